"""The store on disk: a hardened `diskcache` in a folder with a manifest."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kalm_rag.cache import database
from kalm_rag.cache.connections import DEFAULT_LIMIT, Reader, Writer
from kalm_rag.cache.keys import KEY_PATTERN
from kalm_rag.cache.place import Place
from kalm_rag.cache.records import FolderRecords
from kalm_rag.cache.store import CheckReport, StoreError, StoreStats
from kalm_rag.utils.paths import user_path

_STRANGE_ROW = "the cache in %s holds a row that kalm-rag did not write: %s"


class DiskStore:
    """Keeps frames in a folder that any number of processes may share.

    Nothing is opened before the first use, and reading needs no write lock. A folder that cannot be opened is tried
    again after a second, then after two, up to half a minute. One connection reads and one writes, each behind a lock
    of its own.

    Args:
        folder: where; made with mode 0700 by the first write, if need be.
        limit: bytes it may take before the least recently stored passages are evicted. The folder stores it: None
            uses the stored limit, or `DEFAULT_LIMIT` for a new folder.
        read_only: only read; used for a folder that an image ships. Folders that cannot be written
            to, or are on a full disk, are used read-only automatically.

    Attributes:
        folder: where the entries are.
        place: the same, with what is known about it.
        records: the key spaces of the entries, see `kalm_rag.cache.spaces`.
    """

    def __init__(self, folder: str | Path, *, limit: int | None = None, read_only: bool = False) -> None:
        # diskcache expands variables in a path; so that both mean the same folder, it is done here.
        self.folder = user_path(folder, "folder")
        self.place = Place(self.folder, read_only=read_only)
        self._limit = limit
        self._reader = Reader(self.place)
        self._writer = Writer(self.place, limit)
        self.records = FolderRecords(self.place, self._writer)

    def __deepcopy__(self, memo: dict[int, Any]) -> DiskStore:
        """Return the store itself: a copy would open the same folder."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopened, (self.folder, self._limit, self.place.read_only)

    @property
    def read_only(self) -> bool:
        """Whether writing is off, by choice or because the last attempt to write showed that it must be."""
        return self._writer.read_only

    def get_many(self, keys: Sequence[str]) -> dict[str, bytes]:
        """Return the values of the keys; rows that cannot be read are left out.

        Raises:
            StoreError: the folder cannot be opened or read.
        """
        from kalm_rag.cache.strict_disk import StrictDisk

        rows: dict[str, tuple[Any, Any, Any]] = {}
        with self._reader.use() as connection:
            if connection is None:
                return {}
            for key in keys:
                try:
                    row = connection.execute(
                        "SELECT mode, filename, value FROM Cache WHERE key = ? AND raw = 1", (key,)
                    ).fetchone()
                except sqlite3.DataError as error:  # longer than anything of ours
                    self.place.say(
                        "row", "the cache in %s holds a row that kalm-rag did not write: %s", self.folder, error
                    )
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
                self.place.say("row", _STRANGE_ROW, self.folder, error)
            except OSError as error:
                failure = error
                self.place.say("file", "cannot read a value of the cache in %s: %s", self.folder, error)
        if failure is not None and not found:
            msg = f"cannot read the values of the cache in {self.folder}: {failure}"
            raise StoreError(msg) from failure
        return found

    def put_many(self, items: Mapping[str, bytes]) -> int:
        """Store values in transactions of bounded size; read-only stores keep none.

        Raises:
            StoreError: some of it was not kept.
        """
        with self._writer.use() as cache:
            return 0 if cache is None else self._writer.put(cache, items)

    def add(self, key: str, value: bytes) -> bool:
        """Store a value unless there is one already, in one transaction; returns whether this one is kept.

        Eviction takes it last.

        Raises:
            StoreError: the folder cannot be written to.
        """
        with self._writer.use() as cache:
            return cache is not None and self._writer.put(cache, {key: value}, lasting=True) == 1

    def delete(self, keys: Iterable[str]) -> int:
        """Delete keys; read-only stores delete none.

        In the database, deleted bytes are overwritten with zeros; the write-ahead log is emptied, unless another
        process reads it at this moment.

        Raises:
            StoreError: the folder cannot be written to.
        """
        if self.place.file() is None and not self.place.read_only:
            self.place.check()
            return 0
        with self._writer.use() as cache:
            return 0 if cache is None else self._writer.delete(cache, keys)

    def keys(self) -> Iterator[str]:
        """Yield every valid key by a plain read of the database; no key is ever unpickled."""
        with self._reader.use() as connection:
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
        """Return its size from counters in the database: the cost does not grow with the number of entries."""
        limit = DEFAULT_LIMIT if self._limit is None else self._limit
        evicted, refused = self._writer.evicted, self._writer.refused
        with self._reader.use() as connection:
            if connection is None:
                return StoreStats(0, 0, limit, evicted, refused)
            kept = dict(connection.execute("SELECT key, value FROM Settings").fetchall())
            (pages,) = connection.execute("PRAGMA page_count").fetchone()
            (page,) = connection.execute("PRAGMA page_size").fetchone()
        with contextlib.suppress(OSError):
            self._writer.read_only = self.read_only or self.place.cannot_write()
        size = kept.get("size", 0) + pages * page + database.log_bytes(self.folder)
        return StoreStats(
            kept.get("count", 0), size, kept.get("size_limit", limit), self._writer.evicted, self._writer.refused
        )

    def close(self) -> None:
        """Close the database. A later call opens it again."""
        self._reader.close()
        self._writer.close()

    def clear(self) -> int:
        """Delete everything, the records of key spaces too; returns how many entries there were."""
        gone = self.delete(list(self.keys()))
        if not self.read_only:
            self.records.clear()
        return gone

    def check(self, *, fix: bool = False, secret: bytes | None = None, orphan_age: float = 600.0) -> CheckReport:
        """Verify every entry; find files that a crash left behind, and damage to the database itself.

        Args:
            fix: rebuild a damaged database, and remove what is wrong.
            secret: also demand valid tags.
            orphan_age: seconds; a younger file may belong to a write that is under way.

        Raises:
            StoreError: the folder cannot be opened, something in it cannot be read, or fixing was asked for and it is
                read-only. Nothing was removed then.
        """
        from kalm_rag.cache.check import check_folder

        if self.place.file() is None:
            if not self.place.read_only and not self.folder.exists():
                return CheckReport(0, 0, 0, 0, 0)
            self.place.refuse_missing()
        try:
            if fix and (self.place.read_only or self.place.cannot_write()):
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


def _reopened(folder: Path, limit: int | None, read_only: bool) -> DiskStore:
    return DiskStore(folder, limit=limit, read_only=read_only)
