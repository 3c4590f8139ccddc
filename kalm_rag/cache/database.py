"""Opens the cache's database as an untrusted file, and checks what it may hold."""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from kalm_rag.cache.store import StoreError

DATABASE = "cache.db"

LOCK_SECONDS = 5.0
"""How long a write waits for another process before it gives up and counts as failed."""

_LONGEST = 4_000_000
"""Bytes of a row or a statement. Values above 256 KiB are files, so nothing that kalm-rag writes comes near."""

_TABLE = (
    "CREATE TABLE Cache ( rowid INTEGER PRIMARY KEY, key BLOB, raw INTEGER, store_time REAL, expire_time REAL, "
    "access_time REAL, access_count INTEGER DEFAULT 0, tag BLOB, size INTEGER DEFAULT 0, mode INTEGER DEFAULT 0, "
    "filename TEXT, value BLOB)"
)
_SET = "FOR EACH ROW BEGIN UPDATE Settings SET value = value"
SCHEMA: frozenset[tuple[str, str, str | None]] = frozenset(
    {
        ("table", "Settings", "CREATE TABLE Settings ( key TEXT NOT NULL UNIQUE, value)"),
        ("index", "sqlite_autoindex_Settings_1", None),
        ("table", "Cache", _TABLE),
        ("index", "Cache_key_raw", "CREATE UNIQUE INDEX Cache_key_raw ON Cache(key, raw)"),
        ("index", "Cache_expire_time", "CREATE INDEX Cache_expire_time ON Cache (expire_time)"),
        ("index", "Cache_store_time", "CREATE INDEX Cache_store_time ON Cache (store_time)"),
        *(
            (
                "trigger",
                f"Settings_{name}",
                f"CREATE TRIGGER Settings_{name} AFTER {event} ON Cache {_SET}{change} END",
            )
            for name, event, change in (
                ("count_insert", "INSERT", ' + 1 WHERE key = "count";'),
                ("count_delete", "DELETE", ' - 1 WHERE key = "count";'),
                ("size_insert", "INSERT", ' + NEW.size WHERE key = "size";'),
                ("size_update", "UPDATE", ' + NEW.size - OLD.size WHERE key = "size";'),
                ("size_delete", "DELETE", ' - OLD.size WHERE key = "size";'),
            )
        ),
    }
)
"""Everything that diskcache 5.6 creates, as SQLite stores it: type, name and SQL."""


def connect(folder: Path, options: str = "mode=rw") -> sqlite3.Connection:
    """Open the database of a folder and restrict what its content can make SQLite do.

    Args:
        folder: the cache's folder.
        options: SQLite's URI options, such as `mode=ro`.

    Raises:
        StoreError: a file of the database is a link or a special file.
        sqlite3.Error: it cannot be opened.
    """
    for name in (DATABASE, f"{DATABASE}-wal", f"{DATABASE}-shm", f"{DATABASE}-journal"):
        refuse_special(folder / name)
    connection = sqlite3.connect(
        f"{(folder / DATABASE).as_uri()}?{options}",
        uri=True,
        timeout=LOCK_SECONDS,
        isolation_level=None,
        check_same_thread=False,
    )
    try:
        restrict(connection)
    except BaseException:
        connection.close()
        raise
    return connection


def restrict(connection: sqlite3.Connection) -> None:
    """Limit what a hostile or damaged database can do to its reader."""
    connection.text_factory = lambda data: data.decode("utf-8", "replace")  # a flipped bit may leave invalid UTF-8
    if sys.version_info >= (3, 11):
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _LONGEST)
    if sys.version_info >= (3, 12):
        connection.setconfig(sqlite3.SQLITE_DBCONFIG_DEFENSIVE, True)
    connection.execute("PRAGMA trusted_schema = OFF")


def refuse_special(path: Path) -> None:
    """Refuse a link, pipe or device in place of a cache file.

    Raises:
        StoreError: it is one.
    """
    with contextlib.suppress(FileNotFoundError):
        mode = os.lstat(path).st_mode
        if not stat.S_ISREG(mode):
            kind = "a symbolic link" if stat.S_ISLNK(mode) else "not a regular file"
            msg = f"{path} is {kind}: the cache follows no links and opens no special files; give it its own folder"
            raise StoreError(msg)


