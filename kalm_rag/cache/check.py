"""Verifies a cache folder, and removes only what a complete, consistent view of it shows to be wrong."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kalm_rag.cache import database
from kalm_rag.cache.database import DATABASE
from kalm_rag.cache.folder import MANIFEST_PART, is_cut_off, read_manifest, write_manifest
from kalm_rag.cache.frame import Frame, FrameError
from kalm_rag.cache.records import RECORDS, leftovers
from kalm_rag.cache.store import CheckReport, Store, StoreError
from kalm_rag.cache.strict_disk import FILE_PATTERN, StrictDisk
from kalm_rag.utils.paths import MANIFEST

_COLUMNS = "key, raw, mode, filename, value"
_COUNTERS = {"count": "SELECT COUNT(*) FROM Cache", "size": "SELECT COALESCE(SUM(size), 0) FROM Cache"}
_SALVAGED_AT_ONCE = 64


@dataclass(slots=True)
class _Found:
    """Row numbers by what was found, and the files they name."""

    entries: int = 0
    suspects: list[int] = field(default_factory=list)
    corrupt: list[int] = field(default_factory=list)
    missing: list[int] = field(default_factory=list)
    files: list[str] = field(default_factory=list)


def check_folder(
    folder: Path,
    *,
    fix: bool,
    secret: bytes | None,
    orphan_age: float,
    make_store: Callable[[int | None], Store],
) -> CheckReport:
    """Read and verify every entry, the database itself, and the files beside it.

    Nothing is removed unless everything could be read, and each row is verified once more under the write lock just
    before it is removed, so that a value that was written in the meantime stays.

    Args:
        folder: the cache's folder.
        fix: rebuild a damaged database, and remove what is wrong.
        secret: also demand valid tags.
        orphan_age: seconds; a younger file may belong to a write that is under way.
        make_store: makes a store in this folder with a limit (None: the default), for the entries saved from a damaged
            one.

    Raises:
        StoreError: the folder is not ours, or something in it cannot be read or written; nothing was removed then.
    """
    try:
        if is_cut_off(folder):
            if not fix:
                return CheckReport(0, 0, 0, 0, 0, f"{MANIFEST} has lost its content")
            write_manifest(folder)
        read_manifest(folder)
        return _check(folder, fix, secret, orphan_age, make_store)
    except (sqlite3.Error, OSError) as error:
        msg = f"the check of the cache in {folder} stopped, and nothing was removed: {type(error).__name__}: {error}"
        raise StoreError(msg) from error


def _check(
    folder: Path, fix: bool, secret: bytes | None, orphan_age: float, make_store: Callable[[int | None], Store]
) -> CheckReport:
    if fix:
        _roll_back(folder)
    elif database.is_being_made(folder):
        return CheckReport(0, 0, 0, 0, 0, "a crash interrupted its creation, or a process is creating it now")
    damage = _damage(folder)
    if not damage and not _has_tables(folder):
        return CheckReport(0, 0, 0, 0, 0)
    if damage and not fix:
        return CheckReport(0, 0, 0, 0, 0, damage)
    quarantine, salvaged = None, 0
    # A faulty disk may misread a sound database once: it is moved only if it is found damaged each time.
    if damage and not _mended(folder) and _damage(folder):
        quarantine, salvaged = _rebuild(folder, secret, make_store)
    disk = StrictDisk(str(folder))
    found = _Found()
    with _reading(folder) as connection:
        for rowid, *row in database.rows(connection, _COLUMNS):
            found.entries += 1
            if _fault(disk, row, secret):
                found.suspects.append(_number(rowid))
    with _locked(folder) if fix else _reading(folder) as connection:
        # The rows may have been rewritten since, and missing files may exist by now.
        _judge(connection, disk, found, secret)
        orphans = _orphans(folder, connection, orphan_age)
        size = sum(path.stat().st_size for path in orphans if path.exists())
        damage = damage or _miscounted(connection)
        if fix:
            _set_right(connection, found.corrupt + found.missing)
    if fix:
        for name in found.files:
            disk.remove(name)
        for path in orphans:
            _remove(folder, disk, path)
    counts = (found.entries, len(found.corrupt), len(found.missing), len(orphans), size)
    return CheckReport(*counts, damage, None if quarantine is None else str(quarantine), salvaged)


def _set_right(connection: sqlite3.Connection, rows: list[int]) -> None:
    """Delete rows and recompute the counters."""
    database.lift_limits(connection)
    connection.executemany("DELETE FROM Cache WHERE rowid = ?", [(rowid,) for rowid in rows])
    for name, query in _COUNTERS.items():
        connection.execute(f"UPDATE Settings SET value = ({query}) WHERE key = ?", (name,))  # noqa: S608


def _fault(disk: StrictDisk, row: Sequence[Any], secret: bytes | None) -> str:
    """Return what is wrong with a row: an empty string, `missing` (its file) or `corrupt`.

    Raises:
        OSError: its file exists but cannot be read, which says nothing about its content.
    """
    if not row:  # longer than any valid row
        return "corrupt"
    key, raw, mode, filename, value = row
    try:
        Frame.from_bytes(disk.fetch(mode, filename, value, read=False), disk.get(key, raw), secret)
    except FileNotFoundError:
        return "missing"
    except (FrameError, ValueError):
        return "corrupt"
    return ""


def _judge(connection: sqlite3.Connection, disk: StrictDisk, found: _Found, secret: bytes | None) -> None:
    """Verify the suspects a second time, as they are now."""
    for rowid in found.suspects:
        row = database.row(connection, _COLUMNS, rowid)
        fault = "" if row is None else _fault(disk, row, secret)
        if fault == "missing":
            found.missing.append(rowid)
        elif fault:
            found.corrupt.append(rowid)
            found.files += [row[3]] if row and isinstance(row[3], str) else []


def _orphans(folder: Path, connection: sqlite3.Connection, age: float) -> list[Path]:
    """Return old enough cache files that no row names."""
    began = time.time()
    candidates = [*folder.glob("??/??/*.val"), *folder.glob(f"{MANIFEST_PART}*"), *leftovers(folder)]
    named = {name for _, name in database.rows(connection, "filename") if isinstance(name, str)}
    return [
        path
        for path in candidates
        if _is_ours(folder, path) and _relative(folder, path) not in named and _written(path) <= began - age
    ]


def _is_ours(folder: Path, path: Path) -> bool:
    if path.is_symlink():
        return False
    return path.parent in (folder, folder / RECORDS) or bool(FILE_PATTERN.fullmatch(_relative(folder, path)))


def _remove(folder: Path, disk: StrictDisk, path: Path) -> None:
    if path.parent in (folder, folder / RECORDS):
        path.unlink(missing_ok=True)
    else:
        disk.remove(_relative(folder, path))


def _relative(folder: Path, path: Path) -> str:
    return path.relative_to(folder).as_posix()


def _written(path: Path) -> float:
    try:
        return path.lstat().st_mtime
    except FileNotFoundError:
        return float("inf")


def _number(value: object) -> int:
    return value if isinstance(value, int) else -1


@contextlib.contextmanager
def _reading(folder: Path) -> Iterator[sqlite3.Connection]:
    connection, _ = database.connect_reading(folder, whole=True)
    with contextlib.closing(connection):
        yield connection


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[sqlite3.Connection]:
    """Run an exclusive write transaction, committed as a whole or not at all."""
    with contextlib.closing(database.connect(folder)) as connection:
        database.inspect(connection)
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield connection
        except BaseException:
            connection.execute("ROLLBACK")
            raise
        connection.execute("COMMIT")


def _roll_back(folder: Path) -> None:
    """Let SQLite roll back what a crash left half done; a reader may not do that."""
    try:
        with contextlib.closing(database.connect(folder)) as connection:
            connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
        if isinstance(error, sqlite3.DatabaseError) and not database.is_damaged(error):
            raise


def _damage(folder: Path) -> str:
    """Return what SQLite finds wrong with the database; empty if nothing."""
    try:
        with _reading(folder) as connection:
            return _integrity(connection)
    except sqlite3.DatabaseError as error:
        if database.is_damaged(error):
            return str(error)
        raise


def _has_tables(folder: Path) -> bool:
    with _reading(folder) as connection:
        return database.is_complete(connection)


def _integrity(connection: sqlite3.Connection) -> str:
    try:
        (first,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
    except sqlite3.DataError:  # a row longer than any valid one; reading the rows finds it
        return ""
    # SQLite also lists pages that it could not read; that is a fault of the disk, unless its code is that of damage.
    if "unable to get the page" in str(first) and "error code=11" not in str(first):
        raise sqlite3.OperationalError(str(first))
    return "" if first == "ok" else str(first)


def _miscounted(connection: sqlite3.Connection) -> str:
    """Return which size counter disagrees with the rows; empty if none."""
    for name, query in _COUNTERS.items():
        kept = connection.execute("SELECT value FROM Settings WHERE key = ?", (name,)).fetchone()
        true = connection.execute(query).fetchone()
        if kept != true:
            return f"the counter {name!r} is {kept and kept[0]!r} and should be {true[0]!r}"
    return ""


def _mended(folder: Path) -> bool:
    """Rebuild the indexes from the table; return whether that was enough."""
    try:
        with _locked(folder) as connection:
            connection.execute("REINDEX")
    except sqlite3.DatabaseError as error:
        if database.is_damaged(error) or isinstance(error, sqlite3.IntegrityError):
            return False
        raise
    return not _damage(folder)


def _rebuild(folder: Path, secret: bytes | None, make_store: Callable[[int | None], Store]) -> tuple[Path, int]:
    """Move a damaged database aside and copy what still verifies into a new one.

    Processes that have the old one open notice the move and open the new one.
    """
    aside = folder / time.strftime("quarantine-%Y%m%d-%H%M%S")
    limit = _limit_of(folder)
    try:
        aside.mkdir(mode=0o700)
        for name in (DATABASE, f"{DATABASE}-wal", f"{DATABASE}-shm", f"{DATABASE}-journal"):
            with contextlib.suppress(FileNotFoundError):
                (folder / name).rename(aside / name)
    except OSError as error:
        msg = f"cannot move the damaged database of the cache in {folder} aside: {error}"
        raise StoreError(msg) from error
    store = make_store(limit)
    try:
        store.put_many({})
        return aside, _salvage(folder, aside, store.put_many, secret)
    finally:
        store.close()


def _salvage(folder: Path, aside: Path, put: Callable[[dict[str, bytes]], int], secret: bytes | None) -> int:
    """Copy the entries that can still be read and verified; return how many."""
    disk, batch, kept = StrictDisk(str(folder)), dict[str, bytes](), 0
    with (
        contextlib.suppress(sqlite3.Error, StoreError),
        contextlib.closing(database.connect(aside, "mode=ro")) as connection,
    ):
        database.inspect_schema(connection)  # its settings are not used, and may be what is damaged
        for _, key, raw, mode, filename, value in database.rows(connection, _COLUMNS):
            with contextlib.suppress(FrameError, ValueError, OSError):
                data = disk.fetch(mode, filename, value, read=False)
                Frame.from_bytes(data, disk.get(key, raw), secret)
                batch[str(key)] = data
            if len(batch) == _SALVAGED_AT_ONCE:
                kept += put(batch)
                batch = {}
    return kept + (put(batch) if batch else 0)


def _limit_of(folder: Path) -> int | None:
    with contextlib.suppress(sqlite3.Error, StoreError, OSError, TypeError), _reading(folder) as connection:
        (limit,) = connection.execute("SELECT value FROM Settings WHERE key = 'size_limit'").fetchone()
        return int(limit)
    return None
