"""Requests that share a call get what calls of their own give, and none suffers from another."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from kalm_rag import KaLMReranker
from kalm_rag.results import Ranking
from kalm_rag.serving.joining import LANES, Joiner
from kalm_rag.utils.turns import StoppedError, stop_with


def request(number: int, passages: list[str]) -> tuple[str, list[str]]:
    return f"Is this the question of number {number}?", passages[number : number + 1 + number % 4]


def settled(joiner: Joiner) -> bool:
    return joiner._running == 0 and not joiner._waiting


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_rank_each_is_rank_of_each(reranker: KaLMReranker, passages: list[str]) -> None:
    requests = [request(number, passages) for number in range(6)] + [("", passages[:1]), ("nothing", [])]
    for found, (query, texts) in zip(reranker.rank_each(requests), requests, strict=True):
        expected = reranker.rank(query, texts)
        assert [hit.index for hit in found] == [hit.index for hit in expected]
        assert [hit.margin for hit in found] == pytest.approx([hit.margin for hit in expected], abs=1e-5)
    assert reranker.rank_each([]) == []
    with pytest.raises(TypeError, match="query must be a string"):
        reranker.rank_each([(5, ["a"])])  # type: ignore[list-item]


def test_many_at_once_get_their_own_rankings(reranker: KaLMReranker, passages: list[str]) -> None:
    joiner = Joiner(32, 16384)
    requests = [request(number, passages) for number in range(40)]

    def rank(one: tuple[str, list[str]]) -> Ranking[str]:
        return joiner.rank(reranker, *one, 100, None, None)

    with reranker.scorer.turns, ThreadPoolExecutor(16) as pool:
        found = pool.map(rank, requests)
        wait_until(lambda: len(joiner._waiting) == 16 - LANES)
        reranker.scorer.turns.__exit__(None, None, None)
        rankings = list(found)
        reranker.scorer.turns.__enter__()
    assert joiner.joined > 0
    assert settled(joiner)
    for ranking, (query, texts) in zip(rankings, requests, strict=True):
        expected = reranker.rank(query, texts)
        assert [hit.index for hit in ranking] == [hit.index for hit in expected]
        assert [hit.margin for hit in ranking] == pytest.approx([hit.margin for hit in expected], abs=1e-5)


class Scripted:
    """A reranker whose calls wait to be let go, and fail for some queries."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.calls: list[list[str]] = []

    def rank_each(self, requests: Any, instruction: object, ratio: object) -> Any:
        self.calls.append([query for query, _ in requests])
        assert self.go.wait(60)
        if any(query == "bad" for query, _ in requests):
            raise ValueError("bad")
        return [f"shared {query}" for query, _ in requests]

    def rank(self, query: str, *_: object) -> Any:
        if query == "bad":
            raise ValueError("bad")
        return f"own {query}"


def start(joiner: Joiner, reranker: Any, *queries: str, ratio: int | None = None, rows: int = 1) -> list[Any]:
    pool = ThreadPoolExecutor(len(queries))
    futures = []
    for query in queries:
        before = len(joiner._waiting)
        futures.append(pool.submit(joiner.rank, reranker, query, ["text"] * rows, rows, None, ratio))
        wait_until(lambda: len(joiner._waiting) > before or joiner._running)  # noqa: B023
    pool.shutdown(wait=False)
    return futures


def test_one_that_fails_does_not_fail_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kalm_rag.serving.joining.LANES", 1)
    joiner, scripted = Joiner(8, 100), Scripted()
    first = start(joiner, scripted, "first")
    rest = start(joiner, scripted, "a", "bad", "b")
    wait_until(lambda: len(joiner._waiting) == 3)
    scripted.go.set()
    assert first[0].result(60) == "shared first"
    assert rest[0].result(60) == "own a"
    assert rest[2].result(60) == "own b"
    with pytest.raises(ValueError, match="bad"):
        rest[1].result(60)
    assert scripted.calls == [["first"], ["a", "bad", "b"]]
    wait_until(lambda: settled(joiner))


def test_a_call_is_bounded_and_of_one_kind() -> None:
    joiner, scripted = Joiner(4, 100), Scripted()
    first = start(joiner, scripted, *(f"first {number}" for number in range(LANES)))
    wait_until(lambda: joiner._running == LANES)
    rest = start(joiner, scripted, "a", "b", "c", rows=2)
    rest += start(joiner, scripted, "d", ratio=2)
    wait_until(lambda: len(joiner._waiting) == 4)
    scripted.go.set()
    assert [future.result(60) for future in first + rest]
    assert all(len(call) <= 2 for call in scripted.calls)
    assert ["d"] in scripted.calls
    assert not joiner.fits(3, 1)
    assert not joiner.fits(1, 51)
    assert not joiner.fits(0, 0)
    wait_until(lambda: settled(joiner))


def test_one_that_is_cancelled_leaves_the_queue() -> None:
    joiner, scripted = Joiner(8, 100), Scripted()
    first = start(joiner, scripted, *(f"first {number}" for number in range(LANES)))
    wait_until(lambda: joiner._running == LANES)
    stop = threading.Event()

    def cancelled() -> Any:
        stop_with(stop)
        return joiner.rank(scripted, "gone", ["text"], 1, None, None)  # type: ignore[arg-type]

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(cancelled)
        wait_until(lambda: len(joiner._waiting) == 1)
        stop.set()
        with pytest.raises(StoppedError):
            future.result(60)
    assert not joiner._waiting
    scripted.go.set()
    assert [future.result(60) for future in first]
    wait_until(lambda: settled(joiner))
    assert not any("gone" in call for call in scripted.calls)
