"""Leaves a server alone that does not answer, and finds out when it does again.

`pybreaker` was looked at: it holds a lock while it waits for an answer, so that one slow read would hold up all others.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from typing import Literal

from kalm_rag.utils import forks

logger = logging.getLogger(__name__)

State = Literal["closed", "open", "half-open"]

_FAILURES = 3
"""Failures one after the other that open it."""
_FIRST_WAIT, _LONGEST_WAIT = 1.0, 30.0
_PROBE_SECONDS = 10.0
"""A probe that takes longer is given up, and another one may start."""


class Breaker:
    """A circuit breaker: closed while the server answers, open after three failures, half-open while a probe runs.

    Who asks `wants_probe` and gets True runs the probe, in the background or as one call of many. Each change of state
    is one line in the log.

    Args:
        shown: what the server is called in the log, without credentials.
        meanwhile: what happens while it is left alone, for the log.
        longest_wait: seconds between two probes at most.
        clock: never set back.

    Attributes:
        opened: how often it was opened.
    """

    def __init__(
        self,
        shown: str,
        meanwhile: str,
        longest_wait: float = _LONGEST_WAIT,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._shown = shown
        self._meanwhile = meanwhile
        self._longest_wait = longest_wait
        self._clock = clock
        self._lock = forks.Lock()  # of all below
        self.after_fork_in_child()

    def after_fork_in_child(self) -> None:
        """Start over: the parent's probe runs in the parent only."""
        self._state: State = "closed"
        self._failures = 0
        self._wait = _FIRST_WAIT
        self._again = 0.0  # when the next probe may start
        self.opened = 0

    @property
    def state(self) -> State:
        """Whether requests go through."""
        return self._state

    def wants_probe(self) -> bool:
        """Whether it is time to try whether it answers; whoever asks must do so, and say how it went."""
        with self._lock:
            if self._state == "closed" or self._clock() < self._again:
                return False
            self._state = "half-open"
            self._again = self._clock() + _PROBE_SECONDS
            return True

    def succeeded(self) -> None:
        """Note an answer."""
        with self._lock:
            was, self._state = self._state, "closed"
            self._failures, self._wait = 0, _FIRST_WAIT
        if was != "closed":
            logger.warning("%s answers again", self._shown)

    def failed(self, reason: str, *, lasting: bool = False) -> None:
        """Note a failure.

        Args:
            reason: what went wrong, for the log.
            lasting: it will not pass by itself: a wrong password, a bucket that does not exist.
        """
        with self._lock:
            self._failures += 1
            was = self._state
            if was == "closed" and self._failures < _FAILURES and not lasting:
                return
            self._state = "open"
            self._again = self._clock() + self._wait * random.uniform(0.8, 1.2)  # noqa: S311 - so that replicas spread
            self._wait = min(2 * self._wait, self._longest_wait)
            self.opened += was == "closed"
        if was == "closed":
            logger.warning("%s is left alone until it answers again (%s): %s", self._shown, reason, self._meanwhile)
        else:
            logger.debug("%s does not answer yet (%s)", self._shown, reason)
