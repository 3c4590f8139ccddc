"""Entries that are added once and evicted last: the first writer wins, and every fault is another try."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cachekit import DictByteStore, finish, frames, key_of, spawn, value_of

from kalm_rag import PassageCache
from kalm_rag.cache import ByteStoreAdapter, DiskStore, MemoryStore
from kalm_rag.cache.frame import Frame, FrameError, Head
from kalm_rag.cache.store import add
from kalm_rag.cache.transfer import export_shards, import_shards

KEY = key_of(0)
STORES: dict[str, Callable[[Path], Any]] = {
    "disk": lambda folder: DiskStore(folder / "store"),
    "memory": lambda _: MemoryStore(10_000_000),
    "bytestore": lambda _: ByteStoreAdapter(DictByteStore()),
}


def frame(number: float = 1.0, key: str = KEY) -> Frame:
    numbers = torch.full((4, 8), number)
    return Frame.from_tensors(
        key, b"m" * 32, numbers, ratio=4, tokens=4, truncated=False, prefilled=True, reference=True
    )


def decode(found: Frame) -> float:
    if not found.reference:
        msg = "no reference"
        raise FrameError(msg)
    return float(found.tensors()[0][0, 0])


def never() -> Frame:
    msg = "it is there already"
    raise AssertionError(msg)


@pytest.mark.parametrize("kind", STORES)
class TestEveryStore:
    def test_the_first_value_stays(self, kind: str, tmp_path: Path) -> None:
        store = STORES[kind](tmp_path)
        add(store, KEY, b"first")
        add(store, KEY, b"second")
        assert store.get_many([KEY]) == {KEY: b"first"}

    def test_it_is_made_once(self, kind: str, tmp_path: Path) -> None:
        cache = PassageCache(STORES[kind](tmp_path), memory=0)
        assert cache.get_or_add(KEY, lambda: frame(3.0), decode) == 3.0
        assert cache.get_or_add(KEY, never, decode) == 3.0

    @pytest.mark.parametrize("fault", ["cut", "flipped", "empty", "no reference", "another key"])
    def test_what_does_not_verify_is_replaced(self, kind: str, tmp_path: Path, fault: str) -> None:
        store = STORES[kind](tmp_path)
        data = frame().to_bytes()
        [plain] = frames(1).values()
        bad = {
            "cut": data[:-3],
            "flipped": data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
            "empty": b"",
            "no reference": Frame.from_tensors(
                KEY, b"m" * 32, torch.ones(4, 8), ratio=4, tokens=4, truncated=False
            ).to_bytes(),
            "another key": plain,
        }[fault]
        store.put_many({KEY: bad})
        cache = PassageCache(store, memory=0)
        assert cache.get_or_add(KEY, lambda: frame(2.0), decode) == 2.0
        assert cache.get_or_add(KEY, never, decode) == 2.0
        assert cache.stats().store.counters.corrupt == 1


def test_the_flag_survives_and_a_passage_has_none() -> None:
    data = frame().to_bytes()
    assert Frame.from_bytes(data, KEY).reference
    assert Head.from_bytes(data, KEY).reference
    [(key, plain)] = frames(1).items()
    assert not Frame.from_bytes(plain, key).reference
    assert not Head.from_bytes(plain, key).reference


def test_without_a_store_it_is_made_each_time() -> None:
    cache = PassageCache(None)
    assert [cache.get_or_add(KEY, lambda: frame(number), decode) for number in (1.0, 2.0)] == [1.0, 2.0]  # noqa: B023


def test_a_read_only_folder_serves_what_it_has_and_takes_nothing(tmp_path: Path) -> None:
    PassageCache(tmp_path).get_or_add(KEY, lambda: frame(5.0), decode)
    cache = PassageCache(tmp_path, read_only=True)
    assert cache.get_or_add(KEY, never, decode) == 5.0
    other = key_of(1)
    assert cache.get_or_add(other, lambda: frame(6.0, other), decode) == 6.0
    assert other not in list(DiskStore(tmp_path).keys())


def test_one_without_the_secret_is_replaced(tmp_path: Path) -> None:
    PassageCache(tmp_path).get_or_add(KEY, lambda: frame(1.0), decode)
    cache = PassageCache(tmp_path, secret=b"s" * 32)
    assert cache.get_or_add(KEY, lambda: frame(2.0), decode) == 2.0


def test_of_processes_that_add_at_once_one_wins_for_all(tmp_path: Path) -> None:
    code = """
store = DiskStore(sys.argv[1])
open(sys.argv[3] + "/" + sys.argv[2], "w").close()
while len(os.listdir(sys.argv[3])) < 3:
    time.sleep(0.001)
kept = [store.add(key_of(number), sys.argv[2].encode()) for number in range(40)]
print(json.dumps([kept, [store.get_many([key_of(number)])[key_of(number)].decode() for number in range(40)]]))
"""
    ready = tmp_path / "ready"
    ready.mkdir()
    children = [spawn(code, tmp_path / "store", name, ready) for name in ("one", "two", "three")]
    found = [finish(child) for child in children]
    assert [sum(kept) for kept in zip(*(kept for kept, _ in found), strict=True)] == [1] * 40
    assert found[0][1] == found[1][1] == found[2][1]


def test_eviction_takes_it_last(tmp_path: Path) -> None:
    store = DiskStore(tmp_path, limit=2_000_000)
    assert store.add(KEY, value_of(KEY, 50_000))
    for number in range(1, 100):
        store.put_many({key_of(number): value_of(key_of(number), 50_000)})
    assert store.stats().evicted > 50
    assert KEY in store.get_many([KEY])
    assert key_of(1) not in store.get_many([key_of(1)])
    assert key_of(99) in store.get_many([key_of(99)])


def test_what_is_too_large_is_refused_and_counted(tmp_path: Path) -> None:
    store = DiskStore(tmp_path, limit=1_000_000)
    assert not store.add(KEY, b"x" * 2_000_000)
    assert store.stats().refused == 1


def test_it_travels_and_an_import_replaces_none(tmp_path: Path) -> None:
    for name, number in (("here", 1.0), ("there", 2.0)):
        PassageCache(tmp_path / name).get_or_add(KEY, lambda: frame(number), decode)  # noqa: B023
    export_shards(DiskStore(tmp_path / "there"), tmp_path / "shards")
    for name in ("here", "empty"):
        import_shards(DiskStore(tmp_path / name), sorted((tmp_path / "shards").iterdir()))
    assert PassageCache(tmp_path / "here").get_or_add(KEY, never, decode) == 1.0
    assert PassageCache(tmp_path / "empty").get_or_add(KEY, never, decode) == 2.0
