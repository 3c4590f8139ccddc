"""Keeps records of key spaces beside the entries: files in a folder, or reserved names in a `ByteStore`."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from kalm_rag.cache import database
from kalm_rag.cache.connections import Writer
from kalm_rag.cache.keys import KEY_PATTERN
from kalm_rag.cache.place import Place
from kalm_rag.cache.spaces import LARGEST_RECORD, Space, SpaceError
from kalm_rag.cache.store import StoreError

RECORDS = "key-spaces"
"""The folder of records inside of a cache's folder."""

PARTIAL = ".partial-"
"""How the name of a record begins that is still being written."""

SLOT = "key-space-"
"""How the name of a record in a `ByteStore` begins, after the prefix of all names."""

MOST_RECORDS, MOST_SLOTS = 1024, 128
"""Records of a folder, and of a `ByteStore`: what a reader has to go through stays bounded."""

_SUFFIX = ".space"


class FolderRecords:
    """Records as files of a cache's folder. They need no lock: a file never changes, and its name is its content's.

    The database has no table for them, because a version of kalm-rag that does not know the table would refuse it.

    Args:
        place: the cache's folder.
        writer: makes the folder, if it does not exist yet.
    """

    most = MOST_RECORDS

    def __init__(self, place: Place, writer: Writer) -> None:
        self._place = place
        self._writer = writer

    def read(self) -> tuple[list[bytes], int]:
        """As in `Records`.

        Raises:
            StoreError: the folder of records cannot be read.
        """
        found: list[bytes] = []
        try:
            names = self._names()
            for name in names[:MOST_RECORDS]:
                with contextlib.suppress(FileNotFoundError):
                    found.append(_read(self._folder / name))
        except OSError as error:
            raise StoreError(database.explain(error, self._place.folder)) from error
        return found, len(names) - min(len(names), MOST_RECORDS)

    def write(self, name: str, data: bytes) -> bool:
        """As in `Records`.

        Raises:
            StoreError: it cannot be written.
        """
        place = self._place
        if place.read_only or place.cannot_write():
            return False
        if place.file() is None:
            with self._writer.use() as cache:
                if cache is None:
                    return False
        try:
            place.check()
            path = self._folder / f"{name}{_SUFFIX}"
            with contextlib.suppress(FileNotFoundError):
                if _read(path) == data:
                    return True
            self._make_folder()
            if len(self._names()) >= MOST_RECORDS:
                msg = f"the cache in {place.folder} has {MOST_RECORDS} records of key spaces, and takes no more"
                raise StoreError(msg)
            _write(path, data)
        except OSError as error:
            raise StoreError(database.explain(error, place.folder)) from error
        return True

    def holds(self, name: str) -> bool:
        """Whether a record is there; a folder that was removed or replaced has lost it."""
        return os.path.lexists(self._folder / f"{name}{_SUFFIX}")

    def since(self) -> float | None:
        """Return when the oldest record was written, in seconds since the epoch; None without any."""
        try:
            return min((os.lstat(self._folder / name).st_mtime for name in self._names()), default=None)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StoreError(database.explain(error, self._place.folder)) from error

    def clear(self, model: bytes | None = None) -> None:
        """Delete the records, or those of the model with this digest. What uses them writes them again.

        Raises:
            StoreError: the folder of records cannot be read or changed.
        """
        try:
            for name in self._names():
                path = self._folder / name
                with contextlib.suppress(FileNotFoundError):
                    if model is None or _model_of(_read(path)) == model:
                        path.unlink()
        except OSError as error:
            raise StoreError(database.explain(error, self._place.folder)) from error

    @property
    def _folder(self) -> Path:
        return self._place.folder / RECORDS

    def _names(self) -> list[str]:
        """Names of records, sorted; one more than a folder may have, at most."""
        try:
            self._refuse_other()
            with os.scandir(self._folder) as entries:
                named = (
                    entry.name
                    for entry in entries
                    if entry.name.endswith(_SUFFIX) and KEY_PATTERN.fullmatch(entry.name.removesuffix(_SUFFIX))
                )
                return sorted(islice(named, MOST_RECORDS + 1))
        except FileNotFoundError:
            return []

    def _make_folder(self) -> None:
        with contextlib.suppress(FileExistsError):
            self._folder.mkdir()
            # Whoever may write to the cache may write records.
            os.chmod(self._folder, stat.S_IMODE(os.stat(self._place.folder).st_mode))
        self._refuse_other()

    def _refuse_other(self) -> None:
        """Refuse a link or a file in the place of the folder."""
        if not stat.S_ISDIR(os.lstat(self._folder).st_mode):
            msg = f"{self._folder} is not a folder: the cache follows no links; remove it"
            raise StoreError(msg)


