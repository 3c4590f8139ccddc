"""Writes asynchronously on one thread, with a bound on pending bytes."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from kalm_rag.utils import forks


class WriteBehind:
    """Runs writes in order.

    After a fork, the parent does its pending writes.

    Args:
        limit: pending bytes at most; further callers wait until theirs fit.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.after_fork_in_child()
        forks.watch(self)

    def after_fork_in_child(self) -> None:
        """Start without the thread, which did not survive; the parent does its pending writes."""
        self._changed = threading.Condition(threading.Lock())  # of everything below
        self._thread: ThreadPoolExecutor | None = None
        self._pending: dict[Future[None], int] = {}
        self._bytes = 0
        self._blocked = 0

    @property
    def bytes(self) -> int:
        """Pending bytes."""
        return self._bytes

    @property
    def blocked(self) -> int:
        """Number of callers waiting for space."""
        return self._blocked

    def submit(self, size: int, action: Callable[[], None]) -> None:
        """Queue a write; waits while too many bytes are pending."""
        with self._changed:
            self._blocked += 1
            try:
                # The store may be slower than the encoder: wait instead of using more memory or dropping writes.
                self._changed.wait_for(lambda: not self._pending or self._bytes + size <= self._limit)
            finally:
                self._blocked -= 1
            if self._thread is None:
                self._thread = ThreadPoolExecutor(1, thread_name_prefix="kalm-rag-cache")
            future: Future[None] | None = None
            # An interpreter that is shutting down takes no more work.
            with contextlib.suppress(RuntimeError):
                future = self._thread.submit(action)
                self._pending[future] = size
                self._bytes += size
        if future is None:
            action()
        else:
            future.add_done_callback(self._done)

    def offer(self, size: int, action: Callable[[], None]) -> bool:
        """Queue a write unless too many bytes are pending; never waits. Returns whether it was queued."""
        with self._changed:
            if self._pending and self._bytes + size > self._limit:
                return False
        self.submit(size, action)
        return True

    def _done(self, future: Future[None]) -> None:
        with self._changed:
            self._bytes -= self._pending.pop(future, 0)
            self._changed.notify_all()

    def flush(self) -> None:
        """Wait until all writes queued so far are done."""
        with self._changed:
            waiting = set(self._pending)
            self._changed.wait_for(lambda: waiting.isdisjoint(self._pending))

    def close(self) -> None:
        """Finish queued writes and end the thread; a later write starts another."""
        self.flush()
        with self._changed:
            thread, self._thread = self._thread, None
        if thread is not None:
            thread.shutdown()
