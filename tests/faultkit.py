"""Makes the n-th call of an operation on a store fail, and looks at what is left in the folder.

Run in a child process, because the calls of the whole process fail: `python faultkit.py python SCALE FOLDER` lets the
calls of Python and of its sqlite3 module fail; `fiu-run -x python faultkit.py libc SCALE FOLDER` those of the C
library, SQLite's own included. It prints what was injected and every broken rule as JSON.
"""

from __future__ import annotations

import builtins
import collections
import contextlib
import ctypes
import errno
import io
import itertools
import json
import logging
import os
import random
import shutil
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from cachekit import unpack
from rawframes import key_of, value_of

from kalm_rag.cache import strict_disk, transfer
from kalm_rag.cache.disk import CheckReport, DiskStore
from kalm_rag.cache.frame import FrameError
from kalm_rag.cache.store import StoreError

SMALL, LARGE = 2_000, 6_000


class Faults:
    """Decides which call fails: the `at`-th since arming, that one and all later ones, or a share of all."""

    _TAKES_SPACE = frozenset({"write", "pwrite", "fsync", "fdatasync", "mkdir", "create", "sqlite execute"})

    def __init__(self) -> None:
        self.injected: collections.Counter[str] = collections.Counter()
        self._number = 0
        self.disarm()

    def arm(self, number: int, *, at: int = -1, lasting: bool = False, share: float = 0.0, seed: int = 0) -> None:
        self._number, self._at, self._lasting, self._share = number, at, lasting, share
        self._chooser = random.Random(seed)
        self._calls, self.fired, self._armed = 0, 0, True

    def disarm(self) -> None:
        self._armed = False

    def decide(self, call: str) -> int:
        """The error with which this call fails, or 0."""
        if not self._armed:
            return 0
        if self._number == errno.ENOSPC and call not in self._TAKES_SPACE:
            return 0
        count, self._calls = self._calls, self._calls + 1
        fails = self._chooser.random() < self._share if self._share else count == self._at
        if not fails and not (self._lasting and count > self._at >= 0):
            return 0
        self.fired += 1
        self.injected[f"{errno.errorcode[self._number]} in {call}"] += 1
        return self._number


