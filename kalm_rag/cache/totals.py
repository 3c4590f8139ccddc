"""How many entries a store holds, counted as they are written, so that nobody has to list them."""

from __future__ import annotations

import contextlib
import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kalm_rag.utils import forks

TOTALS = "totals-"
"""How the names begin under which totals are kept, after the prefix of all names."""

_SLOTS = 16
_LARGEST = 1 << 62
_MOST_KNOWN = 100_000


class SlotTotals:
    """Entries and bytes under sixteen names of a store that has no counters of its own.

    Each process adds to one of the names. Two that add to the same one at the same moment may lose one of the two, what
    two processes write counts twice, and what a store gives up by itself is not subtracted: the sum is near the truth,
    and costs one read.

    Args:
        read: returns the values of names; missing names are left out.
        write: stores values.
    """

    def __init__(
        self, read: Callable[[Sequence[str]], Mapping[str, Any]], write: Callable[[Mapping[str, bytes]], object]
    ) -> None:
        self._read = read
        self._write = write
        self._lock = forks.Lock()  # of all below
        self.after_fork_in_child()

    def after_fork_in_child(self) -> None:
        """Take a name of its own, and leave to the parent what it has counted."""
        self._name = f"{TOTALS}{secrets.randbelow(_SLOTS):02}"
        self._more = (0, 0)
        self._known: dict[str, int] = {}

    def put(self, sizes: Mapping[str, int]) -> None:
        """Count entries that were written, by key with their bytes; `save` tells the store.

        One that this process has written before is counted once.
        """
        with self._lock:
            if len(self._known) + len(sizes) > _MOST_KNOWN:
                self._known.clear()
            entries = sum(key not in self._known for key in sizes)
            size = sum(size - self._known.get(key, 0) for key, size in sizes.items())
            self._known.update(sizes)
        self._add(entries, size)

    def delete(self, sizes: Mapping[str, int]) -> None:
        """Count entries that were deleted, by key with the bytes that they took."""
        with self._lock:
            for key in sizes:
                self._known.pop(key, None)
        self._add(-len(sizes), -sum(sizes.values()))

    def _add(self, entries: int, size: int) -> None:
        with self._lock:
            self._more = (self._more[0] + entries, self._more[1] + size)

    def save(self) -> None:
        """Add what was counted to the store. What it cannot take is tried again at the next time."""
        with self._lock:
            more, self._more = self._more, (0, 0)
        if more == (0, 0):
            return
        try:
            kept = _numbers(self._read([self._name]).get(self._name))
            sums = [old + new for old, new in zip(kept, more, strict=True)]
            self._write({self._name: json.dumps(sums).encode()})
        except Exception:
            self._add(*more)
            raise

    def sums(self) -> tuple[int, int]:
        """Return entries and bytes, those that this process has not saved yet included; never below 0."""
        kept = [_numbers(value) for value in self._read([f"{TOTALS}{slot:02}" for slot in range(_SLOTS)]).values()]
        with self._lock:
            kept.append(self._more)
        return max(0, sum(entries for entries, _ in kept)), max(0, sum(size for _, size in kept))


def _numbers(value: Any) -> tuple[int, int]:
    """Read two whole numbers; anything else, which somebody else may have written, is nothing."""
    with contextlib.suppress(ValueError, TypeError, RecursionError):
        entries, size = json.loads(bytes(value)[:200])
        if type(entries) is int and type(size) is int and max(abs(entries), abs(size)) < _LARGEST:
            return entries, size
    return 0, 0
