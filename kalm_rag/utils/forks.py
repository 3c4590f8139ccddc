"""Keeps this process's threads and locks safe across `os.fork`.

Only the thread that forks survives in the child. A lock that another thread holds at that moment, here or inside
SQLite, torch or the tokenizer, stays locked there forever. So before a fork, every thread of this package reaches a
point where it holds nothing (`native`, `Lock`), and the child gets new locks and drops the parent's connections.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

from kalm_rag.errors import ForkError

logger = logging.getLogger(__name__)

_WAIT_SECONDS = 10.0
"""How long a fork waits for batches and writes that are running."""


class Lock:
    """A lock that is free in a forked child, for short sections that wait for nothing, other such locks included."""

    __slots__ = ("__weakref__", "lock")

    def __init__(self) -> None:
        self.lock = threading.Lock()
        with _forks.registry:
            _forks.locks.add(self)

    def __enter__(self) -> None:
        self.lock.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.lock.release()


class _Forks:
    """The state of this module, one object per process.

    `changed` guards `inside` (how often each thread is) and `closed_by`, and is notified when a thread leaves;
    `registry` guards `locks` and `watched`; who holds `forking` is between the first and the last hook of a fork, and
    may use the rest.
    """

    def __init__(self) -> None:
        self.locks: weakref.WeakSet[Lock] = weakref.WeakSet()
        self.watched: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        self.held: list[threading.Lock] = []
        self.paused: list[Any] = []
        self.clean = True
        self.broken = False
        self.one_thread = False
        self.told = False
        self._renew()

    def _renew(self) -> None:
        self.forking = threading.Lock()
        self.registry = threading.RLock()
        self.changed = threading.Condition(threading.Lock())
        self.inside: dict[int, int] = {}
        self.closed_by: int | None = None
        self.ready = threading.local()

    def enter(self) -> None:
        me = threading.get_ident()
        with self.changed:
            # A thread that is already inside continues: the fork waits for it.
            while me not in self.inside and self.closed_by not in (None, me):
                self.changed.wait()
            self.inside[me] = self.inside.get(me, 0) + 1

    def leave(self) -> None:
        me = threading.get_ident()
        with self.changed:
            depth = self.inside.pop(me, 0)
            if depth > 1:
                self.inside[me] = depth - 1
            if self.closed_by is not None:
                self.changed.notify_all()

    def before(self) -> None:
        self.forking.acquire()
        me, deadline = threading.get_ident(), time.monotonic() + _WAIT_SECONDS
        with self.changed:
            self.closed_by = me
            self.clean = self.changed.wait_for(lambda: self.inside.keys() <= {me}, _WAIT_SECONDS)
        if self.clean:
            with self.registry:
                self.paused = list(self.watched.values())
            self._call("before_fork")
        self.registry.acquire()
        for lock in list(self.locks):
            if lock.lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
                self.held.append(lock.lock)
            else:
                self.clean = False

    def after_in_parent(self) -> None:
        for lock in self.held:
            lock.release()
        self.held = []
        self.registry.release()
        self._call("after_fork_in_parent")
        self.paused = []
        with self.changed:
            self.closed_by = None
            self.changed.notify_all()
        self.forking.release()
        if not self.clean:
            logger.warning(
                "the process was forked while a call of another thread ran for more than %g seconds: the child cannot "
                "use the model; fork between calls, or start processes with the method 'spawn'",
                _WAIT_SECONDS,
            )

    def after_in_child(self) -> None:
        for lock in list(self.locks):
            lock.lock = threading.Lock()
        self.held, self.paused = [], []
        self._renew()
        self.broken = self.broken or not self.clean
        self.one_thread = self.one_thread or "torch" in sys.modules
        self.paused = list(self.watched.values())
        self._call("after_fork_in_child")
        self.paused = []

    def _call(self, name: str) -> None:
        for thing in self.paused:
            hook: Callable[[], None] | None = getattr(thing, name, None)
            if hook is not None:
                try:
                    hook()
                except Exception:  # the fork must continue, whoever's hook it was
                    logger.exception("%s of %r failed", name, thing)


_forks = _Forks()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=lambda: _forks.before(),
        after_in_parent=lambda: _forks.after_in_parent(),
        after_in_child=lambda: _forks.after_in_child(),
    )


def watch(thing: Any) -> None:
    """Call `before_fork`, `after_fork_in_parent` and `after_fork_in_child` of an object, those it has, at every fork.

    It is not kept alive. Before a fork no thread is inside of `native` any more.
    """
    with _forks.registry:
        _forks.watched[id(thing)] = thing


@contextlib.contextmanager
def native() -> Iterator[None]:
    """Run library code that must not be forked: forks wait until it ends, and it waits until a fork ends."""
    _forks.enter()
    try:
        yield
    finally:
        _forks.leave()


def enter_native() -> None:
    """Enter `native`, for classes that are context managers themselves."""
    _forks.enter()


def leave_native() -> None:
    """Leave `native`; does nothing if it was not entered."""
    _forks.leave()


def is_broken() -> bool:
    """Whether this process was forked while another thread was inside `native`, whose locks are held forever."""
    return _forks.broken


def computes_alone() -> bool:
    """Whether this process was forked after torch was imported, so that torch has one thread in it."""
    return _forks.one_thread


def ready_to_compute() -> None:
    """Make torch usable in a forked child; call this before each use.

    Threads do not survive a fork, and OpenMP would wait for the parent's forever; a single thread needs none of them.

    Raises:
        ForkError: the fork came in the middle of a computation.
    """
    if _forks.broken:
        msg = (
            "this process was forked while another thread was computing, and torch cannot be used in it: "
            "fork between calls, or start processes with the method 'spawn'"
        )
        raise ForkError(msg)
    if not _forks.one_thread or hasattr(_forks.ready, "threads"):
        return
    import torch

    # OpenMP keeps the number for each thread: the one that forked still has that of the parent when another has set it.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    _forks.ready.threads = 1
    if threads > 1 and not _forks.told:
        _forks.told = True
        logger.warning(
            "this process was forked after torch was imported, so it computes with one thread instead of %d; "
            "start processes with the method 'spawn' to use more",
            threads,
        )