def connect_reading(folder: Path, *, whole: bool = False) -> tuple[sqlite3.Connection, bool]:
    """Open and inspect the database of a folder for reading.

    On a read-only medium, in a folder of another user or on a full disk SQLite cannot create the files by which
    processes find each other. The main file is then read as it is, without locks.

    Args:
        folder: the cache's folder.
        whole: fail rather than read without locks or without the write-ahead log. Maintenance needs this.

    Returns:
        The connection, and whether it sees what others write.

    Raises:
        StoreError: the database holds something that kalm-rag did not create.
        sqlite3.Error: it cannot be read.
    """
    try:
        return _inspected(folder, "mode=ro"), True
    except sqlite3.OperationalError:
        # A log that this process could read and cannot is a fault, and without it the main file would be an old state.
        if whole or (log_bytes(folder) and os.access(folder, os.W_OK)):
            raise
        return _inspected(folder, "mode=ro&immutable=1"), False


def _inspected(folder: Path, options: str) -> sqlite3.Connection:
    connection = connect(folder, options)
    try:
        inspect(connection)
    except BaseException:
        connection.close()
        raise
    return connection


def log_bytes(folder: Path) -> int:
    """Bytes of the write-ahead log."""
    try:
        return os.stat(folder / f"{DATABASE}-wal").st_size
    except OSError:
        return 0


def inspect(connection: sqlite3.Connection) -> None:
    """Refuse a database that would make diskcache do more than store rows.

    Settings are checked besides the schema: diskcache turns unknown ones into attributes and SQL.

    Raises:
        StoreError: the database holds something else; the message names it.
    """
    from diskcache.core import DEFAULT_SETTINGS, METADATA

    if not inspect_schema(connection):
        return
    known = {**DEFAULT_SETTINGS, **METADATA}
    for key, value in connection.execute("SELECT key, value FROM Settings").fetchall():
        if key not in known or type(value) is not type(known[key]) or (key == "size_limit" and value < 1):
            msg = (
                f"the cache's database has the setting {key!r:.60} = {value!r:.60}, which kalm-rag did not write; "
                "use another folder"
            )
            raise StoreError(msg)


def inspect_schema(connection: sqlite3.Connection) -> bool:
    """Refuse a database whose schema diskcache did not create, before reading anything else from it.

    Views, triggers and generated columns run code. An incomplete schema is accepted: another process may be creating
    the rest.

    Returns:
        Whether there is a table of settings.

    Raises:
        StoreError: the database holds something else; the message names it.
    """
    try:
        found = {tuple(row) for row in connection.execute("SELECT type, name, sql FROM sqlite_master").fetchall()}
    except UnicodeDecodeError as error:  # SQLite quotes the damaged text in its message, which is not text either
        msg = "malformed database schema"
        raise sqlite3.DatabaseError(msg) from error
    strange = found - SCHEMA
    if strange and strange - _installed_schema():
        kind, name, _ = min(strange, key=str)
        msg = f"the cache's database has the {kind} {name!r:.60}, which kalm-rag did not create; use another folder"
        raise StoreError(msg)
    return any(name == "Settings" for _, name, _ in found)


def _installed_schema() -> frozenset[tuple[str, str, str | None]]:
    """What the installed release of diskcache creates, should it differ from `SCHEMA`."""
    import diskcache

    with tempfile.TemporaryDirectory() as folder:
        with diskcache.Cache(folder):
            pass
        with contextlib.closing(sqlite3.connect(Path(folder) / DATABASE)) as connection:
            return frozenset(connection.execute("SELECT type, name, sql FROM sqlite_master").fetchall())


def is_being_made(folder: Path) -> bool:
    """Whether another process is creating the database, or was killed doing so: only then does a journal exist."""
    return (folder / f"{DATABASE}-journal").exists()


