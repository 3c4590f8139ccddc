"""Rerankers shared by arguments, and calls from asynchronous programs."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import threading
from pathlib import Path

import pytest

from kalm_rag import KaLMReranker, PassageCache
from kalm_rag.shared import shared_reranker


def test_equal_arguments_share_and_others_do_not(checkpoint: Path, tmp_path: Path) -> None:
    first = shared_reranker(checkpoint, cache=tmp_path, device="cpu")
    assert shared_reranker(str(checkpoint), cache=tmp_path, device="cpu", revision=None) is first
    assert shared_reranker(checkpoint, cache=tmp_path / "other", device="cpu") is not first
    assert shared_reranker(checkpoint, cache=tmp_path, device="cpu", dtype="bfloat16") is not first
    cache = PassageCache(tmp_path)
    assert shared_reranker(checkpoint, cache=cache) is shared_reranker(checkpoint, cache=cache)
    assert shared_reranker(checkpoint, cache=PassageCache(tmp_path)) is not shared_reranker(checkpoint, cache=cache)


def test_nothing_is_held_that_nobody_uses(checkpoint: Path) -> None:
    from kalm_rag import shared

    gc.collect()
    before = len(shared._instances)
    shared_reranker(checkpoint, cache=None)
    gc.collect()
    assert len(shared._instances) == before


def test_fifty_concurrent_calls_give_the_scores_of_one(
    checkpoint: Path, passages: list[str], queries: list[str]
) -> None:
    reranker = KaLMReranker(checkpoint, cache=None)
    expected = {query: reranker.rank(query, passages[:5]) for query in queries[:10]}

    async def main() -> None:
        asked = [queries[number % 10] for number in range(50)]
        answers = await asyncio.gather(*(reranker.arank(query, passages[:5]) for query in asked))
        for query, answer in zip(asked, answers, strict=True):
            assert answer == expected[query]
        assert await reranker.apredict([(queries[0], passages[0])]) == pytest.approx(
            [hit.score for hit in expected[queries[0]] if hit.index == 0], abs=1e-6
        )
        assert (await reranker.aencode(passages[:5])).known == 5

    for _ in range(2):  # two event loops, one instance
        asyncio.run(main())


def test_the_loop_stays_free_and_a_cancelled_call_does_not_run(checkpoint: Path) -> None:
    reranker = KaLMReranker(checkpoint, cache=None)
    gate = threading.Event()
    ran: list[str] = []

    def slow(query: str, *_: object) -> list[object]:
        ran.append(query)
        gate.wait(30)
        return []

    reranker.rank = slow  # type: ignore[assignment,method-assign]

    async def main() -> None:
        first = asyncio.create_task(reranker.arank("first", []))
        while not ran:
            await asyncio.sleep(0.01)
        second = asyncio.create_task(reranker.arank("second", []))
        await asyncio.sleep(0.05)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        gate.set()
        assert await first == []
        assert await reranker.arank("third", []) == []

    asyncio.run(main())
    assert ran == ["first", "third"]


def test_context_variables_travel(checkpoint: Path) -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("trace", default="none")
    reranker = KaLMReranker(checkpoint, cache=None)
    reranker.rank = lambda *_: [variable.get()]  # type: ignore[assignment,method-assign]

    async def main() -> None:
        variable.set("here")
        assert await reranker.arank("query", []) == ["here"]

    asyncio.run(main())
