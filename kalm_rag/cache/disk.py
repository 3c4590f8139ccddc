"""The store on disk: `diskcache`, hardened, in a folder that says what it is."""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kalm_rag.cache.folder import MANIFEST, inspect_database, read_manifest, refuse_network, write_manifest
from kalm_rag.cache.keys import KEY_PATTERN
from kalm_rag.cache.store import StoreError, StoreStats

logger = logging.getLogger(__name__)

DEFAULT_LIMIT = 10_000_000_000
"""Bytes that a new folder may take before its oldest passages leave: about 100,000 passages of 300 tokens of Nano."""

LOCK_SECONDS = 5.0
"""How long a write waits for another process before it gives up and counts as failed."""

_RETRY_SECONDS = 30.0
_TRANSACTION = 32_000_000


@dataclass(frozen=True, slots=True)
class CheckReport:
    """What a check of the folder found; with `fix`, all of it was removed.

    Attributes:
        entries: rows that were read.
        corrupt: rows whose bytes do not verify, or that kalm-rag did not write.
        missing: rows whose file is gone.
        orphans: value files that no row names, left by a crash.
        orphan_bytes: what those take.
    """

    entries: int
    corrupt: int
    missing: int
    orphans: int
    orphan_bytes: int

    @property
    def clean(self) -> bool:
        """Whether there is nothing to fix."""
        return not (self.corrupt or self.missing or self.orphans)


