"""The store in memory: least recently used first out, under a budget of bytes."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from kalm_rag.cache.store import StoreStats

logger = logging.getLogger(__name__)


class MemoryStore:
    """Keeps frames in this process.

    Args:
        limit: bytes it may take; 0 keeps nothing.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._items: OrderedDict[str, bytes] = OrderedDict()
        self._bytes = 0
        self._evicted = 0
        self._refused = 0
        self._lock = threading.Lock()

    def get_many(self, keys: Sequence[str]) -> dict[str, bytes]:
        """What is kept under the keys, each becoming the most recently used."""
        found = {}
        with self._lock:
            for key in keys:
                value = self._items.get(key)
                if value is not None:
                    self._items.move_to_end(key)
                    found[key] = value
        return found

    def put_many(self, items: Mapping[str, bytes]) -> int:
        """Keep values, giving up the least recently used ones; a value above the limit is not kept."""
        kept = 0
        with self._lock:
            for key, value in items.items():
                self._drop(key)
                if len(value) > self._limit:
                    self._refused += 1
                    continue
                self._items[key] = value
                self._bytes += len(value)
                kept += 1
                while self._bytes > self._limit:
                    oldest = next(iter(self._items))
                    self._drop(oldest)
                    self._evicted += 1
                    if self._evicted == 1:
                        logger.info("the passages in memory reached %d bytes; the oldest ones leave", self._limit)
        return kept

    def _drop(self, key: str) -> bool:
        value = self._items.pop(key, None)
        if value is None:
            return False
        self._bytes -= len(value)
        return True

    def delete(self, keys: Iterable[str]) -> int:
        """Forget keys."""
        with self._lock:
            return sum(self._drop(key) for key in keys)

    def keys(self) -> Iterator[str]:
        """Every key at the time of the call."""
        with self._lock:
            return iter(list(self._items))

    def stats(self) -> StoreStats:
        """Its size."""
        with self._lock:
            return StoreStats(len(self._items), self._bytes, self._limit, self._evicted, self._refused)

    def close(self) -> None:
        """Forget everything."""
        with self._lock:
            self._items.clear()
            self._bytes = 0
