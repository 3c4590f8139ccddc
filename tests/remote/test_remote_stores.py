"""The contract that every store keeps, on real servers, and what stores of a shared tier add to it."""

from __future__ import annotations

import os
import pickle
import signal
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from cachekit import key_of, value_of
from serverkit import AzureServer, RedisServer, S3Server
from storekit import KEYS, StoreContract

from kalm_rag.cache import Store, StoreError
from kalm_rag.cache.remote.object_store import ObjectStore
from kalm_rag.cache.remote.redis_store import RedisStore
from kalm_rag.cache.store import RefusedError, add


class RemoteContract(StoreContract):
    """What every shared store keeps beyond the contract of all stores."""

    turns = 3

    def test_a_value_is_added_once(self, store: Store) -> None:
        add(store, KEYS[0], b"first")
        add(store, KEYS[0], b"second")
        assert store.get_many(KEYS) == {KEYS[0]: b"first"}

    def test_what_it_contains_is_told_without_reading_it(self, store: Any) -> None:
        store.put_many(dict.fromkeys(KEYS[:3], b"value"))
        assert set(store.contains([*KEYS, key_of(99)])) == set(KEYS[:3])
        assert set(store.contains([])) == set()

    def test_sizes_are_counted_as_entries_come_and_go(self, store: Store) -> None:
        store.put_many({key: value_of(key, 1000) for key in KEYS})
        store.delete(KEYS[:4])
        store.close()
        stats = store.stats()
        assert (stats.entries, stats.bytes) == (8, 8 * len(value_of(KEYS[0], 1000)))

    def test_a_pickle_opens_the_same_place(self, store: Store) -> None:
        store.put_many({KEYS[0]: b"value"})
        other = pickle.loads(pickle.dumps(store))
        assert other.get_many(KEYS) == {KEYS[0]: b"value"}
        other.close()


class ObjectContract(RemoteContract):
    """What object stores keep beyond that."""

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
    def test_a_forked_child_is_told_instead_of_waiting_forever(self, store: Store) -> None:
        store.put_many({KEYS[0]: b"value"})

        def tried() -> str:
            try:
                return str(store.get_many(KEYS))
            except RefusedError as error:
                return str(error)

        assert "it was forked after its parent had used an object store" in in_child(tried)
        assert store.get_many(KEYS) == {KEYS[0]: b"value"}, "the parent is not disturbed"


def in_child(action: Callable[[], str]) -> str:
    """What an action returns in a forked child, which is killed after 20 seconds."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        try:
            os.write(writer, action().encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answer:
        text = answer.read()
    assert os.waitpid(child, 0)[1] == 0, "the child did not end by itself"
    return text


@pytest.fixture
def place() -> str:
    """A part of a store that no other test has used."""
    return uuid.uuid4().hex[:8]


class TestRedis(RemoteContract):
    @pytest.fixture
    def store(self, redis_server: RedisServer, place: str) -> Iterator[Store]:
        with redis_server.client() as client:
            client.mset({"other-data": b"x", f"{place}:notes": b"x", key_of(3): b"x"})
        store = RedisStore(redis_server.url, f"{place}:")
        assert isinstance(store, Store)
        yield store
        store.close()

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
    def test_a_forked_child_has_connections_of_its_own(self, store: Store) -> None:
        values = {key: value_of(key, 20_000) for key in KEYS}
        store.put_many(values)
        assert store.get_many(KEYS) == values

        def wrong() -> int:
            return sum(store.get_many(KEYS) != values for _ in range(10))

        with ThreadPoolExecutor(1) as meanwhile:
            here = meanwhile.submit(wrong)
            there = in_child(lambda: str(wrong()))
        assert (here.result(), there) == (0, "0")

    def test_a_full_server_is_read_from_and_says_so_once(
        self, store: RedisStore, redis_server: RedisServer, caplog: pytest.LogCaptureFixture
    ) -> None:
        values = {key: value_of(key, 10_000) for key in KEYS}
        assert store.put_many(values) == 12
        with redis_server.client() as client:
            try:
                client.config_set("maxmemory", 1_000_000)
                assert store.put_many(values) == store.put_many(values) == 0
                assert store.get_many(KEYS) == values
                assert store.delete(KEYS[:1]) == 1
                with pytest.raises(StoreError):
                    store.add(KEYS[0], b"x")
            finally:
                client.config_set("maxmemory", 0)
        assert store.put_many(values) == 12
        assert caplog.text.count("has no memory left") == 1

    def test_keys_are_listed_for_exports_only(self, store: RedisStore, redis_server: RedisServer) -> None:
        def listed() -> set[str]:
            with redis_server.client() as client:
                return {"cmdstat_scan", "cmdstat_keys"} & client.info("commandstats").keys()

        store.put_many(dict.fromkeys(KEYS, b"value"))
        store.get_many(KEYS)
        store.contains(KEYS)
        store.delete(KEYS[:1])
        assert store.stats().entries == 11
        assert listed() == set()
        assert sorted(store.keys()) == sorted(KEYS[1:])
        assert listed() == {"cmdstat_scan"}


class TestS3(ObjectContract):
    @pytest.fixture
    def store(self, s3: S3Server) -> Iterator[Store]:
        s3.put("bucket", "tenant/other-data", b"x")
        s3.put("bucket", f"tenant/kalm-rag/{key_of(3)[:2]}/notes", b"x")
        store = ObjectStore("s3://bucket/tenant")
        assert isinstance(store, Store)
        yield store
        store.close()


class TestAzure(ObjectContract):
    @pytest.fixture
    def store(self, azure: AzureServer, place: str) -> Iterator[Store]:
        azure.make_container(place)
        store = ObjectStore(f"az://{place}/tenant")
        yield store
        store.close()


class TestFolder(ObjectContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[Store]:
        pytest.importorskip("obstore", reason="the extra objects is not installed")
        store = ObjectStore(f"file://{tmp_path}")
        yield store
        store.close()

    def test_what_another_process_deletes_meanwhile_is_deleted(
        self, store: Any, tmp_path: Path, monkeypatch: Any
    ) -> None:
        store.put_many(dict.fromkeys(KEYS[:3], b"value"))
        sizes = store._bucket.sizes

        def told_too_early(keys: list[str]) -> list[int | None]:
            found: list[int | None] = sizes(keys)
            (file,) = tmp_path.rglob(KEYS[0])
            file.unlink()
            return found

        monkeypatch.setattr(store._bucket, "sizes", told_too_early)
        assert store.delete(KEYS[:3]) == 3
        monkeypatch.undo()
        assert store.get_many(KEYS) == {}


class TestMemory(ObjectContract):
    """As Google's: obstore has one code for both, and there is no server of Google's to test with."""

    @pytest.fixture
    def store(self) -> Iterator[Store]:
        obstore = pytest.importorskip("obstore.store", reason="the extra objects is not installed")
        store = ObjectStore("memory", store=obstore.MemoryStore())
        yield store
        store.close()

    def test_a_pickle_opens_the_same_place(self, store: Store) -> None:
        with pytest.raises(TypeError, match="belongs to its process"):
            pickle.dumps(store)
