"""How long a call may take, and what fits into the time that is left."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar, cast, get_args

from kalm_rag.utils.checks import check_choice, check_finite
from kalm_rag.utils.costs import Work

OnUnknown = Literal["wait", "skip"]

T = TypeVar("T")

_SHARE = 0.5
"""Share of the time left that a step may take, so that a step that takes twice as long ends in time too."""


@dataclass(frozen=True, slots=True)
class TimeLimit:
    """What ends a call before all passages are scored.

    Attributes:
        deadline: in seconds of `clock`; None is none.
        encodes: whether passages that are not encoded yet are encoded while time lasts, instead of left out.
        clock: never set back.
    """

    deadline: float | None
    encodes: bool
    clock: Callable[[], float] = time.monotonic

    @property
    def left(self) -> float:
        """Seconds left; infinite without a deadline."""
        return math.inf if self.deadline is None else self.deadline - self.clock()


def limit_of(budget_ms: object, on_unknown: object, began: float) -> TimeLimit | None:
    """Return what two arguments of `rank` ask for; None where both are left out, or unknown passages are waited for.

    Args:
        budget_ms: milliseconds from `began`, or None.
        on_unknown: "wait", "skip" or None, which is "wait".
        began: when the call began, in seconds of `time.monotonic`.

    Raises:
        TypeError, ValueError: one is wrong; the message names it and its value.
    """
    if on_unknown is not None:
        check_on_unknown("on_unknown", on_unknown)
    if budget_ms is None:
        return TimeLimit(None, encodes=False) if on_unknown == "skip" else None
    return TimeLimit(began + check_milliseconds("budget_ms", budget_ms) / 1000, encodes=on_unknown != "skip")


def check_milliseconds(name: str, value: object) -> float:
    """Return a budget as a `float` if it is a finite number above 0, else raise with the name and the value."""
    budget = check_finite(name, value)
    if budget <= 0:
        msg = f"{name} must be above 0 milliseconds, got {value!r:.80}; leave it out to wait for all passages"
        raise ValueError(msg)
    return budget


def check_on_unknown(name: str, value: object) -> OnUnknown:
    """Return what becomes of passages that are not encoded, if it is a known way, else raise likewise."""
    check_choice(name, value, get_args(OnUnknown))
    return cast("OnUnknown", value)


def budget_left(budget_ms: object, began: float) -> object:
    """Return the milliseconds that are left of a budget, at least a little; what is no budget is returned as it is."""
    if budget_ms is None:
        return None
    try:
        return max(0.001, check_finite("budget_ms", budget_ms) - 1000 * (time.monotonic() - began))
    except (TypeError, ValueError):
        return budget_ms


def next_step(
    items: Sequence[T],
    sizes: Callable[[T], Mapping[Work, float]],
    predict: Callable[[Mapping[Work, float]], float],
    left: float,
    most: int,
) -> list[int]:
    """Choose what to do next: as much as takes half of the time left, else one item that takes less than all of it.

    Args:
        items: what is left to do, in the order in which it should be done.
        sizes: tokens that an item takes, by kind of work.
        predict: seconds of a step of these sizes.
        left: seconds left.
        most: items of a step at most.

    Returns:
        Places of items; none if no item fits.
    """
    chosen: list[int] = []
    total: dict[Work, float] = {}
    alone: int | None = None
    for place, item in enumerate(items):
        own = sizes(item)
        both = {work: total.get(work, 0.0) + own.get(work, 0.0) for work in {**total, **own}}
        seconds = predict(both)
        if seconds <= _SHARE * left:
            chosen.append(place)
            total = both
        elif alone is None and predict(own) <= left:
            alone = place
        if len(chosen) == most:
            break
    return chosen or ([] if alone is None else [alone])
