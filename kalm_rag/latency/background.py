"""Encodes passages that a call left out, while nobody waits for the model."""

from __future__ import annotations

import atexit
import contextvars
import itertools
import logging
import threading
import time
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING

from kalm_rag.latency.records import BackgroundStats
from kalm_rag.utils import forks
from kalm_rag.utils.turns import AbandonedError, StoppedError, Turns, in_background, stop_with

if TYPE_CHECKING:
    from kalm_rag.passage_kv import PassageKVSource
    from kalm_rag.states import StatesSource

logger = logging.getLogger(__name__)

MOST_PASSAGES = 4096
MOST_BYTES = 64_000_000
"""What waits at most, in a process: passages and bytes of their text."""
_AT_ONCE = 1
"""Passages of a batch: a call waits for no more than one of them in one layer."""
_numbers = itertools.count()
_EXIT_SECONDS = 5.0
_IDLE_SECONDS = 1.0


class Background:
    """The passages of one loaded model that wait in the process's queue.

    Args:
        states: encodes them.
        passage_kv: prefills them, if its store keeps that.
        turns: of the model.
    """

    def __init__(self, states: StatesSource, passage_kv: PassageKVSource, turns: Turns) -> None:
        self._states, self._passage_kv, self._turns = states, passage_kv, turns
        self.number = next(_numbers)  # unlike an address, never that of another one later
        self.counts = dict.fromkeys(("encoded", "dropped", "failed", "abandoned"), 0)  # changed by the queue alone
        self._told = False

    def add(self, texts: Iterable[str]) -> None:
        """Queue passages; those that wait already are not queued again. This never waits."""
        _queue.add(self, texts)

    def finish(self, timeout: float | None = None) -> int:
        """Wait until none is pending, at most so many seconds, and return how many are left."""
        return _queue.finish(self, timeout)

    def drop(self) -> None:
        """Take what waits out of the queue, end the batch that is running, and count both as dropped."""
        _queue.drop(self)

    def close(self, timeout: float) -> None:
        """Wait at most so many seconds, then drop what is left."""
        left = self.finish(timeout)
        if left:
            self.drop()
            logger.warning("%d passages that calls left out were not encoded before the model was closed", left)

    def stats(self) -> BackgroundStats:
        """Counts since the model was loaded."""
        return _queue.stats(self)

    def encode(self, texts: list[str]) -> None:
        """Encode a batch at the lowest priority.

        Raises:
            AbandonedError: a call wants the model.
            StoppedError: the queue was told to stop.
        """
        with in_background(self._turns):
            self._states.encode(texts)
            self._passage_kv.encode(texts)

    def failed(self, error: Exception) -> None:
        """Log the first failure; all are counted."""
        if not self._told:
            self._told = True
            logger.warning(
                "passages cannot be encoded in the background (%r): the query that needs them encodes them", error
            )


class _Queue:
    """One queue and one thread per process; `_changed` guards everything."""

    def __init__(self) -> None:
        self.after_fork_in_child()
        forks.watch(self)
        atexit.register(self._exit)

    def after_fork_in_child(self) -> None:
        """Begin empty: what waits is encoded by the parent."""
        self._changed = threading.Condition(threading.Lock())
        self._waiting: dict[tuple[int, str], weakref.ref[Background]] = {}
        self._running: tuple[Background, list[str]] | None = None
        self._stop = threading.Event()  # ends the batch that is running
        self._is_closing = False
        self._bytes = 0
        self._thread: threading.Thread | None = None

    def add(self, owner: Background, texts: Iterable[str]) -> None:
        found = weakref.ref(owner)
        with self._changed:
            busy = set(self._running[1]) if self._running is not None and self._running[0] is owner else set()
            for text in texts:
                key = (owner.number, text)
                if key not in self._waiting and text not in busy:
                    self._waiting[key] = found
                    self._bytes += len(text)
            while self._waiting and (len(self._waiting) > MOST_PASSAGES or self._bytes > MOST_BYTES):
                self._take_out(next(iter(self._waiting)), "dropped")
            if self._waiting and self._thread is None:
                self._thread = threading.Thread(target=self._work, name="kalm-rag-background", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def finish(self, owner: Background, timeout: float | None) -> int:
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            while left := self._pending(owner):
                wait = None if deadline is None else deadline - time.monotonic()
                if wait is not None and wait <= 0:
                    return left
                self._changed.wait(wait)
        return 0

    def drop(self, owner: Background) -> None:
        with self._changed:
            for key in [key for key in self._waiting if key[0] == owner.number]:
                self._take_out(key, "dropped")
            if self._running is not None and self._running[0] is owner:
                self._stop.set()
                self._changed.wait_for(lambda: self._running is None or self._running[0] is not owner, _EXIT_SECONDS)

    def stats(self, owner: Background) -> BackgroundStats:
        with self._changed:
            return BackgroundStats(self._pending(owner), **owner.counts)

    def _pending(self, owner: Background) -> int:
        running = self._running[1] if self._running is not None and self._running[0] is owner else []
        return len(running) + sum(key[0] == owner.number for key in self._waiting)

    def _take_out(self, key: tuple[int, str], count: str) -> None:
        owner = self._waiting.pop(key)()
        self._bytes -= len(key[1])
        if owner is not None:
            owner.counts[count] += 1

    def _work(self) -> None:
        while True:
            with self._changed:
                if not self._changed.wait_for(lambda: self._waiting, _IDLE_SECONDS) or self._is_closing:
                    self._thread = None
                    return
                found = self._next()
                self._running = found
            if found is not None:
                context = contextvars.copy_context()
                context.run(self._encode, *found)
                del found, context  # the model may be closed while the thread waits

    def _next(self) -> tuple[Background, list[str]] | None:
        """Take a batch of one model out of the queue; the oldest passage decides which."""
        first = next(iter(self._waiting))
        owner = self._waiting[first]()
        keys = [key for key in self._waiting if key[0] == first[0]][:_AT_ONCE]
        for key in keys:
            del self._waiting[key]
            self._bytes -= len(key[1])
        return None if owner is None else (owner, [text for _, text in keys])

    def _encode(self, owner: Background, texts: list[str]) -> None:
        stop_with(self._stop)
        count: str = "encoded"
        try:
            owner.encode(texts)
        except AbandonedError:
            count = "abandoned"
        except StoppedError:
            count = "dropped"
        except Exception as error:  # noqa: BLE001 - whatever it is, the query that needs the passage meets it again
            count = "failed"
            owner.failed(error)
        with self._changed:
            owner.counts[count] += 1 if count == "abandoned" else len(texts)
            if count == "abandoned":
                again = {(owner.number, text): weakref.ref(owner) for text in texts}
                self._bytes += sum(map(len, texts))
                self._waiting = {**again, **self._waiting}
            self._running = None
            self._stop.clear()
            self._changed.notify_all()

    def _exit(self) -> None:
        """End the thread before the interpreter takes its modules away."""
        with self._changed:
            self._waiting.clear()
            self._is_closing = True
            self._stop.set()
            thread = self._thread
            self._changed.notify_all()
        if thread is not None:
            thread.join(_EXIT_SECONDS)


_queue = _Queue()
