"""Reads what the entries of a store say of themselves, without reading their numbers where that can be avoided."""

from __future__ import annotations

import contextlib
import math
import sqlite3
from collections import Counter
from collections.abc import Collection, Iterable, Iterator

from kalm_rag.cache import database
from kalm_rag.cache.disk import DiskStore
from kalm_rag.cache.frame import HEADER_BYTES, FrameError, Head
from kalm_rag.cache.keys import KEY_PATTERN
from kalm_rag.cache.spaces import Space
from kalm_rag.cache.store import Store, StoreError

_CLOCK_SECONDS = 10.0
"""What the times of a file and of a row may differ by; a record is written before the first entry of its key space."""

_AT_ONCE = 64


def heads(store: Store) -> Iterator[tuple[str, Head | None]]:
    """Yield every entry's key and head, None for what is no frame: damaged, or without its file.

    Raises:
        StoreError: something cannot be read, which says nothing about its content.
    """
    if isinstance(store, DiskStore):
        yield from _heads_on_disk(store)
        return
    batch: list[str] = []
    for key in store.keys():  # noqa: SIM118 - a store is not a mapping
        batch.append(key)
        if len(batch) == _AT_ONCE:
            yield from _heads_of(store, batch)
            batch = []
    yield from _heads_of(store, batch)


def keys_of_models(store: Store, models: Collection[bytes], *, others: bool = False) -> dict[bytes, list[str]]:
    """Return the keys of the entries of some models, by the model's digest.

    Args:
        store: where they are.
        models: digests of models.
        others: the entries of all other models instead.

    Raises:
        StoreError: something cannot be read.
    """
    found: dict[bytes, list[str]] = {}
    for key, head in heads(store):
        if head is not None and (head.model in models) != others:
            found.setdefault(head.model, []).append(key)
    return found


def unsearchable(store: Store, spaces: Iterable[Space]) -> dict[bytes, int]:
    """Count the entries that are in none of the key spaces, by the digest of their model.

    Such an entry cannot be found by its text. A head does not hold all fields of a key space, so that more of them may
    be in none: those that differ from a known key space in `max_length` or in the instruction and nothing else.

    Raises:
        StoreError: something cannot be read.
    """
    longest: dict[tuple[bytes, bool, str, int], int] = {}
    for space in spaces:
        fields, behind = space.keys.fields, space.behind
        if behind is None:
            kept = str(fields["dtype"] if fields["storage"] == "native" else fields["storage"])
            mark = (space.keys.model, False, kept, 0)
        else:
            mark = (space.keys.model, True, behind.kind.split(",")[0], behind.ratio)
        longest[mark] = max(longest.get(mark, 0), int(fields["max_length"]))
    found: Counter[bytes] = Counter()
    for _, head in heads(store):
        if head is not None and not head.reference:  # which is of no text
            mark = (head.model, head.prefilled, head.dtype, head.ratio if head.prefilled else 0)
            found[head.model] += head.tokens > longest.get(mark, -1)
    return {model: count for model, count in found.items() if count}


def older_than_records(store: Store | None) -> int:
    """Count the entries of a folder that are older than its first record of a key space: no record may speak of them.

    Raises:
        StoreError: the folder cannot be read.
    """
    if not isinstance(store, DiskStore) or store.place.file() is None:
        return 0
    since = store.records.since()
    before = math.inf if since is None else since - _CLOCK_SECONDS
    try:
        connection, _ = database.connect_reading(store.folder)
        with contextlib.closing(connection):
            if not database.is_complete(connection):
                return 0
            (count,) = connection.execute("SELECT COUNT(*) FROM Cache WHERE store_time < ?", (before,)).fetchone()
            return int(count)
    except (sqlite3.Error, OSError) as error:
        raise StoreError(database.explain(error, store.folder)) from error


def _heads_of(store: Store, keys: list[str]) -> Iterator[tuple[str, Head | None]]:
    for key, data in store.get_many(keys).items():
        yield key, _head(data, key)


def _head(data: bytes, key: str) -> Head | None:
    with contextlib.suppress(FrameError):
        return Head.from_bytes(data, key)
    return None


def _heads_on_disk(store: DiskStore) -> Iterator[tuple[str, Head | None]]:
    from kalm_rag.cache.strict_disk import StrictDisk

    if store.place.file() is None:
        return
    disk = StrictDisk(str(store.folder))
    try:
        store.place.check()
        connection, _ = database.connect_reading(store.folder)
        with contextlib.closing(connection):
            if not database.is_complete(connection):
                return
            for rowid, key, raw, mode, filename in database.rows(connection, "key, raw, mode, filename"):
                if raw != 1 or not isinstance(key, str) or not KEY_PATTERN.fullmatch(key):
                    continue
                try:
                    if filename is None:
                        data = database.first_bytes(connection, rowid, HEADER_BYTES)
                    else:
                        data = disk.fetch_first(mode, filename, HEADER_BYTES)
                except (FileNotFoundError, ValueError):
                    data = b""
                yield key, _head(data, key)
    except (sqlite3.Error, OSError) as error:
        raise StoreError(database.explain(error, store.folder)) from error
