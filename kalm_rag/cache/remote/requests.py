"""Requests that are given up when their time is over, whatever the client that makes them does."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from kalm_rag.cache.store import StoreError
from kalm_rag.utils import forks

R = TypeVar("R")

_MOST_WAITING = 8
"""Requests without an answer, after which no further one is made."""


class Requests:
    """Runs each request on a thread of its own."""

    def __init__(self) -> None:
        self._lock = forks.Lock()  # of the next line
        self._waiting = 0
        forks.watch(self)

    def after_fork_in_child(self) -> None:
        """Start over: the threads of earlier requests exist in the parent only."""
        self._waiting = 0

    def ask(self, action: Callable[[], R], seconds: float) -> R | Exception | None:
        """Run something and wait so long; an error is returned, and None if there is no answer then."""
        done = threading.Event()
        answer: list[R | Exception] = []

        def run() -> None:
            try:
                answer.append(action())
            except Exception as error:  # noqa: BLE001 - a store may be anybody's code
                answer.append(error)
            finally:
                done.set()

        if not self.start(run):
            return StoreError(
                f"{_MOST_WAITING} requests before this one are without an answer, or the process is ending"
            )
        done.wait(seconds)
        return answer[0] if answer else None

    def start(self, run: Callable[[], None]) -> bool:
        """Run something in the background; returns False if too many requests are without an answer.

        An interpreter that is ending may start no thread either.
        """
        with self._lock:
            if self._waiting >= _MOST_WAITING:
                return False
            self._waiting += 1

        def counted() -> None:
            try:
                run()
            finally:
                with self._lock:
                    self._waiting = max(0, self._waiting - 1)  # a forked child begins at 0

        # A daemon: a server that never answers must not keep the process from ending.
        try:
            threading.Thread(target=counted, name="kalm-rag-remote", daemon=True).start()
        except RuntimeError:
            with self._lock:
                self._waiting -= 1
            return False
        return True
