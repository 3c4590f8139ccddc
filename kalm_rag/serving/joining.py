"""Joins small requests that come at the same time into one call, so that they share forward passes."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kalm_rag.utils.turns import check_stopped, stop_with

if TYPE_CHECKING:
    from kalm_rag.reranker import KaLMReranker
    from kalm_rag.results import Ranking

LANES = 2
"""Calls that run side by side before further ones wait and are joined: while one computes, another one prepares."""
_POLL_SECONDS = 0.2


@dataclass(eq=False, slots=True)
class _Ticket:
    """One small request.

    Attributes:
        key: requests of the same key may share a call: reranker, instruction and ratio.
        query: the query.
        texts: its passages.
        tokens: of them.
        called: is set when the wait is over.
        leads: whether it is to run a call then, for itself and others.
        ranking: what it gets; None if it leads, or if the shared call failed.
    """

    key: tuple[KaLMReranker, str | None, int | None]
    query: str
    texts: Sequence[str]
    tokens: int
    called: threading.Event = field(default_factory=threading.Event)
    leads: bool = False
    ranking: Ranking[str] | None = None


class Joiner:
    """Runs small requests; where two calls run already, further ones wait and share the next call.

    A shared call is one batch of the model at most, so that nobody waits longer than for the batch that would have been
    before it anyway. The scores are those of calls of their own.

    Args:
        rows: passages of a shared call at most.
        tokens: tokens of its passages at most.

    Attributes:
        joined: requests that took part in a call of another one.
    """

    def __init__(self, rows: int, tokens: int) -> None:
        self._rows, self._tokens = rows, tokens
        self._lock = threading.Lock()  # of the two below
        self._waiting: list[_Ticket] = []
        self._running = 0
        self.joined = 0

    def fits(self, rows: int, tokens: int) -> bool:
        """Whether a request is small enough: half of a batch at most."""
        return 0 < 2 * rows <= self._rows and 2 * tokens <= self._tokens

    def rank(
        self,
        reranker: KaLMReranker,
        query: str,
        texts: Sequence[str],
        tokens: int,
        instruction: str | None,
        ratio: int | None,
    ) -> Ranking[str]:
        """Return the ranking of a request; waits while others compute.

        Raises:
            StoppedError: the request was cancelled.
            Exception: what a call of its own raises.
        """
        own = _Ticket((reranker, instruction, ratio), query, texts, tokens)
        with self._lock:
            own.leads = self._running < LANES
            if own.leads:
                self._running += 1
            else:
                self._waiting.append(own)
        if not own.leads:
            self._wait(own)
        if own.leads:
            self._lead(own)
        if own.ranking is None:  # the shared call failed: one of its own tells whether this request is the reason
            return reranker.rank(query, texts, None, instruction, ratio, None, False)
        return own.ranking

    def _wait(self, own: _Ticket) -> None:
        try:
            while not own.called.wait(_POLL_SECONDS):
                check_stopped()
        except BaseException:
            with self._lock:
                if own in self._waiting:
                    self._waiting.remove(own)
                    raise
            own.called.wait()  # it is part of a call, or is to lead one
            if own.leads:
                self._pass_on()
            raise

    def _lead(self, own: _Ticket) -> None:
        """Run a call for a request and those that wait for the same, then let the next one lead."""
        others: list[_Ticket] = []
        try:
            others = self._take(own)
            both = [own, *others]
            # Its own context: that the client of one goes away ends the call of none.
            rankings = contextvars.copy_context().run(_together, both)
            for ticket, ranking in zip(both, rankings, strict=True):
                ticket.ranking = ranking
        except Exception:
            # One bad request must not fail those that share its call: each is then run by itself.
            if not others:
                raise
        finally:
            for ticket in others:
                ticket.called.set()
            self._pass_on()

    def _take(self, own: _Ticket) -> list[_Ticket]:
        rows, tokens, taken = len(own.texts), own.tokens, []
        with self._lock:
            for ticket in list(self._waiting):
                rows, tokens = rows + len(ticket.texts), tokens + ticket.tokens
                if rows > self._rows or tokens > self._tokens:
                    break
                if ticket.key == own.key:
                    taken.append(ticket)
                    self._waiting.remove(ticket)
            self.joined += len(taken)
        return taken

    def _pass_on(self) -> None:
        with self._lock:
            if self._waiting:
                ticket = self._waiting.pop(0)
                ticket.leads = True
                ticket.called.set()
            else:
                self._running -= 1


def _together(tickets: Sequence[_Ticket]) -> list[Any]:
    reranker, instruction, ratio = tickets[0].key
    stop_with(threading.Event())
    found: list[Any] = reranker.rank_each([(ticket.query, ticket.texts) for ticket in tickets], instruction, ratio)
    return found
