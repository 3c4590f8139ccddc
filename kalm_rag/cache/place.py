"""The folder of a cache: its content, and whether this process may use it."""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
from pathlib import Path

from kalm_rag.cache import database
from kalm_rag.cache.database import DATABASE
from kalm_rag.cache.folder import (
    is_cut_off,
    read_manifest,
    refuse_network,
    who_else_may_write,
    write_manifest,
)
from kalm_rag.cache.store import StoreError
from kalm_rag.utils.paths import MANIFEST

logger = logging.getLogger(__name__)


class Place:
    """A cache's folder, and the warnings already logged about it.

    Args:
        folder: an absolute path.
        read_only: whether it is only to be read.

    Attributes:
        folder: as given.
        read_only: as given.
        authenticated: whether the reader checks tags. If not, a folder that others can write to draws a warning.
    """

    def __init__(self, folder: Path, *, read_only: bool) -> None:
        self.folder = folder
        self.read_only = read_only
        self.authenticated = False
        self._said: set[str] = set()

    def file(self) -> tuple[int, int] | None:
        """Return device and inode of the database's file; None if there is none."""
        try:
            status = os.stat(self.folder / DATABASE)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            msg = f"cannot open the cache in {self.folder}: this user may not read it ({error.strerror})"
            raise StoreError(msg) from error
        return status.st_dev, status.st_ino

    def cannot_write(self) -> bool:
        """Whether this user may not write to it."""
        return self.folder.is_dir() and not os.access(self.folder, os.W_OK | os.X_OK)

    def check(self) -> None:
        """Refuse a folder that cannot be a cache, or belongs to another program.

        Raises:
            StoreError: the message says why, and what to do.
        """
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
        if self.file() is not None and not is_cut_off(self.folder):
            read_manifest(self.folder)
        writers = None if self.authenticated else who_else_may_write(self.folder)
        if writers:
            self.say(
                "shared",
                "the cache folder %s can be changed by %s, who can change scores that way: "
                "give every process the same secret (`PassageCache(secret=...)`), or move the cache",
                self.folder,
                writers,
            )

    def refuse_missing(self) -> None:
        """Explain why there is no database, unless nothing was stored yet.

        Raises:
            StoreError: the folder cannot be a cache, or is to be read and holds none.
        """
        self.check()
        if self.read_only:
            msg = f"no cache exists in {self.folder}; open it without read_only=True to create one"
            raise StoreError(msg)

    def prepare(self) -> None:
        """Make the folder if necessary, and check that it is a cache and can be locked."""
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
        """Rewrite a manifest that a power loss left empty, if the database beside it is valid."""
        if self.file() is not None:
            with contextlib.closing(database.connect(self.folder)) as connection:
                database.inspect(connection)
        write_manifest(self.folder)

    def has_limit(self) -> bool:
        """Whether the folder has a limit; the limit belongs to the folder, not to its users."""
        if self.file() is None:
            return False
        with contextlib.closing(database.connect(self.folder)) as connection:
            try:
                found = connection.execute("SELECT 1 FROM Settings WHERE key = 'size_limit'").fetchone()
            except sqlite3.OperationalError as error:
                if "no such table" not in str(error):
                    raise
                return False
        return found is not None

    def say(self, kind: str, message: str, *values: object) -> None:
        """Log a warning, once of each kind."""
        if kind not in self._said:
            self._said.add(kind)
            logger.warning(message, *values)
