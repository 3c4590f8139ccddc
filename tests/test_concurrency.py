"""Calls of many threads and tasks on one model: who comes next, what is bounded, what stops, what is copied."""

from __future__ import annotations

import asyncio
import copy
import multiprocessing
import pickle
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from cachekit import passage, put

from kalm_rag import KaLMReranker, PassageCache
from kalm_rag import passage_kv as passage_kv_module
from kalm_rag.adapters import shared_reranker
from kalm_rag.cache import MemoryStore
from kalm_rag.cache import passage_cache as passage_cache_module
from kalm_rag.utils.turns import Room, StoppedError, Turns, stop_with

SECONDS = 60
"""How long anything may wait before a test fails instead of hanging."""


def until(condition: Callable[[], bool]) -> None:
    """Wait for what another thread is about to do."""
    pause = threading.Event()
    for _ in range(SECONDS * 1000):
        if condition():
            return
        pause.wait(0.001)
    pytest.fail("it did not happen")


class Gated:
    """A reranker whose encoder stops at each batch until it is let through, and notes whose batch it is."""

    def __init__(self, checkpoint: Path, **options: Any) -> None:
        self.reranker = KaLMReranker(checkpoint, device="cpu", batch_size=1, **{"cache": None, **options})
        self.engine = self.reranker.scorer
        self.batches: list[int | None] = []
        self.passed = threading.Semaphore(0)
        self.open = False
        self.engine.loaded.model.get_encoder().register_forward_pre_hook(self._hook)

    def _hook(self, *_: Any) -> None:
        self.batches.append(self.engine.turns._owner)
        if not self.open:
            assert self.passed.acquire(timeout=SECONDS)

    @property
    def waiting(self) -> int:
        return self.engine.turns.waiting

    def let_all(self) -> None:
        self.open = True
        self.passed.release(1000)


def test_turns_are_taken_in_the_order_of_asking() -> None:
    turns, order = Turns(), []

    def work(number: int) -> None:
        with turns:
            order.append(number)

    with ThreadPoolExecutor(8) as pool:
        with turns:
            for number in range(8):
                pool.submit(work, number)
                until(lambda number=number: turns.waiting == number + 1)  # type: ignore[misc]
        pool.shutdown()
    assert order == list(range(8))


def test_a_turn_is_passed_on_whatever_happens_to_those_before() -> None:
    turns, stop, order = Turns(), threading.Event(), []

    def cancelled() -> None:
        stop_with(stop)
        with turns:
            order.append("cancelled")

    def failing() -> None:
        with turns:
            order.append("failing")
            raise ValueError

    def last() -> None:
        with turns:
            order.append("last")

    with ThreadPoolExecutor(3) as pool:
        with turns:
            results = []
            for number, work in enumerate((cancelled, failing, last)):
                results.append(pool.submit(work))
                until(lambda number=number: turns.waiting == number + 1)  # type: ignore[misc]
            stop.set()
        errors = [type(result.exception(SECONDS)) for result in results]
    assert errors == [StoppedError, ValueError, type(None)]
    assert order == ["failing", "last"]


def test_room_is_given_in_the_order_of_asking_and_never_beyond_its_size() -> None:
    room, lock, taken, most, order = Room(100), threading.Lock(), 0, 0, []

    def work(number: int, size: int) -> None:
        nonlocal taken, most
        with room.of(size):
            with lock:
                order.append(number)
                taken += min(size, 100)
                most = max(most, taken)
            with lock:
                taken -= min(size, 100)

    with ThreadPoolExecutor(4) as pool:
        with room.of(60):
            results = []
            for number, size in enumerate((50, 1, 1000, 40)):
                results.append(pool.submit(work, number, size))
                until(lambda number=number: len(room._queue) == number + 1)  # type: ignore[misc]
            assert order == [], "one that would fit waits behind one that came before"
        for result in results:
            result.result(SECONDS)
    assert order[:3] == [0, 1, 2]
    assert most <= 100


