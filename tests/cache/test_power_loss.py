"""A loss of power at any moment: the store opens or heals, and gives the bytes that were put or a miss.

A child process uses a store while its system calls are recorded. Its folder is rebuilt after every prefix of them, as
a kill leaves it and as a loss of power may leave it, and a new process reads what is there.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cachekit import CHILD, key_of, unpack, value_of
from crashkit import ALL_LOST, KEPT, MODES, Call, Disk, record, strace

from kalm_rag.cache import DiskStore, StoreError, strict_disk
from kalm_rag.cache.frame import FrameError

SMALL, LARGE = 2_000, 6_000
"""Values in the database, and in files of their own."""

PREAMBLE = """
import sqlite3
from kalm_rag.cache import strict_disk
strict_disk.SETTINGS["disk_min_file_size"] = 4096
connect = sqlite3.connect
def connect_and_checkpoint_often(*arguments, **options):
    connection = connect(*arguments, **options)
    connection.execute("PRAGMA wal_autocheckpoint = 25")
    return connection
sqlite3.connect = connect_and_checkpoint_often
log = os.open(sys.argv[1] + "/log", os.O_WRONLY | os.O_CREAT)
folder = sys.argv[1] + "/store"
def say(**what):
    os.write(log, json.dumps(what).encode() + b"\\n")
def put(store, numbers, version=""):
    sizes = {n: 6000 if n % 2 else 2000 for n in numbers}
    say(begin="put", items={key_of(n): [sizes[n], version] for n in numbers})
    assert store.put_many({key_of(n): value_of(key_of(n), sizes[n], version) for n in numbers}) == len(numbers)
    say(end="put")
def delete(store, numbers):
    say(begin="delete", items={key_of(n): None for n in numbers})
    store.delete([key_of(n) for n in numbers])
    say(end="delete")
"""

USE = """
store = DiskStore(folder)
for n in range(6):
    put(store, [n])
put(store, range(6, 10))
put(store, range(4), "second")
delete(store, [4, 5])
store.close()
store = DiskStore(folder)
put(store, [4, 20, 21])
put(store, range(2), "third")
store.check(fix=True, orphan_age=0)
say(evicts=True)
store.close()
store = DiskStore(folder, limit=150_000)
for n in range(30, 60):
    put(store, [n, n + 100])
