"""Faults that a disk cache meets in the world.

One invariant: what is read under a key is exactly what was stored under it, or a miss; never other bytes, a hang, or
an exception out of the cache. The counts are small here; `make faults` runs the large ones. A table of violations and
trials is printed at the end.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cachekit import LOCKER, finish, frames, get, key_of, lookup, passage, put, same, spawn, texts, value_of

from kalm_rag.cache import DiskStore, PassageCache, StoreError, database
from kalm_rag.cache import connections as connections_module
from kalm_rag.utils.paths import MANIFEST

Tally = Callable[[str, int, int], None]
POSIX = pytest.mark.skipif(os.name != "posix", reason="POSIX signals, permissions and mounts")


WRITER = """
folder, seed, size, log = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
store, chooser = DiskStore(folder), random.Random(seed)
with open(log, "a", buffering=1) as acknowledged:
    while True:
        keys = [key_of(chooser.randrange(400)) for _ in range(chooser.randrange(1, 6))]
        kept = store.put_many({key: value_of(key, size) for key in keys})
        if kept == len(set(keys)):
            acknowledged.write("".join(key + "\\n" for key in keys))
"""


@POSIX
@pytest.mark.parametrize("size", [40_000, 300_000], ids=["in-database", "in-files"])
def test_kill_9_of_writers(tmp_path: Path, scale: int, tally: Tally, size: int) -> None:
    """Acknowledged writes survive; nothing wrong is ever read; orphan files are swept."""
    chooser = random.Random(1)
    folder, log = tmp_path / "store", tmp_path / "log"
    log.touch()
    kills = wrong = lost = 0
    for round_number in range(3 * scale):
        writers = [spawn(WRITER, folder, 97 * round_number + number, size, log) for number in range(4)]
        deadline = time.monotonic() + 30
        while log.stat().st_size == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.25 + chooser.uniform(0.02, 0.25))
        for writer in chooser.sample(writers, 4):
            time.sleep(chooser.uniform(0, 0.02))
            writer.send_signal(signal.SIGKILL)
            kills += 1
        for writer in writers:
            writer.communicate()
            assert writer.returncode == -signal.SIGKILL, "the writer ended by itself"
        acknowledged = set(log.read_text().split("\n")[:-1])
        assert acknowledged
        store = DiskStore(folder)
        found = store.get_many([key_of(number) for number in range(400)])
        wrong += sum(value != value_of(key, size) for key, value in found.items())
        lost += len({key for key in acknowledged if len(key) == 64} - found.keys())
        store.close()
    store = DiskStore(folder)
    before = store.stats().entries
    report = store.check(fix=True, orphan_age=0)
    assert (report.corrupt, report.missing) == (0, 0)
    assert store.check(orphan_age=0).clean
    assert store.stats().entries == before
    assert len(list(folder.glob("??/??/*.val"))) == (before if size > 256 * 1024 else 0)
    tally(f"kill -9, {size} bytes: wrong values", wrong, kills)
    tally(f"kill -9, {size} bytes: acknowledged writes lost", lost, kills)


def regions(data: bytes, values: list[bytes]) -> list[tuple[int, int]]:
    """Where the frames stand in a database; small ones are stored in one piece."""
    found = []
    for value in values:
        start = data.find(value)
        assert start >= 0
        found.append((start, start + len(value)))
    return found


def test_bit_flips_in_the_database(tmp_path: Path, scale: int, tally: Tally) -> None:
    """Flips inside of frames are detected, every one; flips elsewhere are a miss or an error of the store."""
    count = 24
    values = frames(count, width=4)
    store = DiskStore(tmp_path / "store")
    store.put_many(values)
    store.close()
    database = tmp_path / "store" / "cache.db"
    pristine = database.read_bytes()
    inside = [offset for start, end in regions(pristine, list(values.values())) for offset in range(start, end)]
    frame_bytes = set(inside)
    chooser = random.Random(2)
    trials = {"frame": 0, "index": 0}
    wrong = undetected = unhandled = 0
    for trial in range(120 * scale):
        offset = chooser.choice(inside) if trial % 2 else chooser.randrange(len(pristine))
        kind = "frame" if offset in frame_bytes else "index"
        damaged = bytearray(pristine)
        damaged[offset] ^= 1 << chooser.randrange(8)
        for suffix in ("-wal", "-shm"):
            Path(f"{database}{suffix}").unlink(missing_ok=True)
        database.write_bytes(bytes(damaged))
        trials[kind] += 1
        reader = DiskStore(tmp_path / "store", read_only=trial % 4 < 2)
        try:
            right, bad, cache = lookup(reader, count, width=4)
            wrong += bad
            counters = cache.stats().store.counters
            undetected += kind == "frame" and right == count
            assert counters.hits == right
            cache.close()
        except Exception:  # noqa: BLE001
            unhandled += 1
    tally("bit flips: wrong states", wrong, sum(trials.values()))
    tally("bit flips in payload and header: undetected", undetected, trials["frame"])
    tally("bit flips: unhandled exceptions", unhandled, sum(trials.values()))


def test_bit_flips_truncation_and_swaps_in_value_files(tmp_path: Path, scale: int, tally: Tally) -> None:
    count, sizes = 6, {"tokens": 4000, "width": 80}
    store = DiskStore(tmp_path / "store")
    store.put_many(frames(count, **sizes))
    files = sorted((tmp_path / "store").glob("??/??/*.val"))
    assert len(files) == count
    pristine = {path: path.read_bytes() for path in files}
    chooser = random.Random(3)
    wrong = undetected = trials = 0
    kinds = ["flip", "truncate", "empty", "extend", "swap", "delete", "zero tail"]
    for trial in range(21 * scale):
        path, other = chooser.sample(files, 2)
        data = pristine[path]
        kind = kinds[trial % len(kinds)]
        if kind == "flip":
            damaged = bytearray(data)
            damaged[chooser.randrange(len(data))] ^= 1 << chooser.randrange(8)
            path.write_bytes(bytes(damaged))
        elif kind == "truncate":
            path.write_bytes(data[: chooser.randrange(1, len(data))])
        elif kind == "zero tail":
            cut = chooser.randrange(1, len(data) - 1)
            path.write_bytes(data[:cut] + bytes(len(data) - cut))
        elif kind == "delete":
            path.unlink()
        else:
            path.write_bytes({"empty": b"", "extend": data + b"\0", "swap": pristine[other]}[kind])
        right, bad, _ = lookup(store, count, **sizes)
        trials += 1
        wrong += bad
        undetected += right != count - 1
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        assert lookup(store, count, **sizes)[0] == count
    tally("damaged value files: wrong states", wrong, trials)
    tally("damaged value files: undetected", undetected, trials)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], capture_output=True)
    if done.returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a tmpfs")
@pytest.mark.parametrize("size", [40_000, 300_000], ids=["in-database", "in-files"])
def test_full_disk(small_disk: Path, tally: Tally, size: int, checkpoint: Path, passages: list[str]) -> None:
    from kalm_rag import KaLMReranker

    store = DiskStore(small_disk / "store")
    kept, failed = [], 0
    for number in range(400):
        key = key_of(number)
        try:
            store.put_many({key: value_of(key, size)})
            kept.append(key)
        except StoreError:
            failed += 1
    assert failed > 100
    wrong = lost = 0
    for reader in (store, DiskStore(small_disk / "store"), DiskStore(small_disk / "store", read_only=True)):
        found = reader.get_many(kept)
        wrong += sum(value != value_of(key, size) for key, value in found.items())
        lost += len(kept) - len(found)
    tally(f"full disk, {size} bytes: wrong values", wrong, 3 * len(kept))
    tally(f"full disk, {size} bytes: lost while full and on opening while full", lost, 3 * len(kept))
    tally(f"full disk, {size} bytes: partial files left", store.check(orphan_age=0).orphans, failed)
    expected = KaLMReranker(checkpoint, cache=None).predict([("q", text) for text in passages[:3]])
    cache = PassageCache(small_disk / "store", memory=0)
    reranker = KaLMReranker(checkpoint, cache=cache, score_memory=0)
    answers = [reranker.predict([("q", text) for text in passages[:3]]) for _ in range(2)]
    cache.flush()
    tally("full disk: queries that failed", sum(answer != pytest.approx(expected, abs=1e-5) for answer in answers), 2)
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    key = key_of(7777)
    assert store.put_many({key: value_of(key, size)}) == 1, "it recovers when there is room again"


MIXED = """
folder, seed, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
from kalm_rag.cache.store import StoreError
store, chooser, end = DiskStore(folder, limit=3_000_000), random.Random(seed), time.monotonic() + float(seconds)
counts = {"operations": 0, "wrong": 0, "errors": 0, "hits": 0}
while time.monotonic() < end:
    keys = [key_of(chooser.randrange(60)) for _ in range(4)]
    size = {key: 20_000 + 40_000 * (int(key[0], 16) % 8) for key in keys}
    try:
        action = chooser.random()
        if action < 0.4:
            store.put_many({key: value_of(key, size[key]) for key in keys})
        elif action < 0.45:
            store.delete(keys[:1])
        else:
            for key, value in store.get_many(keys).items():
                counts["hits"] += 1
                counts["wrong"] += value != value_of(key, size[key])
    except StoreError as error:
        counts["errors"] += 1
    counts["operations"] += 1
