"""Looks at the cache's folder without creating it: what it holds, and whether it can be written."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kalm_rag.cache import DiskStore, StoreError
from kalm_rag.cache.connections import DEFAULT_LIMIT
from kalm_rag.cache.folder import filesystem_of, who_else_may_write
from kalm_rag.cache.preflight import check_writable
from kalm_rag.diagnosis.findings import Finding, Level
from kalm_rag.utils.paths import CACHE_VARIABLE, DEFAULT, MANIFEST, passages_dir, user_path

_ELSEWHERE = f"name a folder that you may write to with --cache or {CACHE_VARIABLE}"


@dataclass(slots=True)
class CachePlace:
    """The folder of encoded passages.

    Attributes:
        folder: where it is, or None if passages are kept in memory only.
        exists: whether a cache is there already.
        writable: whether a test entry, or a test file where no cache exists yet, was written and read back.
        tried: what was written where, to find that out.
        entries: passages that it holds.
        bytes: what they take.
        limit: bytes that it may take.
        free: bytes that its disk has left.
        filesystem: the type of its file system, where the system tells.
        evicted: passages that the test entry pushed out of a full cache.
    """

    folder: str | None
    exists: bool = False
    writable: bool = False
    tried: str = ""
    entries: int | None = None
    bytes: int | None = None
    limit: int | None = None
    free: int | None = None
    filesystem: str | None = None
    evicted: int = 0

    def as_json(self) -> dict[str, Any]:
        """Return all fields."""
        return asdict(self)


def look_at_cache(where: str = DEFAULT) -> tuple[CachePlace, list[Finding]]:
    """Look at the cache's folder, and try to write to it.

    Args:
        where: as in `PassageCache`.

    Returns:
        What was seen, and what is wrong with it.
    """
    try:
        folder = passages_dir() if where == DEFAULT else user_path(where, "cache")
    except ValueError as error:
        return CachePlace(None), [_cache_finding("error", str(error))]
    if folder is None:
        return CachePlace(None), [
            _cache_finding(
                "warning",
                f"This user has no home folder, so encoded passages are kept in memory only; {_ELSEWHERE}.",
            )
        ]
    seen = CachePlace(str(folder), filesystem=filesystem_of(folder))
    try:
        return seen, _look(DiskStore(folder), seen)
    except (StoreError, OSError) as error:
        return seen, [_cache_finding("error", str(error))]


def try_folder(folder: Path) -> Path:
    """Write, read and delete a file in a folder, or in the nearest one above that exists; nothing stays behind.

    Returns:
        The folder where that was tried.

    Raises:
        OSError: it does not work.
    """
    place = folder
    while not place.is_dir() and not os.path.lexists(place) and place != place.parent:
        place = place.parent
    with tempfile.TemporaryDirectory(prefix=".kalm-rag-doctor-", dir=place) as name:
        file = Path(name) / "probe"
        file.write_bytes(b"kalm-rag")
        if file.read_bytes() != b"kalm-rag":
            msg = f"what is written to {place} is not what is read back"
            raise OSError(msg)
    return place


def _cache_finding(level: Level, text: str) -> Finding:
    return Finding(level, "cache", text)


def _look(store: DiskStore, seen: CachePlace) -> list[Finding]:
    folder = store.folder
    store.place.authenticated = True  # who else may write is reported here, instead of in the log
    store.place.check()
    findings = []
    seen.exists = (folder / MANIFEST).is_file() and store.place.file() is not None
    try:
        if seen.exists:
            findings += _try_cache(store, seen)
        else:
            tried = try_folder(folder)
            seen.writable, seen.limit = True, DEFAULT_LIMIT
            seen.tried = f"a test file was written to {tried}, read and deleted; the first passage creates the cache"
    except OSError as error:
        reason = error.strerror or str(error)
        findings.append(
            _cache_finding("error", f"The cache folder {folder} cannot be created ({reason}); {_ELSEWHERE}.")
        )
    finally:
        store.close()
    return findings + _check_room(folder, seen) + _check_owner(folder)


def _try_cache(store: DiskStore, seen: CachePlace) -> list[Finding]:
    """Write, read and delete a test entry in a cache that exists."""
    before = store.stats()
    seen.entries, seen.bytes, seen.limit = before.entries, before.bytes, before.limit
    try:
        check_writable(store)
    except StoreError as error:
        seen.tried = "a test entry could not be kept"
        level: Level = "warning" if store.read_only else "error"
        rest = " What it holds is still used." if store.read_only else ""
        return [_cache_finding(level, f"{_sentence(str(error))}{rest}")]
    seen.writable = True
    seen.tried = "a test entry was written, read and deleted"
    seen.evicted = store.stats().evicted
    if seen.evicted:
        return [_cache_finding("note", f"The cache is full: the test entry pushed {seen.evicted} old passages out.")]
    return []


def _check_room(folder: Path, seen: CachePlace) -> list[Finding]:
    place = folder
    while not place.is_dir() and place != place.parent:
        place = place.parent
    try:
        seen.free = shutil.disk_usage(place).free
    except OSError as error:
        return [_cache_finding("warning", f"The free space of {place} is unknown ({error.strerror}).")]
    growth = (seen.limit or 0) - (seen.bytes or 0)
    if growth <= seen.free:
        return []
    fitting = max(0.1, 0.8 * (seen.free + (seen.bytes or 0)) / 1e9)
    text = (
        f"The cache may grow by {growth / 1e9:.1f} GB up to its limit of {(seen.limit or 0) / 1e9:.1f} GB, but its "
        f"disk has only {seen.free / 1e9:.1f} GB left: once that is full, new passages are not kept. Free some space, "
        f"lower the limit (kalm-rag encode --limit-gb {fitting:.1f}), or name another folder with --cache or "
        f"{CACHE_VARIABLE}."
    )
    return [_cache_finding("warning", text)]


def _check_owner(folder: Path) -> list[Finding]:
    writers = who_else_may_write(folder) if folder.is_dir() else None
    if not writers:
        return []
    text = (
        f"The cache folder {folder} can be changed by {writers}, who can change scores that way: give every process "
        "the same secret (PassageCache(secret=...)), or move the cache."
    )
    return [_cache_finding("warning", text)]


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")
