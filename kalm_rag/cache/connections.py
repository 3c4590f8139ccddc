"""The two connections to a cache's database: one reads, one writes."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING

from kalm_rag.cache import database
from kalm_rag.cache.place import Place
from kalm_rag.cache.store import StoreError
from kalm_rag.utils import forks

if TYPE_CHECKING:
    from kalm_rag.cache.strict_disk import StrictCache

DEFAULT_LIMIT = 10_000_000_000
"""Bytes that a new folder may take before its oldest passages leave: about 100,000 passages of 300 tokens of Nano."""

FIRST_RETRY, LAST_RETRY = 1.0, 30.0
"""Seconds after which a folder that could not be opened is tried again; they double from the first to the last."""

_TRANSACTION = 32_000_000
"""Bytes written at once: others wait no longer than `LOCK_SECONDS` for this."""

_DELETED_AT_ONCE = 256

_REPLACED = "the cache folder %s was removed or replaced; opening it again"

_inherited: list[object] = []
"""Connections of the parent in a forked child. SQLite forbids to use them there, and to close them."""


class Backoff:
    """Decides when something that failed may be tried again."""

    def __init__(self) -> None:
        self.again_at = 0.0
        self._wait = 0.0
        self._failure = ""

    def check(self) -> None:
        """Raise the last failure, unless it is time to try again."""
        if time.monotonic() < self.again_at:
            raise StoreError(self._failure)

    def failed(self, message: str) -> None:
        """Wait twice as long as the last time."""
        self._wait = min(LAST_RETRY, 2 * self._wait or FIRST_RETRY)
        self.again_at = time.monotonic() + self._wait
        self._failure = message

    def worked(self) -> None:
        """Wait no longer."""
        self._wait = self.again_at = 0.0


class _Shared:
    """Base of both connections: a fork waits until neither is in use, and the child opens its own."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.backoff = Backoff()
        self._lock = threading.Lock()
        self._pid = os.getpid()
        forks.watch(self)

    def before_fork(self) -> None:
        """Wait until no other thread uses the database, and keep it so until after the fork."""
        self._lock.acquire()

    def after_fork_in_parent(self) -> None:
        """Let other threads continue."""
        self._lock.release()

    def after_fork_in_child(self) -> None:
        """Give up what belongs to the parent: its connection is neither used nor closed here."""
        self._give_up()
        self._lock = threading.Lock()
        self._pid = os.getpid()

    def _check_process(self) -> None:
        if self._pid != os.getpid():  # forked by something that runs no hooks
            self.after_fork_in_child()

    def _give_up(self) -> None:
        raise NotImplementedError


class Reader(_Shared):
    """Reads without a write lock."""

    def __init__(self, place: Place) -> None:
        self.connection: sqlite3.Connection | None = None
        self._file: tuple[int, int] | None = None
        self._until = 0.0
        super().__init__(place)

    @contextlib.contextmanager
    def use(self) -> Iterator[sqlite3.Connection | None]:
        """Lend the connection to one thread at a time; None if no cache exists yet.

        Raises:
            StoreError: the folder cannot be opened or read.
        """
        self._check_process()
        with self._lock:
            try:
                yield self._open()
            except (sqlite3.Error, OSError) as error:
                self._drop()
                raise StoreError(database.explain(error, self.place.folder)) from error

    def close(self) -> None:
        """Close the connection. A later use opens another."""
        self._check_process()
        with self._lock:
            self._drop()

    def _open(self) -> sqlite3.Connection | None:
        place = self.place
        file = place.file()
        if self.connection is not None:
            if self._file == file and time.monotonic() < self._until:
                return self.connection
            if self._file != file:
                place.say("replaced", _REPLACED, place.folder)
            self._drop()
        self.backoff.check()
        try:
            if file is None:
                place.refuse_missing()
                return None
            place.check()
            if database.is_being_made(place.folder):
                return None
            self.connection, live = database.connect_reading(place.folder)
        except Exception as error:
            message = database.explain(error, place.folder)
            self.backoff.failed(message)
            raise StoreError(message) from error
        self.backoff.worked()
        if not database.is_complete(self.connection):
            self._drop()
            return None
        self._file = file
        # Without locks, other processes' writes are invisible: reopen after a while.
        self._until = float("inf") if live else time.monotonic() + LAST_RETRY
        return self.connection

    def _drop(self) -> None:
        connection, self.connection, self._file = self.connection, None, None
        if connection is not None:
            connection.close()

    def _give_up(self) -> None:
        _inherited.append(self.connection)
        self.connection = self._file = None