def test_a_small_call_comes_in_between_the_batches_of_a_large_one(checkpoint: Path, passages: list[str]) -> None:
    gated = Gated(checkpoint)
    large, small = [f"large {text}" for text in passages[:6]], ["small"]

    async def main() -> None:
        first = asyncio.create_task(gated.reranker.arank("query", large))
        await asyncio.to_thread(until, lambda: len(gated.batches) == 1)
        second = asyncio.create_task(gated.reranker.arank("query", small))
        await asyncio.to_thread(until, lambda: gated.waiting == 1)
        gated.passed.release(2)  # the batch that runs, and that of the small call
        await asyncio.to_thread(until, lambda: len(gated.batches) == 3)
        assert gated.batches[0] == gated.batches[2] != gated.batches[1]
        gated.let_all()
        assert len(await asyncio.wait_for(second, SECONDS)) == 1
        assert len(await asyncio.wait_for(first, SECONDS)) == 6

    asyncio.run(main())


@pytest.mark.parametrize("kind", ["rank", "encode"])
def test_a_cancelled_call_stops_at_its_next_batch(checkpoint: Path, passages: list[str], kind: str) -> None:
    gated = Gated(checkpoint)

    async def main() -> None:
        if kind == "rank":
            call = asyncio.create_task(gated.reranker.arank("query", passages[:20]))
        else:
            call = asyncio.create_task(gated.reranker.aencode(passages[:20]))
        await asyncio.to_thread(until, lambda: len(gated.batches) == 1)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        gated.let_all()
        assert len(await asyncio.wait_for(gated.reranker.arank("query", ["another"]), SECONDS)) == 1

    asyncio.run(main())
    assert len(gated.batches) == 2, "the batch that ran, and the one of the next call"


def test_more_calls_than_one_wait_side_by_side(checkpoint: Path) -> None:
    """As many as the pool has threads are inside at once: a small one does not wait until a large one has ended."""
    reranker = KaLMReranker(checkpoint, cache=None)
    meet = threading.Barrier(4, timeout=SECONDS)
    reranker.rank = lambda *_, **__: [meet.wait() >= 0]  # type: ignore[assignment,method-assign]

    async def main() -> None:
        assert await asyncio.gather(*(reranker.arank("query", []) for _ in range(4))) == [[True]] * 4

    asyncio.run(main())


def test_one_batch_runs_at_a_time_and_no_passage_is_encoded_twice(checkpoint: Path, passages: list[str]) -> None:
    """Queries and encoding side by side, on the same new passages."""
    gated = Gated(checkpoint)
    expected = KaLMReranker(checkpoint, device="cpu", batch_size=1, cache=None).rank("query", passages[:4])
    inside: list[int] = []
    overlaps: list[int] = []
    encoder = gated.engine.loaded.model.get_encoder()

    def enter(*_: Any) -> None:
        inside.append(1)
        overlaps.append(len(inside))

    encoder.register_forward_pre_hook(enter, prepend=True)
    encoder.register_forward_hook(lambda *_: inside.pop() and None)
    with ThreadPoolExecutor(4) as pool:
        ranks = [pool.submit(gated.reranker.rank, "query", passages[:4]) for _ in range(2)]
        encodes = [pool.submit(gated.reranker.encode, passages[:4]) for _ in range(2)]
        # One is in the encoder; the others wait for their turn, or have entered it too.
        until(lambda: gated.waiting == 3 or len(inside) > 1)
        gated.let_all()
        rankings = [rank.result(SECONDS) for rank in ranks]
        reports = [report.result(SECONDS) for report in encodes]
    assert max(overlaps) == 1
    assert rankings == [expected, expected]
    stats = gated.reranker.cache.stats()
    assert (len(gated.batches), stats.encoded) == (4, 4)
    assert all(report.total == 4 for report in reports)
    assert gated.reranker.prefill_stats().size.entries == 4


