"""The store on disk: `diskcache`, hardened, in a folder that says what it is."""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kalm_rag.cache import database
from kalm_rag.cache.database import DATABASE
from kalm_rag.cache.folder import (
    MANIFEST,
    is_cut_off,
    read_manifest,
    refuse_network,
    who_else_may_write,
    write_manifest,
)
from kalm_rag.cache.keys import KEY_PATTERN
from kalm_rag.cache.store import CheckReport, StoreError, StoreStats
from kalm_rag.paths import user_path

if TYPE_CHECKING:
    from kalm_rag.cache.strict_disk import StrictCache

logger = logging.getLogger(__name__)

DEFAULT_LIMIT = 10_000_000_000
"""Bytes that a new folder may take before its oldest passages leave: about 100,000 passages of 300 tokens of Nano."""

_FIRST_RETRY, _LAST_RETRY = 1.0, 30.0
"""Seconds after which a folder that could not be opened is tried again; they double from the first to the last."""

_TRANSACTION = 32_000_000
"""Bytes written at once: others wait no longer than `LOCK_SECONDS` for this."""

_inherited: list[object] = []
"""Connections of the parent in a forked child. SQLite forbids to use them there, and to close them."""


class _Backoff:
    """When something that failed may be tried again."""

    def __init__(self) -> None:
        self._wait = 0.0
        self._again_at = 0.0
        self._failure = ""

    def check(self) -> None:
        """Raise the last failure, unless it is time to try again."""
        if time.monotonic() < self._again_at:
            raise StoreError(self._failure)

    def failed(self, message: str) -> None:
        self._wait = min(_LAST_RETRY, 2 * self._wait or _FIRST_RETRY)
        self._again_at = time.monotonic() + self._wait
        self._failure = message

    def worked(self) -> None:
        self._wait = self._again_at = 0.0


