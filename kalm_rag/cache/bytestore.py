"""Any key-value store shaped like LangChain's `ByteStore` as a store of passages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from kalm_rag.cache.keys import KEY_PATTERN
from kalm_rag.cache.store import StoreStats


class ByteStoreLike(Protocol):
    """The four methods of `langchain_core.stores.ByteStore` that are used; nothing of LangChain is imported."""

    def mget(self, keys: Sequence[str]) -> Sequence[bytes | None]:
        """Values in the order of the keys, None where there is none."""
        ...

    def mset(self, key_value_pairs: Sequence[tuple[str, bytes]]) -> None:
        """Keep values."""
        ...

    def mdelete(self, keys: Sequence[str]) -> None:
        """Forget keys."""
        ...

    def yield_keys(self, *, prefix: str | None = None) -> Iterator[Any]:
        """Every key that starts with `prefix`."""
        ...


class ByteStoreAdapter:
    """Keeps passages in a `ByteStore`: a local folder, Redis, or whatever it wraps.

    Args:
        store: the `ByteStore`.
        prefix: put in front of every key, so that a store may be shared with other data.
    """

    def __init__(self, store: ByteStoreLike, prefix: str = "kalm-rag-") -> None:
        self._store = store
        self._prefix = prefix

    def get_many(self, keys: Sequence[str]) -> dict[str, bytes]:
        """What is kept under the keys."""
        values = self._store.mget([self._prefix + key for key in keys])
        return {key: value for key, value in zip(keys, values, strict=True) if isinstance(value, bytes)}

    def put_many(self, items: Mapping[str, bytes]) -> int:
        """Keep values."""
        if items:
            self._store.mset([(self._prefix + key, value) for key, value in items.items()])
        return len(items)

    def delete(self, keys: Iterable[str]) -> int:
        """Forget keys."""
        known = list(self.get_many(list(keys)))
        if known:
            self._store.mdelete([self._prefix + key for key in known])
        return len(known)

    def keys(self) -> Iterator[str]:
        """Every key of ours; keys of other data under the same prefix are passed over."""
        for name in self._store.yield_keys(prefix=self._prefix):
            key = str(name).removeprefix(self._prefix)
            if KEY_PATTERN.fullmatch(key):
                yield key

    def stats(self) -> StoreStats:
        """The number of entries; a `ByteStore` does not tell its size."""
        return StoreStats(sum(1 for _ in self.keys()), None, None)

    def close(self) -> None:
        """The `ByteStore` belongs to whoever made it."""
