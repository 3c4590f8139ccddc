"""The stores of this machine: the contract that every store keeps, and what each adds to it."""

from __future__ import annotations

import base64
import copy
import fnmatch
import pickle
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from cachekit import DictByteStore, key_of, value_of
from storekit import KEYS, StoreContract

from kalm_rag.cache import ByteStoreAdapter, DiskStore, MemoryStore, Store
from kalm_rag.cache.store import StoreError


class GlobByteStore(DictByteStore):
    """As langchain-community's `RedisStore` reads a prefix: as a pattern; keys are bytes, and some come twice."""

    def yield_keys(self, *, prefix: str | None = None) -> Iterator[Any]:
        names = list(self.items)
        for name in [*names, *names[:3]]:
            if fnmatch.fnmatchcase(name, prefix or "*"):
                yield name.encode()


class ViewByteStore(DictByteStore):
    """Gives values as other types of bytes."""

    def mget(self, keys: Sequence[str]) -> list[Any]:
        kinds = (bytes, bytearray, memoryview)
        found = super().mget(keys)
        return [None if value is None else kinds[at % 3](value) for at, value in enumerate(found)]


def langchain_store(kind: str, folder: Path) -> Any:
    stores = pytest.importorskip("langchain_core.stores")
    if kind == "InMemoryByteStore":
        return stores.InMemoryByteStore()
    if kind == "InMemoryStore":
        return stores.InMemoryStore()
    storage = pytest.importorskip("langchain_classic.storage")
    if kind == "LocalFileStore":
        return storage.LocalFileStore(folder / "files")
    return storage.EncoderBackedStore(
        stores.InMemoryByteStore(), lambda key: f"namespace/{key}", base64.b64encode, base64.b64decode
    )


def shared_with_others(store: Any) -> ByteStoreAdapter:
    """An adapter over a store that holds data of others, some of it under keys much like ours."""
    adapter = ByteStoreAdapter(store)
    store.mset([("other-data", b"x"), ("kalm-rag-notes", b"x"), (key_of(3), b"x")])
    return adapter


LANGCHAIN = ("InMemoryByteStore", "InMemoryStore", "LocalFileStore", "EncoderBackedStore")
STORES: dict[str, Callable[[Path], Any]] = {
    "disk": lambda folder: DiskStore(folder / "store"),
    "memory": lambda _: MemoryStore(10_000_000),
    "bytestore": lambda _: ByteStoreAdapter(DictByteStore()),
    "patterns": lambda _: ByteStoreAdapter(GlobByteStore()),
    "views": lambda _: ByteStoreAdapter(ViewByteStore()),
    **{
        kind: partial(lambda kind, folder: shared_with_others(langchain_store(kind, folder)), kind)
        for kind in LANGCHAIN
    },
}


@pytest.mark.parametrize("kind", STORES)
class TestContract(StoreContract):
    @pytest.fixture
    def store(self, kind: str, tmp_path: Path) -> Iterator[Store]:
        self.torn = kind == "LocalFileStore"
        store = STORES[kind](tmp_path)
        assert isinstance(store, Store)
        yield store
        store.close()


PREFIXES = ["", "p", "a*", "a[b]?", "tenant:7:", "folder/", "a/b-", "\u00e9 \\ %"]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("make", [DictByteStore, GlobByteStore])
def test_a_prefix_is_never_read_as_a_pattern(make: Callable[[], Any], prefix: str) -> None:
    inner = make()
    store, neighbour = ByteStoreAdapter(inner, prefix), ByteStoreAdapter(inner, "neighbour-" + prefix)
    store.put_many(dict.fromkeys(KEYS[:3], b"ours"))
    neighbour.put_many(dict.fromkeys(KEYS[2:5], b"theirs"))
    assert sorted(store.keys()) == sorted(KEYS[:3])
    assert sorted(neighbour.keys()) == sorted(KEYS[2:5])
    assert store.get_many(KEYS) == dict.fromkeys(KEYS[:3], b"ours")


@pytest.mark.parametrize("prefix", ["p", "folder/", "a/b-"])
def test_a_prefix_with_folders_works_in_a_folder(tmp_path: Path, prefix: str) -> None:
    store = ByteStoreAdapter(langchain_store("LocalFileStore", tmp_path), prefix)
    store.put_many(dict.fromkeys(KEYS, b"value"))
    assert sorted(store.keys()) == sorted(KEYS)


@pytest.mark.parametrize("prefix", ["/", "/a", "./a", "a/../b", "a//b", "a\n", "\0"])
def test_a_prefix_that_a_path_would_change_is_refused(prefix: str) -> None:
    with pytest.raises(ValueError, match=r"prefix must be printable.*got .*use letters"):
        ByteStoreAdapter(DictByteStore(), prefix)
    with pytest.raises(TypeError, match="prefix must be a string, got int: 7"):
        ByteStoreAdapter(DictByteStore(), 7)  # type: ignore[arg-type]


def test_stats_of_a_byte_store_list_nothing() -> None:
    class Silent(DictByteStore):
        def yield_keys(self, *, prefix: str | None = None) -> Iterator[str]:
            raise AssertionError

    store = ByteStoreAdapter(Silent())
    store.put_many({KEYS[0]: b"value"})
    assert (store.stats().entries, store.stats().bytes) == (1, 5)


@pytest.mark.parametrize("number", [0, 2, 4])
def test_another_number_of_values_than_keys_is_no_answer(number: int) -> None:
    class Short(DictByteStore):
        def mget(self, keys: Sequence[str]) -> list[bytes | None]:
            return [b"value"] * number

    with pytest.raises(StoreError, match=rf"Short.mget must give one value for each key, got {number} for 3 keys"):
        ByteStoreAdapter(Short()).get_many(KEYS[:3])