store.close()
"""

REPAIR = """
say(evicts=True)
store = DiskStore(folder)
store.check(fix=True, orphan_age=0)
put(store, [70, 71])
store.clear()
put(store, [72, 73])
store.close()
"""


class Story:
    """What a child did up to some call, by what it said."""

    def __init__(self, before: dict[str, bytes]) -> None:
        self.kept = dict(before)
        self.possible = {key: {value} for key, value in before.items()}
        self.under_way: dict[str, bytes | None] = {}
        self.evicts = False
        self.safe: dict[str, bytes] = {}
        """What was put before the last sync of the write-ahead log, and was not changed since."""

    def hear(self, line: bytes) -> None:
        what = json.loads(line)
        self.evicts |= "evicts" in what
        if "begin" in what:
            self.under_way = {key: None if how is None else value_of(key, *how) for key, how in what["items"].items()}
            for key, value in self.under_way.items():
                self.safe.pop(key, None)
                if value is not None:
                    self.possible.setdefault(key, set()).add(value)
        if "end" in what:
            for key, value in self.under_way.items():
                self.kept.pop(key, None)
                if value is not None:
                    self.kept[key] = value
            self.under_way = {}
        if self.evicts:
            self.safe = {}

    def synced(self) -> None:
        if not self.evicts:
            small = {key: value for key, value in self.kept.items() if len(value) < 4096}
            self.safe = {key: value for key, value in small.items() if key not in self.under_way}

    def broken(self, mode: str, found: dict[str, bytes]) -> list[str]:
        """What a reader may not find."""
        texts = []
        for key, values in self.possible.items():
            value = found.get(key)
            if mode == KEPT:
                allowed: set[bytes | None] = {self.kept.get(key)}
                allowed |= {self.under_way[key]} if key in self.under_way else set()
                allowed |= {None} if self.evicts else set()
            else:
                allowed = {None, *values}
                if key in self.safe and mode != ALL_LOST:
                    allowed = {self.safe[key]}
                if value is not None and value not in allowed and not verifies(key, value):
                    value = None  # a miss, for whoever verifies it
            if value not in allowed:
                texts.append(f"{key[:8]} is {'lost' if value is None else 'other bytes'}")
        return texts


def verifies(key: str, value: bytes) -> bool:
    try:
        unpack(value, key)
    except FrameError:
        return False
    return True


def look(folder: Path, story: Story, mode: str) -> list[str]:
    """What is broken in a folder that a loss of power left."""
    keys = [*story.possible, key_of(999)]
    store = DiskStore(folder)
    try:
        try:
            found = store.get_many(keys)
        except StoreError as error:
            if mode == KEPT and not story.evicts:
                return [f"does not open: {error}"]
            DiskStore(folder).check(fix=True)
            store = DiskStore(folder)
            found = store.get_many(keys)
        texts = story.broken(mode, found)
        key = key_of(999)
        if store.put_many({key: value_of(key, LARGE)}) != 1 or store.get_many([key]) != {key: value_of(key, LARGE)}:
            texts.append("keeps nothing any more")
        store.check(fix=True, orphan_age=0)
        if not store.check(orphan_age=0).clean:
            texts.append("a second check finds what the first one should have removed")
        left = store.get_many(list(store.keys()))
        texts += [f"{key[:8]} stays and does not verify" for key, value in left.items() if not verifies(key, value)]
        if mode == KEPT:
            lost = {key for key, value in found.items() if left.get(key) != value}
            texts += [f"the check removed {key[:8]}, which was sound" for key in lost if not story.evicts]
    except Exception as error:  # noqa: BLE001 - whatever it is, it is told
        return [f"does not heal: {type(error).__name__}: {error}"]
    finally:
        store.close()
    return texts


def store_with_a_damaged_index(folder: Path) -> dict[str, bytes]:
    """A store whose rows are sound and whose index over the keys is garbage."""
    import sqlite3

    values = {key_of(n): value_of(key_of(n), LARGE if n % 2 else SMALL) for n in range(8)}
    store = DiskStore(folder)
    store.put_many(values)
    store.close()
    connection = sqlite3.connect(folder / "cache.db")
    (page,) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'Cache_key_raw'").fetchone()
    (size,) = connection.execute("PRAGMA page_size").fetchone()
    connection.close()
    with (folder / "cache.db").open("r+b") as file:
        file.seek((page - 1) * size)
        file.write(b"\xa5" * size)
    return values


@pytest.mark.parametrize("what", ["use", "repair"])
def test_power_loss(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scale: int, tally: Callable[[str, int, int], None]
) -> None:
    if reason := strace():
        pytest.skip(reason)
    monkeypatch.setitem(strict_disk.SETTINGS, "disk_min_file_size", 4096)
    root = tmp_path / "root"
    root.mkdir()
    before: dict[str, bytes] = {}
    if what == "repair":
        before = store_with_a_damaged_index(root / "store")
    disk, story = Disk.of(root), Story(before)
    code = CHILD + PREAMBLE + {"use": USE, "repair": REPAIR}[what]
    calls = record([sys.executable, "-c", code, str(root)], root, tmp_path / "trace")
    writes = [
        number for number, call in enumerate(calls) if call.name != "open" and not call.path.endswith(("log", "-shm"))
    ]
    assert len(writes) > 50
    assert sum(call.name == "sync" for call in calls) > 2
    points = 90 * scale
    chosen = set(writes[:: max(1, len(writes) // points)]) | {len(calls) - 1}
    told: dict[str, list[str]] = {}
    trials = dict.fromkeys(MODES, 0)
    for number, call in enumerate(calls):
        hear(call, disk, story)
        if number not in chosen:
            continue
        for mode in MODES:
            folder = tmp_path / "after"
            disk.write_to(folder, mode)
            trials[mode] += 1
            for text in look(folder / "store", story, mode):
                told.setdefault(f"{mode}: {text}", []).append(f"{number} ({call.name} {call.path})")
            shutil.rmtree(folder)
    texts = [f"{text}, at {len(places)} calls, first after {places[0]}" for text, places in told.items()]
    assert not texts, "\n".join(texts)
    assert same_as(disk, root), "the recording misses something that the child did"
    for mode, count in trials.items():
        tally(f"power loss, {what}, {mode}: broken rules", 0, count)


def hear(call: Call, disk: Disk, story: Story) -> None:
    disk.apply(call)
    if call.path == "log" and call.name == "write":
        story.hear(call.data)
    elif call.name == "sync" and call.path.endswith(("-wal", ".db")):
        story.synced()


def same_as(disk: Disk, root: Path) -> bool:
    """Whether what was recorded is what stands on the disk."""
    files = {path.relative_to(root).as_posix(): path for path in root.rglob("*") if path.is_file()}
    assert os.listdir(root / "store")
    return {name: bytes(file.content) for name, file in disk.names.items() if not name.endswith("-shm")} == {
        name: path.read_bytes() for name, path in files.items() if not name.endswith("-shm")
    }
