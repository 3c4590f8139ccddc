"""A tier that several machines share: what a query gets from it, what it may cost, and what becomes of its faults."""

from __future__ import annotations

import logging
import os
import pickle
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from rawframes import key_of as raw_key

from kalm_rag import KaLMReranker, PassageCache
from kalm_rag.cache import StoreError, StoreStats
from kalm_rag.cache.remote import patience
from kalm_rag.cache.remote.address import read_address
from kalm_rag.cache.remote.tier import RemoteTier
from kalm_rag.cache.remote.windows import Windows, by_bytes
from kalm_rag.cache.remote.writes import RemoteWrites
from kalm_rag.utils.breaker import Breaker

SECRET = "s" * 32
QUERY = "which animal purrs?"
TEXTS = [f"passage {number} about animals, {'cats' if number % 2 else 'dogs'}" for number in range(8)]


class Shared:
    """A store in memory whose answers a test can slow down, break or falsify."""

    def __init__(self) -> None:
        self.items: dict[str, bytes] = {}
        self.asked: list[tuple[str, ...]] = []
        self.slow = 0.0
        self.error: Exception | None = None
        self.falsify: Callable[[bytes], bytes] = lambda data: data
        self.released = threading.Event()
        self.hangs = False

    def _meet(self) -> None:
        if self.hangs:
            self.released.wait(20)
        time.sleep(self.slow)
        if self.error is not None:
            raise self.error

    def get_many(self, keys: Sequence[str]) -> dict[str, bytes]:
        self.asked.append(tuple(keys))
        self._meet()
        return {key: self.falsify(self.items[key]) for key in keys if key in self.items}

    def put_many(self, items: Mapping[str, bytes]) -> int:
        self._meet()
        self.items.update(items)
        return len(items)

    def add(self, key: str, value: bytes) -> bool:
        self._meet()
        return self.items.setdefault(key, value) is value

    def delete(self, keys: Iterable[str]) -> int:
        self._meet()
        return sum(self.items.pop(key, None) is not None for key in keys)

    def keys(self) -> Iterator[str]:
        return iter(list(self.items))

    def stats(self) -> StoreStats:
        self._meet()
        return StoreStats(len(self.items), sum(map(len, self.items.values())), None)

    def close(self) -> None:
        pass

    def reads(self, key: str) -> int:
        return sum(key in asked for asked in self.asked)


@pytest.fixture
def shared() -> Iterator[Shared]:
    store = Shared()
    yield store
    store.released.set()


def machine(folder: Path | None, shared: Shared, **arguments: Any) -> PassageCache:
    return PassageCache(folder, remote=shared, secret=SECRET, **arguments)


def rank(cache: PassageCache, passages: Sequence[str] = TEXTS, **arguments: Any) -> list[float]:
    with KaLMReranker("mini", cache=cache, device="cpu", score_memory=0, **arguments) as reranker:
        return [hit.score for hit in reranker.rank(QUERY, passages)]