def test_tokenising_holds_up_nobody(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reranker = KaLMReranker(checkpoint, device="cpu", cache=None)
    engine = reranker.scorer
    prompt, inside, go = engine.prompts.prompt, threading.Event(), threading.Event()

    def slow(query: str, *rest: Any) -> Any:
        if query == "long":
            inside.set()
            assert go.wait(SECONDS)
        return prompt(query, *rest)

    monkeypatch.setattr(engine.prompts, "prompt", slow)
    with ThreadPoolExecutor(2) as pool:
        long = pool.submit(reranker.rank, "long", ["passage"])
        assert inside.wait(SECONDS)
        assert len(pool.submit(reranker.rank, "short", ["passage"]).result(SECONDS)) == 1
        go.set()
        assert len(long.result(SECONDS)) == 1


def test_prefilled_passages_at_work_are_bounded(
    checkpoint: Path, passages: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    reranker = KaLMReranker(checkpoint, device="cpu", cache=None, prefill_memory=0)
    expected = reranker.predict([("query", text) for text in passages[:12]])
    reranker = KaLMReranker(checkpoint, device="cpu", cache=None)
    engine = reranker.scorer
    one = engine.passage_kv.bytes_of(max(reranker.estimate(passages[:12]).tokens))
    monkeypatch.setattr(engine.passage_kv, "_group_bytes", 3 * one)
    groups: list[int] = []
    margins = engine.passage_kv.decoder.margins

    def watch(beginning: Any, pairs: Any, *reference: Any) -> Any:
        groups.append(sum({id(pair.passage): pair.passage.nbytes for pair in pairs}.values()))
        return margins(beginning, pairs, *reference)

    monkeypatch.setattr(engine.passage_kv.decoder, "margins", watch)
    found = reranker.predict([("query", text) for text in passages[:12]])
    assert found == pytest.approx(expected, abs=1e-5)
    assert len(groups) > 1
    assert max(groups) <= 3 * one


def test_prompt_beginnings_are_bounded(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passage_kv_module, "_MOST_INSTRUCTIONS", 3)
    reranker = KaLMReranker(checkpoint, device="cpu", cache=None, score_memory=0)
    first = reranker.predict([("query", "passage")], instruction="Task 0.")
    for number in range(1, 8):
        reranker.predict([("query", "passage")], instruction=f"Task {number}.")
        assert len(reranker.scorer.passage_kv._prefixes) <= 3
    assert reranker.predict([("query", "passage")], instruction="Task 0.") == first


class Blocked(MemoryStore):
    """A store whose writes wait until they are let through."""

    def __init__(self) -> None:
        super().__init__(10**9)
        self.entered, self.go = threading.Event(), threading.Event()

    def put_many(self, items: Any) -> int:
        self.entered.set()
        assert self.go.wait(SECONDS)
        return super().put_many(items)


def test_writes_that_wait_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store slower than the encoder makes the caller wait; nothing is dropped."""
    size = len(pack_one(0))
    monkeypatch.setattr(passage_cache_module, "_PENDING_BYTES", 3 * size)
    store = Blocked()
    cache = PassageCache(store)
    most: list[int] = []

    def produce() -> None:
        for seed in range(10):
            put(cache, {f"text {seed}": passage(seed)})
            most.append(cache._writer.bytes)

    with ThreadPoolExecutor(1) as pool:
        producer = pool.submit(produce)
        until(lambda: (cache._writer.blocked == 1 and len(most) == 3) or producer.done())
        assert not producer.done(), "the caller waits"
        store.go.set()
        producer.result(SECONDS)
    cache.close()
    assert max(most) <= 3 * size
    assert len(list(store.keys())) == 0, "closed"
    stats = cache.stats().store.counters
    assert (stats.write_failed, stats.bytes_written) == (0, 10 * size)


def test_a_write_beyond_the_bound_is_kept_once_nothing_else_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passage_cache_module, "_PENDING_BYTES", 1)
    cache = PassageCache(MemoryStore(10**9))
    for seed in range(3):
        put(cache, {f"text {seed}": passage(seed)})
    cache.flush()
    assert cache.stats().store.size.entries == 3


def pack_one(seed: int) -> bytes:
    from cachekit import frames

    return next(iter(frames(seed + 1).values()))


def test_cache_closed_while_queries_run(checkpoint: Path, tmp_path: Path, passages: list[str]) -> None:
    """It closes between the look-up and the write, in the middle of every call, and later calls open it again."""
    expected = KaLMReranker(checkpoint, device="cpu", cache=None).rank("query", passages[:6])
    cache = PassageCache(tmp_path, memory=0)
    reranker = KaLMReranker(checkpoint, device="cpu", cache=cache)
    encoder = reranker.scorer.loaded.model.get_encoder()
    closed: list[int] = []
    encoder.register_forward_hook(lambda *_: closed.append(1) or cache.close())
    assert reranker.rank("query", passages[:6]) == expected
    assert closed
    cache.flush()
    assert cache.stats().store.size.entries == 6
    other = KaLMReranker(checkpoint, device="cpu", cache=cache)
    assert [hit.index for hit in other.rank("query", passages[:6])] == [hit.index for hit in expected]
    assert (cache.stats().encoded, cache.stats().store.counters.write_failed) == (6, 0)


def test_prefill_counters_add_up_over_threads(checkpoint: Path) -> None:
    """Each `+=` gives way in its middle: without a lock, updates are lost."""
    reranker = KaLMReranker(checkpoint, device="cpu", cache=None, score_memory=0)
    engine = reranker.scorer

    class Counters(type(engine.passage_kv.cached._counters)):  # type: ignore[misc]
        """Reading a counter gives other threads the time to do the same."""

        def __getattribute__(self, name: str) -> Any:
            value = super().__getattribute__(name)
            if name == "hits":
                threading.Event().wait(0.001)
            return value

    engine.passage_kv.cached._counters = Counters()
    reranker.rank("query", ["one", "two"])
    with ThreadPoolExecutor(4) as pool:
        for result in [pool.submit(reranker.rank, "query", ["one", "two"]) for _ in range(20)]:
            result.result(SECONDS)
    assert engine.passage_kv.cached.stats().counters.hits == 40


@pytest.fixture
def reranker_on_disk(checkpoint: Path, tmp_path: Path) -> Iterator[KaLMReranker]:
    with KaLMReranker(
        checkpoint, device="cpu", cache=tmp_path / "cache", ratio=8, max_length=64, token="hf_secret"
    ) as made:
        yield made


COPIES: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
}


@pytest.mark.parametrize("how", COPIES)
def test_a_reranker_is_copied_by_its_arguments(reranker_on_disk: KaLMReranker, how: str) -> None:
    expected = reranker_on_disk.rank("query", ["one", "two " * 100])
    found = COPIES[how](reranker_on_disk)
    assert type(found) is KaLMReranker
    assert "not loaded" in repr(found)
    assert found.settings == reranker_on_disk.settings
    assert (found._arguments["token"], found._arguments["device"], found.owns_cache) == ("hf_secret", "cpu", True)
    assert found.cache.store.folder == reranker_on_disk.cache.store.folder
    reranker_on_disk.cache.flush()
    assert found.rank("query", ["one", "two " * 100]) == expected
    assert found.cache.stats().encoded == 0
    found.close()


@pytest.mark.parametrize("how", COPIES)
def test_a_shared_reranker_keeps_what_its_folder_keeps(checkpoint: Path, tmp_path: Path, how: str) -> None:
    found = COPIES[how](shared_reranker(checkpoint, cache=tmp_path, keep="prefilled", ratio=2))
    assert (found.cache.keeps_prefilled, found.cache.base_ratio, found.owns_cache) == (True, 2, True)


def test_a_cache_is_pickled_by_its_arguments_and_shared_by_copies(tmp_path: Path) -> None:
    secret = "0123456789abcdef"
    options: dict[str, Any] = {"memory": 7, "limit": 10**7, "base_ratio": 2, "keep": "prefilled", "storage": "int8"}
    shared = {"remote": f"file://{tmp_path}", "remote_mode": "read", "remote_timeout_ms": 70, "remote_prefilled": True}
    options |= {**shared, "namespace": "one", "unauthenticated": True}
    cache = PassageCache(tmp_path, secret=secret, read_only=True, **options)
    assert copy.copy(cache) is copy.deepcopy(cache) is cache
    found = pickle.loads(pickle.dumps(cache))
    assert found._arguments == {"where": tmp_path, "secret": secret, "read_only": True, **options}
    assert repr(found) == repr(cache)
    assert secret not in repr(found)
    in_memory = PassageCache(None)
    put(in_memory, {"text 0": passage(0)})
    assert pickle.loads(pickle.dumps(in_memory)).stats().memory.size.entries == 0


def test_copies_share_a_cache_that_was_handed_in(checkpoint: Path) -> None:
    for cache in (PassageCache(None), MemoryStore(1000)):
        reranker = KaLMReranker(checkpoint, cache=cache)
        for how in (copy.copy, copy.deepcopy):
            found = how(reranker)
            assert (found.cache if isinstance(cache, PassageCache) else found.cache.store) is cache
            assert not found.owns_cache


def _rank(reranker: KaLMReranker) -> dict[int, float]:
    return {hit.index: hit.margin for hit in reranker.rank("query", ["one", "two"])}


def test_a_pool_of_processes_ranks(reranker_on_disk: KaLMReranker) -> None:
    expected = _rank(reranker_on_disk)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(_rank, reranker_on_disk).result(SECONDS) == pytest.approx(expected, abs=1e-5)
