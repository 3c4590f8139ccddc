"""Chooses the thread that computes on a CPU: the main one, or one that computes for all the others.

OpenMP gives workers to each thread that computes. GNU's stay awake from one product to the next only while there are no
more of them than processors (`gomp_throttled_spin_count_var` in libgomp's `env.c`). With the workers of two threads,
each product waits until they have been woken, and a batch of a small model takes twice as long.

The main thread computes by itself, since other models of the same program mostly run there too.
"""

from __future__ import annotations

import contextvars
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from kalm_rag.utils import forks

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

_LEAST_THREADS = 2
"""Threads of torch from which there are workers."""
_IDLE_SECONDS = 10.0
"""After which the common thread ends and takes its workers along; the next call starts it again."""
_here = threading.local()
"""Whether this thread computes by itself: `itself` is set in threads that exist for that."""


def compute(action: Callable[[], T], device: torch.device | None = None) -> T:
    """Call `action` in this context: in this thread if it is the main one, otherwise in the thread for all others.

    Both compute with as many threads as torch would use in the caller's. Where that is one, as in a forked child,
    nothing is gained, and `action` is called here; so it is with an accelerator, whose streams belong to threads.

    Args:
        action: computes. It must not wait for what another call of `compute` does, nor for a fork.
        device: where it computes.
    """
    if device is not None and device.type != "cpu":
        return action()
    import torch

    is_main = threading.current_thread() is threading.main_thread()
    threads = torch.get_num_threads()
    if is_main or threads < _LEAST_THREADS or forks.computes_alone() or getattr(_here, "itself", False):
        return action()
    return _common.run(partial(_with_threads, threads, action))


def apart(action: Callable[[], T], device: torch.device) -> T:
    """Call `action` in this context; on a CPU in a thread of its own, whose workers end with it.

    So a process that loads a model in one thread and uses it in others has no workers left from loading.
    """
    if device.type != "cpu" or forks.computes_alone():
        return action()
    future: Future[T] = Future()
    context = contextvars.copy_context()

    def run() -> None:
        _here.itself = True
        _settle(future, partial(context.run, action))

    # Not a daemon: a thread that is killed inside of torch at the end of the process can abort it.
    thread = threading.Thread(target=run, name="kalm-rag-load")
    if not _started(thread):
        return action()
    try:
        return future.result()
    finally:
        thread.join()  # after Ctrl-C too: nobody else may begin what it has not finished


def _with_threads(threads: int, action: Callable[[], T]) -> T:
    import torch

    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    return action()


def _started(thread: threading.Thread) -> bool:
    """Start a thread, unless the process has no room for one, or ends: Python 3.12 starts none then."""
    try:
        thread.start()
    except RuntimeError:
        return False
    return True


def _settle(future: Future[Any], action: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        value = action()
    except BaseException as error:  # noqa: BLE001 - it is raised where the call came from
        future.set_exception(error)
    else:
        future.set_result(value)


class _Common:
    """The thread for all others; it starts with the first call."""

    def __init__(self) -> None:
        self.after_fork_in_child()
        forks.watch(self)

    def after_fork_in_child(self) -> None:
        """Begin without a thread: it did not survive the fork."""
        self._changed = threading.Condition(threading.Lock())  # of the two below
        self._waiting: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._thread: threading.Thread | None = None

    def run(self, action: Callable[[], T]) -> T:
        future: Future[T] = Future()
        call = partial(contextvars.copy_context().run, action)
        if not self._add(future, call):
            return action()
        try:
            return future.result()
        finally:
            future.cancel()  # where the wait was interrupted before it began

    def _add(self, future: Future[Any], call: Callable[[], Any]) -> bool:
        with self._changed:
            if self._thread is None:
                thread = threading.Thread(target=self._work, name="kalm-rag-compute", daemon=True)
                if not _started(thread):
                    return False
                self._thread = thread
            self._waiting.append((future, call))
            self._changed.notify()
            return True

    def _work(self) -> None:
        _here.itself = True
        while True:
            with self._changed:
                if not self._changed.wait_for(lambda: self._waiting, _IDLE_SECONDS):
                    self._thread = None
                    return
                future, call = self._waiting.popleft()
            _settle(future, call)
            del future, call  # the model may be closed while this thread waits


_common = _Common()
