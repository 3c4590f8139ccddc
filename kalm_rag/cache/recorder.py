"""Records the key spaces that a process uses, so that any process can find their entries by text to forget them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from kalm_rag.cache.disk import DiskStore
from kalm_rag.cache.remote.tier import RemoteTier
from kalm_rag.cache.spaces import Space, SpaceBook, record, records_of
from kalm_rag.cache.store import Store
from kalm_rag.cache.writer import WriteBehind
from kalm_rag.utils import forks


class Recorder:
    """Records each key space once in the store, and once in the shared tier.

    Args:
        book: the key spaces that this process uses, and which of them the store has recorded.
        writer: writes to the store.
        report: logs a fault, by its kind.
    """

    def __init__(self, book: SpaceBook, writer: WriteBehind, report: Callable[[str, str], None]) -> None:
        self._book = book
        self._book_there = SpaceBook()
        self._writer = writer
        self._report = report

    @property
    def unrecorded_there(self) -> int:
        """How many key spaces could not be recorded in the shared tier."""
        return self._book_there.unrecorded

    def use(self, store: Store | None, remote: RemoteTier | None, space: Space) -> None:
        """Remember a key space, and record it in the background.

        Args:
            store: where entries of it are kept, or are about to be; None for nowhere.
            remote: likewise.
            space: the key space.
        """
        self._book.use(space)
        if remote is not None and remote.writes and self._book_there.begin(space):
            remote.later(partial(self._record_there, remote.link.store, space))
        if store is None or records_of(store) is None:
            return
        if isinstance(store, DiskStore) and not store.records.holds(space.id):
            self._book.lost(space)
        if self._book.begin(space):
            self._writer.submit(0, partial(self._record, store, space))

    def _record(self, store: Store, space: Space) -> None:
        try:
            with forks.native():
                kept = record(store, [space])
        except Exception as error:  # noqa: BLE001 - a store may be anybody's code
            self._book.end(space, failed=True)
            self._report(
                "record", f"cannot record a key space: other processes cannot find its entries by text ({error})"
            )
        else:
            self._book.end(space, again=not kept)

    def _record_there(self, store: Store, space: Space) -> None:
        try:
            record(store, [space])
        except Exception:
            self._book_there.end(space, failed=True)
            raise
        self._book_there.end(space)
