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
    assert shared_reranker(str(checkpoint), cache=tmp_path, device="cpu") is first
    assert shared_reranker(checkpoint, cache=tmp_path / "other", device="cpu") is not first
    assert shared_reranker(checkpoint, cache=tmp_path, device="cpu", dtype="bfloat16") is not first
    cache = PassageCache(tmp_path)
    assert shared_reranker(checkpoint, cache=cache) is shared_reranker(checkpoint, cache=cache)
    assert shared_reranker(checkpoint, cache=PassageCache(tmp_path)) is not shared_reranker(checkpoint, cache=cache)


def test_places_of_the_cache_are_compared_as_places(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PLACE", str(tmp_path))
    first = shared_reranker(checkpoint, cache="passages")
    assert shared_reranker(checkpoint, cache=Path("passages")) is first
    assert shared_reranker(checkpoint, cache=str(tmp_path / "passages")) is first
    assert shared_reranker(checkpoint, cache="$PLACE/passages") is first
    default = shared_reranker(checkpoint)
    monkeypatch.setenv("KALM_RAG_CACHE", str(tmp_path / "other"))
    assert shared_reranker(checkpoint) is not default
    assert shared_reranker(checkpoint, ratio=None).settings.ratio == 1
    assert shared_reranker(checkpoint).settings.ratio == 4


def test_the_loop_stays_free_while_the_model_loads(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reranker = KaLMReranker(checkpoint, cache=None)
    gate = threading.Event()
    find = reranker.find

    def slow() -> object:
        gate.wait(30)
        return find()

    monkeypatch.setattr(reranker, "find", slow)

    async def main() -> None:
        calls = [asyncio.create_task(reranker.arank("query", ["passage"])) for _ in range(3)]
        for _ in range(20):
            await asyncio.sleep(0.01)
        assert not any(call.done() for call in calls)
        gate.set()
        assert [len(found) for found in await asyncio.gather(*calls)] == [1, 1, 1]

    asyncio.run(asyncio.wait_for(main(), 60))


def test_queries_come_in_between_while_a_corpus_is_encoded(checkpoint: Path, passages: list[str]) -> None:
    reranker = KaLMReranker(checkpoint, cache=None, batch_size=1)
    texts = [f"{number} {text}" for number, text in enumerate(passages * 2)]

    async def main() -> tuple[bool, int]:
        encoding = asyncio.create_task(reranker.aencode(texts))
        await asyncio.sleep(0.3)
        await reranker.arank("query", ["passage"])
        return encoding.done(), (await encoding).new

    done, new = asyncio.run(main())
    assert not done
    assert new == len(texts)


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
