"""Options that several commands share, and how they show things."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

ModelOption = Annotated[
    str, typer.Option("--model", "-m", help="nano, small, large, a folder, or a hub id.", metavar="MODEL")
]
RevisionOption = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit on the hub.")]
DeviceOption = Annotated[str | None, typer.Option("--device", help="cpu, cuda, mps, ... [default: the best]")]
DtypeOption = Annotated[
    str | None,
    typer.Option("--dtype", help="float32 or bfloat16. [default: bfloat16 on CUDA, else float32]"),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]


def print_json(value: Any) -> None:
    """One JSON document on standard output."""
    typer.echo(json.dumps(value, ensure_ascii=False, indent=2))


def console() -> Console:
    """Where tables go: standard output, as wide as the terminal, 80 columns where there is none."""
    from rich.console import Console

    return Console(highlight=False, soft_wrap=False)


def one_line(text: str) -> str:
    """Text with line breaks and runs of spaces made single spaces, for a table cell."""
    return " ".join(text.split())