def is_complete(connection: sqlite3.Connection) -> bool:
    """Whether the tables exist; if not, another process is creating them, or was killed doing so."""
    query = "SELECT COUNT(*) FROM sqlite_master WHERE type = 'table' AND name IN ('Settings', 'Cache')"
    return tuple(connection.execute(query).fetchone()) == (2,)


def rows(connection: sqlite3.Connection, columns: str) -> Iterator[tuple[object, ...]]:
    """Yield the table's rows, `rowid` first, in pages, so that no long read blocks a writer.

    All columns of a row that is longer than any valid one are None.
    """
    last = -(1 << 63)
    after = "FROM Cache WHERE rowid > ? ORDER BY rowid LIMIT 64"
    nothing = (None,) * (columns.count(",") + 1)
    while True:
        try:
            page = connection.execute(f"SELECT rowid, {columns} {after}", (last,)).fetchall()
        except sqlite3.DataError:
            numbers = [number for (number,) in connection.execute(f"SELECT rowid {after}", (last,))]
            found = {number: row(connection, columns, number) for number in numbers}
            page = [(number, *(values or nothing)) for number, values in found.items() if values is not None]
            last = numbers[-1]
        else:
            last = page[-1][0] if page else last
            if not page:
                return
        yield from page


def row(connection: sqlite3.Connection, columns: str, number: int) -> tuple[object, ...] | None:
    """Return the columns of one row: an empty tuple if it is longer than any valid one, None if it is gone."""
    try:
        found = connection.execute(f"SELECT {columns} FROM Cache WHERE rowid = ?", (number,)).fetchone()  # noqa: S608
    except sqlite3.DataError:
        return ()
    return None if found is None else tuple(found)


def first_bytes(connection: sqlite3.Connection, number: object, count: int) -> bytes:
    """Return the first bytes of the value in a row: nothing, if the row is gone or its value is not bytes."""
    if sys.version_info >= (3, 11) and isinstance(number, int):
        try:
            with connection.blobopen("Cache", "value", number, readonly=True) as value:
                return bytes(value.read(count))
        except sqlite3.OperationalError as error:
            if "no such rowid" in str(error) or "cannot open value of type" in str(error):
                return b""
            raise
    try:
        found = connection.execute("SELECT substr(value, 1, ?) FROM Cache WHERE rowid = ?", (count, number)).fetchone()
    except sqlite3.DataError:  # longer than any valid value
        return b""
    return found[0] if found is not None and isinstance(found[0], bytes) else b""


def lift_limits(connection: sqlite3.Connection) -> None:
    """Let a connection delete rows that are longer than any valid one."""
    if sys.version_info >= (3, 11):
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 1_000_000_000)


def is_damaged(error: BaseException) -> bool:
    """Whether SQLite says that the file is damaged or not a database, in contrast to one that cannot be read now."""
    text = str(error)
    return isinstance(error, sqlite3.DatabaseError) and ("malformed" in text or "not a database" in text)


def passes(error: BaseException) -> bool:
    """Whether an error is temporary and leaves the connection usable: a full disk, or a lock."""
    return "disk is full" in str(error) or "locked" in str(error)


def explain(error: BaseException, folder: Path) -> str:
    """Explain what went wrong with a folder's database, and what to do about it."""
    import diskcache

    if isinstance(error, StoreError):
        return str(error)
    if is_damaged(error):
        return (
            f"the database of the cache in {folder} is damaged ({error}): "
            f"`kalm-rag cache check --fix --cache {folder}` rebuilds it"
        )
    if isinstance(error, diskcache.Timeout) or "locked" in str(error):
        return (
            f"the cache in {folder} is locked: another process has been writing to it for {LOCK_SECONDS:g} s; wait for "
            "it or stop it"
        )
    if "disk is full" in str(error) or getattr(error, "errno", None) == errno.ENOSPC:
        return f"the disk of the cache in {folder} is full ({error}): free some space, or lower the cache's limit"
    advice = "name another folder, or see that this one can be made, read and written by this user"
    return f"the cache in {folder} cannot be used ({type(error).__name__}: {error}): {advice}"
