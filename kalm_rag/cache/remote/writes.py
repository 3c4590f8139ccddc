"""Writes to a shared tier in the background: bounded, tried again, and never waited for by a query."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from kalm_rag.utils import forks

PENDING_BYTES = 256_000_000
"""Bytes that wait at most; what comes beyond is dropped and counted."""

_PENDING_JOBS = 100_000
_TRIES = 3
_POLL_SECONDS = 0.1


@dataclass(slots=True)
class _Job:
    """One write.

    Attributes:
        run: does it; raises what went wrong.
        entries: how many entries it keeps.
        size: their bytes.
        tries: how often it failed.
    """

    run: Callable[[], object]
    entries: int
    size: int
    tries: int = 0


class RemoteWrites:
    """Runs writes in order on one thread.

    Args:
        is_open: whether the tier may be written to now.
        lost: called with the number of entries that were given up, and why: `failed` or `dropped`.
    """

    def __init__(self, is_open: Callable[[], bool], lost: Callable[[int, str], None]) -> None:
        self._is_open = is_open
        self._lost = lost
        self.after_fork_in_child()
        forks.watch(self)

    def after_fork_in_child(self) -> None:
        """Begin without the thread, which did not survive; the parent does its pending writes."""
        self._changed = threading.Condition(threading.Lock())  # of all below
        self._jobs: deque[_Job] = deque()
        self._running: _Job | None = None
        self._bytes = 0
        self._thread: threading.Thread | None = None

    @property
    def pending_bytes(self) -> int:
        """Bytes that wait or are being written."""
        return self._bytes

    @property
    def has_jobs(self) -> bool:
        """Whether anything waits or is being written."""
        return bool(self._jobs) or self._running is not None

    def submit(self, run: Callable[[], object], entries: int, size: int) -> None:
        """Queue a write; this never waits. What finds no room is dropped and counted."""
        with self._changed:
            full = self._bytes + size > PENDING_BYTES and self._bytes > 0
            if full or len(self._jobs) >= _PENDING_JOBS:
                room = False
            else:
                room = True
                self._jobs.append(_Job(run, entries, size))
                self._bytes += size
                if self._thread is None or not self._thread.is_alive():
                    # A daemon: a server that never answers must not keep the process from ending.
                    self._thread = threading.Thread(target=self._work, name="kalm-rag-remote", daemon=True)
                    self._thread.start()
                self._changed.notify_all()
        if not room:
            self._lost(entries, "dropped")

    def flush(self, timeout: float) -> bool:
        """Wait until all writes are done, so many seconds at most; returns whether nothing is left."""
        until = time.monotonic() + timeout
        with self._changed:
            while (self._jobs or self._running) and time.monotonic() < until:
                self._changed.wait(max(0.0, until - time.monotonic()))
            return not self._jobs and self._running is None

    def drop(self) -> None:
        """Give up what waits, and count it. What is being written at this moment is not stopped."""
        with self._changed:
            left, self._jobs = list(self._jobs), deque()
            self._bytes = self._running.size if self._running else 0
            self._changed.notify_all()
        if left:
            self._lost(sum(job.entries for job in left), "dropped")

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._jobs:
                    self._changed.wait()
            if not self._is_open():
                time.sleep(_POLL_SECONDS)
                continue
            with self._changed:
                if not self._jobs:
                    continue
                job = self._running = self._jobs.popleft()
            failed = False
            try:
                job.run()
            except Exception:  # noqa: BLE001 - a store may be anybody's code, and has been logged where it was called
                failed = True
            with self._changed:
                self._running = None
                job.tries += failed
                again = failed and job.tries < _TRIES
                if again:
                    self._jobs.appendleft(job)
                else:
                    self._bytes -= min(job.size, self._bytes)
                self._changed.notify_all()
            if failed and not again:
                self._lost(job.entries, "failed")
            elif failed:
                time.sleep(_POLL_SECONDS)
