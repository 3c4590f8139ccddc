"""What `kalm-rag eval --calibrate` prints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from kalm_rag.cli.output import console
from kalm_rag.utils.display import visible, visible_line

if TYPE_CHECKING:
    from kalm_rag.evaluation.threshold_report import Calibrated


def show_thresholds(found: Calibrated, file: Path) -> None:
    """Print the chosen threshold on both halves, and where its profile is."""
    from rich.table import Table
    from rich.text import Text

    from kalm_rag.evaluation.threshold_report import halves_table, threshold_text

    if found.profile is None:
        return
    out = console()
    out.print(Text(f"Threshold for {found.aim}: {threshold_text(found.profile.margin)}"))
    heading, rows = halves_table(found.profile)
    table = Table(box=None, pad_edge=False)
    for place, name in enumerate(heading):
        table.add_column(Text(name), justify="right" if place else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    out.print(table)
    raw, fitted = found.study.raw.error, found.study.calibrated.error
    out.print(Text(f"Mean distance from the share relevant: {raw:.3f} of P(yes), {fitted:.3f} of calibrated scores"))
    for note in found.profile.notes:
        out.print(Text(f"note: {visible(note)}"))
    typer.echo(f"Profile: {visible_line(str(file))}")
