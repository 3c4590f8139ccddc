"""Rules of the store on disk that only a second process, a failed transaction or a strange file puts to the test."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cachekit import key_of, value_of

from kalm_rag.cache import DiskStore, StoreError
from kalm_rag.cache.frame import Frame

SMALL, LARGE = 4_000, 300_000
"""Values in the database, and in files of their own."""

resource = pytest.importorskip("resource", reason="needs limits on the size of a file") if os.name == "posix" else None


def value_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("??/??/*.val"))


@contextlib.contextmanager
def when_verified(monkeypatch: pytest.MonkeyPatch, key: str, act: Callable[[], object]) -> Iterator[None]:
    """Act once, just after a check has read the entry of this key and before it knows what is wrong with it."""
    acted: list[str] = []
    verify = Frame.from_bytes

    def watched(data: bytes, of: str, *secret: Any) -> Any:
        if of == key and not acted:
            acted.append(of)
            act()
        return verify(data, of, *secret)

    with monkeypatch.context() as patch:
        patch.setattr(Frame, "from_bytes", watched)
        yield
    assert acted, "the check never came to this entry"


def damaged(value: bytes) -> bytes:
    return value[:-1] + bytes([value[-1] ^ 1])


@pytest.mark.parametrize("size", [SMALL, LARGE], ids=["in-database", "in-files"])
def test_a_check_removes_what_it_read_and_not_what_was_stored_since(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """A damaged entry that another process encodes again during the check is sound, and stays."""
    good = {key_of(n): value_of(key_of(n), size) for n in range(4)}
    victim = key_of(2)
    store, other = DiskStore(tmp_path / "store"), DiskStore(tmp_path / "store")
    store.put_many({**good, victim: damaged(good[victim]), key_of(3): damaged(good[key_of(3)])})
    with when_verified(monkeypatch, victim, lambda: other.put_many({victim: good[victim]})):
        store.check(fix=True, orphan_age=0)
    kept = {key: value for key, value in good.items() if key != key_of(3)}
    for reader in (store, other, DiskStore(tmp_path / "store")):
        assert reader.get_many(list(good)) == kept, "the rewritten entry stays, and the damaged one is removed"
    assert store.check(orphan_age=0).clean


def test_a_check_leaves_files_that_were_stored_since_it_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that the check did not see has a file that it must not take for an orphan."""
    first, later = key_of(0), key_of(1)
    store, other = DiskStore(tmp_path / "store"), DiskStore(tmp_path / "store")
    store.put_many({first: damaged(value_of(first, LARGE))})
    with when_verified(monkeypatch, first, lambda: other.put_many({later: value_of(later, LARGE)})):
        store.check(fix=True)
    assert other.get_many([first, later]) == {later: value_of(later, LARGE)}
    assert len(value_files(tmp_path / "store")) == 1


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writes beyond this size of any file fail, as they do on a full disk."""
    assert resource is not None
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.skipif(resource is None, reason="needs limits on the size of a file")
def test_a_transaction_that_fails_leaves_everything_as_it_was(tmp_path: Path) -> None:
    """The files of values that were not kept are gone, and those of values that were not replaced are there."""
    folder = tmp_path / "store"
    old = {key_of(n): value_of(key_of(n), LARGE) for n in range(3)}
    store = DiskStore(folder)
    store.put_many(old)
    before = value_files(folder)
    assert len(before) == 3
    replaced = {key: value_of(key, LARGE, "replaced") for key in old}
    new = {key_of(n): value_of(key_of(n), LARGE) for n in range(3, 6)}
    in_database = {key_of(n): value_of(key_of(n), 200_000) for n in range(6, 14)}
    with largest_file(1_000_000), pytest.raises(StoreError):
        store.put_many({**replaced, **new, **in_database})  # the files fit, the database does not
    assert value_files(folder) == before
    for reader in (store, DiskStore(folder)):
        assert reader.get_many([*old, *new, *in_database]) == old
    assert store.stats().entries == len(old)
    assert store.put_many({**replaced, **new}) == 6
    assert store.get_many([*old, *new]) == {**replaced, **new}
    assert len(value_files(folder)) == 6, "the files of replaced values are gone"


@pytest.mark.parametrize("bad", [{"not a key": b"x"}, {key_of(9): "text"}], ids=["key", "value"])
def test_a_transaction_with_an_item_that_is_refused_leaves_no_file(tmp_path: Path, bad: dict[str, Any]) -> None:
    folder = tmp_path / "store"
    store = DiskStore(folder)
    store.put_many({key_of(0): b"x"})
    with pytest.raises(StoreError):
        store.put_many({key_of(1): value_of(key_of(1), LARGE), **bad})
    assert value_files(folder) == []
    assert store.get_many([key_of(0), key_of(1)]) == {key_of(0): b"x"}


@pytest.mark.parametrize("read_only", [False, True], ids=["read-write", "read-only"])
def test_a_file_that_is_larger_than_any_value_is_not_read(tmp_path: Path, read_only: bool) -> None:
    """A sparse file costs its owner nothing, and would cost its reader a gigabyte of memory."""
    folder = tmp_path / "store"
    values = {key_of(n): value_of(key_of(n), LARGE) for n in range(2)}
    store = DiskStore(folder)
    store.put_many(values)
    store.close()
    huge = value_files(folder)[0]
    os.truncate(huge, (1 << 30) + 1)
    store = DiskStore(folder, read_only=read_only)
    tracemalloc.start()
    try:
        found = store.get_many(list(values))
        report = store.check()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(found) == 1, "only the other value is found"
    assert found.items() <= values.items()
    assert report.corrupt == 1
    assert peak < 1 << 28
    if not read_only:
        assert store.check(fix=True).corrupt == 1
        assert not huge.exists()
        assert store.put_many(values) == 2
        assert store.get_many(list(values)) == values


def test_a_flipped_bit_in_the_database_is_repaired_or_explained(
    fast_path: Path, scale: int, tally: Callable[[str, int, int], None]
) -> None:
    """Wherever it is: every call works or raises a `StoreError`, and what a repair leaves works again and verifies."""
    values = {key_of(n): value_of(key_of(n), 600) for n in range(8)}
    store = DiskStore(fast_path / "store")
    store.put_many({**values, key_of(8): value_of(key_of(8), LARGE)})
    store.close()
    size = (fast_path / "store" / "cache.db").stat().st_size
    offsets = range(0, size, max(1, size // (150 * scale)))
    refused = 0
    for trial, offset in enumerate(offsets):
        folder = fast_path / "damaged"
        shutil.copytree(fast_path / "store", folder)
        with (folder / "cache.db").open("r+b") as file:
            file.seek(offset)
            old = file.read(1)[0]
            file.seek(offset)
            file.write(bytes([old ^ 1 << trial % 8]))
        store = DiskStore(folder)
        for call in (
            lambda store=store: store.get_many(list(values)),
            lambda store=store: list(store.keys()),
            lambda store=store: store.stats(),
            lambda store=store: store.check(),
            lambda store=store: store.put_many({key_of(9): b"x"}) and store.delete([key_of(9)]),
        ):
            with contextlib.suppress(StoreError):
                call()
        store.close()
        with contextlib.closing(DiskStore(folder)) as store:
            try:
                store.check(fix=True, orphan_age=0)
            except StoreError:
                refused += 1
            else:
                assert store.check(orphan_age=0).clean, f"after a flipped bit at {offset}"
                assert store.get_many(list(values)).items() <= values.items(), f"after a flipped bit at {offset}"
                assert store.put_many(values) == len(values)
                assert store.get_many(list(values)) == values, f"after a flipped bit at {offset}"
        shutil.rmtree(folder)
    tally("bit flips in the database: refused as not ours, or broken rules", 0, len(offsets) - refused)
    assert refused < len(offsets) / 10, "a repair that refuses most folders is none"


@pytest.mark.parametrize("fix", [False, True])
def test_a_schema_that_is_no_text_is_an_error_of_the_store(tmp_path: Path, fix: bool) -> None:
    """SQLite quotes the damaged statement in its message, and Python cannot decode that."""
    store = DiskStore(tmp_path / "store")
    store.put_many({key_of(0): b"x"})
    store.close()
    database = tmp_path / "store" / "cache.db"
    statement = b"CREATE INDEX Cache_store_time ON Cache (store_time)"
    content = database.read_bytes()
    assert content.count(statement) == 1
    database.write_bytes(content.replace(statement, statement[:-2] + b"\xf3)"))
    for call in (lambda: store.get_many([key_of(0)]), lambda: list(store.keys()), lambda: store.put_many({})):
        with pytest.raises(StoreError):
            call()
    with contextlib.suppress(StoreError):
        store.check(fix=fix)
    store.close()


@pytest.mark.parametrize("first", ["read", "write", "check --fix"])
def test_a_database_whose_making_was_cut_off_is_rolled_back(tmp_path: Path, first: str) -> None:
    """A loss of power while the database is made leaves a journal that the next process rolls back."""
    folder = tmp_path / "store"
    DiskStore(folder).put_many({})
    making = tmp_path / "making.db"
    with contextlib.closing(sqlite3.connect(making, isolation_level=None)) as connection:
        connection.execute("PRAGMA cache_size = 1")
        connection.execute("CREATE TABLE Settings ( key TEXT NOT NULL UNIQUE, value)")
        connection.execute("BEGIN")
        connection.executemany("INSERT INTO Settings VALUES (?, 1)", [(f"{n:01000}",) for n in range(40)])
        for suffix in ("", "-wal", "-shm"):
            (folder / f"cache.db{suffix}").unlink(missing_ok=True)
        shutil.copy(making, folder / "cache.db")
        shutil.copy(f"{making}-journal", folder / "cache.db-journal")
    store = DiskStore(folder)
    if first == "read":
        assert store.get_many([key_of(0)]) == {}
    elif first == "check --fix":
        assert store.check(fix=True).entries == 0
    assert store.put_many({key_of(0): b"x"}) == 1
    assert store.get_many([key_of(0)]) == {key_of(0): b"x"}
