"""The interface of a store of frames. The cache verifies every byte, so a store only has to keep them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from kalm_rag.errors import KaLMError
from kalm_rag.utils.display import Shown


class StoreError(KaLMError, RuntimeError):
    """A store cannot do what was asked; the cache turns it into a miss, a log line and a counter."""


class RefusedError(StoreError):
    """A store refuses in a way that does not pass by itself: a wrong password, a bucket that does not exist."""


@dataclass(frozen=True, slots=True, repr=False)
class StoreStats(Shown):
    """Size of a store; None where a store cannot tell.

    Attributes:
        entries: how many frames it holds.
        bytes: what they take.
        limit: bytes it may take.
        evicted: frames it gave up to stay within the limit, since it was opened.
        refused: frames that were larger than the limit, since it was opened.
    """

    entries: int | None
    bytes: int | None
    limit: int | None
    evicted: int = 0
    refused: int = 0


@dataclass(frozen=True, slots=True, repr=False)
class CheckReport(Shown):
    """The result of a check; with `fix`, everything found was repaired or removed.

    Attributes:
        entries: rows that were read.
        corrupt: rows whose bytes do not verify, or that kalm-rag did not write.
        missing: rows whose file is gone.
        orphans: files that no row names, left by a crash.
        orphan_bytes: what those take.
        database: what SQLite finds wrong with the database itself, empty if nothing.
        quarantine: the folder to which a damaged database was moved by `fix`, or None.
        salvaged: entries that `fix` copied from a damaged database into a new one.
    """

    entries: int
    corrupt: int
    missing: int
    orphans: int
    orphan_bytes: int
    database: str = ""
    quarantine: str | None = None
    salvaged: int = 0

    @property
    def clean(self) -> bool:
        """Whether there is nothing to fix."""
        return not (self.corrupt or self.missing or self.orphans or self.database)


@runtime_checkable
class Store(Protocol):
    """Keeps bytes under keys of 64 hexadecimal digits.

    Any method may raise: the caller treats it as a miss and recomputes.
    """

    def get_many(self, keys: Sequence[str]) -> dict[str, bytes]:
        """Return the values of the keys; missing keys are left out."""
        ...

    def put_many(self, items: Mapping[str, bytes]) -> int:
        """Store values, replacing older ones; return how many are kept."""
        ...

    def delete(self, keys: Iterable[str]) -> int:
        """Delete keys; return how many existed."""
        ...

    def keys(self) -> Iterator[str]:
        """Yield every key while others read and write; concurrent changes may or may not be seen."""
        ...

    def stats(self) -> StoreStats:
        """Return its size."""
        ...

    def close(self) -> None:
        """Release open resources. A later call may open them again."""
        ...


def add(store: Store, key: str, value: bytes) -> None:
    """Store a value unless there is one already.

    A store that can do so in one step has a method `add(key, value)`. With any other, what a process reads back may be
    overwritten later by a process that found nothing at the same time.
    """
    atomic = getattr(store, "add", None)
    if atomic is not None:
        atomic(key, value)
    elif key not in store.get_many([key]):
        store.put_many({key: value})
