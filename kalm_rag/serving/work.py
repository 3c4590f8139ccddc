"""Runs requests on the model: so many side by side, so many waiting, the rest refused."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any, TypeVar, get_args

from kalm_rag.documents import repair_text
from kalm_rag.latency.limit import budget_left
from kalm_rag.serving.asked import Answered, Ask, Asked, Outcome
from kalm_rag.serving.cutting import cut, most_tokens
from kalm_rag.serving.joining import Joiner
from kalm_rag.serving.limits import BusyError, Limits
from kalm_rag.serving.tokens import TokenCounter
from kalm_rag.settings import LongPassages
from kalm_rag.utils.async_calls import AsyncCalls
from kalm_rag.utils.checks import check_choice
from kalm_rag.utils.recording import recording_sources

if TYPE_CHECKING:
    from kalm_rag.reranker import KaLMReranker
    from kalm_rag.results import PartialRanking, Ranking
    from kalm_rag.thresholds import ThresholdLike

T = TypeVar("T")

_LONGEST_RETRY = 30.0
_FIRST_GUESS = 1.0
"""Seconds of a request, before any has ended."""
_SHARE = 0.1
"""What one request changes the mean duration by."""


class Queue:
    """Places for requests. It is used on the event loop alone.

    Args:
        limits: how many are worked on, and how many may wait.

    Attributes:
        running: requests that are worked on.
        waiting: requests that wait for a place.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._places = asyncio.Semaphore(limits.running)
        self._seconds = _FIRST_GUESS
        self.running = 0
        self.waiting = 0

    def check(self) -> None:
        """Refuse a further request.

        Raises:
            BusyError: too many wait already.
        """
        if self._places.locked() and self.waiting >= self._limits.waiting:
            msg = f"the server is full, {self.running} requests run and {self.waiting} wait, which is its limit"
            raise BusyError(msg, self.retry_after)

    @contextlib.asynccontextmanager
    async def place(self, *, refused: bool = True) -> AsyncIterator[None]:
        """Wait for a place and hold it.

        Args:
            refused: whether this is refused if too many wait; what was let in before is not.

        Raises:
            BusyError: too many wait already.
        """
        if refused:
            self.check()
        self.waiting += 1
        try:
            await self._places.acquire()
        finally:
            self.waiting -= 1
        self.running += 1
        began = time.monotonic()
        try:
            yield
        finally:
            self._seconds += _SHARE * (time.monotonic() - began - self._seconds)
            self.running -= 1
            self._places.release()

    @property
    def retry_after(self) -> float:
        """Seconds after which half of what is here now should have ended, 30 at most."""
        return min(_LONGEST_RETRY, self._seconds * (1 + self.waiting / self._limits.running) / 2)