class TestSharing:
    def test_the_second_machine_encodes_nothing(self, tmp_path: Path, shared: Shared) -> None:
        first, second = machine(tmp_path / "a", shared), machine(tmp_path / "b", shared)
        expected = rank(first)
        first.flush()
        assert rank(second) == pytest.approx(expected, abs=1e-5)
        assert (first.stats().encoded, second.stats().encoded) == (8, 0)
        remote = second.stats().remote
        assert remote is not None
        assert (remote.counters.hits, remote.counters.promoted) == (8, 8)

    def test_what_came_from_the_tier_is_on_the_disk_next_time(self, tmp_path: Path, shared: Shared) -> None:
        rank(machine(tmp_path / "a", shared))
        rank(machine(tmp_path / "a", shared))
        for _ in range(2):
            second = machine(tmp_path / "b", shared)
            rank(second)
            second.close()
        assert second.stats().store.counters.hits == 8
        assert second.stats().remote.counters.hits == 0

    def test_without_a_folder_the_tier_is_behind_memory(self, shared: Shared) -> None:
        first, second = machine(None, shared), machine(None, shared)
        rank(first)
        first.flush()
        rank(second)
        assert second.stats().encoded == 0

    def test_a_reader_writes_nothing(self, tmp_path: Path, shared: Shared) -> None:
        cache = machine(tmp_path / "a", shared, remote_mode="read")
        rank(cache)
        assert cache.flush()
        assert shared.items == {}
        with pytest.raises(StoreError, match="only read here"):
            cache.forget(TEXTS)

    def test_large_forms_are_shared_by_choice(self, tmp_path: Path, shared: Shared) -> None:
        cache = machine(tmp_path / "a", shared, keep="prefilled")
        rank(cache)
        cache.flush()
        states = len(shared.items)
        cache = machine(tmp_path / "b", shared, keep="prefilled", remote_prefilled=True)
        rank(cache)
        cache.flush()
        assert (states, len(shared.items)) == (8, 16)
        other = machine(tmp_path / "c", shared, keep="prefilled", remote_prefilled=True)
        rank(other)
        assert other.stats().remote.counters.hits == 8, "prefilled passages need no states"

    def test_the_compact_form_has_one_reference_for_all(self, tmp_path: Path, shared: Shared) -> None:
        first, second = (machine(tmp_path / name, shared, keep="compact") for name in "ab")
        expected = rank(first)
        first.flush()
        assert rank(second) == pytest.approx(expected, abs=1e-3)
        assert second.stats().encoded == 0
        assert second.stats().remote.counters.hits == 16, "states and compact entries of the same reference"

    def test_a_reference_made_alone_gives_way_to_the_shared_one(self, tmp_path: Path, shared: Shared) -> None:
        first, second = (machine(tmp_path / name, shared, keep="compact") for name in "ab")
        rank(first)
        first.close()
        shared.error = OSError("away")
        rank(second)
        second.close()
        shared.error = None
        third = machine(tmp_path / "b", shared, keep="compact")
        rank(third)
        third.close()
        fourth = machine(tmp_path / "b", shared, keep="compact")
        rank(fourth)
        assert fourth.stats().prefilled.hits == 8, "entries of the shared reference are on this disk now"


class TestDeadline:
    def test_a_slow_tier_costs_its_budget_and_not_more(self, shared: Shared) -> None:
        cache = machine(None, shared, remote_timeout_ms=150)
        shared.hangs = True
        assert len(rank(cache)) == 8
        remote = cache.stats().remote
        assert remote.counters.late == 8
        assert cache.stats().encoded == 8

    def test_what_answers_in_time_is_used(self, shared: Shared) -> None:
        shared.items = {raw_key(number): b"x" for number in range(3)}
        late = threading.Event()

        class Half(Shared):
            windows = Windows()

            def get_many(self, keys: Sequence[str]) -> dict[str, bytes]:
                if late.is_set():
                    time.sleep(5)
                late.set()
                return super().get_many(keys)

        half = Half()
        half.items = shared.items
        half.windows._average = 16_000_000
        tier = RemoteTier(half, "half", mode="read", timeout=None)
        found = tier.get_many(list(shared.items), 0.5)
        assert len(found) == 1, "the first window came, the second one is too late"

    def test_all_reads_of_a_query_share_one_deadline(self) -> None:
        now = [0.0]
        both = patience.Patience(lambda: now[0])
        assert both.left(1.0) == 1.0
        now[0] = 0.6
        assert both.left(0.1) == pytest.approx(0.4)
        assert both.left(2.0) == pytest.approx(1.4), "a read that saves more may wait longer"
        now[0] = 3.0
        assert both.left(2.0) == 0.0

    def test_the_deadline_is_what_encoding_would_take(self) -> None:
        seconds = patience.seconds_for
        assert seconds(0.001, None, float("inf")) == 0.1
        assert seconds(0.7, None, float("inf")) == 0.7
        assert seconds(float("inf"), None, float("inf")) == 2.0
        assert seconds(0.7, 0.05, float("inf")) == 0.05
        assert seconds(0.7, None, 0.02) == 0.02

    def test_it_never_exceeds_the_budget(self, shared: Shared, monkeypatch: pytest.MonkeyPatch) -> None:
        cache = machine(None, shared)
        allowed: list[float] = []
        with KaLMReranker("mini", cache=cache, device="cpu", encode_in_background=False) as reranker:
            reranker.load()
            monkeypatch.setattr(cache.remote, "get_many", lambda _, seconds: allowed.append(seconds) or {})
            assert len(reranker.rank(QUERY, TEXTS, budget_ms=50)) == 8
            within = list(allowed)
            reranker.rank(QUERY, [f"{text}, once more" for text in TEXTS])
        assert all(seconds <= 0.05 for seconds in within)
        assert max(allowed) > 0.09, "without a budget it may wait longer"

    def test_keys_that_were_absent_are_not_asked_for_again_for_seconds(self, shared: Shared) -> None:
        tier = RemoteTier(shared, "it", mode="read", timeout=None)
        for _ in range(3):
            assert tier.get_many([raw_key(1)], 1.0) == {}
        assert len(shared.asked) == 1
        assert tier.stats().counters.misses == 3

    def test_what_this_process_wrote_is_asked_for_at_once(self, shared: Shared) -> None:
        tier = RemoteTier(shared, "it", mode="read-write", timeout=None)
        assert tier.get_many([raw_key(1)], 1.0) == {}
        tier.put_many({raw_key(1): b"x"})
        assert tier.flush(5)
        assert tier.get_many([raw_key(1)], 1.0) == {raw_key(1): b"x"}


