"""diskcache without pickle, and without trust in what its database says.

`diskcache` 5.6.3 unpickles keys and values and opens or deletes whatever file name stands in a row (CVE-2025-69872), so
whoever can write to the directory can run code in the reader. This `Disk` stores and reads raw bytes under hexadecimal
keys only. It overrides every method through which a row could reach pickle, the file system outside of the directory,
or a blocking special file; `tests/test_cache_attacks.py` holds the known attacks.
"""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
import stat
import threading
from collections.abc import Iterator
from typing import Any

import diskcache
from diskcache.core import DEFAULT_SETTINGS, ENOVAL, MODE_BINARY, MODE_RAW, UNKNOWN

from kalm_rag.cache.keys import KEY_PATTERN

FILE_PATTERN = re.compile(r"[0-9a-f]{2}/[0-9a-f]{2}/[0-9a-f]{28}\.val")
"""File names as diskcache makes them, relative to the directory."""

LARGEST_FILE = 1 << 30
"""A value file above this is no passage; it is not read into memory."""


SETTINGS: dict[str, Any] = {
    "eviction_policy": "least-recently-stored",  # other policies turn every read into a write
    "cull_limit": 0,  # nothing is evicted behind our back: see `DiskStore._evict`
    "disk_min_file_size": 256 * 1024,  # smaller values are faster, and safer in a crash, inside of the database
    "sqlite_mmap_size": 0,  # a mapped file that is cut short kills the process
    "statistics": 0,
    "tag_index": 0,
}
"""Settings of diskcache; every process that opens the folder uses the same."""


class StrictCache(diskcache.Cache):  # type: ignore[misc]
    """A cache whose pragmas are ours, whatever stands in its database.

    diskcache reads settings from the database for every new connection, and executes those that begin with `sqlite_`.
    """

    def reset(self, key: str, value: Any = ENOVAL, update: bool = True) -> Any:
        """As diskcache, with pragmas from our own table; one that is unknown is not executed."""
        if key.startswith("sqlite_"):
            if key not in DEFAULT_SETTINGS:
                return None
            value = SETTINGS.get(key, DEFAULT_SETTINGS[key])
        return super().reset(key, value, update)


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
        """Put bytes into the database, or into a file of their own when they are many; no half file is left behind."""
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
        msg = f"a row of mode {mode!r} is not ours"
        raise ValueError(msg)

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
    def _read(path: str) -> bytes:
        # A link is not followed, and a pipe put in a file's place does not block.
        flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        handle = os.open(path, flags)
        with os.fdopen(handle, "rb") as file:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode) or status.st_size > LARGEST_FILE:
                msg = f"{path!r} is no value file"
                raise ValueError(msg)
            return file.read()
