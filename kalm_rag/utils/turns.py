"""Decides who may use the model next: one batch at a time, in order of arrival."""

from __future__ import annotations

import contextlib
import contextvars
import threading
from collections import deque
from collections.abc import Iterator
from types import TracebackType

from kalm_rag.utils import forks

_stop: contextvars.ContextVar[threading.Event | None] = contextvars.ContextVar("kalm_rag_stop", default=None)


class StoppedError(Exception):
    """The call was cancelled."""


def stop_with(event: threading.Event) -> None:
    """Make calls in this context stop at their next batch once the event is set."""
    _stop.set(event)


def check_stopped() -> None:
    """Raise if this context's call was cancelled.

    Raises:
        StoppedError: it was.
    """
    event = _stop.get()
    if event is not None and event.is_set():
        msg = "the call was cancelled"
        raise StoppedError(msg)


class Turns:
    """A first-come, first-served lock, so that a long call gives way after each batch.

    Entering raises `StoppedError` in a cancelled call, and a fork waits until the turn ends. Not reentrant.
    """

    def __init__(self) -> None:
        self.after_fork_in_child()
        forks.watch(self)

    def after_fork_in_child(self) -> None:
        """Reset: no other thread survived the fork."""
        self._guard = threading.Lock()  # of the two below
        self._owner: int | None = None
        self._queue: deque[_Ticket] = deque()
        self._entered = False  # whether the owner is inside of `forks.native` for this turn

    @property
    def waiting(self) -> int:
        """Number of threads waiting for their turn."""
        return len(self._queue)

    def __enter__(self) -> None:
        check_stopped()
        me = threading.get_ident()
        ticket = _Ticket(me)
        try:
            with self._guard:
                # A thread that owns the lock already was interrupted on its way out.
                if self._owner is None or self._owner == me:
                    self._owner = me
                else:
                    self._queue.append(ticket)
            if self._owner != me:
                ticket.called.acquire()
            forks.ready_to_compute()
            if not self._entered:  # as it still is where this thread was interrupted on its way out
                forks.enter_native()
                self._entered = True
            check_stopped()
        except BaseException:
            self._give_up(ticket)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pass_on()

    def _give_up(self, ticket: _Ticket) -> None:
        with self._guard:
            if ticket in self._queue:
                self._queue.remove(ticket)
                return
        self._pass_on()

    def _pass_on(self) -> None:
        with self._guard:
            if self._owner != threading.get_ident():
                return
            entered, self._entered = self._entered, False
        if entered:
            forks.leave_native()
        with self._guard:
            if self._queue:
                ticket = self._queue.popleft()
                self._owner = ticket.thread
                ticket.called.release()
            else:
                self._owner = None


class Room:
    """A byte budget that calls borrow from in order of arrival; a request above the budget takes all of it.

    Args:
        size: bytes.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self.after_fork_in_child()
        forks.watch(self)

    def after_fork_in_child(self) -> None:
        """Reset: no other thread survived the fork."""
        self._changed = threading.Condition(threading.Lock())  # of the two below
        self._taken = 0
        self._queue: deque[object] = deque()

    @contextlib.contextmanager
    def of(self, size: int) -> Iterator[None]:
        """Borrow bytes, waiting for others to return theirs."""
        size = min(size, self._size)
        place = object()
        with self._changed:
            self._queue.append(place)
            try:
                self._changed.wait_for(lambda: self._queue[0] is place and self._taken + size <= self._size)
                self._taken += size
            finally:
                self._queue.remove(place)
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._taken -= size
                self._changed.notify_all()


class _Ticket:
    """One place in the queue."""

    def __init__(self, thread: int) -> None:
        self.thread = thread
        self.called = threading.Lock()
        self.called.acquire()
