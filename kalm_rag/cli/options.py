"""Options that several commands share, and how they show things."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

ModelOption = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="nano, small, large, mini (bundled, for trying out), a folder, or a hub id.",
        metavar="MODEL",
    ),
]
RevisionOption = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit on the hub.")]
DeviceOption = Annotated[str | None, typer.Option("--device", help="cpu, cuda, mps, ... [default: the best]")]
DtypeOption = Annotated[
    str | None,
    typer.Option(
        "--dtype", help="float32, bfloat16, float16, or int8 on a CPU. [default: bfloat16 on CUDA, else float32]"
    ),
]
CacheOption = Annotated[
    str,
    typer.Option(
        "--cache",
        help="Folder of encoded passages. [default: the user's cache folder, or KALM_RAG_CACHE]",
        show_default=False,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]


def print_json(value: Any) -> None:
    """One JSON document on standard output."""
    typer.echo(json.dumps(value, ensure_ascii=False, indent=2))


def console() -> Console:
    """Where tables go: standard output, as wide as the terminal, 80 columns where there is none."""
    from rich.console import Console

    return Console(highlight=False, soft_wrap=False)


def note_mini(model: str) -> None:
    """Say so where the demonstration checkpoint runs."""
    from kalm_rag.checkpoint import MINI, MINI_NOTE

    if model == MINI:
        typer.echo(f"note: {MINI_NOTE}", err=True)


def passage_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table whose last column is a passage, cut to what is left of the line; the others keep their width.

    Args:
        columns: headings; numbers stand right, so a heading that starts with "<" marks a column that stands left.
        rows: the cells, shown as they are, without markup.
    """
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for name in columns:
        left = name.startswith("<")
        table.add_column(name.removeprefix("<"), justify="left" if left else "right", no_wrap=True)
    fixed = [max(len(row[place]) for row in [*rows, columns]) for place in range(len(columns) - 1)]
    room = max(10, console().width - sum(fixed) - 2 * len(fixed))
    for row in rows:
        text = Text(" ".join(row[-1].split()))
        text.truncate(room, overflow="ellipsis")
        table.add_row(*(Text(cell) for cell in row[:-1]), text)
    return table
