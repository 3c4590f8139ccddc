"""diskcache without pickle, and without trust in its database.

`diskcache` 5.6.3 unpickles keys and values and opens or deletes whatever file name stands in a row (CVE-2025-69872), so
whoever can write to the directory can run code in the reader. This `Disk` stores and reads raw bytes under hexadecimal
keys only. It overrides every method through which a row could reach pickle, the file system outside of the directory,
or a blocking special file; `tests/cache/test_attacks.py` holds the known attacks.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import re
import sqlite3
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diskcache
from diskcache.core import DEFAULT_SETTINGS, ENOVAL, MODE_BINARY, MODE_RAW, UNKNOWN

from kalm_rag.cache.database import DATABASE, connect
from kalm_rag.cache.keys import KEY_PATTERN

FILE_PATTERN = re.compile(r"[0-9a-f]{2}/[0-9a-f]{2}/[0-9a-f]{28}\.val")
"""File names as diskcache makes them, relative to the directory."""

LARGEST_VALUE = 1 << 27
"""Bytes of a value. Larger values are not kept, and larger files are not read. A prefilled passage of Large in float32
with 1,024 tokens at ratio 4 takes 86 MB."""


_NO_FILE = {errno.ELOOP, errno.ENXIO, errno.ENOTDIR, errno.EISDIR}
"""Errors of opening that say that something else stands in a file's place: a link, a socket, a folder."""

SETTINGS: dict[str, Any] = {
    "eviction_policy": "least-recently-stored",  # other policies turn every read into a write
    "cull_limit": 0,  # nothing is evicted behind our back: see `Writer`
    "disk_min_file_size": 256 * 1024,  # smaller values are faster, and safer in a crash, inside of the database
    "sqlite_mmap_size": 0,  # a mapped file that is cut short kills the process
    "statistics": 0,
    "tag_index": 0,
}
"""Settings of diskcache; every process that opens the folder uses the same."""

_PRAGMAS = {
    "cache_size": DEFAULT_SETTINGS["sqlite_cache_size"],
    "mmap_size": SETTINGS["sqlite_mmap_size"],
    "synchronous": DEFAULT_SETTINGS["sqlite_synchronous"],
    "journal_size_limit": 16_000_000,  # the log is cut to this when it begins again
}
"""What SQLite does not keep in the file."""