def leftovers(folder: Path) -> list[Path]:
    """Files in a cache's folder that an interrupted recording may have left, and records that do not verify.

    Raises:
        OSError: a record cannot be read, which says nothing about its content.
    """
    records = folder / RECORDS
    if records.is_symlink():
        return []
    damaged = []
    for path in records.glob(f"*{_SUFFIX}"):
        with contextlib.suppress(FileNotFoundError):
            if KEY_PATTERN.fullmatch(path.stem) and path.is_file() and not path.is_symlink():
                with path.open("rb") as file:
                    data = file.read(LARGEST_RECORD + 1)
                if _model_of(data) is None:
                    damaged.append(path)
    return [*records.glob(f"{PARTIAL}*"), *damaged]


def _model_of(data: bytes) -> bytes | None:
    """Return the digest of a record's model, or None if the record does not verify."""
    try:
        return Space.from_bytes(data).keys.model
    except SpaceError:
        return None


def _read(path: Path) -> bytes:
    """Return the content of a record's file: nothing, if no record can be read there."""
    # A link is not followed, and a pipe in a file's place does not block.
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        handle = os.open(path, flags)
    except FileNotFoundError:
        raise
    except OSError:
        return b""
    with os.fdopen(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            return b""
        try:
            return file.read(LARGEST_RECORD + 1)
        except OSError:
            return b""


def _write(path: Path, data: bytes) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=PARTIAL)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # else a loss of power may keep the name and lose the content
        os.chmod(name, 0o644)  # the folder's mode decides who may read
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


class SlotRecords:
    """Records in a `ByteStore`, under a fixed number of names: a store that cannot list its names can still read them.

    Args:
        read: returns the values of names; missing names are left out.
        write: stores values.
    """

    most = MOST_SLOTS

    def __init__(
        self, read: Callable[[Sequence[str]], Mapping[str, Any]], write: Callable[[Mapping[str, bytes]], object]
    ) -> None:
        self._read = read
        self._write = write

    def read(self) -> tuple[list[bytes], int]:
        """As in `Records`."""
        kept = self._read(list(_slots(0)))
        found = [bytes(value) for value in kept.values() if isinstance(value, (bytes, bytearray, memoryview))]
        return found, len(kept) - len(found)

    def write(self, name: str, data: bytes) -> bool:
        """As in `Records`.

        Raises:
            StoreError: there is no room for it, or the store does not keep it.
        """
        slots = list(_slots(int(name[:8], 16)))
        kept = self._read(slots)
        if any(isinstance(value, (bytes, bytearray, memoryview)) and bytes(value) == data for value in kept.values()):
            return True
        free = next((slot for slot in slots if slot not in kept), None)
        if free is None:
            msg = f"the store has {MOST_SLOTS} records of key spaces, and takes no more"
            raise StoreError(msg)
        self._write({free: data})
        # Two processes may have chosen the same name at once. Whoever finds the other's record here tries again at its
        # next write; a record that is replaced after that is lost, and its entries count as unsearchable.
        if self._read([free]).get(free) != data:
            msg = "the store does not keep the record of a key space"
            raise StoreError(msg)
        return True


def _slots(first: int) -> Iterator[str]:
    """Every name, from one on."""
    return (f"{SLOT}{(first + number) % MOST_SLOTS:03}" for number in range(MOST_SLOTS))