class DiskStore:
    """Keeps frames in a folder that any number of processes may share.

    Nothing is opened before the first use, and reading needs no write lock. A folder that cannot be opened is tried
    again after a second, then after two, up to half a minute. One connection reads and one writes, each behind a lock
    of its own (`_reading`, `_writing`), which guards everything that the methods of its side change.

    Args:
        folder: where; made with mode 0700 by the first write, if need be.
        limit: bytes it may take before the least recently stored passages are evicted. It is kept in the folder: None
            is what stands there, or `DEFAULT_LIMIT` for a new one.
        read_only: only read; used for a folder that an image ships. A folder that cannot be written to, or is on a full
            disk, is used in this way by itself.

    Attributes:
        folder: where the entries are.
        read_only: whether writing is off, by choice or because the last attempt to write showed that it must be.
        authenticated: whether the reader checks tags. If not, a folder that others can write to draws a warning.
    """

    def __init__(self, folder: str | Path, *, limit: int | None = None, read_only: bool = False) -> None:
        # diskcache expands variables in a path; so that both mean the same folder, it is done here.
        self.folder = user_path(folder, "folder")
        self.read_only = read_only
        self.authenticated = False
        self._asked_limit = limit
        self._forced_read_only = read_only
        self._said: set[str] = set()
        self._evicted = 0
        self._refused = 0
        self._reader: sqlite3.Connection | None = None
        self._reader_file: tuple[int, int] | None = None
        self._reader_until = 0.0
        self._reading_again = _Backoff()
        self._read_lock = threading.Lock()
        self._writer: StrictCache | None = None
        self._writer_file: tuple[int, int] | None = None
        self._writing_again = _Backoff()
        self._write_lock = threading.Lock()
        self._pid = os.getpid()

    def __deepcopy__(self, memo: dict[int, Any]) -> DiskStore:
        """The store itself: a copy would open the same folder."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopened, (self.folder, self._asked_limit, self._forced_read_only)

    def get_many(self, keys: Sequence[str]) -> dict[str, bytes]:
        """What is kept under the keys; a row that cannot be read is left out.

        Raises:
            StoreError: the folder cannot be opened or read.
        """
        from kalm_rag.cache.strict_disk import StrictDisk

        rows: dict[str, tuple[Any, Any, Any]] = {}
        with self._reading() as connection:
            if connection is None:
                return {}
            for key in keys:
                try:
                    row = connection.execute(
                        "SELECT mode, filename, value FROM Cache WHERE key = ? AND raw = 1", (key,)
                    ).fetchone()
                except sqlite3.DataError as error:  # longer than anything of ours
                    self._say("row", "the cache in %s holds a row that kalm-rag did not write: %s", self.folder, error)
                    continue
                if row is not None:
                    rows[key] = row
        disk = StrictDisk(str(self.folder))
        found: dict[str, bytes] = {}
        failure: OSError | None = None
        for key, (mode, filename, value) in rows.items():
            try:
                found[key] = disk.fetch(mode, filename, value, read=False)
            except FileNotFoundError:
                continue
            except ValueError as error:
                self._say("row", "the cache in %s holds a row that kalm-rag did not write: %s", self.folder, error)
            except OSError as error:
                failure = error
                self._say("file", "cannot read a value of the cache in %s: %s", self.folder, error)
        if failure is not None and not found:
            msg = f"cannot read the values of the cache in {self.folder}: {failure}"
            raise StoreError(msg) from failure
        return found

    def put_many(self, items: Mapping[str, bytes]) -> int:
        """Keep values, in transactions of bounded size; in read-only mode none.

        Raises:
            StoreError: some of it was not kept.
        """
        kept = 0
        with self._writing() as cache:
            if cache is None:
                return 0
            limit = self._read_limit(cache)
            for part in _parts(items, min(_TRANSACTION, max(1, limit // 4))):
                kept += self._put(cache, part, limit)
                self._bound_log(cache, limit)
            self._evict(cache, limit)
        return kept

    def _put(self, cache: StrictCache, items: list[tuple[str, bytes]], limit: int) -> int:
        """Keep values in one transaction."""
        from kalm_rag.cache.strict_disk import LARGEST_VALUE

        most = min(limit, LARGEST_VALUE)
        fitting = [item for item in items if len(item[1]) <= most]
        if len(fitting) < len(items):
            self._refused += len(items) - len(fitting)
            self._say(
                "refused",
                "a passage of %d bytes is larger than the cache's limit of %d and is not kept",
                max(len(value) for _, value in items),
                most,
            )
        with cache.disk.batch(), cache.transact(retry=False):
            for key, value in fitting:
                cache.set(key, value, retry=False)
        return len(fitting)

    def _read_limit(self, cache: StrictCache) -> int:
        """The folder's limit as it stands now: another process may have changed it."""
        return int(cache.reset("size_limit"))

    def _bound_log(self, cache: StrictCache, limit: int) -> None:
        if cache.log_bytes > min(2 * _TRANSACTION, limit // 4):
            with contextlib.suppress(sqlite3.Error):
                cache.shrink_log()

    def _evict(self, cache: StrictCache, limit: int) -> None:
        try:
            if cache.volume() + cache.log_bytes <= limit:
                return
            cache.shrink_log()
            # A log that somebody reads cannot shrink; that alone must not empty the cache.
            room = limit - min(cache.log_bytes, limit // 2)
            if cache.volume() <= room:
                return
            self._say(
                "evict",
                "the cache in %s reached its limit of %d bytes: the oldest passages leave, about ten at a time",
                self.folder,
                limit,
            )
            self._evicted += cache.evict_oldest(room)
            self._bound_log(cache, limit)
        except Exception as error:  # noqa: BLE001 - what was written stays; the next write tries again
            self._say("evict-failed", "cannot evict: %s", database.explain(error, self.folder))

    def delete(self, keys: Iterable[str]) -> int:
        """Delete keys; in read-only mode none.

        Raises:
            StoreError: the folder cannot be written to.
        """
        with self._writing() as cache:
            return 0 if cache is None else sum(bool(cache.delete(key, retry=False)) for key in keys)

    def keys(self) -> Iterator[str]:
        """Every key of ours, by a plain read of the database: no key is ever unpickled."""
        with self._reading() as connection:
            if connection is None:
                return
        try:
            connection, _ = database.connect_reading(self.folder)
            with contextlib.closing(connection):
                for _, key, raw in database.rows(connection, "key, raw"):
                    if raw == 1 and isinstance(key, str) and KEY_PATTERN.fullmatch(key):
                        yield key
        except (sqlite3.Error, OSError) as error:
            raise StoreError(database.explain(error, self.folder)) from error

    def stats(self) -> StoreStats:
        """Its size, from counters that the database keeps: the cost does not grow with the number of entries."""
        limit = DEFAULT_LIMIT if self._asked_limit is None else self._asked_limit
        with self._reading() as connection:
            if connection is None:
                return StoreStats(0, 0, limit, self._evicted, self._refused)
            kept = dict(connection.execute("SELECT key, value FROM Settings").fetchall())
            (pages,) = connection.execute("PRAGMA page_count").fetchone()
            (page,) = connection.execute("PRAGMA page_size").fetchone()
        with contextlib.suppress(OSError):
            self.read_only = self._forced_read_only or self._cannot_write() or self.read_only
        size = kept.get("size", 0) + pages * page + database.log_bytes(self.folder)
        return StoreStats(kept.get("count", 0), size, kept.get("size_limit", limit), self._evicted, self._refused)

    def close(self) -> None:
        """Close the database. A later call opens it again."""
        self._check_process()
        with self._read_lock, self._write_lock:
            self._drop_reader()
            self._drop_writer()

    def clear(self) -> int:
        """Delete everything; returns how many entries there were."""
        return self.delete(list(self.keys()))

    def check(self, *, fix: bool = False, secret: bytes | None = None, orphan_age: float = 600.0) -> CheckReport:
        """Read every entry and verify it; find files that a crash left behind, and damage of the database itself.

        Args:
            fix: rebuild a damaged database, and remove what is wrong.
            secret: also demand valid tags.
            orphan_age: seconds; a younger file may belong to a write that is under way.

        Raises:
            StoreError: the folder cannot be opened, something in it cannot be read, or fixing was asked for and it is
                read-only. Nothing was removed then.
        """
        from kalm_rag.cache.check import check_folder

        if self._file() is None:
            if not self._forced_read_only and not self.folder.exists():
                return CheckReport(0, 0, 0, 0, 0)
            self._refuse_missing()
        try:
            if fix and (self._forced_read_only or self._cannot_write()):
                msg = f"the cache in {self.folder} is read-only and cannot be fixed"
                raise StoreError(msg)
        except OSError as error:
            raise StoreError(database.explain(error, self.folder)) from error
        return check_folder(
            self.folder,
            fix=fix,
            secret=secret,
            orphan_age=orphan_age,
            make_store=lambda limit: DiskStore(self.folder, limit=limit),
        )

    def before_fork(self) -> None:
        """Wait until no other thread uses the database, and keep it so until after the fork."""
        self._read_lock.acquire()
        self._write_lock.acquire()

    def after_fork_in_parent(self) -> None:
        """Let other threads go on."""
        self._write_lock.release()
        self._read_lock.release()

    def after_fork_in_child(self) -> None:
        """Give up what belongs to the parent: its connections are neither used nor closed here."""
        _inherited.append(self._reader)
        self._reader = self._reader_file = None
        if self._writer is not None:
            _inherited.append(self._writer.let_go())
        self._writer = self._writer_file = None
        self._read_lock, self._write_lock = threading.Lock(), threading.Lock()
        self._pid = os.getpid()

    def _check_process(self) -> None:
        if self._pid != os.getpid():  # forked by something that runs no hooks
            self.after_fork_in_child()

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection | None]:
        """The connection that reads, for one thread at a time; None if there is no cache yet."""
        self._check_process()
        with self._read_lock:
            try:
                yield self._open_reader()
            except (sqlite3.Error, OSError) as error:
                self._drop_reader()
                raise StoreError(database.explain(error, self.folder)) from error

    def _open_reader(self) -> sqlite3.Connection | None:
        file = self._file()
        if self._reader is not None:
            if self._reader_file == file and time.monotonic() < self._reader_until:
                return self._reader
            if self._reader_file != file:
                self._say("replaced", "the cache folder %s was removed or replaced; opening it again", self.folder)
            self._drop_reader()
        self._reading_again.check()
        try:
            if file is None:
                self._refuse_missing()
                return None
            self._check_place()
            if database.is_being_made(self.folder):
                return None
            self._reader, live = database.connect_reading(self.folder)
        except Exception as error:
            message = database.explain(error, self.folder)
            self._reading_again.failed(message)
            raise StoreError(message) from error
        self._reading_again.worked()
        if not database.is_complete(self._reader):
            self._drop_reader()
            return None
        self._reader_file = file
        # Without locks nothing is seen of what others write: look again in a while.
        self._reader_until = float("inf") if live else time.monotonic() + _LAST_RETRY
        return self._reader

    def _drop_reader(self) -> None:
        reader, self._reader, self._reader_file = self._reader, None, None
        if reader is not None:
            reader.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[StrictCache | None]:
        """The cache that writes, for one thread at a time; None in read-only mode."""
        import diskcache

        self._check_process()
        with self._write_lock:
            cache = self._open_writer()
            if cache is None:
                self._say("read-only", "the cache in %s is read-only: new passages are not kept", self.folder)
            try:
                yield cache
            except (sqlite3.Error, OSError, ValueError, diskcache.Timeout) as error:
                # A full disk or a lock passes; after anything else the connection may stay broken.
                if isinstance(error, sqlite3.Error) and not database.passes(error):
                    self._drop_writer()
                raise StoreError(database.explain(error, self.folder)) from error

    def _open_writer(self) -> StrictCache | None:
        if self._forced_read_only:
            return None
        file = self._file()
        if self._writer is not None:
            if self._writer_file == file:
                return self._writer
            self._say("replaced", "the cache folder %s was removed or replaced; opening it again", self.folder)
            self._drop_writer()
        self._writing_again.check()
        try:
            self._check_place()
            if file is not None and self._cannot_write():
                self._go_read_only("this user may not write to it")
                return None
            self._prepare()
            self._writer = self._diskcache()
        except Exception as error:
            message = database.explain(error, self.folder)
            self._writing_again.failed(message)
            raise StoreError(message) from error
        self._writing_again.worked()
        self.read_only = False
        self._writer_file = self._file()
        return self._writer

    def _drop_writer(self) -> None:
        writer, self._writer, self._writer_file = self._writer, None, None
        if writer is not None:
            with contextlib.suppress(sqlite3.Error):
                writer.close()

    def _go_read_only(self, reason: str) -> None:
        self.read_only = True
        self._say("read-only", "the cache in %s is read-only (%s): new passages are not kept", self.folder, reason)

    def _cannot_write(self) -> bool:
        return self.folder.is_dir() and not os.access(self.folder, os.W_OK | os.X_OK)

    def _check_place(self) -> None:
        """Refuse a place that cannot be a cache, or is somebody else's."""
        if os.path.expandvars(self.folder) != str(self.folder):
            msg = f"the cache path {self.folder} names a variable, which diskcache would expand; rename the folder"
            raise StoreError(msg)
        refuse_network(self.folder)
        try:
            os.stat(self.folder)
        except FileNotFoundError:
            return
        except OSError as error:
            msg = f"cannot open the cache in {self.folder}: {error.strerror}"
            raise StoreError(msg) from error
        if not self.folder.is_dir():
            msg = f"the cache path {self.folder} is a file; give a folder"
            raise StoreError(msg)
        if not os.access(self.folder, os.R_OK | os.X_OK):
            msg = f"cannot open the cache in {self.folder}: this user may not read it"
            raise StoreError(msg)
        if self._file() is not None and not is_cut_off(self.folder):
            read_manifest(self.folder)
        writers = None if self.authenticated else who_else_may_write(self.folder)
        if writers:
            self._say(
                "shared",
                "the cache folder %s can be changed by %s, who can thereby change scores: "
                "give every process the same secret (`PassageCache(secret=...)`), or move the cache",
                self.folder,
                writers,
            )

    def _refuse_missing(self) -> None:
        """Say why there is no database, unless the reason is only that nothing was kept yet."""
        self._check_place()
        if self._forced_read_only:
            msg = f"no cache exists in {self.folder}; open it without read_only=True to create one"
            raise StoreError(msg)

    def _prepare(self) -> None:
        """Make the folder, if need be, and see that what is in it is ours and can be locked."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            self.folder.mkdir(mode=0o700)
        names = os.listdir(self.folder)
        if MANIFEST in names and is_cut_off(self.folder):
            self._heal_manifest()
        elif MANIFEST not in names:
            if any(name.endswith((".val", ".db")) for name in names):
                read_manifest(self.folder)  # another process may have made it a moment ago; if not, it is foreign
            else:
                write_manifest(self.folder)
        read_manifest(self.folder)
        if (self.folder / DATABASE).is_file() and (self.folder / DATABASE).stat().st_size:
            with contextlib.closing(database.connect(self.folder)) as connection:
                database.inspect(connection)
                # diskcache waits a minute for a lock when it opens a folder; find out sooner.
                connection.execute("BEGIN IMMEDIATE")
                connection.execute("ROLLBACK")

    def _heal_manifest(self) -> None:
        """Write a manifest again that a loss of power left without content, if the database beside it is ours."""
        if self._file() is not None:
            with contextlib.closing(database.connect(self.folder)) as connection:
                database.inspect(connection)
        write_manifest(self.folder)

    def _diskcache(self) -> StrictCache:
        from kalm_rag.cache.strict_disk import SETTINGS, StrictCache, StrictDisk

        limit = self._asked_limit
        if limit is None and not self._has_limit():
            limit = DEFAULT_LIMIT
        options = SETTINGS if limit is None else {**SETTINGS, "size_limit": limit}
        return StrictCache(str(self.folder), timeout=database.LOCK_SECONDS, disk=StrictDisk, **options)

    def _has_limit(self) -> bool:
        """Whether the folder has a limit already: it belongs to the folder, not to whoever opens it."""
        if self._file() is None:
            return False
        with contextlib.closing(database.connect(self.folder)) as connection:
            try:
                found = connection.execute("SELECT 1 FROM Settings WHERE key = 'size_limit'").fetchone()
            except sqlite3.OperationalError as error:
                if "no such table" not in str(error):
                    raise
                return False
        return found is not None

    def _file(self) -> tuple[int, int] | None:
        """What tells the database's file from another one in its place; None if there is none."""
        try:
            status = os.stat(self.folder / DATABASE)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            msg = f"cannot open the cache in {self.folder}: this user may not read it ({error.strerror})"
            raise StoreError(msg) from error
        return status.st_dev, status.st_ino

    def _say(self, kind: str, message: str, *values: object) -> None:
        """Log a warning, once of each kind."""
        if kind not in self._said:
            self._said.add(kind)
            logger.warning(message, *values)


def _reopened(folder: Path, limit: int | None, read_only: bool) -> DiskStore:
    return DiskStore(folder, limit=limit, read_only=read_only)


def _parts(items: Mapping[str, bytes], most: int) -> Iterator[list[tuple[str, bytes]]]:
    """Values in groups of about `most` bytes."""
    part: list[tuple[str, bytes]] = []
    size = 0
    for item in items.items():
        part.append(item)
        size += len(item[1])
        if size >= most:
            yield part
            part, size = [], 0
    if part:
        yield part
