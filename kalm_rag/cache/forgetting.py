"""Deletes entries by key, and counts what went."""

from __future__ import annotations

import logging
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass, fields
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from kalm_rag.cache import database
from kalm_rag.cache.disk import DiskStore
from kalm_rag.cache.heads import older_than_records
from kalm_rag.cache.keys import KEY_PATTERN
from kalm_rag.cache.memory import MemoryStore
from kalm_rag.cache.remote.maintenance import check_can_delete as check_can_delete_shared
from kalm_rag.cache.remote.maintenance import delete_shared, shared_spaces
from kalm_rag.cache.scores import ScoreCache
from kalm_rag.cache.sieve import BudgetSieve
from kalm_rag.cache.spaces import Kind, Space, SpaceBook, distinct, recorded_spaces, records_of
from kalm_rag.cache.store import Store, StoreError
from kalm_rag.documents import iter_documents
from kalm_rag.utils import forks
from kalm_rag.utils.display import Shown

if TYPE_CHECKING:
    from kalm_rag.cache.remote.tier import RemoteTier
    from kalm_rag.results import Document

logger = logging.getLogger(__name__)


class Waiting(Protocol):
    """Passages of a reranker that wait to be encoded."""

    def drop(self) -> None:
        """Give them up, and wait until none is being encoded."""


Level: TypeAlias = BudgetSieve[str, Any] | ScoreCache | Waiting
"""What a reranker holds in memory: prefilled passages under the cache's keys, scores, or passages that wait."""

_AT_ONCE = 256


@dataclass(frozen=True, slots=True, repr=False)
class Forgotten(Shown):
    """Counts the entries that one level has forgotten.

    Attributes:
        states: encoder states.
        prefilled: prefilled passages.
        scores: scores of pairs with a passage, which only memory holds.
    """

    states: int = 0
    prefilled: int = 0
    scores: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.states + self.prefilled + self.scores


@dataclass(frozen=True, slots=True, repr=False)
class ForgetReport(Shown):
    """Counts what `forget` deleted. A text may have several entries: one for each model and setting that read it.

    Attributes:
        texts: texts that were given.
        memory: entries that went in the memory of this process.
        store: entries that went in the store.
        remote: entries that went in the tier that several machines share; those on the disks of other machines stay.
        spaces: key spaces that were searched: ways to encode, each with keys of its own.
        unrecorded: key spaces that this process used and could not record. Other processes do not search them.
        unreadable: records of key spaces that could not be read, or found no room. Entries in those spaces were not
            searched.
        older: entries left in a folder that are older than its first record, as earlier versions kept them. They were
            searched in the recorded and named key spaces only.
        windowed: ways in which long passages were split into windows that were not forgotten with them: to find
            windows takes the tokenizer, so forget through a reranker of the model, or name it.
    """

    texts: int
    memory: Forgotten
    store: Forgotten
    spaces: int
    unrecorded: int = 0
    unreadable: int = 0
    older: int = 0
    windowed: int = 0
    remote: Forgotten = Forgotten()

    @property
    def total(self) -> int:
        """All entries that went, at every level."""
        return self.memory.total + self.store.total + self.remote.total


def together(reports: Sequence[ForgetReport], *, texts: int) -> ForgetReport:
    """Return the counts of several reports: entries add up, and what was searched is the most that one of them says.

    Args:
        reports: of parts of the texts, or of several processes that forgot the same ones.
        texts: that were given.
    """
    levels = ("memory", "store", "remote")
    counts: dict[str, Any] = {
        level: Forgotten(
            **{part.name: sum(getattr(getattr(one, level), part.name) for one in reports) for part in fields(Forgotten)}
        )
        for level in levels
    }
    for part in fields(ForgetReport):
        if part.name not in levels:
            counts[part.name] = max((getattr(one, part.name) for one in reports), default=0)
    return ForgetReport(**counts | {"texts": texts})


def check_can_delete(store: Store | None) -> None:
    """Refuse a store from which nothing can be deleted.

    Raises:
        StoreError: it is read-only.
    """
    if not isinstance(store, DiskStore):
        return
    try:
        refused = store.place.read_only or store.place.cannot_write()
    except OSError as error:
        raise StoreError(database.explain(error, store.folder)) from error
    if refused:
        msg = (
            f"the cache in {store.folder} is read-only, so nothing can be deleted from it: open it without "
            "read_only=True, as a user who may write to it"
        )
        raise StoreError(msg)


def delete_from(store: Store | None, keys: Sequence[str]) -> int:
    """Delete keys from a store; returns how many existed.

    Raises:
        StoreError: the store failed, or still holds some of them.
    """
    if store is None or not keys:
        return 0
    try:
        with forks.native():
            gone = store.delete(keys)
            # A folder deletes in a transaction. Any other store is somebody's code, which may not delete at all.
            left = {} if isinstance(store, DiskStore) else store.get_many(keys)
    except StoreError:
        raise
    except Exception as error:
        msg = (
            f"{type(store).__name__} did not delete what it was asked to ({type(error).__name__}: {error}); delete "
            "the entries where it keeps them"
        )
        raise StoreError(msg) from error
    check_can_delete(store)
    if left:
        msg = (
            f"{type(store).__name__} still holds {len(left)} of {len(keys)} deleted entries: it cannot delete, or "
            "something stores them again at this moment. Stop what ranks these texts, or delete the entries where the "
            "store keeps them"
        )
        raise StoreError(msg)
    return int(gone or 0)


