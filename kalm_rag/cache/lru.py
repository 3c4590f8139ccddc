"""Evicts the least recently used values under a budget of bytes."""

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


class BudgetLRU(Generic[K, V]):
    """A mapping whose values take at most `limit` bytes together. Safe from any thread: `_lock` guards all of it.

    Args:
        limit: bytes; 0 keeps nothing.
        size: bytes of a value.
        what: what the values are, for the log.
    """

    def __init__(self, limit: int, size: Callable[[V], int], what: str) -> None:
        self.limit = limit
        self._size = size
        self._what = what
        self._items: OrderedDict[K, V] = OrderedDict()
        self._bytes = 0
        self._evicted = 0
        self._refused = 0
        self._lock = forks.Lock()

    def get_many(self, keys: Iterable[K]) -> dict[K, V]:
        """Return the values of the keys; each becomes the most recently used."""
        found = {}
        with self._lock:
            for key in keys:
                value = self._items.get(key)
                if value is not None:
                    self._items.move_to_end(key)
                    found[key] = value
        return found

    def put(self, key: K, value: V) -> bool:
        """Store a value, evicting the least recently used ones; return False for one above the limit."""
        size = self._size(value)
        with self._lock:
            self._drop(key)
            if size > self.limit:
                self._refused += 1
                if self._refused == 1 and self.limit:
                    logger.warning(
                        "one of the %s takes %d bytes, more than the budget of %d, and is not kept in memory",
                        self._what,
                        size,
                        self.limit,
                    )
                return False
            while self._bytes + size > self.limit:
                self._drop(next(iter(self._items)))
                self._evicted += 1
                if self._evicted == 1:
                    logger.info(
                        "the %s in memory reached %d bytes; the least recently used ones are evicted",
                        self._what,
                        self.limit,
                    )
            self._items[key] = value
            self._bytes += size
            return True

    def _drop(self, key: K) -> bool:
        value = self._items.pop(key, None)
        if value is None:
            return False
        self._bytes -= self._size(value)
        return True

    def delete(self, keys: Iterable[K]) -> int:
        """Delete keys."""
        with self._lock:
            return sum(self._drop(key) for key in keys)

    def keys(self) -> list[K]:
        """Every key, least recently used first."""
        with self._lock:
            return list(self._items)

    def values(self) -> list[V]:
        """Every value, least recently used first."""
        with self._lock:
            return list(self._items.values())

    def clear(self) -> None:
        """Delete everything."""
        with self._lock:
            self._items.clear()
            self._bytes = 0

    def stats(self) -> StoreStats:
        """Return its size."""
        with self._lock:
            return StoreStats(len(self._items), self._bytes, self.limit, self._evicted, self._refused)
