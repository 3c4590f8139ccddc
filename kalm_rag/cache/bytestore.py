"""Adapts any key-value store shaped like LangChain's `ByteStore` to a store of passages."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from kalm_rag.cache.keys import KEY_PATTERN
from kalm_rag.cache.records import SLOT, SlotRecords
from kalm_rag.cache.store import StoreError, StoreStats
from kalm_rag.cache.totals import TOTALS, SlotTotals
from kalm_rag.utils import forks
from kalm_rag.utils.checks import check_text

logger = logging.getLogger(__name__)

_KEY_LENGTH = 64
_BYTES = (bytes, bytearray, memoryview)


class ByteStoreLike(Protocol):
    """The four methods of `langchain_core.stores.ByteStore` that are used; nothing of LangChain is imported."""

    def mget(self, keys: Sequence[str]) -> Sequence[bytes | None]:
        """Return values in the order of the keys, None for a missing one."""
        ...

    def mset(self, key_value_pairs: Sequence[tuple[str, bytes]]) -> None:
        """Store values."""
        ...

    def mdelete(self, keys: Sequence[str]) -> None:
        """Delete keys."""
        ...

    def yield_keys(self, *, prefix: str | None = None) -> Iterator[Any]:
        """Yield every key, or those that the store considers to be under `prefix`."""
        ...


class ByteStoreAdapter:
    """Keeps passages in a `ByteStore`: a local folder, Redis, or whatever it wraps.

    Args:
        store: the `ByteStore`. It must keep any bytes; one that keeps only text needs an encoding wrapper.
        prefix: put in front of every key, so that a store may be shared with other data.

    Attributes:
        records: the key spaces of the entries, see `kalm_rag.cache.spaces`.

    Raises:
        TypeError: the prefix is not a string.
        ValueError: a store that reads keys as paths would read the prefix as another one.
    """

    def __init__(self, store: ByteStoreLike, prefix: str = "kalm-rag-") -> None:
        self._store = store
        self._prefix = _checked_prefix(prefix)
        self._warned: set[str] = set()
        self.records = SlotRecords(self._read, self._keep)
        self._totals = SlotTotals(self._read, self._keep)
        forks.watch(self._totals)

    def get_many(self, keys: Sequence[str]) -> dict[str, bytes]:
        """What is kept under the keys.

        Raises:
            StoreError: the `ByteStore` returns more or fewer values than keys, so they cannot be matched.
        """
        found = {key: value for key, value in self._read(keys).items() if isinstance(value, _BYTES)}
        return {key: bytes(value) for key, value in found.items()}

    def put_many(self, items: Mapping[str, bytes]) -> int:
        """Store values, and count them in the `ByteStore`."""
        if items:
            self._keep(items)
            self._totals.put({key: len(value) for key, value in items.items()})
            self._save_totals()
        return len(items)

    def delete(self, keys: Iterable[str]) -> int:
        """Delete keys, whatever their values are."""
        known = self._read(list(keys))
        if known:
            self._store.mdelete([self._prefix + key for key in known])
            self._totals.delete({key: len(value) if isinstance(value, _BYTES) else 0 for key, value in known.items()})
            self._save_totals()
        return len(known)

    def keys(self) -> Iterator[str]:
        """Yield the passages' keys at the time of the call; keys of other data are skipped.

        The `ByteStore` lists all its keys: some read a prefix as a folder or as a pattern and would find none.
        """
        # A dict, because Redis may list a key twice, and a store in memory may not change while it is listed.
        found: dict[str, None] = {}
        others = False
        for name in self._store.yield_keys():
            text = name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name)
            key = text[-_KEY_LENGTH:]
            if f"{self._prefix}{SLOT}" in text or f"{self._prefix}{TOTALS}" in text:
                continue
            if not KEY_PATTERN.fullmatch(key) or not text.endswith(self._prefix + key):
                others = True
                continue
            # A wrapper may list encoded keys: a key is a passage's if the store has a value for it.
            if len(text) == len(self._prefix) + len(key) or self._read([key]):
                found[key] = None
        if others and not found:
            self._warn_once(
                "%s lists keys, but none of a passage: if it stores keys in another form (such as a hash), "
                "passages are found but cannot be listed or exported",
                type(self._store).__name__,
            )
        return iter(found)

    def stats(self) -> StoreStats:
        """Return what was counted at writing: no key is listed.

        An entry that was replaced, or that the `ByteStore` gave up by itself, still counts. What was stored before
        there were counts is not counted.
        """
        return StoreStats(*self._totals.sums(), None)

    def close(self) -> None:
        """Save what was counted; the caller owns the `ByteStore`."""
        self._save_totals()

    def _keep(self, items: Mapping[str, bytes]) -> None:
        self._store.mset([(self._prefix + key, value) for key, value in items.items()])

    def _save_totals(self) -> None:
        try:
            self._totals.save()
        except Exception as error:  # noqa: BLE001 - a `ByteStore` may be anybody's code, and no entry is lost
            logger.debug("cannot save what was counted: %s", error)

    def _read(self, keys: Sequence[str]) -> dict[str, Any]:
        """Return the store's value for each key it knows, of any type."""
        if not keys:
            return {}
        values = list(self._store.mget([self._prefix + key for key in keys]))
        if len(values) != len(keys):
            msg = (
                f"{type(self._store).__name__}.mget must give one value for each key, got {len(values)} for "
                f"{len(keys)} keys; use a store that gives None for a key it does not hold"
            )
            raise StoreError(msg)
        found = {key: value for key, value in zip(keys, values, strict=True) if value is not None}
        other = next((value for value in found.values() if not isinstance(value, _BYTES)), None)
        if other is not None:
            self._warn_once(
                "%s returns %s where bytes were kept; such passages count as not cached: use a store that returns "
                "bytes (for Redis, decode_responses=False)",
                type(self._store).__name__,
                type(other).__name__,
            )
        return found

    def _warn_once(self, message: str, *parts: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            logger.warning(message, *parts)


def _checked_prefix(prefix: object) -> str:
    text = check_text("prefix", prefix)
    parts = text.split("/")
    if not text.isprintable() or any(part in (".", "..") for part in parts) or "" in parts[:-1]:
        msg = (
            f"prefix must be printable, without empty, '.' or '..' parts between slashes, got {prefix!r:.80}; "
            "some stores read it as a path: use letters, digits, '-' and '_'"
        )
        raise ValueError(msg)
    return text
