"""How long a query waits for the shared tier, all its reads together."""

from __future__ import annotations

import contextlib
import contextvars
import time
from collections.abc import Callable, Iterator

LEAST_SECONDS, MOST_SECONDS = 0.1, 2.0
"""What a query waits at least and at most: less would miss a healthy tier, more would be an outage of its own."""

_query: contextvars.ContextVar[Patience | None] = contextvars.ContextVar("kalm_rag_patience", default=None)


class Patience:
    """The time that the reads of one query have together. It begins with the first of them."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began: float | None = None
        self._seconds = 0.0

    def left(self, worth: float) -> float:
        """Return the seconds that a read may take.

        Args:
            worth: seconds that it saves at best; the largest of all reads counts.
        """
        now = self._clock()
        if self._began is None:
            self._began = now
        self._seconds = max(self._seconds, worth)
        return max(0.0, self._began + self._seconds - now)


@contextlib.contextmanager
def one_query() -> Iterator[None]:
    """Let all reads inside share one deadline; elsewhere each read has its own."""
    token = _query.set(Patience())
    try:
        yield
    finally:
        _query.reset(token)


def seconds_for(predicted: float, fixed: float | None, most: float) -> float:
    """Return how long a read of this context may take.

    Args:
        predicted: seconds that computing what is asked for would take; infinite if nobody knows.
        fixed: seconds that a user chose instead.
        most: seconds that the call has left.
    """
    worth = min(max(predicted, LEAST_SECONDS), MOST_SECONDS) if fixed is None else fixed
    patience = _query.get()
    return min(worth if patience is None else patience.left(worth), most)
