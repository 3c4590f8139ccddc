"""Options that several commands share, and how they show things."""

from __future__ import annotations

import io
import json
import logging
import math
import re
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kalm_rag.utils.display import HIDDEN, visible, visible_line

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
LimitOption = Annotated[
    float | None, typer.Option("--limit-gb", help="Most the cache may take on disk. [default: as it was, or 10]")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]


_JSON = {code: f"\\u{code:04x}" for code in HIDDEN if code >= 0x7F}


def with_flags(message: str, flags: Mapping[str, str]) -> str:
    """Rewrite a library message so that it names command-line options instead of arguments.

    Args:
        message: it names an argument at its beginning (`top_k must be`), or with a value (`dtype='bfloat16'`).
        flags: the options by the name of the argument.
    """
    message = re.sub(r"^(\w+)(?= must )", lambda match: flags.get(match[1], match[1]), message)
    return re.sub(
        r"(?<!, )\b(\w+)='([^']*)'",
        lambda match: f"{flags[match[1]]} {match[2]}" if match[1] in flags else match[0],
        message,
    )


def show(text: str, *, wrap: bool = True) -> None:
    """Print a sentence that may contain untrusted text, without interpreting markup or control characters."""
    from rich.text import Text

    console().print(Text(visible(text)), soft_wrap=not wrap)


class _VisibleFormatter(logging.Formatter):
    """Writes out control characters in log lines."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


def make_log_visible() -> None:
    """Write out control characters in log lines that Python's default handler prints."""
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(_VisibleFormatter())


def limit_bytes(limit_gb: float | None) -> int | None:
    """`--limit-gb` in bytes, None if it was not given."""
    if limit_gb is None:
        return None
    if not math.isfinite(limit_gb) or limit_gb * 1e9 < 1:
        msg = f"--limit-gb must be a number above 0, got {limit_gb:g}"
        raise ValueError(msg)
    return int(limit_gb * 1e9)


def print_json(value: Any) -> None:
    """Print one JSON document in ASCII, which every stream and terminal can take."""
    # ASCII is valid JSON in every encoding.
    is_utf8 = (sys.stdout.encoding or "").lower().replace("_", "-") in ("utf-8", "utf8")
    typer.echo(json.dumps(value, ensure_ascii=not is_utf8, indent=2).translate(_JSON))


def replace_what_a_stream_cannot_hold() -> None:
    """Make standard output and error replace characters that their encoding lacks."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def console() -> Console:
    """Return a console on standard output, as wide as the terminal, or 80 columns."""
    from rich.console import Console

    return Console(highlight=False, soft_wrap=False)


def note_mini(model: str) -> None:
    """Tell the user when the demonstration checkpoint runs."""
    from kalm_rag.model.checkpoint import MINI, MINI_NOTE

    if model == MINI:
        typer.echo(f"note: {MINI_NOTE}", err=True)


def passage_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Make a table whose last column is a passage, cut to the rest of the line.

    Args:
        columns: headings; numbers stand right, so a heading that starts with "<" marks a column that stands left.
        rows: the cells, shown without markup, and with control characters made visible.
    """
    from rich.table import Table
    from rich.text import Text

    rows = [[*map(visible_line, row[:-1]), visible(row[-1])] for row in rows]
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