print(json.dumps(counts))
"""


def test_eight_processes_write_read_and_evict_the_same_keys(tmp_path: Path, scale: int, tally: Tally) -> None:
    seconds = min(60.0, 2.0 + scale)
    results = [finish(child) for child in [spawn(MIXED, tmp_path / "store", seed, seconds) for seed in range(8)]]
    total = {name: sum(result[name] for result in results) for name in results[0]}
    assert total["hits"] > 50
    tally("8 processes: wrong values", total["wrong"], total["operations"])
    tally("8 processes: lock errors surfaced", total["errors"], total["operations"])


OPENER = """
time.sleep(max(0.0, float(sys.argv[3]) - time.time()))
store = DiskStore(sys.argv[1])
key = key_of(int(sys.argv[2]))
store.put_many({key: value_of(key, 1000)})
print(json.dumps(store.get_many([key]) == {key: value_of(key, 1000)}))
"""


def test_first_open_race(tmp_path: Path, scale: int, tally: Tally) -> None:
    failures = trials = 0
    for round_number in range(2 * scale):
        folder = tmp_path / f"store-{round_number}"
        start = time.time() + 1.5
        children = [spawn(OPENER, folder, number, start) for number in range(12)]
        failures += sum(not finish(child) for child in children)
        trials += len(children)
        assert len(DiskStore(folder).get_many([key_of(number) for number in range(12)])) == 12
    tally("first-open race of 12 processes: failures", failures, trials)


FORKER = """
store = DiskStore(sys.argv[1])
store.put_many({key_of(0): value_of(key_of(0), 5000)})
children = []
for number in range(1, 7):
    child = os.fork()
    if child == 0:
        key = key_of(number)
        store.put_many({key: value_of(key, 5000)})
        fine = store.get_many([key_of(0), key]) == {k: value_of(k, 5000) for k in (key_of(0), key)}
        os._exit(0 if fine else 1)
    children.append(child)