class DiskStore:
    """Keeps frames in a folder that any number of processes may share.

    Nothing is opened before the first use. A folder that cannot be opened is tried again after half a minute.

    Args:
        folder: where; made with mode 0700 if need be.
        limit: bytes it may take before the least recently stored passages are evicted. It is kept in the folder: None
            is what stands there, or `DEFAULT_LIMIT` for a new one.
        read_only: only read; used for a folder that an image ships. A folder that cannot be written to, or is on a full
            disk, is opened in this way by itself.
    """

    def __init__(self, folder: str | Path, *, limit: int | None = None, read_only: bool = False) -> None:
        # diskcache expands variables in a path; so that both mean the same folder, it is done here.
        self.folder = Path(os.path.expandvars(folder)).expanduser().absolute()
        self._asked_limit = limit
        self._limit = DEFAULT_LIMIT if limit is None else limit
        self._forced_read_only = read_only
        self.read_only = read_only
        self._cache: Any = None
        self._inode: tuple[int, int] | None = None
        self._retry_at = 0.0
        self._write_again_at = float("inf")
        self._failure = ""
        self._evicted = 0
        self._refused = 0
        self._said: set[str] = set()
        self._opening = threading.Lock()

    def get_many(self, keys: Sequence[str]) -> dict[str, bytes]:
        """What is kept under the keys; a row that cannot be read is left out.

        Raises:
            StoreError: the folder cannot be opened or read.
        """
        self._open()
        if self.read_only:
            return self._read_rows(keys)
        found: dict[str, bytes] = {}
        for key in keys:
            try:
                value = self._cache.get(key, default=None, retry=False)
            except (ValueError, TypeError) as error:
                self._say("row", "the cache in %s holds a row that is not ours: %s", self.folder, error)
                continue
            except Exception as error:
                msg = f"cannot read the cache in {self.folder}: {type(error).__name__}: {error}"
                raise StoreError(msg) from error
            if value is not None:
                found[key] = value
        return found

    def put_many(self, items: Mapping[str, bytes]) -> int:
        """Keep values, in transactions of bounded size; in read-only mode none.

        Raises:
            StoreError: some of it was not kept.
        """
        self._open()
        if self.read_only:
            self._say("read-only", "the cache in %s is read-only: new passages are not kept", self.folder)
            return 0
        kept = 0
        try:
            for part in _parts(items):
                kept += self._put(part)
        except Exception as error:
            msg = f"cannot write to the cache in {self.folder}: {type(error).__name__}: {error}"
            raise StoreError(msg) from error
        self._evict()
        return kept

    def _put(self, items: list[tuple[str, bytes]]) -> int:
        """Keep values in one transaction."""
        kept = 0
        with self._cache.disk.batch(), self._cache.transact(retry=False):
            for key, value in items:
                if len(value) > self._limit:
                    self._refused += 1
                    self._say(
                        "refused",
                        "a passage of %d bytes is larger than the cache's limit of %d and is not kept",
                        len(value),
                        self._limit,
                    )
                    continue
                self._cache.set(key, value, retry=False)
                kept += 1
        return kept

    def _evict(self) -> None:
        try:
            if self._cache.volume() <= self._limit:
                return
            self._say(
                "evict",
                "the cache in %s reached its limit of %d bytes: the oldest passages leave, about ten at a time",
                self.folder,
                self._limit,
            )
            self._evicted += self._cache.cull(retry=False)
        except Exception as error:  # noqa: BLE001 - what was written stays; the next write tries again
            self._say("evict-failed", "cannot evict from the cache in %s: %s", self.folder, error)

    def delete(self, keys: Iterable[str]) -> int:
        """Forget keys; in read-only mode none."""
        self._open()
        if self.read_only:
            return 0
        try:
            return sum(bool(self._cache.delete(key, retry=False)) for key in keys)
        except Exception as error:
            msg = f"cannot remove entries of the cache in {self.folder}: {type(error).__name__}: {error}"
            raise StoreError(msg) from error

    def keys(self) -> Iterator[str]:
        """Every key of ours, by a plain read of the database: no key is ever unpickled."""
        self._open()
        for row in self._rows("key, raw"):
            if row[2] == 1 and isinstance(row[1], str) and KEY_PATTERN.fullmatch(row[1]):
                yield row[1]

    def stats(self) -> StoreStats:
        """Its size."""
        self._open()
        try:
            with contextlib.closing(self._connect()) as connection:
                (entries,) = connection.execute("SELECT COUNT(*) FROM Cache").fetchone()
                (files,) = connection.execute("SELECT COALESCE(SUM(size), 0) FROM Cache").fetchone()
                (pages,) = connection.execute("PRAGMA page_count").fetchone()
                (page,) = connection.execute("PRAGMA page_size").fetchone()
        except sqlite3.Error as error:
            msg = f"cannot read the cache in {self.folder}: {error}"
            raise StoreError(msg) from error
        return StoreStats(int(entries), int(files) + int(pages) * int(page), self._limit, self._evicted, self._refused)

    def close(self) -> None:
        """Close the database."""
        cache, self._cache, self._inode = self._cache, None, None
        if cache is not None:
            with contextlib.suppress(Exception):
                cache.close()

    def clear(self) -> int:
        """Forget everything; returns how many entries there were."""
        return self.delete(list(self.keys()))

    def check(self, *, fix: bool = False, secret: bytes | None = None, orphan_age: float = 600.0) -> CheckReport:
        """Read every entry and verify it; find files that a crash left behind.

        Args:
            fix: remove what is wrong.
            secret: also demand valid tags.
            orphan_age: seconds; a younger file may belong to a write that is under way.

        Raises:
            StoreError: the folder cannot be opened, or fixing was asked for and it is read-only.
        """
        from kalm_rag.cache.frame import FrameError, unpack
        from kalm_rag.cache.strict_disk import StrictDisk

        self._open()
        if fix and self.read_only:
            msg = f"the cache in {self.folder} is read-only and cannot be fixed"
            raise StoreError(msg)
        disk = StrictDisk(str(self.folder))
        began = time.time()
        corrupt: list[tuple[int, float]] = []
        missing: list[tuple[int, float]] = []
        doomed: list[str] = []
        named: set[str] = set()
        entries = 0
        columns = "store_time, key, raw, mode, filename, value"
        for rowid, stored, key, raw, mode, filename, value in self._rows(columns):
            entries += 1
            if isinstance(filename, str):
                named.add(filename)
            try:
                unpack(disk.fetch(mode, filename, value, read=False), disk.get(key, raw), secret)
            except FileNotFoundError:
                missing.append((rowid, stored))
            except (FrameError, ValueError, OSError):
                corrupt.append((rowid, stored))
                doomed += [filename] if isinstance(filename, str) else []
        orphans = [
            path
            for path in self._value_files()
            if self._relative(path) not in named and _written(path) <= began - orphan_age
        ]
        size = sum(path.stat().st_size for path in orphans if path.exists())
        if fix:
            self._forget_rows(corrupt + missing)
            for name in [*doomed, *map(self._relative, orphans)]:
                disk.remove(name)
        return CheckReport(entries, len(corrupt), len(missing), len(orphans), size)

    def _forget_rows(self, rows: list[tuple[int, float]]) -> None:
        """Delete rows, unless they were written again since they were read."""
        try:
            connection = sqlite3.connect(self.folder / "cache.db", timeout=LOCK_SECONDS)
            with contextlib.closing(connection), connection:
                connection.executemany("DELETE FROM Cache WHERE rowid = ? AND store_time IS ?", rows)
        except sqlite3.Error as error:
            msg = f"cannot remove damaged rows from the cache in {self.folder}: {error}"
            raise StoreError(msg) from error

    def _value_files(self) -> Iterator[Path]:
        from kalm_rag.cache.strict_disk import FILE_PATTERN

        for path in self.folder.glob("??/??/*.val"):
            if FILE_PATTERN.fullmatch(self._relative(path)) and not path.is_symlink():
                yield path

    def _relative(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    def _rows(self, columns: str) -> Iterator[tuple[Any, ...]]:
        """Rows in pages, so that no long read holds up a writer; `rowid` comes first."""
        last = -(1 << 63)
        try:
            with contextlib.closing(self._connect()) as connection:
                while True:
                    query = f"SELECT rowid, {columns} FROM Cache WHERE rowid > ? ORDER BY rowid LIMIT 64"  # noqa: S608
                    page = connection.execute(query, (last,)).fetchall()
                    if not page:
                        return
                    yield from page
                    last = page[-1][0]
        except sqlite3.Error as error:
            msg = f"cannot read the cache in {self.folder}: {error}"
            raise StoreError(msg) from error

    def _read_rows(self, keys: Sequence[str]) -> dict[str, bytes]:
        """Read without writing: diskcache itself writes when it opens a folder."""
        from kalm_rag.cache.strict_disk import StrictDisk

        disk = StrictDisk(str(self.folder))
        found: dict[str, bytes] = {}
        try:
            with contextlib.closing(self._connect()) as connection:
                for key in keys:
                    row = connection.execute(
                        "SELECT mode, filename, value FROM Cache WHERE key = ? AND raw = 1", (key,)
                    ).fetchone()
                    if row is not None:
                        with contextlib.suppress(ValueError, OSError):
                            found[key] = disk.fetch(row[0], row[1], row[2], read=False)
        except sqlite3.Error as error:
            msg = f"cannot read the cache in {self.folder}: {error}"
            raise StoreError(msg) from error
        return found

    def _connect(self) -> sqlite3.Connection:
        """A connection that cannot write. On a read-only medium SQLite wants to be told that nothing changes."""
        uri = (self.folder / "cache.db").as_uri()
        last: sqlite3.Error | None = None
        for mode in ("mode=ro", "mode=ro&immutable=1"):
            connection = sqlite3.connect(f"{uri}?{mode}", uri=True, timeout=LOCK_SECONDS, isolation_level=None)
            connection.text_factory = lambda data: data.decode("utf-8", "replace")  # a flipped bit is no text
            try:
                connection.execute("SELECT 1 FROM Settings LIMIT 1").fetchone()
            except sqlite3.Error as error:
                connection.close()
                last = error
            else:
                return connection
        raise last or sqlite3.OperationalError("cannot open the database")

    def _open(self) -> None:
        if self._inode is not None and self._inode == self._inode_now() and time.monotonic() < self._write_again_at:
            return
        with self._opening:
            if self._inode is not None:
                if self._inode != self._inode_now():
                    self._say("replaced", "the cache folder %s was removed or replaced; opening it anew", self.folder)
                elif time.monotonic() < self._write_again_at:
                    return
                self.close()
            if time.monotonic() < self._retry_at:
                raise StoreError(self._failure)
            try:
                self._open_now()
            except Exception as error:
                known = isinstance(error, StoreError)
                self._failure = str(error) if known else f"cannot open the cache in {self.folder}: {error}"
                self._retry_at = time.monotonic() + _RETRY_SECONDS
                raise StoreError(self._failure) from error

    def _open_now(self) -> None:
        self.read_only = self._forced_read_only
        self._write_again_at = float("inf")
        if not self.folder.exists() and self.read_only:
            msg = f"there is no cache in {self.folder}, and a read-only one is not made"
            raise StoreError(msg)
        refuse_network(self.folder)
        if self.folder.exists() and not self.folder.is_dir():
            msg = f"the cache path {self.folder} is a file; give a folder"
            raise StoreError(msg)
        if self.folder.is_dir() and not os.access(self.folder, os.R_OK | os.X_OK):
            msg = f"cannot open the cache in {self.folder}: this user may not read it"
            raise StoreError(msg)
        if not self.read_only and self.folder.is_dir() and not os.access(self.folder, os.W_OK | os.X_OK):
            self._go_read_only("this user may not write to it")
        if not self.read_only:
            try:
                self._prepare()
                self._cache = self._diskcache()
            except (OSError, sqlite3.Error) as error:
                if not (self.folder / "cache.db").is_file() or "locked" in str(error):
                    raise
                read_manifest(self.folder)
                self._go_read_only(str(error))
                self._write_again_at = time.monotonic() + _RETRY_SECONDS
        if self.read_only:
            read_manifest(self.folder)
            with contextlib.closing(self._connect()) as connection:
                inspect_database(connection)
                row = connection.execute("SELECT value FROM Settings WHERE key = 'size_limit'").fetchone()
                self._limit = int(row[0]) if row else self._limit
        self._inode = self._inode_now()

    def _prepare(self) -> None:
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            self.folder.mkdir(mode=0o700)
        names = os.listdir(self.folder)
        if MANIFEST not in names:
            if any(name.endswith((".val", ".db")) for name in names):
                read_manifest(self.folder)  # another process may have made it a moment ago; if not, it is foreign
            else:
                write_manifest(self.folder)
        read_manifest(self.folder)
        if (self.folder / "cache.db").is_file() and (self.folder / "cache.db").stat().st_size:
            connection = sqlite3.connect(self.folder / "cache.db", timeout=LOCK_SECONDS, isolation_level=None)
            with contextlib.closing(connection):
                inspect_database(connection)
                # diskcache waits a minute for a lock when it opens a folder; find out sooner.
                connection.execute("BEGIN IMMEDIATE")
                connection.execute("ROLLBACK")

    def _diskcache(self) -> Any:
        from kalm_rag.cache.strict_disk import SETTINGS, StrictCache, StrictDisk

        limit = {} if self._asked_limit is None else {"size_limit": self._asked_limit}
        cache = StrictCache(str(self.folder), timeout=LOCK_SECONDS, disk=StrictDisk, **limit, **SETTINGS)
        self._limit = int(cache.size_limit)
        return cache

    def _go_read_only(self, reason: str) -> None:
        self.read_only = True
        self._say("went-read-only", "the cache in %s is used read-only (%s)", self.folder, reason)

    def _inode_now(self) -> tuple[int, int] | None:
        try:
            status = os.stat(self.folder / "cache.db")
        except OSError:
            return None
        return status.st_dev, status.st_ino

    def _say(self, kind: str, message: str, *values: object) -> None:
        """Log a warning, once of each kind."""
        if kind not in self._said:
            self._said.add(kind)
            logger.warning(message, *values)


def _parts(items: Mapping[str, bytes]) -> Iterator[list[tuple[str, bytes]]]:
    """Values in groups of about `_TRANSACTION` bytes: others wait no longer than `LOCK_SECONDS` for a transaction."""
    part: list[tuple[str, bytes]] = []
    size = 0
    for item in items.items():
        part.append(item)
        size += len(item[1])
        if size >= _TRANSACTION:
            yield part
            part, size = [], 0
    if part:
        yield part


def _written(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return float("inf")
