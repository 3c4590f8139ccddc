"""Any order of what can happen to a store, against a dict: the bytes that were put, or a miss.

Two stores have one folder open, as two processes do. While nothing damages the folder and the limit is not reached,
a miss is as wrong as other bytes, and no call fails. A damaged value file may cost its own entry. A damaged database
may cost entries, bring older ones back, or make calls fail with a `StoreError`; a check with `fix` that succeeds ends
that.
"""

from __future__ import annotations

import collections
import contextlib
import shutil
import sqlite3
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cachekit import key_of, unpack, value_of
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from kalm_rag.cache import DiskStore, StoreError, strict_disk
from kalm_rag.cache.frame import FrameError

SMALL, LARGE = 1_500, 6_000
"""Values in the database, and in files of their own."""

LIMIT = 400_000
"""More than all keys need, and little enough to be filled."""

KEYS = [key_of(number) for number in range(6)]
FILLERS = [key_of(number) for number in range(100, 180)]
PROBE = key_of(999)

stores = st.integers(0, 1)
ages = st.sampled_from([0.0, 600.0])
some_keys = st.lists(st.sampled_from(KEYS), min_size=1, max_size=3, unique=True)
places = st.integers(0, 1_000_000)
steps: collections.Counter[str] = collections.Counter()


class StoreMachine(RuleBasedStateMachine):
    """A folder, two stores that have it open, and what they must find."""

    place: Path
    """Where folders are made."""

    @initialize(careful=st.booleans())
    def start(self, careful: bool) -> None:
        self.root = Path(tempfile.mkdtemp(dir=self.place))
        self.folder = self.root / "store-0"
        self.stores = [self.open(), self.open()]
        self.careful = careful
        self.current: dict[str, bytes] = {}
        self.history: dict[str, set[bytes]] = {}
        self.hurt: set[str] = set()
        self.full = self.damaged = self.orphans = False
        self.version = self.moves = 0
        self.put_items(0, {key: value_of(key, LARGE if place % 2 else SMALL) for place, key in enumerate(KEYS)})

    def open(self, **options: Any) -> DiskStore:
        return DiskStore(self.folder, **({"limit": LIMIT} | options))

    def attempt(self, what: str, call: Callable[[], Any]) -> Any:
        """The result of a call, or None if it failed, which it may only on a damaged database."""
        steps[what] += 1
        try:
            return call()
        except StoreError:
            if not self.damaged:
                raise
            steps["errors of a damaged database"] += 1
            return None

    def judge(self, found: dict[str, bytes], asked: list[str]) -> None:
        assert found.keys() <= set(asked)
        for key in asked:
            value = found.get(key)
            with contextlib.suppress(FrameError):
                if value is not None:
                    unpack(value, key)
                    allowed = self.history.get(key, set()) if self.damaged else {self.current.get(key)}
                    assert value in allowed, f"other bytes under {key[:8]}"
                    steps["hits"] += 1
                    continue
            if key in self.current and not (self.damaged or self.full or key in self.hurt):
                assert value is None, f"damaged bytes under {key[:8]}, which nothing touched"
                raise AssertionError(f"{key[:8]} is lost")

    def put_items(self, number: int, items: dict[str, bytes]) -> None:
        for key, value in items.items():
            self.history.setdefault(key, set()).add(value)
        kept = self.attempt("put", lambda: self.stores[number].put_many(items))
        if kept is None:
            return
        assert self.damaged or kept == len(items)
        self.current |= items
        self.hurt -= items.keys()

    @rule(number=stores, keys=some_keys, size=st.sampled_from([SMALL, LARGE]))
    def put(self, number: int, keys: list[str], size: int) -> None:
        self.version += 1
        items = {key: value_of(key, size, str(self.version)) for key in keys}
        self.put_items(number, items)
        if not self.damaged:
            found = self.stores[1 - number].get_many(keys)
            assert found == items, "what was just put is found by the other process, also when the cache is full"

    @rule(number=stores, size=st.sampled_from([SMALL, LARGE]))
    def fill(self, number: int, size: int) -> None:
        """Store more than the limit allows: the oldest entries leave."""
        self.full = True
        self.put_items(number, {key: value_of(key, size) for key in FILLERS})
        self.put_items(number, {key: value_of(key, LARGE) for key in FILLERS[:30]})

    @rule(number=stores, key=st.sampled_from(KEYS))
    def put_too_much(self, number: int, key: str) -> None:
        value = value_of(key, LIMIT + 1000)
        kept = self.attempt("put above the limit", lambda: self.stores[number].put_many({key: value}))
        if kept and self.damaged:  # the limit stands in the database, and may be damaged as well
            self.history.setdefault(key, set()).add(value)
        assert self.damaged or kept == 0

    @rule(number=stores, keys=some_keys)
    def get(self, number: int, keys: list[str]) -> None:
        found = self.attempt("get", lambda: self.stores[number].get_many(keys))
        self.judge(found or {}, keys if found is not None else [])

    @rule()
    def get_read_only(self) -> None:
        reader = self.open(read_only=True, limit=None)
        if not (self.folder / "cache.db").exists():
            return
        found = self.attempt("get read-only", lambda: reader.get_many(KEYS))
        reader.close()
        self.judge(found or {}, KEYS if found is not None else [])

    @rule(number=stores, keys=some_keys)
    def delete(self, number: int, keys: list[str]) -> None:
        deleted = self.attempt("delete", lambda: self.stores[number].delete(keys))
        if deleted is None:
            return
        present = self.current.keys() & set(keys)
        assert self.damaged or self.full or deleted == len(present)
        for key in keys:
            self.current.pop(key, None)
            self.hurt.discard(key)

    @rule(number=stores)
    def clear(self, number: int) -> None:
        cleared = self.attempt("clear", lambda: self.stores[number].clear())
        if cleared is None:
            return
        self.current, self.hurt = {}, set()
        if not self.damaged:
            assert list(self.stores[number].keys()) == []
            assert self.orphans or list(self.folder.glob("??/??/*.val")) == []

    @rule(number=stores)
    def list_keys(self, number: int) -> None:
        listed = self.attempt("keys", lambda: list(self.stores[number].keys()))
        stats = self.attempt("stats", lambda: self.stores[number].stats())
        if self.damaged:
            return
        assert len(listed) == len(set(listed)) == stats.entries
        assert set(listed) <= self.current.keys()
        assert self.full or set(listed) == self.current.keys()
        assert stats.limit == LIMIT

    @rule(number=stores, fix=st.booleans(), age=ages)
    def check(self, number: int, fix: bool, age: float) -> None:
        report = self.attempt(
            "check --fix" if fix else "check", lambda: self.stores[number].check(fix=fix, orphan_age=age)
        )
        if report is None:
            return
        if not self.damaged:
            assert report.corrupt + report.missing <= len(self.hurt), "sound entries are called bad"
            assert self.hurt or self.orphans or report.clean, "there is nothing to fix"
        if fix:
            self.orphans = bool(age) and (self.orphans or self.damaged)
            self.healed(number)

    def healed(self, number: int) -> None:
        """After a check with `fix` that succeeded, all is well again, and stays so."""
        assert self.stores[number].check(orphan_age=600.0).clean
        with contextlib.closing(self.open()) as store:
            left = store.get_many(list(store.keys()))
        for key, value in left.items():
            unpack(value, key)
        self.judge({key: value for key, value in left.items() if key in KEYS}, KEYS)
        self.hurt &= self.current.keys() & left.keys()
        for key in self.current.keys() - left.keys():
            del self.current[key]
        if not self.damaged:
            return
        steps["healed databases"] += 1
        for one in self.stores:
            one.close()
        self.stores = [self.open(), self.open()]
        log = self.folder / "cache.db-wal"
        if log.exists() and log.stat().st_size:
            return  # nobody could move the log into the database, and it may be what is damaged
        assert self.stores[0].put_many({PROBE: value_of(PROBE, LARGE)}) == 1
        assert self.stores[1].get_many([PROBE]) == {PROBE: value_of(PROBE, LARGE)}
        self.stores[0].delete([PROBE])
        self.damaged, self.full = False, True  # the limit may have been damaged, and entries have left for that
        self.current, self.hurt = left, set()

    @rule(number=stores, properly=st.booleans())
    def reopen(self, number: int, properly: bool) -> None:
        steps["reopen"] += 1
        if properly:
            self.stores[number].close()
        self.stores[number] = self.open()

    @rule(shared_memory=st.booleans())
    def kill(self, shared_memory: bool) -> None:
        """Both processes end at once, and go on with the files as they stand."""
        steps["kill"] += 1
        old, self.moves = self.folder, self.moves + 1
        self.folder = self.root / f"store-{self.moves}"
        if old.exists():
            shutil.copytree(old, self.folder)
        if not shared_memory:
            (self.folder / "cache.db-shm").unlink(missing_ok=True)
        for store in self.stores:
            store.close()
        shutil.rmtree(old, ignore_errors=True)
        self.stores = [self.open(), self.open()]

    def file_of(self, place: int) -> tuple[str, Path] | None:
        """An entry that has a file of its own."""
        with (
            contextlib.suppress(sqlite3.Error),
            contextlib.closing(
                sqlite3.connect(f"{(self.folder / 'cache.db').as_uri()}?mode=ro", uri=True)
            ) as connection,
        ):
            rows = connection.execute("SELECT key, filename FROM Cache WHERE filename NOT NULL ORDER BY key").fetchall()
            if rows:
                key, name = rows[place % len(rows)]
                return key, self.folder / name
        return None

    @rule(place=places, how=st.sampled_from(["flip", "cut", "remove", "empty", "swap"]))
    def damage_file(self, place: int, how: str) -> None:
        if self.damaged:
            return
        one, other = self.file_of(place), self.file_of(place // 7)
        if one is None or other is None or not one[1].exists():
            return
        steps["damage of a value file"] += 1
        key, path = one
        data = bytearray(path.read_bytes())
        if how == "remove":
            path.unlink()
        elif how == "swap":
            if not other[1].exists() or other[0] == key:
                return
            path.write_bytes(other[1].read_bytes())
        elif data:
            data[place % len(data)] ^= 1 << place % 8
            path.write_bytes({"flip": data, "cut": data[: place % len(data)], "empty": b""}[how])
        self.hurt.add(key)

    @precondition(lambda self: not self.careful)
    @rule(number=stores, hits=st.lists(places, min_size=1, max_size=3), page=st.booleans(), age=ages)
    def damage_and_repair(self, number: int, hits: list[int], page: bool, age: float) -> None:
        """Damage while nobody has the folder open, whatever works then, and a repair."""
        for store in self.stores:
            store.close()
        for place in hits:
            self.damage_database(place, "cache.db", page)
        self.get(1 - number, KEYS)
        self.check(number, True, age)

    @precondition(lambda self: not self.careful)
    @rule(place=places, name=st.sampled_from(["cache.db", "cache.db", "cache.db-wal"]), page=st.booleans())
    def damage_database(self, place: int, name: str, page: bool) -> None:
        path = self.folder / name
        if not path.exists() or path.stat().st_size == 0:
            return
        steps["damage of the database"] += 1
        size = path.stat().st_size
        with path.open("r+b") as file:
            file.seek(place % size // 4096 * 4096 if page else place % size)
            old = file.read(1)
            file.seek(-1, 1)
            file.write(b"\xa5" * min(4096, size) if page else bytes([old[0] ^ 1 << place % 8]))
        self.damaged = True

    def teardown(self) -> None:
        if hasattr(self, "root"):
            for store in self.stores:
                store.close()
            shutil.rmtree(self.root, ignore_errors=True)


def test_any_order_of_events(
    fast_path: Path, monkeypatch: pytest.MonkeyPatch, scale: int, tally: Callable[[str, int, int], None]
) -> None:
    monkeypatch.setattr(StoreMachine, "place", fast_path, raising=False)
    monkeypatch.setitem(strict_disk.SETTINGS, "disk_min_file_size", 4096)
    steps.clear()
    run_state_machine_as_test(
        StoreMachine,
        settings=settings(
            max_examples=80 * scale,
            stateful_step_count=40,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    for what in ("hits", "kill", "check --fix", "damage of a value file", "damage of the database", "healed databases"):
        assert steps[what] > 0, f"no {what} at all: {steps}"
    for what, count in steps.items():
        tally(f"stateful, {what}: broken rules", 0, count)
