"""What commands print: text that is safe to show, JSON, and tables."""

from __future__ import annotations

import io
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import typer

from kalm_rag.utils.display import HIDDEN, size_text, visible, visible_line

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from kalm_rag.distributed.shards import Shard
    from kalm_rag.settings import Settings

_JSON = {code: f"\\u{code:04x}" for code in HIDDEN if code >= 0x7F}


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


def passages_text(shard: Shard | None) -> str:
    """Name what is encoded: the passages of a corpus, or of a shard of it."""
    return "passages" if shard is None else f"passages of shard {shard}"


def show_notes(facts: Mapping[str, Any], settings: Settings) -> None:
    """Print what was not read as it is, and what the cache holds, from the result of `kalm-rag encode` as JSON."""
    if facts["truncated"]:
        most, flag = f"{settings.max_length} tokens", "--max-length"
        if settings.splits:
            most, flag = f"{settings.max_windows} windows", "--max-windows"
        show(f"{facts['truncated']} are longer than {most}; their tails were not read ({flag})")
    if facts["repaired"]:
        show(f"{facts['repaired']} hold half a surrogate pair, which was read as U+FFFD")
    if facts["cache_entries"] is not None:
        size = size_text(facts["cache_bytes"] or 0)
        show(f"The cache holds {facts['cache_entries']} passages, {size}.")


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