class Forgetter:
    """Forgets texts at every level of a cache.

    `_lock` guards `_prefilled`, `_scores` and `_waiting`.

    Args:
        memory: the cache's encoder states in memory.
        flush: waits for the cache's pending writes.

    Attributes:
        book: the key spaces that this process uses.
    """

    def __init__(self, memory: MemoryStore, flush: Callable[[], object]) -> None:
        self.book = SpaceBook()
        self._memory = memory
        self._flush = flush
        self._prefilled: weakref.WeakSet[BudgetSieve[str, Any]] = weakref.WeakSet()
        self._scores: weakref.WeakSet[ScoreCache] = weakref.WeakSet()
        self._waiting: weakref.WeakSet[Waiting] = weakref.WeakSet()
        self._lock = forks.Lock()

    def attach(self, level: Level) -> None:
        """Reach what a reranker holds in memory, for as long as it is used."""
        with self._lock:
            if isinstance(level, ScoreCache):
                self._scores.add(level)
            elif isinstance(level, BudgetSieve):
                self._prefilled.add(level)
            else:
                self._waiting.add(level)

    def _settle(self) -> None:
        """Let nothing be stored later that is on its way now."""
        with self._lock:
            waiting = list(self._waiting)
        for passages in waiting:
            passages.drop()
        self._flush()

    def unrecorded(self, store: Store | None) -> int:
        """Return how many key spaces that this process uses are not recorded, though their entries are kept."""
        if store is None:
            return 0
        return len(self.book.used()) if records_of(store) is None else self.book.unrecorded

    def delete_in_memory(self, keys: Sequence[str], kind: Kind | None = None) -> int:
        """Delete keys of one kind or of both in memory; returns how many existed."""
        gone = 0
        if kind != "passage_kv":
            gone += self._memory.delete(keys)
        if kind != "states":
            gone += sum(level.delete(keys) for level in self._levels())
        return gone

    def delete_scores(self, keys: Sequence[str] | None) -> int:
        """Delete the scores of passages, or all scores; returns how many existed.

        Args:
            keys: keys of the passages' encoder states; None for all scores.
        """
        with self._lock:
            found = list(self._scores)
        return sum(scores.clear() if keys is None else scores.delete(keys) for scores in found)

    def delete(self, store: Store | None, remote: RemoteTier | None, keys: Iterable[str]) -> int:
        """Delete keys at every level, see `PassageCache.delete`."""
        keys = list(dict.fromkeys(keys))
        wrong = [key for key in keys if not isinstance(key, str) or not KEY_PATTERN.fullmatch(key)]
        if wrong:
            msg = f"a key must be 64 hexadecimal digits, got {wrong[0]!r:.80}; to delete by text, use forget(texts)"
            raise ValueError(msg)
        check_can_delete(store)
        check_can_delete_shared(remote)
        self._settle()
        # The shared tier comes first: a lookup in between would copy an entry to the store again.
        gone = delete_shared(remote, keys)
        gone += delete_from(store, keys) + self.delete_in_memory(keys)
        if keys:
            self.delete_scores(None)  # a key of a prefilled passage does not tell which scores were made from it
        return gone

    def forget(
        self, store: Store | None, remote: RemoteTier | None, texts: Iterable[Document], spaces: Iterable[Space]
    ) -> ForgetReport:
        """Delete what is kept of texts, see `PassageCache.forget`."""
        given = iter_documents(list(texts) if isinstance(texts, Set) else texts)
        check_can_delete(store)
        check_can_delete_shared(remote)
        self._settle()  # a record may be among the pending writes
        recorded, unreadable = recorded_spaces(store)
        theirs, unreadable_there = shared_spaces(remote)
        recorded, unreadable = recorded | theirs, unreadable + unreadable_there
        if store is not None and records_of(store) is None:
            logger.warning(
                "%s keeps no records of key spaces: texts are searched only in those that this process has used",
                type(store).__name__,
            )
        named = list(spaces)
        searched = distinct(recorded.values(), self.book.used().values(), named)
        windowed = _ways_to_split(searched) - _ways_to_split(named)  # who names them gives the windows as texts
        memory, kept, shared = Counter[Kind](), Counter[Kind](), Counter[Kind]()
        scores = 0
        if self.book.overflowed:  # not every key of what is in memory is known
            for level in self._levels():
                memory["passage_kv"] += len(level.keys())
                level.clear()
            scores += self.delete_scores(None)
        count = 0
        while window := list(islice(given, _AT_ONCE)):
            count += len(window)
            found = list(dict.fromkeys(passage.text for passage in window))
            self._flush()
            for space in searched:
                keys = space.keys_of(found)
                # From behind: a lookup in between would copy an entry into the levels in front again.
                shared[space.kind] += delete_shared(remote, keys)
                kept[space.kind] += delete_from(store, keys)
                memory[space.kind] += self.delete_in_memory(keys, space.kind)
                if space.kind == "states":
                    scores += self.delete_scores(keys)
        return ForgetReport(
            count,
            Forgotten(memory["states"], memory["passage_kv"], scores),
            Forgotten(kept["states"], kept["passage_kv"]),
            len(searched),
            self.unrecorded(store),
            unreadable,
            older_than_records(store),
            len(windowed),
            Forgotten(shared["states"], shared["passage_kv"]),
        )

    def _levels(self) -> list[BudgetSieve[str, Any]]:
        with self._lock:
            return list(self._prefilled)


def _ways_to_split(spaces: Iterable[Space]) -> set[tuple[object, ...]]:
    return {(space.keys.fields["tokenizer"], *space.windows) for space in spaces if space.windows is not None}
