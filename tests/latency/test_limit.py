"""What a budget lets a call do, on a simulated clock with simulated costs; and what costs are learned to be."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from typing import Any

import pytest

from kalm_rag.latency.limit import TimeLimit, budget_left, limit_of, next_step
from kalm_rag.utils.costs import SAFETY, Costs, Work


class Clock:
    """Time that passes only when something is done."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def play(tokens: list[int], budget: float, *, slower: float = 1.0, fixed: float = 0.01) -> tuple[list[int], float]:
    """Encode passages of so many tokens within a budget, at 1 ms a token and what a step costs besides.

    Args:
        tokens: of each passage.
        budget: in seconds.
        slower: times what is predicted.
        fixed: seconds of a step besides.

    Returns:
        The passages in the order in which they were done, and the seconds it took.
    """
    clock = Clock()
    limit = TimeLimit(budget, encodes=True, clock=clock)

    def predict(sizes: Mapping[Work, float]) -> float:
        return fixed + 0.001 * sizes["encode"]

    left, done = list(range(len(tokens))), []
    while places := next_step(left, lambda number: {"encode": tokens[number]}, predict, limit.left, 32):
        chosen = [left[place] for place in places]
        clock.now += slower * predict({"encode": sum(tokens[number] for number in chosen)})
        done += chosen
        left = [number for number in left if number not in chosen]
    return done, clock.now


def test_as_many_as_fit_are_done_in_the_order_given() -> None:
    done, seconds = play([100] * 20, 1.0)
    assert done == list(range(len(done)))
    assert 0.7 <= seconds <= 1.0
    assert play([100] * 20, 10.0)[0] == list(range(20))


def test_a_passage_that_takes_longer_than_what_is_left_is_not_started_but_a_shorter_one_is() -> None:
    assert play([5000, 100, 5000, 50], 0.4)[0] == [1, 3]
    assert play([5000], 1.0)[0] == []
    assert play([100], 0.0)[0] == []


def test_one_passage_may_take_all_of_what_is_left() -> None:
    done, seconds = play([900], 1.0)
    assert (done, seconds) == ([0], pytest.approx(0.91))


@pytest.mark.parametrize("slower", [0.5, 1.0, 1.9])
def test_a_budget_holds_where_steps_take_up_to_twice_as_long_as_predicted(slower: float) -> None:
    """Beyond it goes at most one passage, that which was started alone."""
    draw = random.Random(0)
    for _ in range(300):
        tokens = [draw.randrange(1, 600) for _ in range(draw.randrange(1, 40))]
        budget = draw.uniform(0.0, 3.0)
        done, seconds = play(tokens, budget, slower=slower)
        longest = max((0.01 + 0.001 * tokens[number] for number in done), default=0.0)
        assert seconds <= budget + max(0.0, slower - 1.0) * longest + 1e-9
        assert len(set(done)) == len(done)


def test_a_step_has_a_bound() -> None:
    assert next_step(range(100), lambda _: {"score": 1.0}, lambda _: 0.0, math.inf, 32) == list(range(32))


def test_costs_are_a_line_through_what_was_seen() -> None:
    costs = Costs()
    assert costs.predict({"encode": 1}) == math.inf
    assert not costs.knows("encode")
    for size in (10, 100, 200):
        costs.learn("encode", size, 0.05 + 0.002 * size)
    assert costs.knows("encode")
    assert costs.predict({"encode": 1000}) == pytest.approx(SAFETY * (0.05 + 2.0))
    assert costs.predict({"encode": 1000, "score": 0}) == pytest.approx(SAFETY * 2.05)
    assert costs.predict({"encode": 1000, "score": 1}) == math.inf


def test_equal_sizes_and_noise_are_counted_by_token() -> None:
    costs = Costs()
    costs.learn("score", 100, 0.1)
    costs.learn("score", 100, 0.3)
    assert costs.predict({"score": 200}) == pytest.approx(SAFETY * 0.4)
    costs.learn("score", 1000, 0.0)  # larger and faster: the line would fall
    assert costs.predict({"score": 10}) > 0


def test_what_was_long_ago_is_forgotten_and_nonsense_is_not_learned() -> None:
    costs = Costs()
    costs.learn("score", 0, 5.0)
    costs.learn("score", 10, math.nan)
    assert not costs.knows("score")
    for _ in range(10):
        costs.learn("score", 10, 100.0)
    for _ in range(64):
        costs.learn("score", 10, 0.1)
    assert costs.predict({"score": 10}) == pytest.approx(SAFETY * 0.1)


@pytest.mark.parametrize(
    ("budget", "unknown", "message"),
    [
        (0, None, "budget_ms must be above 0 milliseconds, got 0; leave it out"),
        (-5, None, "budget_ms must be above 0 milliseconds, got -5"),
        (math.nan, None, "budget_ms must be a finite number, got nan"),
        (math.inf, None, "budget_ms must be a finite number, got inf"),
        ("150", None, "budget_ms must be a number, got '150'"),
        (True, None, "budget_ms must be a number, got True"),
        (None, "drop", "on_unknown must be one of"),
        (100, 1, "on_unknown must be"),
    ],
)
def test_wrong_limits_are_refused(budget: Any, unknown: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        limit_of(budget, unknown, 0.0)


def test_what_two_arguments_ask_for() -> None:
    assert limit_of(None, None, 5.0) is None
    assert limit_of(None, "wait", 5.0) is None
    both = limit_of(150, "skip", 5.0)
    assert both is not None
    assert (both.deadline, both.encodes) == (pytest.approx(5.15), False)
    skip = limit_of(None, "skip", 5.0)
    assert skip is not None
    assert (skip.left, skip.encodes) == (math.inf, False)
    assert budget_left("wrong", 0.0) == "wrong"
    assert budget_left(None, 0.0) is None
    assert budget_left(1.0, 0.0) == 0.001, "a call that waited too long is over, and is no wrong budget"