failures = sum(os.waitpid(child, 0)[1] != 0 for child in children)
found = store.get_many([key_of(number) for number in range(7)])
print(json.dumps(failures + 7 - len(found)))
"""


@POSIX
def test_fork_after_open(tmp_path: Path, scale: int, tally: Tally) -> None:
    failures = sum(finish(spawn(FORKER, tmp_path / f"store-{number}")) for number in range(scale))
    tally("fork after open: failures", failures, 6 * scale)


@POSIX
def test_cache_object_survives_a_fork(tmp_path: Path) -> None:
    """The thread that writes behind does not exist in the child."""
    cache = PassageCache(tmp_path / "store")
    put(cache, {"text 0": passage(0)})
    cache.flush()
    child = os.fork()
    if child == 0:
        try:
            put(cache, {"text 1": passage(1)})
            cache.flush()
            os._exit(0 if lookup(cache.store, 2)[0] == 2 else 1)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    assert lookup(cache.store, 2)[:2] == (2, 0)


OTHER_USER = """
import diskcache, xxhash, kalm_rag.cache.frame, kalm_rag.cache.strict_disk  # may be out of this user's reach
os.setgid(65534); os.setuid(65534)
from kalm_rag.cache.store import StoreError
store = DiskStore(sys.argv[1])
result = {}
try:
    result["found"] = len(store.get_many([key_of(0)]))
    result["kept"] = store.put_many({key_of(1): b"x"})
    result["keys"] = len(list(store.keys()))
except StoreError as error:
    result["error"] = str(error)
