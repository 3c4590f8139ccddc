"""The store in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from kalm_rag.cache.sieve import BudgetSieve
from kalm_rag.cache.store import StoreStats


class MemoryStore:
    """Keeps frames in this process and evicts those that are not used again.

    Copies in the same process are the store itself. A pickle holds the limit and no passages.

    Args:
        limit: bytes it may take; 0 keeps nothing.
    """

    def __init__(self, limit: int) -> None:
        self._items: BudgetSieve[str, bytes] = BudgetSieve(limit, len, "encoded passages")

    def __copy__(self) -> MemoryStore:
        """Return the store itself: copies share it."""
        return self

    def __deepcopy__(self, memo: dict[int, object]) -> MemoryStore:
        """Return the store itself, as `__copy__` does."""
        return self

    def __reduce__(self) -> tuple[type[MemoryStore], tuple[int]]:
        return type(self), (self._items.limit,)

    def get_many(self, keys: Sequence[str]) -> dict[str, bytes]:
        """Return the values of the keys; each is spared when room is next made."""
        return self._items.get_many(keys)

    def put_many(self, items: Mapping[str, bytes]) -> int:
        """Store values, evicting unused ones; values above the limit are not stored."""
        return sum(self._items.put(key, value) for key, value in items.items())

    def delete(self, keys: Iterable[str]) -> int:
        """Delete keys."""
        return self._items.delete(keys)

    def keys(self) -> Iterator[str]:
        """Every key at the time of the call."""
        return iter(self._items.keys())

    def stats(self) -> StoreStats:
        """Return its size."""
        return self._items.stats()

    def close(self) -> None:
        """Delete everything."""
        self._items.clear()