class Work:
    """What the endpoints ask of the model.

    Args:
        reranker: the model and its cache. `load()` is called by who makes it.
        limits: what one request may ask for.
        threshold: of requests that name none.
        joins: whether small requests share calls.
    """

    def __init__(
        self, reranker: KaLMReranker, limits: Limits, threshold: ThresholdLike | None = None, *, joins: bool = True
    ) -> None:
        self.reranker = reranker
        self.limits = limits
        self.queue = Queue(limits)
        settings = reranker.settings
        self.joiner = Joiner(settings.batch_size if joins else 0, settings.batch_tokens)
        self._threshold = threshold
        self._calls = AsyncCalls()
        self._lock = threading.Lock()  # of the next two
        self._reading: dict[str, KaLMReranker] = {reranker.settings.long_passages: reranker}
        self._counter: TokenCounter | None = None

    async def rank(self, asked: Asked, request_id: str, model: str, began: float) -> Outcome:
        """Rank what is asked for. If the task is cancelled, the work ends at its next batch.

        Args:
            asked: what is asked for.
            request_id: for the response.
            model: the real name of the model.
            began: when the request came, in seconds of `time.monotonic`; its budget counts from there.

        Raises:
            ServingError: a limit is exceeded, or the queue is full.
            TypeError, ValueError: a field is wrong; the message names it.
            ScoringError: the model gave non-finite numbers.
        """
        self._check(asked)
        async with self.queue.place():
            return await self._calls.run("rank", self._rank, asked, request_id, model, began)

    async def run(self, action: Callable[..., T], *arguments: Any, refused: bool = True) -> T:
        """Run a method of the reranker in a thread, in a place of the queue; `refused` as in `Queue.place`."""
        async with self.queue.place(refused=refused):
            return await self._calls.run("encode", action, *arguments)

    async def ask(self, action: Callable[[], T]) -> T:
        """Run something short in a thread, past the queue."""
        return await self._calls.run("short", action)

    @property
    def identity(self) -> dict[str, str]:
        """The header that names the model with its adapter, for each answer that is its doing."""
        return {"x-kalm-digest": self.reranker.scorer.identity.mark}

    @property
    def counter(self) -> TokenCounter:
        """Counts tokens; loads the model if necessary."""
        with self._lock:
            if self._counter is None:
                settings, scorer = self.reranker.settings, self.reranker.scorer
                most = max(settings.max_length, settings.query_max_length) * settings.max_windows
                self._counter = TokenCounter(scorer.loaded.tokenizer, most)
            return self._counter

    def rereading(self, long_passages: str | None) -> KaLMReranker:
        """Return the reranker that reads long passages in this way.

        Raises:
            ValueError: there is no such way.
        """
        if long_passages is None:
            return self.reranker
        check_choice("long_passages", long_passages, get_args(LongPassages))
        with self._lock:
            if long_passages not in self._reading:
                self._reading[long_passages] = self.reranker.reading(long_passages)  # type: ignore[arg-type]
            return self._reading[long_passages]

    def _check(self, asked: Asked) -> None:
        self.limits.check_documents(asked.passages)
        if asked.instruction is not None:
            self.limits.check_text("instruction", asked.instruction)
        for ask in asked.asks:
            self.limits.check_text("query", ask.query)
            for place, text in enumerate(ask.texts):
                self.limits.check_text(f"documents[{place}]", text)

    def _rank(self, asked: Asked, request_id: str, model: str, began: float) -> Outcome:
        reranker = self.rereading(asked.long_passages)
        answers, tokens = [], 0
        for ask in asked.asks:
            answer, read = self._rank_one(reranker, ask, asked, began)
            answers.append(answer)
            tokens += read
        return Outcome(answers, model, request_id, tokens)

    def _rank_one(self, reranker: KaLMReranker, ask: Ask, asked: Asked, began: float) -> tuple[Answered, int]:
        settings, counter = reranker.settings, self.counter
        query, texts = cut(ask, asked.truncation, settings, counter)
        most_query, most_passage = most_tokens(settings, counter)
        [(own, _)] = counter.count([query.text])
        counts = [min(count, most_passage) for count, _ in counter.count([text.text for text in texts])]
        read = [text.text for text in texts]
        with contextlib.ExitStack() as stack:
            found = stack.enter_context(recording_sources()) if asked.return_source else {}
            ranking = self._ranking(reranker, ask, asked, query.text, read, sum(counts), began)
        sources = [found.get(repair_text(text)[0]) for text in read] if asked.return_source else []
        places = {place: text.start for place, text in enumerate(texts) if text.is_cut}
        return Answered(ask, ranking, places, query.is_cut, sources), sum(counts) + min(own, most_query) * len(texts)

    def _ranking(
        self,
        reranker: KaLMReranker,
        ask: Ask,
        asked: Asked,
        query: str,
        texts: list[str],
        tokens: int,
        began: float,
    ) -> Ranking[str] | PartialRanking[str]:
        threshold = None if ask.places is not None else self._threshold if asked.threshold is None else asked.threshold
        # A shared call does not tell whose passages it read.
        is_plain = threshold is None and asked.budget_ms is None and asked.on_unknown is None
        is_plain = is_plain and not asked.return_source
        if is_plain and not reranker.settings.refine and self.joiner.fits(len(texts), tokens):
            return self.joiner.rank(reranker, query, texts, tokens, asked.instruction, asked.ratio)[: asked.top_n]
        within: dict[str, Any] = {
            "budget_ms": budget_left(asked.budget_ms, began),
            "on_unknown": asked.on_unknown,
        }
        found: Ranking[str] | PartialRanking[str] = reranker.rank(
            query, texts, asked.top_n, asked.instruction, asked.ratio, threshold, False, **within
        )
        return found
