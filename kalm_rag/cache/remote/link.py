"""The line to a shared tier: requests that are given up in time, and what they tell of the tier's health."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from typing import TypeVar

from kalm_rag.cache.remote.requests import Requests
from kalm_rag.cache.store import RefusedError, Store, StoreError
from kalm_rag.utils import forks
from kalm_rag.utils.breaker import Breaker

logger = logging.getLogger(__name__)

R = TypeVar("R")

_LONGEST_SECONDS = 10.0
_PROBE_SECONDS = 2.0
_PROBE = hashlib.sha256(b"kalm-rag probe").hexdigest()


class Link:
    """Runs requests to a store, and knows whether it answers.

    Args:
        store: the store.
        shown: what it is called in messages.

    Attributes:
        store: as given.
        shown: as given.
        breaker: whether the store is asked at all.
        requests: those under way.
    """

    def __init__(self, store: Store, shown: str) -> None:
        self.store = store
        self.shown = shown
        self.breaker = Breaker(f"the shared tier at {shown}", "passages that only it holds are encoded here")
        self.requests = Requests()
        self._is_refused = False  # of the last write
        forks.watch(self.breaker)
        if hasattr(store, "after_fork_in_child"):
            forks.watch(store)

    def is_open(self) -> bool:
        """Whether the store may be asked. If not, and it is time, the background finds out whether it answers again."""
        if self.breaker.state == "closed":
            return True
        if self.breaker.wants_probe():
            self.requests.start(self._probe)
        return False

    def prepare(self) -> None:
        """Open the connection in the background, so that the first query finds it open."""
        self.requests.start(self._probe)

    def try_again(self, seconds: float) -> bool:
        """Find out whether it answers; returns whether it did within so many seconds."""
        self.requests.ask(self._probe, min(seconds, _PROBE_SECONDS))
        return self.breaker.state == "closed"

    def check(self) -> None:
        """Ask the store for something, and wait for the answer.

        Raises:
            StoreError: it does not answer, or refuses; the message says why.
        """
        self.waited(self._try_out)

    def waited(self, action: Callable[[], R]) -> R:
        """Run something for which the caller waits, at most ten seconds.

        Raises:
            StoreError: it failed, or took too long.
        """
        answer = self.requests.ask(lambda: (self.noted(action),), _LONGEST_SECONDS)
        if answer is None:
            msg = f"the shared tier at {self.shown} did not answer within {_LONGEST_SECONDS:.0f} s: is it there?"
            raise StoreError(msg)
        if isinstance(answer, Exception):
            raise self._told(answer) from answer
        return answer[0]

    def noted(self, action: Callable[[], R]) -> R:
        """Run something on the store, and let the breaker know how it went."""
        try:
            found = action()
        except Exception as error:
            self.failed(error)
            raise
        self.breaker.succeeded()
        return found

    def written(self, action: Callable[[], R]) -> R | None:
        """Run a write, and let the breaker know how it went; None if it is refused.

        A refusal is a line in the log, once, and tells the breaker nothing: the same user may be allowed to read.
        """
        try:
            found = action()
        except RefusedError as error:
            if not self._is_refused:
                logger.warning("nothing is written to the shared tier: %s", error)
            self._is_refused = True
            return None
        except Exception as error:
            self.failed(error)
            raise
        self._is_refused = False
        self.breaker.succeeded()
        return found

    def failed(self, error: Exception) -> None:
        """Let the breaker know of an error."""
        self.breaker.failed(str(self._told(error)), lasting=isinstance(error, RefusedError))

    def _probe(self) -> None:
        try:
            self._try_out()
        except Exception as error:  # noqa: BLE001 - a store may be anybody's code
            self.failed(error)
        else:
            self.breaker.succeeded()

    def _try_out(self) -> None:
        own = getattr(self.store, "check", None)
        if own is not None:
            own()
        self.store.get_many([_PROBE])

    def _told(self, error: Exception) -> StoreError:
        if isinstance(error, StoreError):
            return error
        return StoreError(f"the shared tier at {self.shown} failed ({type(error).__name__}: {error!s:.200})")