print(json.dumps(result))
"""


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user may enter; pytest's own are closed to others."""
    with tempfile.TemporaryDirectory(prefix="kalm-rag-open-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("mode", [0o755, 0o555, 0o700, 0o000])
def test_folder_of_another_user(open_folder: Path, tally: Tally, mode: int) -> None:
    folder = open_folder / "store"
    store = DiskStore(folder)
    store.put_many({key_of(0): value_of(key_of(0), 5000)})
    store.close()
    for path in folder.iterdir():
        path.chmod(0o644)
    folder.chmod(mode)
    result = finish(spawn(OTHER_USER, folder))
    if mode & 0o005:
        assert result == {"found": 1, "kept": 0, "keys": 1}
    else:
        assert "this user may not read it" in result["error"]
    tally(f"folder of another user, mode {mode:o}: unhandled", 0, 1)


def outcome(folder: Path) -> tuple[bool, str]:
    """Whether a cache in this place goes on without an exception, and what the store says."""
    cache = PassageCache(folder, memory=0)
    put(cache, {"text 0": passage(0)})
    cache.flush()
    found = get(cache, texts(1))
    cache.stats()
    cache.close()
    try:
        cache.store.get_many([key_of(0)])
    except StoreError as error:
        return not found, str(error)
    return bool(found) and same(found["text 0"], passage(0)), ""


def test_places_that_cannot_be_a_cache(tmp_path: Path, tally: Tally) -> None:
    (tmp_path / "file").write_text("hello")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    newer = tmp_path / "newer"
    DiskStore(newer).put_many({key_of(0): b"x"})
    (newer / MANIFEST).write_text(json.dumps({"what": "encoded passages of kalm-rag", "format": 99}))
    garbled = tmp_path / "garbled"
    DiskStore(garbled).put_many({key_of(0): b"x"})
    (garbled / MANIFEST).write_text("{")
    no_database = tmp_path / "no-database"
    with contextlib.closing(DiskStore(no_database)) as store:  # else it may write to the file that replaces its own
        store.put_many({key_of(0): b"x"})
    (no_database / "cache.db").write_bytes(b"not a database " * 1000)
    expected = {
        "file": "is a file; give a folder",
        "file/below": "cannot open the cache",
        "loop": "cannot open the cache",
        "newer": "format 99",
        "garbled": "cannot read",
        "no-database": "not a database",
    }
    failures = 0
    for name, message in expected.items():
        fine, said = outcome(tmp_path / name)
        assert message in said, (name, said)
        failures += not fine
    assert (tmp_path / "file").read_text() == "hello"
    assert (no_database / "cache.db").read_bytes() == b"not a database " * 1000
    tally("impossible places: exceptions or wrong values", failures, len(expected))


def test_folder_removed_and_replaced_under_a_live_process(tmp_path: Path, tally: Tally) -> None:
    folder = tmp_path / "store"
    failures = 0
    cache = PassageCache(folder, memory=0)
    for turn in range(6):
        put(cache, {f"text {turn}": passage(turn)})
        cache.flush()
        found = get(cache, [f"text {turn}"])
        failures += not (found and same(found[f"text {turn}"], passage(turn)))
        if turn % 2:
            shutil.rmtree(folder)
        else:
            shutil.move(folder, tmp_path / f"moved-{turn}")
        failures += bool(get(cache, [f"text {turn}"]))
    tally("folder removed under a live process: wrong or lost", failures, 12)


def test_a_folder_that_cannot_be_opened_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "store"
    folder.write_text("in the way")
    store = DiskStore(folder)
    with pytest.raises(StoreError):
        store.get_many([key_of(0)])
    folder.unlink()
    with pytest.raises(StoreError, match="is a file"):
        store.get_many([key_of(0)])
    later = time.monotonic() + connections_module.LAST_RETRY + 1
    monkeypatch.setattr(connections_module.time, "monotonic", lambda: later)
    assert store.put_many({key_of(0): b"x"}) == 1


def test_orphans_are_swept_when_old_enough(tmp_path: Path) -> None:
    store = DiskStore(tmp_path / "store")
    store.put_many({key_of(0): value_of(key_of(0), 300_000)})
    orphan = tmp_path / "store" / "aa" / "bb" / f"{'c' * 28}.val"
    orphan.parent.mkdir(parents=True)
    orphan.write_bytes(b"left by a crash")
    other = tmp_path / "store" / "aa" / "notes.txt"
    other.write_text("of the user")
    assert store.check().orphans == 0, "it may belong to a write that is under way"
    assert store.check(orphan_age=0).orphans == 1
    report = store.check(fix=True, orphan_age=0)
    assert (report.orphans, report.orphan_bytes) == (1, 15)
    assert not orphan.exists()
    assert other.exists()
    assert store.get_many([key_of(0)]) == {key_of(0): value_of(key_of(0), 300_000)}


def test_a_lock_at_opening_is_a_short_wait_and_not_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when another process is stopped in the middle of a write."""
    monkeypatch.setattr(database, "LOCK_SECONDS", 0.3)
    DiskStore(tmp_path / "store").put_many({key_of(0): b"x"})
    command = [sys.executable, "-c", "import sys\n" + LOCKER, str(tmp_path / "store")]
    locker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert locker.stdout is not None
    assert locker.stdout.readline() == "locked\n"
    store = DiskStore(tmp_path / "store")
    start = time.monotonic()
    with pytest.raises(StoreError, match="locked"):
        store.put_many({key_of(1): b"x"})
    assert time.monotonic() - start < 20
    locker.communicate("")
    store._writer.backoff.worked()
    assert store.put_many({key_of(1): b"x"}) == 1