class TestFaults:
    @pytest.mark.parametrize(
        "falsify",
        [
            lambda data: data[:-1],
            lambda data: b"",
            lambda data: data[:200] + bytes([data[200] ^ 1]) + data[201:],
            lambda data: b"HTTP/1.1 200 OK",
        ],
        ids=["cut", "empty", "flipped", "another protocol"],
    )
    def test_wrong_bytes_are_a_miss_and_never_reach_the_disk(
        self, tmp_path: Path, shared: Shared, falsify: Callable[[bytes], bytes]
    ) -> None:
        first = machine(tmp_path / "a", shared)
        expected = rank(first)
        first.flush()
        shared.falsify = falsify
        second = machine(tmp_path / "b", shared)
        assert rank(second) == pytest.approx(expected, abs=1e-5)
        second.flush()
        assert second.stats().remote.counters.corrupt == 8
        assert second.stats().remote.counters.promoted == 0
        assert second.stats().encoded == 8

    def test_an_entry_without_the_secret_is_a_miss(self, tmp_path: Path, shared: Shared) -> None:
        forger = PassageCache(None, remote=shared, unauthenticated=True)
        rank(forger)
        forger.flush()
        cache = machine(tmp_path / "a", shared)
        rank(cache)
        assert cache.stats().encoded == 8
        assert cache.stats().remote.counters.corrupt == 8

    def test_errors_are_misses_one_line_and_an_end_of_asking(
        self, shared: Shared, caplog: pytest.LogCaptureFixture
    ) -> None:
        shared.error = ConnectionResetError("reset")
        tier = RemoteTier(shared, "redis://there", mode="read-write", timeout=None)
        with caplog.at_level(logging.WARNING):
            for number in range(20):
                assert tier.get_many([raw_key(number)], 1.0) == {}
        assert len(shared.asked) == 3
        counters = tier.stats().counters
        assert (counters.read_failed, counters.left_alone, counters.outages) == (3, 17, 1)
        (line,) = caplog.messages
        assert "redis://there is left alone until it answers again" in line
        assert "reset" in line

    def test_it_is_used_again_once_it_answers(self, shared: Shared, caplog: pytest.LogCaptureFixture) -> None:
        shared.error = OSError("away")
        tier = RemoteTier(shared, "it", mode="read-write", timeout=None)
        for number in range(3):
            tier.get_many([raw_key(number)], 1.0)
        shared.error, shared.items[raw_key(7)] = None, b"x"
        until = time.monotonic() + 20
        while not tier.get_many([raw_key(7)], 1.0) and time.monotonic() < until:
            time.sleep(0.05)
        assert tier.stats().state == "closed"
        assert "answers again" in caplog.text

    def test_a_query_never_waits_for_a_probe(self) -> None:
        now = [0.0]
        breaker = Breaker("it", "nothing happens", clock=lambda: now[0])
        for _ in range(3):
            breaker.failed("away")
        assert breaker.state == "open"
        assert not breaker.wants_probe()
        now[0] = 1.3
        assert breaker.wants_probe()
        assert breaker.state == "half-open"
        assert not breaker.wants_probe(), "one at a time"
        breaker.failed("away")
        now[0] = 2.5
        assert not breaker.wants_probe(), "the wait has doubled"
        now[0] = 4.0
        assert breaker.wants_probe()
        breaker.succeeded()
        assert breaker.state == "closed"

    def test_writes_are_tried_again(self, shared: Shared) -> None:
        tier = RemoteTier(shared, "it", mode="read-write", timeout=None)
        shared.error = OSError("away")
        tier.put_many({raw_key(1): b"x"})
        time.sleep(0.05)
        shared.error = None
        assert tier.flush(10)
        assert shared.items == {raw_key(1): b"x"}
        assert tier.stats().counters.written == 1

    def test_closing_a_dead_tier_is_bounded_and_counts_what_is_lost(
        self, shared: Shared, caplog: pytest.LogCaptureFixture
    ) -> None:
        shared.hangs = True
        tier = RemoteTier(shared, "it", mode="read-write", timeout=None)
        tier.put_many({raw_key(1): b"x"})
        tier.put_many({raw_key(2): b"y"})
        began = time.monotonic()
        assert not tier.close(0.3)
        assert time.monotonic() - began < 5
        assert tier.stats().counters.dropped >= 1
        assert "not written to the shared tier at it" in caplog.text

    def test_what_finds_no_room_is_dropped_and_counted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("kalm_rag.cache.remote.writes.PENDING_BYTES", 100)
        lost: list[tuple[int, str]] = []
        writes = RemoteWrites(lambda: False, lambda count, why: lost.append((count, why)))
        writes.submit(lambda: None, 1, 80)
        writes.submit(lambda: None, 2, 80)
        assert lost == [(2, "dropped")]
        assert writes.pending_bytes == 80

    def test_requests_that_hang_are_bounded(self, shared: Shared) -> None:
        shared.hangs = True
        tier = RemoteTier(shared, "it", mode="read", timeout=None)
        threads = threading.active_count()
        for number in range(30):
            tier.link.breaker.succeeded()
            tier.get_many([raw_key(number)], 0.01)
        assert threading.active_count() - threads <= 9

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
    def test_a_forked_child_begins_anew(self, shared: Shared) -> None:
        shared.hangs = True
        tier = RemoteTier(shared, "it", mode="read-write", timeout=None)
        for number in range(3):
            tier.get_many([raw_key(number)], 0.06)
        tier.put_many({raw_key(1): b"x"})
        child = os.fork()
        if child == 0:
            shared.hangs = False
            shared.items[raw_key(9)] = b"z"
            good = tier.stats().state == "closed" and tier.get_many([raw_key(9)], 5.0) and not tier._queue.has_jobs
            os._exit(0 if good else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


class TestForgetting:
    def test_forgetting_and_deleting_reach_the_tier(self, tmp_path: Path, shared: Shared) -> None:
        cache = machine(tmp_path / "a", shared)
        rank(cache)
        cache.flush()
        report = cache.forget(TEXTS[:3])
        assert (report.store.states, report.remote.states) == (3, 3)
        assert len(shared.items) == 5
        assert cache.delete(list(shared.items)) >= 10
        assert shared.items == {}

    def test_a_tier_that_does_not_answer_is_an_error_and_deletes_nothing_here(
        self, tmp_path: Path, shared: Shared
    ) -> None:
        cache = machine(tmp_path / "a", shared)
        rank(cache)
        cache.flush()
        shared.error = OSError("away")
        with pytest.raises(StoreError, match="away"):
            cache.forget(TEXTS)
        assert cache.stats().store.size.entries == 8

    def test_share_writes_what_only_the_folder_holds(self, tmp_path: Path, shared: Shared) -> None:
        alone = PassageCache(tmp_path / "a", secret=SECRET)
        rank(alone)
        alone.close()
        cache = machine(tmp_path / "a", shared)
        with KaLMReranker("mini", cache=cache, device="cpu") as reranker:
            assert reranker.scorer.share(TEXTS) == 0
            assert len(shared.items) == 8
            assert reranker.scorer.share([*TEXTS, "not encoded"]) == 1


class TestArguments:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"remote": "redis://h:1"}, "a remote needs a secret"),
            ({"remote": "ftp://h", "secret": SECRET}, "must be a URL that begins with one of redis://"),
            ({"remote": "plain", "secret": SECRET}, "a text without a known scheme"),
            ({"remote": "redis://", "secret": SECRET}, "must name a host"),
            ({"remote": "s3://", "secret": SECRET}, "must name a bucket"),
            ({"remote": "redis://h:x", "secret": SECRET}, "whose port is a number"),
            ({"remote": "file://relative/x", "secret": SECRET}, "file:///absolute/path"),
            ({"remote": "redis://h", "secret": SECRET, "namespace": "a b"}, "namespace must be 1 to 64 letters"),
            ({"remote": "redis://h", "secret": SECRET, "namespace": ".."}, "namespace must be 1 to 64 letters"),
            ({"remote_timeout_ms": -1}, "remote_timeout_ms must be above 0 milliseconds"),
            ({"remote_mode": "write"}, "remote_mode must be one of"),
            ({"remote": Shared(), "secret": SECRET, "namespace": "x"}, "give the store a prefix of its own"),
        ],
    )
    def test_a_wrong_one_is_refused_at_once(self, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            PassageCache(None, **arguments)

    def test_no_message_holds_a_password(self) -> None:
        for url in ("http://user:hunter2@h", "redis://user:hunter2@h:x", "hunter2"):
            with pytest.raises(ValueError) as error:
                PassageCache(None, remote=url, secret=SECRET)
            assert "hunter2" not in str(error.value)
        cache = PassageCache(None, remote="redis://user:hunter2@h:1/0?client_name=hunter2", secret=SECRET)
        shown = (
            repr(cache) + repr(cache.remote) + repr(cache.remote.link.store) + repr(read_address("redis://a:hunter2@h"))
        )
        assert "hunter2" not in shown
        assert "redis://h:1/0" in repr(cache)

    def test_the_environment_gives_secret_and_password(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("KALM_RAG_CACHE_SECRET", SECRET)
        monkeypatch.setenv("KALM_RAG_REMOTE_PASSWORD", "p@ss/word")
        cache = PassageCache(None, remote="redis://h:1/0")
        assert cache.secret == SECRET.encode()
        assert read_address("redis://h:1/0").url == "redis://:p%40ss%2Fword@h:1/0"
        assert read_address("redis://me:own@h:1/0").url == "redis://me:own@h:1/0"

    def test_a_missing_client_is_named_with_its_extra(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        for url, extra in (("redis://h", "redis"), ("s3://b", "objects")):
            with pytest.raises(ImportError, match=rf"kalm-rag\[{extra}\]"):
                PassageCache(None, remote=url, secret=SECRET)

    def test_a_pickle_opens_the_same_tier(self, tmp_path: Path) -> None:
        cache = PassageCache(tmp_path, remote=f"file://{tmp_path}", secret=SECRET, namespace="one", remote_mode="read")
        again = pickle.loads(pickle.dumps(cache))
        assert again.remote.shown == cache.remote.shown
        assert not again.remote.writes
        assert repr(again.remote.link.store) == repr(cache.remote.link.store)

    def test_tenants_and_secrets_do_not_meet(self, tmp_path: Path) -> None:
        tier = tmp_path / "shared"
        tier.mkdir()
        (tier / "somebody's.txt").write_text("mine")

        def used(**arguments: Any) -> int:
            cache = PassageCache(None, remote=f"file://{tier}", **arguments)
            rank(cache)
            cache.close()
            return cache.stats().encoded

        assert used(secret=SECRET) == 8
        assert used(secret=SECRET) == 0
        assert used(secret=SECRET, namespace="other") == 8
        assert used(secret="t" * 32) == 8
        assert used(unauthenticated=True) == 8
        assert (tier / "somebody's.txt").read_text() == "mine"


def test_windows_learn_how_large_values_are() -> None:
    windows = Windows()
    keys = [raw_key(number) for number in range(300)]
    assert len(next(iter(windows.of(keys)))) == 64
    windows.learn({"a": bytes(4_000_000)})
    assert len(next(iter(windows.of(keys)))) == 4
    small = Windows()
    for _ in range(20):
        small.learn({"a": b"x"})
    assert len(next(iter(small.of(keys)))) == 256


def test_writes_are_divided_by_bytes() -> None:
    items = {str(number): bytes(40) for number in range(5)} | {"large": bytes(500)}
    found = list(by_bytes(items, 100))
    assert [len(part) for part in found] == [2, 2, 1, 1]
    assert {key for part in found for key in part} == set(items)
    assert list(by_bytes({}, 100)) == []


def test_what_the_documentation_says_of_waiting_and_room() -> None:
    from kalm_rag.cache import passage_cache
    from kalm_rag.cache.remote import tier, writes
    from kalm_rag.utils import breaker

    page = " ".join((Path(__file__).parents[2] / "docs/how-to/shared-tier.md").read_text("utf-8").split())
    assert (patience.LEAST_SECONDS, patience.MOST_SECONDS) == (0.1, 2.0)
    assert "at least 100 ms and at most 2 s" in page
    assert (breaker._FAILURES, breaker._FIRST_WAIT, breaker._LONGEST_WAIT) == (3, 1.0, 30.0)
    assert "After three failures in a row" in page
    assert "after one second, then two, up to half a minute" in page
    assert (tier._ABSENT_SECONDS, writes._TRIES, writes.PENDING_BYTES) == (5.0, 3, 256_000_000)
    assert "not asked for again for five seconds. Writes are tried three times; 256 MB may wait" in page
    assert passage_cache._CLOSING_SECONDS == tier._AT_EXIT_SECONDS == 10.0
    assert "wait for ten seconds" in page
