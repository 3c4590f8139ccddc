"""The tables that `kalm-rag eval` prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kalm_rag.cli.output import console
from kalm_rag.utils.display import visible, visible_line

if TYPE_CHECKING:
    from kalm_rag.evaluation.summary import Summary


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table whose numbers are never cut: one that is too wide for the terminal runs over its edge."""
    from rich.measure import Measurement
    from rich.table import Table
    from rich.text import Text

    out = console()
    rows = [[visible_line(cell) for cell in row] for row in rows]
    table = Table(box=None, pad_edge=False)
    for number, name in enumerate(heading):
        widest = max(len(row[number]) for row in [heading, *rows])
        table.add_column(
            Text(name),
            justify="right" if number else "left",
            no_wrap=number > 0,
            min_width=widest if number else min(widest, 12),
            overflow="fold",
        )
    for row in rows:
        table.add_row(*map(Text, row))
    needed = Measurement.get(out, out.options.update(width=10_000), table).minimum
    out.width = max(out.width, needed)
    out.print(table)


def show_summary(summary: Summary, title: str, shown: tuple[str, ...]) -> None:
    """Print the tables of an evaluation, what encoding took, and its warnings.

    Args:
        summary: the result.
        title: what the collection is called.
        shown: warnings that the user has seen already.
    """
    from rich.text import Text

    out = console()
    out.print(Text(f"{visible(title)}: {len(summary.rankings)} queries, candidates of {visible(summary.first_name)}"))
    _table(*summary.columns())
    out.print(Text("KB: one encoded passage. ms: one query, its passages encoded before."))
    if summary.entries:
        out.print(Text(f"\n{summary.metrics[0]}, and its change against {visible(summary.first_name)}:"))
        _table(*summary.differences())
        out.print(
            Text(
                "Intervals: bootstrap over queries. p: paired randomisation test.\n"
                f"Holm: p corrected for {len(summary.entries)} comparisons."
            )
        )
    for encoding in summary.encodings:
        precision = f" in {encoding.dtype}" if encoding.dtype else ""
        known = encoding.passages - encoding.new
        out.print(
            Text(
                f"{visible(encoding.name)}{precision}: {encoding.new} passages encoded in {encoding.seconds:.1f} s, "
                f"{known} known already."
            )
        )
    for warning in summary.warnings:
        if warning not in shown:
            out.print(Text(f"note: {visible(warning)}"))
