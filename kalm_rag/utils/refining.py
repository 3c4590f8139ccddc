"""Two passes over a list: an approximate margin of each candidate, and an exact one of those that can still count.

How far an approximate margin can be off is learned from the candidates that got both. This module knows numbers only.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple

from kalm_rag.utils import forks
from kalm_rag.utils.margins import probability

LEAST_PAIRS = 64
"""Pairs that got both passes before a bound is trusted."""
WINDOW = 512
"""The last pairs that a bound is learned from."""
SAFETY = 1.25
"""Times the largest error of the window; `benchmarks/refine.py` counts how often that is not enough."""
SAMPLE = 1 / 16
"""Share of the candidates that the bound rules out and that get the exact pass all the same, to check it."""
_LEAST_SHARE = 3
"""With fewer candidates than this many times `top_k`, most would get both passes."""
_MOST_BOUNDS = 256


class Wanted(NamedTuple):
    """What a call returns of its candidates.

    Attributes:
        top_k: the best so many; None is all.
        threshold: lowest `P(yes)`; None is any.
        known: exact margins of further candidates of the call.
        margin: lowest margin; None is any.
    """

    top_k: int | None = None
    threshold: float | None = None
    known: tuple[float, ...] = ()
    margin: float | None = None

    def beside(self, known: Iterable[float]) -> Wanted:
        """Return the same beside candidates whose exact margins are known."""
        return self._replace(known=(*self.known, *known))

    def of_windows(self, counts: Sequence[int]) -> Wanted:
        """Return what is wanted of windows, of which each candidate has so many, and counts as its best one.

        The best window of the last candidate that is returned has at most all windows of the better ones before it.
        """
        if self.top_k is None:
            return self
        return self._replace(top_k=1 + sum(sorted(counts, reverse=True)[: self.top_k - 1]))

    def saves(self, count: int) -> bool:
        """Whether a first pass over so many candidates is likely to save time."""
        if self.top_k is None:
            return self.margin is not None or (self.threshold is not None and self.threshold > 0)
        return count > _LEAST_SHARE * self.top_k

    def admits(self, margin: float) -> bool:
        """Whether a margin reaches the threshold, as `P(yes)` or as a margin."""
        if self.margin is not None and margin < self.margin:
            return False
        return self.threshold is None or probability(margin) >= self.threshold


class ErrorBound:
    """A bound on how far approximate margins of one kind are off.

    Calls may come from any thread. What they get depends only on their order.
    """

    def __init__(self) -> None:
        self._lock = forks.Lock()  # of the two below
        self._errors: deque[float] = deque(maxlen=WINDOW)
        self._random = random.Random(0)  # noqa: S311 - nothing secret

    @property
    def missing(self) -> int:
        """How many more pairs it takes before the bound is known."""
        return max(0, LEAST_PAIRS - len(self._errors))

    @property
    def value(self) -> float:
        """The bound; infinity as long as too few pairs are known."""
        with self._lock:
            return SAFETY * max(self._errors) if len(self._errors) >= LEAST_PAIRS else math.inf

    def learn(self, errors: Iterable[float]) -> None:
        """Add the errors of pairs that got both passes; those that are not finite tell nothing."""
        with self._lock:
            self._errors.extend(error for error in errors if math.isfinite(error))

    def draw(self, places: Sequence[int], count: int) -> list[int]:
        """Return so many of the places, or all of them, at random."""
        with self._lock:
            return self._random.sample(places, min(count, len(places)))

    def sample(self, places: Sequence[int]) -> list[int]:
        """Return a random share of the places, `SAMPLE` on average."""
        with self._lock:
            return [place for place in places if self._random.random() < SAMPLE]


class ErrorBounds:
    """The bounds of a model, by what its approximate margins depend on."""

    def __init__(self) -> None:
        self._lock = forks.Lock()
        self._bounds: dict[Hashable, ErrorBound] = {}

    def get(self, kind: Hashable) -> ErrorBound:
        """Return the bound for a kind of margins."""
        made = ErrorBound()
        with self._lock:
            if len(self._bounds) >= _MOST_BOUNDS and kind not in self._bounds:
                self._bounds.clear()
            return self._bounds.setdefault(kind, made)

    def largest(self) -> float | None:
        """Return the largest bound that is known, or None."""
        with self._lock:
            bounds = list(self._bounds.values())
        return max((bound.value for bound in bounds if not bound.missing), default=None)


class Refined(NamedTuple):
    """What two passes found.

    Attributes:
        exact: exact margins, by the candidate's place.
        sampled: candidates that the bound ruled out and that got the exact pass to check it.
        failures: of these, those whose margin was further off than the bound.
    """

    exact: dict[int, float]
    sampled: int
    failures: int


def best(near: Mapping[int, float], exact: Iterable[float], top_k: int) -> list[int]:
    """Return the places of the approximate margins among the `top_k` best margins of all, NaN first.

    Args:
        near: approximate margins by place.
        exact: exact margins of further candidates.
        top_k: how many.
    """
    ranked = [(math.inf if math.isnan(margin) else margin, place) for place, margin in near.items()]
    ranked += [(margin, -1) for margin in exact if math.isfinite(margin)]
    ranked.sort(key=lambda item: -item[0])
    return [place for _, place in ranked[:top_k] if place >= 0]


def undecided(near: Mapping[int, float], exact: Iterable[float], wanted: Wanted, bound: float) -> list[int]:
    """Return the places whose exact margin could change what is returned.

    Args:
        near: approximate margins by place. One that is NaN is undecided.
        exact: exact margins of all other candidates. One that is not finite counts for nothing.
        wanted: what is returned.
        bound: how far an approximate margin can be off.
    """
    if wanted.top_k is None:
        return [
            place
            for place, margin in near.items()
            if math.isnan(margin) or wanted.admits(margin + bound) != wanted.admits(margin - bound)
        ]
    ranked = sorted((margin for margin in exact if math.isfinite(margin)), reverse=True)
    last = ranked[wanted.top_k - 1] if len(ranked) >= wanted.top_k else -math.inf
    return [
        place
        for place, margin in near.items()
        if math.isnan(margin) or (margin + bound >= last and wanted.admits(margin + bound))
    ]


def refine(
    near: Sequence[float],
    known: Sequence[float],
    wanted: Wanted,
    bound: ErrorBound,
    exactly: Callable[[list[int]], Sequence[float]],
) -> Refined:
    """Compute the exact margins that decide what is returned.

    The best by their approximate margins come first: their exact ones rule out most of the others. Then follow all that
    the bound does not rule out, until none is left: a bound that failed is wider in the next round.

    Args:
        near: approximate margins.
        known: exact margins of further candidates.
        wanted: what is returned.
        bound: what is known about errors; it learns.
        exactly: returns the exact margins of places in `near`.
    """
    left = dict(enumerate(near))
    exact: dict[int, float] = {}

    def run(places: list[int]) -> list[float]:
        """Run the exact pass on places; returns their errors."""
        found = exactly(places) if places else ()
        exact.update(zip(places, found, strict=True))
        errors = [abs(exact[place] - left.pop(place)) for place in places]
        bound.learn(errors)
        return errors

    start = [] if wanted.top_k is None else best(left, known, wanted.top_k)
    chosen = set(start)
    rest = [place for place in left if place not in chosen]
    run(start + bound.draw(rest, max(0, bound.missing - len(start))))
    limit = bound.value
    todo = undecided(left, [*known, *exact.values()], wanted, limit)
    chosen = set(todo)
    sampled = bound.sample([place for place in left if place not in chosen])
    errors = run(todo + sampled)[len(todo) :]
    while todo := undecided(left, [*known, *exact.values()], wanted, bound.value):
        run(todo)
    return Refined(exact, len(sampled), sum(error > limit for error in errors))
