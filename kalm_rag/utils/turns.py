"""Decides who may use the model next: one batch at a time, in order of arrival."""

from __future__ import annotations

import contextlib
import contextvars
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType

from kalm_rag.utils import forks
from kalm_rag.utils.costs import Costs, Work
from kalm_rag.utils.recording import add_seconds

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


class LateError(Exception):
    """The call's budget ended before its turn came."""


class AbandonedError(Exception):
    """Work in the background gave way to a call."""


@dataclass(slots=True)
class Turn:
    """One use of the model.

    Attributes:
        size: tokens that it ran; 0 is not learned from.
        rows: passages or pairs that it ran.
    """

    size: float = 0
    rows: int = 0


_POLL_SECONDS = 0.2
_URGENT, _NORMAL, _BACKGROUND = range(3)
_OVERTAKEN = 3
"""Calls with a budget that may go before one without, so that it is not held up for ever."""
_deadline: contextvars.ContextVar[float | None] = contextvars.ContextVar("kalm_rag_deadline", default=None)
_behind: contextvars.ContextVar[Turns | None] = contextvars.ContextVar("kalm_rag_behind", default=None)


@contextlib.contextmanager
def until(deadline: float | None) -> Iterator[None]:
    """Let turns inside go before those of calls without a deadline, and raise `LateError` once it has passed.

    Args:
        deadline: in seconds of `time.monotonic`; None changes nothing.
    """
    token = _deadline.set(deadline)
    try:
        yield
    finally:
        _deadline.reset(token)


def time_left() -> float:
    """Return the seconds that the call of this context has left; infinite without a deadline."""
    deadline = _deadline.get()
    return math.inf if deadline is None else max(0.0, deadline - time.monotonic())


@contextlib.contextmanager
def in_background(turns: Turns) -> Iterator[None]:
    """Let turns inside wait for all calls, and `give_way` raise as soon as one waits."""
    token = _behind.set(turns)
    try:
        yield
    finally:
        _behind.reset(token)


def give_way() -> None:
    """Raise if this is work in the background and a call waits for the model: called between the encoder's layers.

    Raises:
        AbandonedError: a call waits.
        StoppedError: the work was cancelled.
    """
    turns = _behind.get()
    if turns is None:
        return
    check_stopped()
    if turns.is_wanted:
        msg = "a call waits for the model"
        raise AbandonedError(msg)


class Turns:
    """A first-come, first-served lock, so that a long call gives way after each batch.

    Calls with a deadline go before calls without one, and work in the background after all. Entering raises
    `StoppedError` in a cancelled call and `LateError` in one whose deadline has passed, and a fork waits until the turn
    ends. Not reentrant.

    Attributes:
        costs: what turns have cost so far.
        watchers: are called with each turn that has ended and its kind, for metrics.
    """

    def __init__(self) -> None:
        self.costs = Costs()
        self.watchers: tuple[Callable[[Work, Turn], None], ...] = ()
        self.after_fork_in_child()
        forks.watch(self)

    def after_fork_in_child(self) -> None:
        """Reset: no other thread survived the fork."""
        self._guard = threading.Lock()  # of the three below
        self._owner: int | None = None
        self._queue: list[_Ticket] = []
        self._calls = 0
        self._no_call = threading.Condition(self._guard)
        self._entered = False  # whether the owner is inside of `forks.native` for this turn

    @property
    def waiting(self) -> int:
        """Number of threads waiting for their turn."""
        return len(self._queue)

    @property
    def is_wanted(self) -> bool:
        """Whether a call runs or waits; work in the background does not count."""
        with self._guard:
            return self._calls > 0 or any(ticket.rank < _BACKGROUND for ticket in self._queue)

    @contextlib.contextmanager
    def call(self) -> Iterator[None]:
        """Keep work in the background from taking turns between those of a call."""
        with self._guard:
            self._calls += 1
        try:
            yield
        finally:
            with self._guard:
                self._calls = max(0, self._calls - 1)  # after a fork inside, the child begins at 0
                self._no_call.notify_all()

    @contextlib.contextmanager
    def of(self, work: Work) -> Iterator[Turn]:
        """Take a turn, learn what it costs, and record its time; who takes it sets its size."""
        asked, turn = time.monotonic(), Turn()
        with self:
            began = time.monotonic()
            yield turn
            seconds = time.monotonic() - began
        add_seconds("queue", began - asked)
        add_seconds(work, seconds)
        self.costs.learn(work, turn.size, seconds)
        for watch in self.watchers:
            watch(work, turn)

    def __enter__(self) -> None:
        check_stopped()
        if _behind.get() is self:
            self._wait_for_calls()
        me, deadline = threading.get_ident(), _deadline.get()
        ticket = _Ticket(me, _BACKGROUND if _behind.get() is self else _NORMAL if deadline is None else _URGENT)
        try:
            with self._guard:
                # A thread that owns the lock already was interrupted on its way out.
                if self._owner is None or self._owner == me:
                    self._owner = me
                else:
                    self._line_up(ticket)
            left = -1.0 if deadline is None else min(max(0.0, deadline - time.monotonic()), threading.TIMEOUT_MAX)
            if (self._owner != me and not ticket.called.acquire(timeout=left)) or left == 0.0:
                msg = "the budget of the call is used up"
                raise LateError(msg)
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

    def _wait_for_calls(self) -> None:
        with self._guard:
            while self._calls:
                self._no_call.wait(_POLL_SECONDS)
                check_stopped()

    def _line_up(self, ticket: _Ticket) -> None:
        place = len(self._queue)
        while place and self._queue[place - 1].lets(ticket):
            place -= 1
        for later in self._queue[place:]:
            later.overtaken += 1
        self._queue.insert(place, ticket)

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
                ticket = self._queue.pop(0)
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

    def __init__(self, thread: int, rank: int) -> None:
        self.thread = thread
        self.rank = rank
        self.overtaken = 0
        self.called = threading.Lock()
        self.called.acquire()

    def lets(self, other: _Ticket) -> bool:
        """Whether a later one may go before it."""
        return other.rank < self.rank and (self.rank == _BACKGROUND or self.overtaken < _OVERTAKEN)