class StrictCache(diskcache.Cache):  # type: ignore[misc]
    """A cache with one connection, guarded by its owner, and with fixed pragmas whatever its database says.

    diskcache keeps a connection per thread, which nobody can close from another one or give up before a fork. It reads
    settings from the database for every connection and executes those that begin with `sqlite_`.
    """

    _connection: sqlite3.Connection | None = None

    @property
    def _con(self) -> sqlite3.Connection:
        if self._connection is None:
            # The folder is inspected, and its database created, before diskcache sees it: see `DiskStore`.
            self._connection = connect(Path(self._directory), "mode=rwc")
            for pragma, value in _PRAGMAS.items():
                self._connection.execute(f"PRAGMA {pragma} = {value}")
        return self._connection

    def close(self) -> None:
        """Close the connection."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def let_go(self) -> sqlite3.Connection | None:
        """Give up the connection without closing it."""
        connection, self._connection = self._connection, None
        return connection

    def reset(self, key: str, value: Any = ENOVAL, update: bool = True) -> Any:
        """Like diskcache, with pragmas from a fixed table; unknown ones are not executed."""
        if key.startswith("sqlite_"):
            if key not in DEFAULT_SETTINGS:
                return None
            value = SETTINGS.get(key, DEFAULT_SETTINGS[key])
        return super().reset(key, value, update)

    def _row_insert(self, key: Any, raw: Any, now: float, columns: Any) -> None:
        super()._row_insert(key, raw, self._in_order(now), columns)

    def _row_update(self, rowid: int, now: float, columns: Any) -> None:
        super()._row_update(rowid, self._in_order(now), columns)

    def _in_order(self, now: float) -> float:
        """Return a time after all others in the table: eviction follows the order of storing, not the clock."""
        # A number that is too large, or no number, can only come from somebody else; both sort behind.
        (newest,) = self._sql("SELECT MAX(store_time) FROM Cache WHERE store_time < 1e300").fetchone()
        return now if newest is None or newest < now else math.nextafter(newest, math.inf)

    @property
    def log_bytes(self) -> int:
        """Bytes of the write-ahead log."""
        try:
            return os.stat(os.path.join(self._directory, f"{DATABASE}-wal")).st_size
        except OSError:
            return 0

    def shrink_log(self) -> None:
        """Move the write-ahead log into the database, unless somebody reads it at this moment."""
        self._sql("PRAGMA busy_timeout = 0")
        try:
            self._sql("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        finally:
            self._sql(f"PRAGMA busy_timeout = {int(1000 * self.timeout)}")

    @contextlib.contextmanager
    def overwriting(self) -> Iterator[None]:
        """Overwrite with zeros what is deleted in here, which SQLite would otherwise leave in free pages."""
        (before,) = self._sql("PRAGMA secure_delete").fetchone()
        self._sql("PRAGMA secure_delete = ON").fetchall()
        try:
            yield
        finally:
            self._sql(f"PRAGMA secure_delete = {('OFF', 'ON', 'FAST')[before]}").fetchall()

    def add_lasting(self, key: str, value: bytes, *, retry: bool) -> bool:
        """Store a value that eviction takes last, unless the key has one already; returns whether it did."""
        with self.transact(retry=retry):
            if self._sql("SELECT rowid FROM Cache WHERE key = ? AND raw = 1", (key,)).fetchone() is not None:
                return False
            self.set(key, value, retry=retry)
            # Behind all times that `_in_order` gives.
            self._sql("UPDATE Cache SET store_time = 1e300 WHERE key = ? AND raw = 1", (key,))
            return True

    def evict_oldest(self, room: int) -> int:
        """Delete the least recently stored rows until database and files take `room` bytes; returns how many."""
        evicted = 0
        while self.volume() > room:
            with self._transact() as (sql, cleanup):
                oldest = sql("SELECT rowid, filename FROM Cache ORDER BY store_time, rowid LIMIT 10").fetchall()
                for rowid, name in oldest:
                    sql("DELETE FROM Cache WHERE rowid = ?", (rowid,))
                    cleanup(name)
            if not oldest:
                break
            evicted += len(oldest)
        return evicted


class StrictDisk(diskcache.Disk):  # type: ignore[misc]
    """Raw bytes under keys of 64 hexadecimal digits; anything else raises ValueError."""

    def __init__(self, directory: str, **options: Any) -> None:
        super().__init__(directory, **options)
        self._batch = threading.local()

    @contextlib.contextmanager
    def batch(self) -> Iterator[None]:
        """Keep files in step with one transaction over many `set` calls.

        Inside of an outer transaction, diskcache deletes the file of a replaced value before the outer commit: a crash
        in between would lose the value that was there. Here files are deleted after the commit, and files that were
        written are deleted if the transaction fails.
        """
        self._batch.written, self._batch.replaced = [], []
        try:
            yield
        except BaseException:
            doomed = self._batch.written
            raise
        else:
            doomed = self._batch.replaced
        finally:
            del self._batch.written, self._batch.replaced
            for name in doomed:
                self.remove(name)

    def put(self, key: Any) -> tuple[str, bool]:
        """Check a key."""
        if not isinstance(key, str) or not KEY_PATTERN.fullmatch(key):
            msg = f"a key is 64 hexadecimal digits, got {key!r:.80}"
            raise ValueError(msg)
        return key, True

    def get(self, key: Any, raw: Any) -> str:
        """Check a key that comes from the database."""
        if raw != 1 or not isinstance(key, str) or not KEY_PATTERN.fullmatch(key):
            msg = "the database holds a key that kalm-rag did not write"
            raise ValueError(msg)
        return key

    def store(self, value: Any, read: bool, key: Any = UNKNOWN) -> tuple[int, int, str | None, Any]:
        """Put bytes into the database, or many bytes into a file of their own; no partial file is left behind."""
        if read or not isinstance(value, bytes):
            msg = f"a value is bytes, got {type(value).__name__}"
            raise ValueError(msg)
        if len(value) < self.min_file_size:
            return 0, MODE_RAW, None, sqlite3.Binary(value)
        name, path = self.filename(key, value)
        self._inside(name)
        try:
            self._write(path, iter([value]), "xb")
        except OSError:
            self._unlink(name)
            raise
        if hasattr(self._batch, "written"):
            self._batch.written.append(name)
        return len(value), MODE_BINARY, name.replace(os.sep, "/"), None

    def fetch(self, mode: Any, filename: Any, value: Any, read: bool) -> bytes:
        """Bytes of a row."""
        if read:
            msg = "values are not read as files"
            raise ValueError(msg)
        if mode == MODE_RAW and isinstance(value, bytes):
            return value
        if mode == MODE_BINARY:
            return self._read(self._inside(filename))
        msg = f"a row of mode {mode!r} is not one that kalm-rag writes"
        raise ValueError(msg)

    def fetch_first(self, mode: Any, filename: Any, count: int) -> bytes:
        """Return the first bytes of a row whose value is a file."""
        if mode != MODE_BINARY:
            msg = f"a row of mode {mode!r} with a file is not one that kalm-rag writes"
            raise ValueError(msg)
        return self._read(self._inside(filename), count)

    def remove(self, file_path: Any) -> None:
        """Delete a value file, if it is one; inside of a `batch`, at its end."""
        if hasattr(self._batch, "replaced"):
            self._batch.replaced.append(file_path)
        else:
            self._unlink(file_path)

    def _unlink(self, file_path: Any) -> None:
        with contextlib.suppress(ValueError, OSError):
            path = self._inside(file_path)
            os.remove(path)
            os.removedirs(os.path.dirname(path))

    def _inside(self, name: Any) -> str:
        if not isinstance(name, str) or not FILE_PATTERN.fullmatch(name.replace(os.sep, "/")):
            msg = f"a row names the file {name!r:.80}, which kalm-rag did not write"
            raise ValueError(msg)
        root = os.path.realpath(self._directory)
        path = os.path.join(root, *name.replace(os.sep, "/").split("/"))
        if os.path.realpath(os.path.dirname(path)) != os.path.dirname(path):
            msg = f"the folder of {name!r} is a link that leads elsewhere"
            raise ValueError(msg)
        return path

    @staticmethod
    def _read(path: str, count: int = -1) -> bytes:
        # A link is not followed, and a pipe put in a file's place does not block.
        flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        try:
            handle = os.open(path, flags)
        except OSError as error:
            if error.errno in _NO_FILE:
                msg = f"{path!r} is not a value file: {error.strerror}"
                raise ValueError(msg) from error
            raise
        with os.fdopen(handle, "rb") as file:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode) or status.st_size > LARGEST_VALUE:
                msg = f"{path!r} is not a value file"
                raise ValueError(msg)
            return file.read(count)
