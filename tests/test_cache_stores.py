"""The contract that every store keeps."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from cachekit import key_of, value_of

from kalm_rag.cache import ByteStoreAdapter, DiskStore, MemoryStore, Store


class DictByteStore:
    """The shape of `langchain_core.stores.InMemoryByteStore`."""

    def __init__(self) -> None:
        self.items: dict[str, bytes] = {"other-data": b"x"}

    def mget(self, keys: Sequence[str]) -> list[bytes | None]:
        return [self.items.get(key) for key in keys]

    def mset(self, key_value_pairs: Sequence[tuple[str, bytes]]) -> None:
        self.items.update(key_value_pairs)

    def mdelete(self, keys: Sequence[str]) -> None:
        for key in keys:
            self.items.pop(key, None)

    def yield_keys(self, *, prefix: str | None = None) -> Iterator[str]:
        yield from [key for key in self.items if key.startswith(prefix or "")]


STORES: dict[str, Callable[[Path], Any]] = {
    "disk": lambda folder: DiskStore(folder / "store"),
    "memory": lambda _: MemoryStore(10_000_000),
    "bytestore": lambda _: ByteStoreAdapter(DictByteStore()),
}
KEYS = [key_of(number) for number in range(12)]


@pytest.mark.parametrize("kind", STORES)
class TestContract:
    @pytest.fixture
    def store(self, kind: str, tmp_path: Path) -> Iterator[Store]:
        store = STORES[kind](tmp_path)
        assert isinstance(store, Store)
        yield store
        store.close()

    @pytest.mark.parametrize("size", [0, 1, 1000, 40_000, 300_000])
    def test_what_is_put_is_got(self, store: Store, size: int) -> None:
        items = {key: value_of(key, size) for key in KEYS}
        assert store.put_many(items) == len(items)
        found = store.get_many([*KEYS, key_of(99)])
        assert found == items
        assert all(type(value) is bytes for value in found.values())

    def test_nothing_in_nothing_out(self, store: Store) -> None:
        assert store.get_many([]) == {}
        assert store.get_many(KEYS) == {}
        assert store.put_many({}) == 0
        assert list(store.keys()) == []
        assert store.delete([]) == 0

    def test_the_last_put_wins(self, store: Store) -> None:
        store.put_many({KEYS[0]: b"old" * 100_000})
        store.put_many({KEYS[0]: b"new"})
        assert store.get_many(KEYS) == {KEYS[0]: b"new"}
        assert store.stats().entries == 1

    def test_delete(self, store: Store) -> None:
        store.put_many(dict.fromkeys(KEYS, b"value"))
        assert store.delete([KEYS[0], KEYS[1], key_of(99)]) == 2
        assert sorted(store.keys()) == sorted(KEYS[2:])
        assert store.delete([KEYS[0]]) == 0

    def test_keys_while_writing(self, store: Store) -> None:
        store.put_many(dict.fromkeys(KEYS, b"value"))
        seen = []
        for key in store.keys():  # noqa: SIM118
            seen.append(key)
            store.put_many({key_of(1000 + len(seen)): b"more"})
            store.delete([key])
            if len(seen) > 100:
                break
        assert set(KEYS) <= set(seen)

    def test_stats(self, store: Store) -> None:
        store.put_many({key: value_of(key, 1000) for key in KEYS})
        stats = store.stats()
        assert stats.entries == len(KEYS)
        assert stats.bytes is None or 12_000 <= stats.bytes <= 200_000

    def test_threads(self, store: Store) -> None:
        errors: list[BaseException] = []

        def work(number: int) -> None:
            try:
                for turn in range(20):
                    key = key_of((number + turn) % 8)
                    store.put_many({key: value_of(key, 5000)})
                    for found, value in store.get_many([key_of(other) for other in range(8)]).items():
                        assert value == value_of(found, 5000)
            except BaseException as error:  # noqa: BLE001
                errors.append(error)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []

    def test_use_after_close(self, store: Store) -> None:
        store.put_many({KEYS[0]: b"value"})
        store.close()
        assert store.get_many([KEYS[0]]) in ({}, {KEYS[0]: b"value"})
        assert store.put_many({KEYS[1]: b"value"}) == 1


def test_memory_evicts_the_least_recently_used() -> None:
    store = MemoryStore(3000)
    for key in KEYS[:3]:
        store.put_many({key: bytes(1000)})
    store.get_many([KEYS[0]])
    store.put_many({KEYS[3]: bytes(1000)})
    assert set(store.keys()) == {KEYS[0], KEYS[2], KEYS[3]}
    assert store.put_many({KEYS[4]: bytes(3001)}) == 0
    stats = store.stats()
    assert (stats.entries, stats.bytes, stats.evicted, stats.refused) == (3, 3000, 1, 1)


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
    monkeypatch.setattr("kalm_rag.cache.disk._TRANSACTION", 100_000)
    store = DiskStore(tmp_path / "store")
    sizes: list[int] = []
    put = store._put
    monkeypatch.setattr(store, "_put", lambda cache, part, limit: sizes.append(len(part)) or put(cache, part, limit))
    assert store.put_many({key: value_of(key, 40_000) for key in KEYS}) == 12
    assert sizes == [3, 3, 3, 3]
