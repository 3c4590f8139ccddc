"""What every benchmark prints: the machine, a table for people, and percentiles."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kalm_rag.utils.machine import this_machine, utc_now, versions

_WIDTH = 240
"""Columns of a table at most: one that is cut to a narrow terminal hides figures."""


@dataclass(frozen=True)
class Spent:
    """What a call took.

    Attributes:
        wall: seconds on the clock.
        cpu: seconds of processor time of all threads of this process.
    """

    wall: float
    cpu: float


def spent_on(action: Callable[[], object]) -> Spent:
    """Time one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    action()
    return Spent(time.perf_counter() - wall, time.process_time() - cpu)


def counted(device: str) -> str:
    """Which of the two times counts: `cpu` where one thread does all, since other processes change it less."""
    import torch

    return "cpu" if device == "cpu" and torch.get_num_threads() == 1 else "wall"


def environment() -> dict[str, object]:
    """Date, hardware and versions."""
    return {"date": utc_now(), **this_machine().as_json(), **versions()}


def can_run(dtype: str) -> bool:
    """Whether this machine runs a precision: int8 needs an x86 CPU with VNNI instructions."""
    from kalm_rag.model.cpu_kernels import why_no_int8

    return dtype not in ("int8", "int8-all") or not why_no_int8()


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table of text, first column left, the others right."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for number, name in enumerate(header):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    Console(highlight=False, width=_WIDTH).print(table)


def percentiles(samples: Sequence[float]) -> dict[str, float]:
    """The median, maximum, and p90, p95 and p99: the smallest sample that so many are no larger than."""
    ordered = sorted(samples)
    upper = {f"p{share}": ordered[math.ceil(share / 100 * len(ordered)) - 1] for share in (90, 95, 99)}
    return {"p50": statistics.median(ordered), **upper, "max": ordered[-1]}
