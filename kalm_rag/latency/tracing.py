"""What a call took, as attributes for tracing: counts and seconds only, no text."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

if TYPE_CHECKING:
    from kalm_rag.results import PartialRanking, Ranking

P = ParamSpec("P")
R = TypeVar("R")


def trace_attributes(ranking: Ranking[Any] | PartialRanking[Any]) -> dict[str, int | float]:
    """Return the counts and timings of a ranking by flat names.

    The names are `kalm_rag.counts.` and a field of `RankCounts`, and `kalm_rag.timings.` and one of `Timings`, in
    seconds. A ranking that `rank` did not make has neither, and the result is empty.
    """
    found: dict[str, int | float] = {}
    for group, record in (("counts", ranking.counts), ("timings", ranking.timings)):
        if record is not None:
            found |= {f"kalm_rag.{group}.{name}": value for name, value in asdict(record).items()}
    return found


def traced(rank: Callable[P, R]) -> Callable[P, R]:
    """Make a function that returns a ranking run in a span `kalm_rag.rank` of OpenTelemetry, with its attributes.

    A program that traces has imported OpenTelemetry: it is not imported here, and a program without it pays for one
    look-up. A call that fails leaves the name of the exception's class as `error.type`; its message may hold text.
    """

    @functools.wraps(rank)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        get_tracer = getattr(sys.modules.get("opentelemetry.trace"), "get_tracer", None)
        if get_tracer is None:
            return rank(*args, **kwargs)
        unrecorded = {"record_exception": False, "set_status_on_exception": False}
        with get_tracer("kalm_rag").start_as_current_span("kalm_rag.rank", **unrecorded) as span:
            try:
                ranking: Any = rank(*args, **kwargs)
            except BaseException as error:
                span.set_attribute("error.type", type(error).__name__)
                span.set_status(sys.modules["opentelemetry.trace"].StatusCode.ERROR)
                raise
            span.set_attributes(trace_attributes(ranking))
            return ranking  # type: ignore[no-any-return]

    return run