def test_text_where_bytes_were_kept_is_a_miss_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    class Text(DictByteStore):
        def mget(self, keys: Sequence[str]) -> list[Any]:
            return ["text" if key in self.items else None for key in keys]

    store = ByteStoreAdapter(Text())
    store.put_many({KEYS[0]: b"value", KEYS[1]: b"value"})
    assert store.get_many(KEYS) == store.get_many(KEYS) == {}
    assert caplog.text.count("Text returns str where bytes were kept") == 1
    assert store.delete(KEYS) == 2


def test_memory_evicts_what_is_not_used_again() -> None:
    store = MemoryStore(3000)
    for key in KEYS[:3]:
        store.put_many({key: bytes(1000)})
    store.get_many([KEYS[0]])
    store.put_many({KEYS[3]: bytes(1000)})
    assert set(store.keys()) == {KEYS[0], KEYS[2], KEYS[3]}
    assert store.put_many({KEYS[4]: bytes(3001)}) == 0
    stats = store.stats()
    assert (stats.entries, stats.bytes, stats.evicted, stats.refused) == (3, 3000, 1, 1)


def test_memory_is_shared_by_copies_and_pickled_without_passages() -> None:
    store = MemoryStore(3000)
    store.put_many({KEYS[0]: b"x"})
    assert copy.copy(store) is store
    assert copy.deepcopy(store) is store
    other = pickle.loads(pickle.dumps(store))
    assert (other.stats().limit, other.stats().entries) == (3000, 0)


def test_a_store_that_lists_keys_in_another_form_is_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    class Hashing(DictByteStore):
        def yield_keys(self, *, prefix: str | None = None) -> Iterator[str]:
            yield from (f"hash-{hash(key)}" for key in self.items)

    store = ByteStoreAdapter(Hashing())
    store.put_many({KEYS[0]: b"value"})
    assert store.get_many(KEYS) == {KEYS[0]: b"value"}
    assert list(store.keys()) == list(store.keys()) == []
    assert caplog.text.count("Hashing lists keys, but none of a passage") == 1


def test_memory_of_zero_bytes_keeps_nothing() -> None:
    store = MemoryStore(0)
    assert store.put_many({KEYS[0]: b"x"}) == 0
    assert store.get_many(KEYS) == {}


def test_disk_evicts_the_oldest_and_says_so_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = DiskStore(tmp_path / "store", limit=1_000_000)
    for number in range(60):
        key = key_of(number)
        store.put_many({key: value_of(key, 40_000)})
    stats = store.stats()
    assert stats.bytes is not None
    assert stats.bytes <= 1_050_000
    assert stats.evicted > 30
    assert key_of(59) in store.get_many([key_of(59)])
    assert store.get_many([key_of(0)]) == {}
    assert caplog.text.count("reached its limit of 1000000 bytes") == 1


def test_disk_refuses_a_value_above_its_limit_aloud(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = DiskStore(tmp_path / "store", limit=100_000)
    assert store.put_many({KEYS[0]: bytes(100_001), KEYS[1]: b"small"}) == 1
    assert set(store.get_many(KEYS)) == {KEYS[1]}
    assert store.stats().refused == 1
    assert "a passage of 100001 bytes is larger than the cache's limit of 100000 and is not kept" in caplog.text


def test_disk_is_shared_by_instances_and_private_to_the_user(tmp_path: Path) -> None:
    DiskStore(tmp_path / "a" / "store").put_many({KEYS[0]: b"value"})
    assert DiskStore(tmp_path / "a" / "store").get_many(KEYS) == {KEYS[0]: b"value"}
    assert (tmp_path / "a" / "store").stat().st_mode & 0o777 == 0o700


def test_the_limit_stays_with_the_folder(tmp_path: Path) -> None:
    """Somebody who opens a folder without a wish must not evict what its owner keeps."""
    DiskStore(tmp_path / "store", limit=50_000_000).put_many({key: value_of(key, 100_000) for key in KEYS})
    for options in ({}, {"read_only": True}):
        store = DiskStore(tmp_path / "store", **options)
        assert len(store.get_many(KEYS)) == len(KEYS)
        assert store.stats().limit == 50_000_000
    DiskStore(tmp_path / "store", limit=500_000).put_many({key_of(77): b"x"})
    assert len(DiskStore(tmp_path / "store").get_many(KEYS)) < len(KEYS)
    assert DiskStore(tmp_path / "store").stats().limit == 500_000


def test_large_batches_are_written_in_several_transactions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kalm_rag.cache.connections._TRANSACTION", 100_000)
    store = DiskStore(tmp_path / "store")
    sizes: list[int] = []
    writer = store._writer
    put = writer._put
    monkeypatch.setattr(writer, "_put", lambda cache, part, *rest: sizes.append(len(part)) or put(cache, part, *rest))
    assert store.put_many({key: value_of(key, 40_000) for key in KEYS}) == 12
    assert sizes == [3, 3, 3, 3]


def test_disk_is_copied_by_its_arguments(tmp_path: Path) -> None:
    store = DiskStore(tmp_path / "store", limit=5_000_000)
    store.put_many({KEYS[0]: b"value"})
    assert copy.deepcopy(store) is store
    other = pickle.loads(pickle.dumps(store))
    assert other.get_many(KEYS) == {KEYS[0]: b"value"}
    assert other.stats().limit == 5_000_000
    assert pickle.loads(pickle.dumps(DiskStore(tmp_path / "store", read_only=True))).read_only