class PythonFaults(Faults):
    """Fails calls of Python's own functions and of its sqlite3 module."""

    _FUNCTIONS = (
        [(os, name) for name in ("open", "read", "write", "fsync", "replace", "rename", "remove", "unlink")]
        + [(os, name) for name in ("mkdir", "rmdir", "listdir", "scandir", "stat", "fdopen")]
        + [(builtins, "open"), (io, "open")]
    )

    def __init__(self) -> None:
        super().__init__()
        for module, name in self._FUNCTIONS:
            setattr(module, name, self._failing(getattr(module, name), name))
        connect = sqlite3.connect
        faults = self

        class Cursor(sqlite3.Cursor):
            def execute(self, *arguments: Any) -> Any:
                faults.raise_sqlite("sqlite execute")
                return super().execute(*arguments)

            def executemany(self, *arguments: Any) -> Any:
                faults.raise_sqlite("sqlite execute")
                return super().executemany(*arguments)

            def fetchall(self) -> Any:
                faults.raise_sqlite("sqlite fetch")
                return super().fetchall()

            def fetchone(self) -> Any:
                faults.raise_sqlite("sqlite fetch")
                return super().fetchone()

        class Connection(sqlite3.Connection):
            def cursor(self, factory: Any = Cursor) -> Any:
                return super().cursor(factory)

            def execute(self, *arguments: Any) -> Any:
                return self.cursor().execute(*arguments)

            def executemany(self, *arguments: Any) -> Any:
                return self.cursor().executemany(*arguments)

            def commit(self) -> None:
                faults.raise_sqlite("sqlite commit")
                super().commit()

        def failing_connect(*arguments: Any, **options: Any) -> Any:
            faults.raise_sqlite("sqlite open")
            return connect(*arguments, **{"factory": Connection, **options})

        sqlite3.connect = failing_connect

    def _failing(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            how = arguments[1] if name == "open" and len(arguments) > 1 else ""
            makes = how & os.O_CREAT if isinstance(how, int) else set(how) & set("wxa")
            if number := self.decide("create" if makes else name):
                raise OSError(number, os.strerror(number))
            return function(*arguments, **options)

        return call

    def raise_sqlite(self, call: str) -> None:
        if number := self.decide(call):
            text = "database or disk is full" if number == errno.ENOSPC else "disk I/O error"
            raise sqlite3.OperationalError(text)


class LibcFaults(Faults):
    """Fails calls of the C library through libfiu, which `fiu-run -x` put in front of it."""

    _POINTS = (
        [f"rw/{name}" for name in ("read", "pread", "write", "pwrite", "ftruncate", "truncate")]
        + ["oc/open", "sync/fsync", "sync/fdatasync"]
        + [f"dir/{name}" for name in ("opendir", "readdir", "unlink", "rename")]
    )
    _CALLBACK = ctypes.CFUNCTYPE(
        ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(ctypes.c_int), ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p
    )

    def __init__(self) -> None:
        super().__init__()
        library = ctypes.CDLL("libfiu.so.0")
        library.fiu_init(0)
        self._callbacks = [self._CALLBACK(self._callback(point.split("/")[1])) for point in self._POINTS]
        for point, callback in zip(self._POINTS, self._callbacks, strict=True):
            if library.fiu_enable_external(f"posix/io/{point}".encode(), 1, None, 0, callback):
                raise RuntimeError(point)

    def _callback(self, call: str) -> Callable[..., int]:
        def decide(_name: bytes, _number: Any, info: Any, _flags: Any) -> int:
            number = self.decide(call)
            if number:
                info[0] = number  # becomes errno
            return int(number != 0)

        return decide


class World:
    """A folder with known entries, a planted bad one and an orphan, and a writer that has it open."""

    def __init__(self, folder: Path, template: Path | None = None) -> None:
        self.folder = folder
        self.kept = {key_of(n): value_of(key_of(n), LARGE if n % 2 else SMALL) for n in range(8)}
        if template is None:
            self.writer = DiskStore(folder)
            self.writer.put_many({**self.kept, key_of(90): value_of(key_of(90), SMALL)[:-1] + b"!"})
            orphan = folder / "aa" / "bb" / f"{'c' * 28}.val"
            orphan.parent.mkdir(parents=True, exist_ok=True)
            orphan.write_bytes(b"left by a crash")
            self.age()
            return
        shutil.copytree(template, folder)
        self.age()
        self.writer = DiskStore(folder)
        # These stand in the write-ahead log only: nobody may look at the database without it.
        live = {key_of(n): value_of(key_of(n), LARGE if n % 2 else SMALL) for n in range(20, 24)}
        self.writer.put_many(live)
        self.kept |= live
        self.age()

    def age(self) -> None:
        """Nothing here was written a moment ago, so a check may take any file for an orphan."""
        before = time.time() - 7200
        for path in self.folder.glob("??/??/*.val"):
            os.utime(path, (before, before))

    def close(self) -> None:
        self.writer.close()
        shutil.rmtree(self.folder)


class Run:
    """One operation: what it may change, by key, as the values that may be read afterwards."""

    def __init__(self, world: World, shard: Path) -> None:
        self.world, self.shard = world, shard
        self.allowed: dict[str, set[bytes]] = {}
        self.wrong: list[str] = []

    def read(self, store: DiskStore) -> None:
        self.look(store.get_many([*self.world.kept, key_of(99)]))

    def look(self, found: dict[str, bytes]) -> None:
        for key, value in found.items():
            with contextlib.suppress(FrameError):
                unpack(value, key)
                if value not in self.allowed.get(key, {self.world.kept.get(key)}):
                    self.wrong.append(f"other bytes under {key[:8]}")

    def put(self, items: dict[str, bytes], store: DiskStore) -> None:
        for key, value in items.items():
            self.allowed[key] = {value, *self.allowed.get(key, {self.world.kept.get(key, value)})}
        store.put_many(items)

    def put_new(self, store: DiskStore) -> None:
        self.put({key_of(n): value_of(key_of(n), LARGE if n % 2 else SMALL) for n in range(30, 34)}, store)

    def replace(self, store: DiskStore) -> None:
        self.put({key_of(n): value_of(key_of(n), SMALL if n % 2 else LARGE, "2") for n in range(4)}, store)

    def evict(self, store: DiskStore) -> None:
        store.close()
        small = DiskStore(self.world.folder, limit=250_000)
        self.allowed |= {key: {value} for key, value in self.world.kept.items()}
        try:
            for start in (100, 120):
                self.put({key_of(n): value_of(key_of(n), LARGE) for n in range(start, start + 20)}, small)
        finally:
            small.close()

    def delete(self, store: DiskStore) -> None:
        self.allowed |= {key_of(n): {self.world.kept[key_of(n)]} for n in (0, 1, 20, 21)}
        store.delete([key_of(n) for n in (0, 1, 20, 21)])

    def clear(self, store: DiskStore) -> None:
        self.allowed |= {key: {value} for key, value in self.world.kept.items()}
        store.clear()

    def keys(self, store: DiskStore) -> None:
        if strange := set(store.keys()) - {*self.world.kept, key_of(90)}:
            self.wrong.append(f"keys nobody stored: {strange}")

    def stats(self, store: DiskStore) -> None:
        store.stats()

    def check(self, store: DiskStore) -> None:
        self.judge(store.check())

    def fix(self, store: DiskStore) -> None:
        self.judge(store.check(fix=True))

    def judge(self, report: CheckReport) -> None:
        """A check that cannot read says so; it calls no good entry bad."""
        if report.corrupt > 1 or report.missing or report.orphans > 1:
            self.wrong.append(f"good entries are called bad: {report}")

    def export(self, store: DiskStore) -> None:
        with contextlib.suppress(OSError, transfer_error()):
            transfer.export_shards(store, self.world.folder.parent / "export")

    def import_(self, store: DiskStore) -> None:
        for n in range(40, 44):
            self.allowed[key_of(n)] = {value_of(key_of(n), SMALL)}
        with contextlib.suppress(OSError):
            transfer.import_shards(store, [self.shard])

    def read_only(self, store: DiskStore) -> None:
        store.close()
        reader = DiskStore(self.world.folder, read_only=True)
        try:
            self.read(reader)
            self.keys(reader)
        finally:
            reader.close()


def transfer_error() -> type[Exception]:
    from safetensors import SafetensorError

    return SafetensorError


OPERATIONS = {
    "get": Run.read,
    "get read-only": Run.read_only,
    "put": Run.put_new,
    "replace": Run.replace,
    "evict": Run.evict,
    "delete": Run.delete,
    "clear": Run.clear,
    "keys": Run.keys,
    "stats": Run.stats,
    "check": Run.check,
    "check --fix": Run.fix,
    "export": Run.export,
    "import": Run.import_,
}
READ_ONLY = {"get", "get read-only", "keys", "stats", "check", "export"}


def verify(run: Run) -> list[str]:
    """Every broken rule in what an operation left, once nothing fails any more."""
    world, broken = run.world, list(run.wrong)
    every = [*world.kept, *run.allowed, key_of(90)]
    for name, store in (("a new store", DiskStore(world.folder)), ("the writer", world.writer)):
        try:
            found = store.get_many(every)
            for key, value in world.kept.items():
                if key not in run.allowed and found.get(key) != value:
                    broken.append(f"{name} lost {key[:8]}, of {len(value)} bytes, which nothing touched")
            for key, values in run.allowed.items():
                if key in found and found[key] not in values:
                    broken.append(f"{name} reads other bytes under {key[:8]}")
            key = key_of(70)
            if store.put_many({key: value_of(key, LARGE)}) != 1 or key not in store.get_many([key]):
                broken.append(f"{name} keeps nothing any more")
            store.delete([key])
        except Exception as error:  # noqa: BLE001 - whatever it is, it is told
            broken.append(f"{name} does not recover: {type(error).__name__}: {error}")
        if store is not world.writer:
            store.close()
    return broken


class Sweep:
    """Runs operations with faults, each on a world of its own."""

    def __init__(self, faults: Faults, folder: Path) -> None:
        self.faults, self.folder = faults, folder
        self.broken: dict[str, list[str]] = {}
        self.trials: collections.Counter[str] = collections.Counter()
        self.errors = 0
        World(folder / "template").writer.close()
        imported = DiskStore(folder / "other")
        imported.put_many({key_of(n): value_of(key_of(n), SMALL) for n in range(40, 44)})
        self.shard = Path(transfer.export_shards(imported, folder / "shards").shards[0])
        self.shard = folder / "shards" / self.shard.name
        imported.close()

    def once(self, name: str, number: int, **fault: Any) -> int:
        """How many calls failed while an operation ran."""
        world = World(self.folder / "store", self.folder / "template")
        run, store = Run(world, self.shard), DiskStore(world.folder)
        told = "success"
        self.faults.arm(number, **fault)
        try:
            OPERATIONS[name](run, store)
        except StoreError as error:
            told = f"StoreError: {error}"
            self.errors += 1
            if not str(error).strip():
                run.wrong.append("an error without a text")
        except Exception as error:  # noqa: BLE001 - reported as a broken rule
            run.wrong.append(f"{type(error).__name__} out of the store: {error}")
        finally:
            self.faults.disarm()
        store.close()
        broken = verify(run)
        world.close()
        shutil.rmtree(self.folder / "export", ignore_errors=True)
        self.trials[name] += self.faults.fired
        for text in broken:
            self.broken.setdefault(name, []).append(f"{errno.errorcode[number]} {fault}: {text} (it told {told})")
        return self.faults.fired

    def all_points(self, name: str, number: int, stride: int, offset: int, *, lasting: bool) -> None:
        """Let the first call fail, then the one `stride` later, until the operation ends before it comes to that."""
        for at in itertools.count(offset, stride):
            if not self.once(name, number, at=at, lasting=lasting):
                return

    def at_random(self, name: str, rounds: int) -> None:
        for seed in range(rounds):
            for share in (0.02, 0.2):
                self.once(name, errno.EIO, share=share, seed=seed)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """A log line is a write that could fail, and a module loaded late is a read."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def main(kind: str, scale: int, folder: Path) -> None:
    strict_disk.SETTINGS["disk_min_file_size"] = 4096  # so that LARGE stands in a file of its own
    faults = {"python": PythonFaults, "libc": LibcFaults}[kind]()
    sweep = Sweep(faults, folder)
    with quiet():
        for name in OPERATIONS:  # what is loaded at the first call is loaded now
            sweep.once(name, errno.EIO)
        if sweep.broken:
            raise SystemExit(f"broken without any fault: {sweep.broken}")
        for place, name in enumerate(OPERATIONS):
            stride = 1 if scale > 1 else {"check --fix": 1, "evict": 17}.get(name, 5)
            sweep.all_points(name, errno.EIO, stride, place % stride, lasting=False)
            sweep.all_points(name, errno.EIO, stride if scale > 1 else 2 * stride + 1, 0, lasting=True)
            if name not in READ_ONLY:
                sweep.all_points(name, errno.ENOSPC, stride, 0, lasting=False)
                sweep.all_points(name, errno.ENOSPC, stride if scale > 1 else 2 * stride + 1, 0, lasting=True)
            sweep.at_random(name, scale)
    result = {"injected": faults.injected, "trials": sweep.trials, "broken": sweep.broken, "errors": sweep.errors}
    print(json.dumps(result), flush=True)
    os._exit(0)  # libfiu still calls back into the interpreter while it is taken down


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
