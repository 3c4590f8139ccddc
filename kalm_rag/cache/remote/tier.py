"""A shared tier: a store behind the local one that may be slow, away or wrong, and never holds up a query for long."""

from __future__ import annotations

import atexit
import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

from kalm_rag.cache.remote.counters import RemoteCounters, RemoteStats
from kalm_rag.cache.remote.link import Link
from kalm_rag.cache.remote.windows import bytes_of, parts
from kalm_rag.cache.remote.writes import RemoteWrites
from kalm_rag.cache.store import Store, StoreStats, add
from kalm_rag.utils import forks

logger = logging.getLogger(__name__)

RemoteMode = Literal["read", "read-write"]

_ABSENT_SECONDS = 5.0
"""How long a key is not asked for again that was not there."""
_MOST_ABSENT = 100_000
_SPENT_SECONDS = 0.05
"""A query with less than this left says nothing about the tier."""
_WAITING_SHARE = 0.9
"""Share of a read's time that is waited for; the rest is for verifying what came, so that the read ends in time."""
_WINDOW = 64
"""Keys of one request to a store that does not say itself how many are right."""
_AT_EXIT_SECONDS = 10.0


class RemoteTier:
    """Reads and writes a store that several machines share. No method raises: a fault is a missing value and a counter.

    Args:
        store: the store.
        shown: what it is called in messages.
        mode: whether it is written to.
        timeout: seconds of a query's reads together, instead of what they are worth.

    Attributes:
        link: the line to the store.
        shown: as given.
        writes: whether entries are written to it.
        timeout: as given.
    """

    def __init__(self, store: Store, shown: str, *, mode: RemoteMode, timeout: float | None) -> None:
        self.link = Link(store, shown)
        self.shown = shown
        self.writes = mode == "read-write"
        self.timeout = timeout
        self._lock = forks.Lock()  # of the next two lines
        self._counters = RemoteCounters()
        self._absent: dict[str, float] = {}
        self._queue = RemoteWrites(self.link.is_open, self._lost)
        _alive.add(self)

    def __repr__(self) -> str:
        return f"RemoteTier({self.shown!r}, {'read-write' if self.writes else 'read'})"

    def get_many(self, keys: Sequence[str], seconds: float) -> dict[str, bytes]:
        """Return what it holds under the keys and can send in time. The bytes are not verified.

        Args:
            keys: of entries.
            seconds: what the answer may take.
        """
        now = time.monotonic()
        with self._lock:
            asked = [key for key in keys if self._absent.get(key, 0.0) < now]
            self._counters.misses += len(keys) - len(asked)
        if not asked:
            return {}
        if seconds <= 0 or not self.link.is_open():
            self.count(left_alone=len(asked))
            return {}
        found: dict[str, bytes] = {}
        seen: set[str] = set()  # keys whose answer is here
        guard = threading.Lock()  # of both: the thread may go on after its deadline

        def read() -> bool:
            for window in _windows(self.link.store, asked):
                answer = self.link.store.get_many(window)
                with guard:
                    found.update((key, bytes(answer[key])) for key in window if key in answer)
                    seen.update(window)
            return True

        answer = self.link.requests.ask(read, _WAITING_SHARE * seconds)
        with guard:
            values, absent = dict(found), seen - found.keys()
            left = len(asked) - len(seen)
        with self._lock:
            if len(self._absent) + len(absent) > _MOST_ABSENT:
                self._absent.clear()
            self._absent.update(dict.fromkeys(absent, time.monotonic() + _ABSENT_SECONDS))
        if isinstance(answer, Exception):
            self.count(misses=len(absent), read_failed=left)
            self.link.failed(answer)
        else:
            self.count(misses=len(absent), late=left)
            if answer:
                self.link.breaker.succeeded()
            elif seconds >= _SPENT_SECONDS:
                self.link.breaker.failed(f"no answer within {seconds * 1000:.0f} ms")
        return values

    def get(self, key: str, seconds: float) -> bytes | None:
        """Return one value, even if it was not there a moment ago."""
        with self._lock:
            self._absent.pop(key, None)
        return self.get_many([key], seconds).get(key)

    def put_many(self, items: Mapping[str, bytes]) -> None:
        """Write entries in the background; never waits."""

        def put() -> None:
            size, kept = bytes_of(items), self.link.written(lambda: self.link.store.put_many(items)) or 0
            self.count(written=kept, write_failed=len(items) - kept, bytes_written=size * kept // len(items))
            with self._lock:
                for key in items:
                    self._absent.pop(key, None)

        if items and self.writes:
            self._queue.submit(put, len(items), bytes_of(items))

    def later(self, action: Callable[[], object]) -> None:
        """Run something on its store in the background, between the writes; it handles its errors itself."""
        if self.writes:
            self._queue.submit(partial(self.link.written, action), 0, 0)

    def add(self, key: str, value: bytes, seconds: float) -> bool:
        """Store a value unless there is one already; returns whether it answered in time."""
        if not self.writes or not self.link.is_open():
            return False
        with self._lock:
            self._absent.pop(key, None)
        answer = self.link.requests.ask(lambda: (self.link.noted(lambda: add(self.link.store, key, value)),), seconds)
        return isinstance(answer, tuple)

    def count(self, **more: int) -> None:
        """Add to counters, by name."""
        with self._lock:
            for name, number in more.items():
                setattr(self._counters, name, getattr(self._counters, name) + number)

    def stats(self) -> RemoteStats:
        """Return counters, state, and the size of the store if it answers within a second."""
        breaker = self.link.breaker
        size = self.link.requests.ask(self.link.store.stats, 1.0) if breaker.state == "closed" else None
        with self._lock:
            counters = replace(self._counters, outages=breaker.opened)
        kept = size if isinstance(size, StoreStats) else None
        return RemoteStats(counters, breaker.state, self._queue.pending_bytes, kept)

    def flush(self, timeout: float) -> bool:
        """Wait until what was queued is written, at most so many seconds; hardly at all while the tier is away.

        Returns:
            Whether nothing is left.
        """
        began = time.monotonic()
        if self._queue.has_jobs and self.link.breaker.state != "closed" and not self.link.try_again(timeout):
            return False
        return self._queue.flush(max(0.0, timeout - (time.monotonic() - began)))

    def close(self, timeout: float) -> bool:
        """Flush, give up and count what is left, and close the store; a later call opens it again."""
        done = self.flush(timeout)
        self._queue.drop()
        self.link.requests.ask(self.link.store.close, 1.0)
        return done

    def _lost(self, entries: int, why: str) -> None:
        if entries:
            self.count(**{"write_failed" if why == "failed" else "dropped": entries})
            logger.warning(
                "%d encoded passages were not written to the shared tier at %s: %s",
                entries,
                self.shown,
                "it failed each time" if why == "failed" else "too much was waiting, or the process ended",
            )


def _windows(store: Store, keys: Sequence[str]) -> Iterable[Sequence[str]]:
    own = getattr(store, "windows", None)
    return parts(keys, _WINDOW) if own is None else own.of(keys)


_alive: weakref.WeakSet[RemoteTier] = weakref.WeakSet()


def _at_exit() -> None:
    until = time.monotonic() + _AT_EXIT_SECONDS
    for tier in list(_alive):
        tier.close(max(0.0, until - time.monotonic()))


atexit.register(_at_exit)
