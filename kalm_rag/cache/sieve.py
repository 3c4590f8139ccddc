"""Keeps values under a budget of bytes so that one pass over a corpus does not push out what is used again.

The policy is SIEVE (Zhang et al., NSDI 2024), which `benchmarks/eviction.py` compares with others. A hand walks from
the oldest value to the newest: it evicts a value that nothing has read since the hand last passed, and lets one that
was read stay where it is. What a scan puts in is new and unread, so it goes first.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from typing import Generic, TypeVar

from kalm_rag.cache.store import StoreStats
from kalm_rag.utils import forks

logger = logging.getLogger(__name__)

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class _Entry(Generic[V]):
    """A value, its bytes, and whether it was read since the hand last passed."""

    __slots__ = ("size", "used", "value")

    def __init__(self, value: V, size: int) -> None:
        self.value = value
        self.size = size
        self.used = False


class BudgetSieve(Generic[K, V]):
    """A mapping whose values take at most `limit` bytes together. Safe from any thread: `_lock` guards all of it.

    The order from oldest to newest is `_passed`, then `_ahead`; the hand stands between them. There are two mappings
    and no linked list, because links would keep cleared values alive until the garbage collector runs.

    Args:
        limit: bytes; 0 keeps nothing.
        size: bytes of a value.
        what: what the values are, for the log.
    """

    def __init__(self, limit: int, size: Callable[[V], int], what: str) -> None:
        self.limit = limit
        self._size = size
        self._what = what
        self._passed: OrderedDict[K, _Entry[V]] = OrderedDict()
        self._ahead: OrderedDict[K, _Entry[V]] = OrderedDict()
        self._bytes = 0
        self._evicted = 0
        self._refused = 0
        self._lock = forks.Lock()

    def get_many(self, keys: Iterable[K]) -> dict[K, V]:
        """Return the values of the keys; each is spared when the hand comes by next."""
        found = {}
        with self._lock:
            for key in keys:
                entry = self._ahead.get(key) or self._passed.get(key)
                if entry is not None:
                    entry.used = True
                    found[key] = entry.value
        return found

    def put(self, key: K, value: V) -> bool:
        """Store a value as the newest, evicting others if necessary; return False for one above the limit."""
        entry = _Entry(value, self._size(value))
        with self._lock:
            self._drop(key)
            if entry.size > self.limit:
                self._refused += 1
                if self._refused == 1 and self.limit:
                    logger.warning(
                        "one of the %s takes %d bytes, more than the budget of %d, and is not kept in memory",
                        self._what,
                        entry.size,
                        self.limit,
                    )
                return False
            while self._bytes + entry.size > self.limit:
                self._evict()
                self._evicted += 1
                if self._evicted == 1:
                    logger.info(
                        "the %s in memory reached %d bytes; those that are not used again are evicted",
                        self._what,
                        self.limit,
                    )
            self._ahead[key] = entry
            self._bytes += entry.size
            return True

    def _evict(self) -> None:
        """Move the hand to the next unused value and remove it; each use costs the hand one step at most."""
        while True:
            if not self._ahead:
                self._ahead, self._passed = self._passed, self._ahead
            key, entry = self._ahead.popitem(last=False)
            if not entry.used:
                self._bytes -= entry.size
                return
            entry.used = False
            self._passed[key] = entry

    def _drop(self, key: K) -> bool:
        entry = self._ahead.pop(key, None) or self._passed.pop(key, None)
        if entry is None:
            return False
        self._bytes -= entry.size
        return True

    def delete(self, keys: Iterable[K]) -> int:
        """Delete keys; return how many existed."""
        with self._lock:
            return sum(self._drop(key) for key in keys)

    def keys(self) -> list[K]:
        """Every key, oldest first."""
        with self._lock:
            return [*self._passed, *self._ahead]

    def values(self) -> list[V]:
        """Every value, oldest first."""
        with self._lock:
            return [entry.value for part in (self._passed, self._ahead) for entry in part.values()]

    def clear(self) -> None:
        """Delete everything."""
        with self._lock:
            self._passed.clear()
            self._ahead.clear()
            self._bytes = 0

    def stats(self) -> StoreStats:
        """Return its size."""
        with self._lock:
            count = len(self._passed) + len(self._ahead)
            return StoreStats(count, self._bytes, self.limit, self._evicted, self._refused)
