"""Options that several commands share, and how they show things."""

from __future__ import annotations

import io
import json
import sys
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
FormatOption = Annotated[
    str,
    typer.Option(
        "--format",
        help="How passages are written: jsonl, json, csv, tsv, parquet or text. auto goes by the file's name.",
    ),
]
TextFieldOption = Annotated[
    str | None,
    typer.Option(
        "--text-field", help="Field that holds the text. [default: text, contents, content or passage]", metavar="NAME"
    ),
]
IdFieldOption = Annotated[
    str | None,
    typer.Option("--id-field", help="Field that holds the id. [default: _id, id, docid or doc_id]", metavar="NAME"),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]


_BIDI = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
_HIDDEN = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\t\n"}
_HIDDEN |= {ord(letter): f"\\u{ord(letter):04x}" for letter in f"{_BIDI}\u2028\u2029\ufeff"}
_JSON = {code: f"\\u{code:04x}" for code in _HIDDEN if code >= 0x7F}


def visible(text: str) -> str:
    """Text that came from a user or a file, for a terminal: what would steer it or reorder the line is written out."""
    return text.translate(_HIDDEN)


def print_json(value: Any) -> None:
    """One JSON document on standard output, valid whatever the stream can hold, and harmless to a terminal."""
    # A stream of another encoding would hold JSON that no reader takes, or could not hold it at all.
    is_utf8 = (sys.stdout.encoding or "").lower().replace("_", "-") in ("utf-8", "utf8")
    typer.echo(json.dumps(value, ensure_ascii=not is_utf8, indent=2).translate(_JSON))


def replace_what_a_stream_cannot_hold() -> None:
    """Let standard output and error replace characters that their encoding lacks, instead of ending the program."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


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
        rows: the cells, shown without markup, and with control characters made visible.
    """
    from rich.table import Table
    from rich.text import Text

    rows = [[visible(cell) for cell in row] for row in rows]
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