class Writer(_Shared):
    """Writes through `diskcache`, and evicts.

    Args:
        place: the folder.
        limit: bytes it may take, or None for the limit stored in the folder.

    Attributes:
        cache: the open cache, or None.
        read_only: whether writing is off, by choice or because the last attempt to write showed that it must be.
        evicted: entries that were given up to stay within the limit.
        refused: entries that were larger than the limit.
    """

    def __init__(self, place: Place, limit: int | None) -> None:
        self.cache: StrictCache | None = None
        self.read_only = place.read_only
        self.evicted = 0
        self.refused = 0
        self._limit = limit
        self._file: tuple[int, int] | None = None
        super().__init__(place)

    @contextlib.contextmanager
    def use(self) -> Iterator[StrictCache | None]:
        """Lend the writing cache to one thread at a time; None in read-only mode.

        Raises:
            StoreError: the folder cannot be opened or written to.
        """
        import diskcache

        self._check_process()
        with self._lock:
            cache = self._open()
            if cache is None:
                folder = self.place.folder
                self.place.say("read-only", "the cache in %s is read-only: new passages are not kept", folder)
            try:
                yield cache
            except (sqlite3.Error, OSError, ValueError, diskcache.Timeout) as error:
                # A full disk or a lock passes; after anything else the connection may stay broken.
                if isinstance(error, sqlite3.Error) and not database.passes(error):
                    self._drop()
                raise StoreError(database.explain(error, self.place.folder)) from error

    def put(self, cache: StrictCache, items: Mapping[str, bytes], *, lasting: bool = False) -> int:
        """Keep values in transactions of bounded size, and evict; returns how many were kept.

        Args:
            cache: the open folder.
            items: values by key.
            lasting: leave keys alone that have a value, and evict these values last.
        """
        limit = int(cache.reset("size_limit"))  # as it stands now: another process may have changed it
        kept = 0
        for part in _parts(items, min(_TRANSACTION, max(1, limit // 4))):
            kept += self._put(cache, part, limit, lasting)
            _bound_log(cache, limit)
        self._evict(cache, limit)
        return kept

    def delete(self, cache: StrictCache, keys: Iterable[str]) -> int:
        """Delete keys in transactions of bounded size, and overwrite what they held; returns how many existed."""
        waiting = iter(keys)
        gone = 0
        with cache.overwriting():
            while part := list(islice(waiting, _DELETED_AT_ONCE)):
                with cache.disk.batch(), cache.transact(retry=False):
                    gone += sum(bool(cache.delete(key, retry=False)) for key in part)
            if gone:
                with contextlib.suppress(sqlite3.Error):
                    cache.shrink_log()
        return gone

    def close(self) -> None:
        """Close the database. A later use opens it again."""
        self._check_process()
        with self._lock:
            self._drop()

    def _put(self, cache: StrictCache, items: list[tuple[str, bytes]], limit: int, lasting: bool) -> int:
        """Keep values in one transaction."""
        from kalm_rag.cache.strict_disk import LARGEST_VALUE

        most = min(limit, LARGEST_VALUE)
        fitting = [item for item in items if len(item[1]) <= most]
        if len(fitting) < len(items):
            self.refused += len(items) - len(fitting)
            self.place.say(
                "refused",
                "a passage of %d bytes is larger than the cache's limit of %d and is not kept",
                max(len(value) for _, value in items),
                most,
            )
        with cache.disk.batch(), cache.transact(retry=False):
            keep = cache.add_lasting if lasting else cache.set
            return sum(bool(keep(key, value, retry=False)) for key, value in fitting)

    def _evict(self, cache: StrictCache, limit: int) -> None:
        try:
            if cache.volume() + cache.log_bytes <= limit:
                return
            cache.shrink_log()
            # A log that somebody reads cannot shrink; that must not empty the cache.
            room = limit - min(cache.log_bytes, limit // 2)
            if cache.volume() <= room:
                return
            self.place.say(
                "evict",
                "the cache in %s reached its limit of %d bytes: evicting the oldest passages, about ten at a time",
                self.place.folder,
                limit,
            )
            self.evicted += cache.evict_oldest(room)
            _bound_log(cache, limit)
        except Exception as error:  # noqa: BLE001 - what was written stays; the next write tries again
            self.place.say("evict-failed", "cannot evict: %s", database.explain(error, self.place.folder))

    def _open(self) -> StrictCache | None:
        if self.place.read_only:
            return None
        file = self.place.file()
        if self.cache is not None:
            if self._file == file:
                return self.cache
            self.place.say(
                "replaced", "the cache folder %s was removed or replaced; opening it again", self.place.folder
            )
            self._drop()
        self.backoff.check()
        try:
            self.place.check()
            if file is not None and self.place.cannot_write():
                self.read_only = True
                self.place.say(
                    "read-only",
                    "the cache in %s is read-only (this user may not write to it): new passages are not kept",
                    self.place.folder,
                )
                return None
            self.place.prepare()
            self.cache = self._diskcache()
        except Exception as error:
            message = database.explain(error, self.place.folder)
            self.backoff.failed(message)
            raise StoreError(message) from error
        self.backoff.worked()
        self.read_only = False
        self._file = self.place.file()
        return self.cache

    def _diskcache(self) -> StrictCache:
        from kalm_rag.cache.strict_disk import SETTINGS, StrictCache, StrictDisk

        limit = self._limit
        if limit is None and not self.place.has_limit():
            limit = DEFAULT_LIMIT
        options = SETTINGS if limit is None else {**SETTINGS, "size_limit": limit}
        return StrictCache(str(self.place.folder), timeout=database.LOCK_SECONDS, disk=StrictDisk, **options)

    def _drop(self) -> None:
        cache, self.cache, self._file = self.cache, None, None
        if cache is not None:
            with contextlib.suppress(sqlite3.Error):
                cache.close()

    def _give_up(self) -> None:
        if self.cache is not None:
            _inherited.append(self.cache.let_go())
        self.cache = self._file = None


def _bound_log(cache: StrictCache, limit: int) -> None:
    if cache.log_bytes > min(2 * _TRANSACTION, limit // 4):
        with contextlib.suppress(sqlite3.Error):
            cache.shrink_log()


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
