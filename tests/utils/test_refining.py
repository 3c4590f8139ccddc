"""Which candidates get the exact pass, with made-up margins and errors."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest

from kalm_rag.utils.refining import (
    LEAST_PAIRS,
    SAFETY,
    ErrorBound,
    ErrorBounds,
    Refined,
    Wanted,
    best,
    refine,
    undecided,
)

INF, NAN = math.inf, math.nan


def learned(error: float = 0.5) -> ErrorBound:
    bound = ErrorBound()
    bound.learn([error] * LEAST_PAIRS)
    return bound


class List:
    """A list of candidates, and what was computed of it."""

    def __init__(self, seed: int, count: int, error: float, *, known: int = 0) -> None:
        numbers = random.Random(seed)
        self.exact = [numbers.gauss(0, 2) for _ in range(count)]
        self.near = [margin + numbers.choice((-1, 1)) * error for margin in self.exact]
        self.known = [numbers.gauss(0, 2) for _ in range(known)]
        self.calls: list[list[int]] = []

    def run(self, wanted: Wanted, bound: ErrorBound) -> Refined:
        def exactly(places: list[int]) -> Sequence[float]:
            self.calls.append(places)
            return [self.exact[place] for place in places]

        return refine(self.near, self.known, wanted, bound, exactly)

    def check_best(self, found: Refined, top_k: int) -> None:
        """The best of approximate and exact margins are those of exact ones, and each is exact."""
        mixed = [found.exact.get(place, margin) for place, margin in enumerate(self.near)] + self.known
        order = sorted(range(len(mixed)), key=lambda place: -mixed[place])[:top_k]
        truth = self.exact + self.known
        assert order == sorted(range(len(truth)), key=lambda place: -truth[place])[:top_k]
        assert all(place in found.exact for place in order if place < len(self.near))


@pytest.mark.parametrize("top_k", [1, 5, 10])
@pytest.mark.parametrize("known", [0, 20])
def test_errors_within_the_bound_never_change_the_best(top_k: int, known: int) -> None:
    bound, skipped = ErrorBound(), 0
    for seed in range(60):
        candidates = List(seed, 50, 0.4, known=known)
        found = candidates.run(Wanted(top_k), bound)
        candidates.check_best(found, top_k)
        assert found.failures == 0
        assert sorted(place for call in candidates.calls for place in call) == sorted(found.exact), "each once"
        skipped += 50 - len(found.exact)
    assert skipped > 60 * 15
    assert bound.value == pytest.approx(0.4 * SAFETY)


def test_few_pairs_get_both_passes_until_the_bound_is_known() -> None:
    bound = ErrorBound()
    assert bound.value == INF
    assert len(List(0, LEAST_PAIRS - 1, 0.1).run(Wanted(5), bound).exact) == LEAST_PAIRS - 1
    assert bound.missing == 1
    assert len(List(1, 50, 0.1).run(Wanted(5), bound).exact) < 30


def test_one_long_list_is_enough_to_learn_from() -> None:
    candidates = List(0, 1000, 0.4)
    found = candidates.run(Wanted(10), ErrorBound())
    candidates.check_best(found, 10)
    assert LEAST_PAIRS <= len(found.exact) < 250


def test_a_threshold_alone_leaves_what_is_far_from_it() -> None:
    bound = learned(0.4)
    candidates = List(3, 200, 0.4)
    found = candidates.run(Wanted(threshold=0.5), bound)
    for place, (near, exact) in enumerate(zip(candidates.near, candidates.exact, strict=True)):
        if place not in found.exact:
            assert (near >= 0) == (exact >= 0)
            assert abs(near) >= 0.4
    assert 0 < len(found.exact) < 100


@pytest.mark.parametrize(
    ("wanted", "bound", "expected"),
    [
        (Wanted(2), 0.5, [0, 1]),  # 1.8 and 1.5 could exceed the second best exact one, 2.0
        (Wanted(2), 0.1, []),
        (Wanted(1), 0.5, []),
        (Wanted(4), 0.0, [0, 1, 2, 3]),  # fewer than four exact ones
        (Wanted(2), INF, [0, 1, 2, 3]),
        (Wanted(2, threshold=0.9), 0.5, [0]),  # a margin of 2.0 is below 0.9, one of 2.3 is not
        (Wanted(threshold=0.5), 0.5, [2]),
        (Wanted(threshold=0.5), INF, [0, 1, 2, 3]),
        (Wanted(threshold=0.0), INF, []),
    ],
)
def test_undecided(wanted: Wanted, bound: float, expected: list[int]) -> None:
    assert undecided({0: 1.8, 1: 1.5, 2: 0.2, 3: -3.0}, [3.0, 2.0, NAN], wanted, bound) == expected


def test_a_threshold_of_1_admits_what_rounds_to_it() -> None:
    assert Wanted(threshold=1.0).admits(50.0)
    assert undecided({0: 50.0, 1: 36.0, 2: 0.0}, [], Wanted(threshold=1.0), 3.0) == [1]


@pytest.mark.parametrize("wanted", [Wanted(1), Wanted(threshold=0.5)])
def test_what_is_not_a_number_gets_the_exact_pass(wanted: Wanted) -> None:
    found = refine([NAN, -9.0, -9.0], [9.0], wanted, learned(), lambda places: [1.0 for _ in places])
    assert 0 in found.exact
    assert best({0: NAN, 1: 2.0}, [3.0], 2) == [0]


def test_exact_margins_that_are_not_finite_hide_nothing() -> None:
    found = refine([5.0, 4.0, 3.0], [], Wanted(1), learned(), lambda places: [NAN if p == 0 else 4.0 for p in places])
    assert set(found.exact) == {0, 1, 2}
    bound = learned()
    bound.learn([NAN, INF])
    assert bound.value == 0.5 * SAFETY


def test_a_failure_is_counted_and_widens_the_bound() -> None:
    bound, failures, sampled = learned(0.01), 0, 0
    for seed in range(20):
        candidates = List(seed, 60, 0.01)
        candidates.near[5:] = [-50.0] * 55  # far off, and ruled out
        found = candidates.run(Wanted(3), bound)
        failures, sampled = failures + found.failures, sampled + found.sampled
        if failures:
            break
    assert 0 < failures <= sampled
    candidates.check_best(found, 3)  # the wider bound rules out nothing
    assert bound.value > 40


def test_the_same_calls_give_the_same_result() -> None:
    results = []
    for _ in range(2):
        bound = ErrorBound()
        results.append([List(seed, 80, 0.3).run(Wanted(5), bound) for seed in range(5)])
    assert results[0] == results[1]
    assert any(found.sampled for found in results[0])


@pytest.mark.parametrize(
    ("wanted", "count", "saves"),
    [
        (Wanted(), 1000, False),
        (Wanted(5), 15, False),
        (Wanted(5), 16, True),
        (Wanted(1000), 1000, False),
        (Wanted(threshold=0.5), 10, True),
        (Wanted(threshold=0.0), 10, False),
    ],
)
def test_when_a_first_pass_is_taken(wanted: Wanted, count: int, saves: bool) -> None:
    assert wanted.saves(count) is saves


def test_bounds_are_kept_by_kind() -> None:
    bounds = ErrorBounds()
    assert bounds.largest() is None
    bounds.get("one").learn([0.5] * LEAST_PAIRS)
    bounds.get("other").learn([9.0])
    assert bounds.get("one") is bounds.get("one")
    assert bounds.largest() == 0.5 * SAFETY
    for number in range(1000):
        bounds.get(number)
    assert bounds.largest() is None  # many kinds push out all, and each learns again
