"""The client of `kalm-rag serve`, with the calls and the results of `KaLMReranker`."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

from kalm_rag.cache.forgetting import ForgetReport, together
from kalm_rag.client.answers import (
    Answer,
    order_kept,
    ranked,
    ranking_of,
    read_encoded,
    read_report,
    read_scores,
    summed_up,
)
from kalm_rag.client.base import ServedModel, in_parts, texts_in_parts
from kalm_rag.client.exchange import Deadline, read_lines, read_object
from kalm_rag.client.server import DEFAULT_RETRIES, DEFAULT_TIMEOUT, OnFailure, Server
from kalm_rag.documents import (
    TextOf,
    iter_documents,
    iter_pairs,
    iter_queries,
    repair_text,
)
from kalm_rag.errors import ServerUnavailableError
from kalm_rag.latency.limit import OnUnknown, budget_left, limit_of
from kalm_rag.latency.records import BackgroundStats, RankCounts, RerankerStats, Timings
from kalm_rag.latency.tracing import traced
from kalm_rag.reranker.rankings import Rankings
from kalm_rag.results import D, EncodeReport, PartialRanking, Ranking
from kalm_rag.thresholds import ThresholdLike, read_limit
from kalm_rag.utils.checks import check_positive, check_string
from kalm_rag.utils.fusion import FirstStage
from kalm_rag.utils.progress import Progress

logger = logging.getLogger(__name__)


class RerankerClient(ServedModel):
    """Scores passages on a server of `kalm-rag serve`, with the calls and the results of `KaLMReranker`.

    Settings that are not here, such as `max_length`, `long_passages` and the cache, are the server's. One instance may
    be used from any number of threads. It may be a context manager; `close()` closes its connections. A copy or a
    pickle is made of the arguments, `api_key` included.

    The server's model is compared with `model` before the first request. Each answer names the digest of the model that
    gave it; one of another model is an error, unless the server has a new model that `model` names too.

    After three calls in a row that found the server away, others fail at once, or keep their order. Every 5 seconds at
    most, one call tries the server again.

    Args:
        server: the address, such as `http://127.0.0.1:8000`.
        model: the name of the server's model, or its digest of 24 digits as `GET /info` tells it. A server with
            another model is an error, as is a tuned one that is not named by its digest. None takes any model.
        api_key: the server's key. Default: the first one in the environment variable `KALM_RAG_API_KEY`.
        timeout: seconds that a call of `rank` may take, with all of its attempts and the pauses between them; an
            attempt to connect gets 5 of them at most. Other calls have them for each request that they send, and
            `encode` until the next line of progress.
        retries: how often a request is sent again if the server is away, too slow or busy, or if its answer cannot be
            read. Pauses grow from a quarter of a second to 5 seconds, and are as long as the server asks for in
            `Retry-After`; there is none that the timeout has no room for.
        on_failure: what `rank` does if the last attempt failed. `raise` is an error; `keep-order` returns the passages
            in the order given, or by the scores of `first_stage`, each an `UnscoredPassage`, and logs a warning. A
            wrong key, another model and a refused request are errors in both.
        instruction: what "relevant" means, in a sentence. Default: the server's.
        ratio: encoder states averaged into one. Default: the server's.

    Attributes:
        server: as given, without a slash at the end.
        model: as given.
        repairs: as in `KaLMReranker`.
        truncations: as in `KaLMReranker`; counts what results of `rank` and `rank_many` say.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it and the rule.
    """

    def __init__(
        self,
        server: str,
        *,
        model: str | None = None,
        api_key: str | None = None,
        timeout: float = DEFAULT_TIMEOUT,
        retries: int = DEFAULT_RETRIES,
        on_failure: OnFailure = "raise",
        instruction: str | None = None,
        ratio: int | None = None,
    ) -> None:
        super().__init__(Server(server, api_key, timeout, retries, on_failure), model, instruction, ratio)

    def __reduce__(self) -> tuple[Any, ...]:
        server = self._server
        given: dict[str, Any] = {
            "model": self.model,
            "api_key": server.api_key,
            "timeout": server.timeout,
            "retries": server.retries,
            "on_failure": server.on_failure,
            "instruction": self._instruction,
            "ratio": self._ratio,
        }
        return partial(type(self), server.url, **given), ()

    @traced
    def rank(
        self,
        query: str,
        documents: Iterable[D],
        top_k: int | None = None,
        instruction: str | None = None,
        ratio: int | None = None,
        threshold: ThresholdLike | None = None,
        show_progress: bool | None = None,
        *,
        text: TextOf[D] | None = None,
        calibrated: bool = False,
        first_stage: FirstStage | None = None,
        budget_ms: float | None = None,
        on_unknown: OnUnknown | None = None,
    ) -> Ranking[D] | PartialRanking[D]:
        """Order passages by how well they answer a query, in one request, or more if the server accepts fewer passages.

        Args:
            query: the query.
            documents: as in `KaLMReranker.rank`; they stay here, only their texts are sent.
            top_k: how many to return, default all.
            instruction: for this call, instead of the instance's.
            ratio: for this call, instead of the instance's.
            threshold: as in `KaLMReranker.rank`; a profile is read and applied here. None is the server's `--threshold`
                if it has one, except with `first_stage`.
            show_progress: ignored: one request has no progress.
            text: as in `KaLMReranker.rank`.
            calibrated: as in `KaLMReranker.rank`.
            first_stage: as in `KaLMReranker.rank`.
            budget_ms: as in `KaLMReranker.rank`, from the arrival of the request at the server. Waiting for a thread or
                for another attempt counts, the way over the network does not. If there are several requests, the first
                passages get the budget first.
            on_unknown: as in `KaLMReranker.rank`.

        Returns:
            As in `KaLMReranker.rank`. `counts` and `timings` are the server's, those of several requests added up,
            except `timings.total`, which is the time of the call here. Small requests that the server joined share
            theirs. A list without scores if
            `on_failure` is `keep-order` and the server is away.

        Raises:
            TypeError, ValueError: an argument is wrong; the message names it and its value.
            ServerError: the server refuses the request, or has another model.
            ServerUnavailableError: the server is away, and `on_failure` is `raise`.
        """
        began = time.monotonic()
        query_repaired = repair_text(check_string("query", query))[1]
        limit = read_limit(threshold, calibrated)
        wanted = limit.wanted(None if top_k is None else check_positive("top_k", top_k))
        within = limit_of(budget_ms, on_unknown, began)
        given = list(iter_documents(documents, text))
        if first_stage is not None:
            first_stage.check(len(given))
        fields = self._fields(instruction, ratio)
        self.repairs.add(query_repaired + sum(passage.repaired for passage in given))
        if not given:
            return PartialRanking() if within is not None else Ranking()
        fields |= {"top_n": wanted.top_k, "threshold": limit.score, "on_unknown": on_unknown}
        all_needed = first_stage is not None or limit.profile is not None
        if all_needed:  # cut here
            fields |= {"top_n": len(given), "threshold": 0.0}

        def body() -> dict[str, Any]:
            return fields | {"budget_ms": budget_left(budget_ms, began)}

        deadline = Deadline(self._server.timeout, within=within)
        try:
            answer = self._answer(query, given, body, deadline, complete=all_needed)
            if limit.profile is not None:
                limit.profile.check(self._scope(fields))
            ranking = ranking_of(answer, given, wanted, limit, first_stage, partial=within is not None)
            counts, timings = answer.counts, answer.timings
        except ServerUnavailableError as error:
            if not self._server.keeps_order:
                raise
            logger.warning("%s; %d passages keep their order and have no score", error, len(given))
            ranking = order_kept(given, bool(query_repaired), wanted.top_k, first_stage)
            counts, timings = RankCounts(passages=len(given), skipped=len(given)), Timings()
        ranking.counts = replace(counts, cut=len(given) - len(ranking))
        ranking.timings = replace(timings, total=time.monotonic() - began)
        self._totals.add(ranking.counts, ranking.timings)
        return cast("Ranking[D] | PartialRanking[D]", ranking)

    def rank_many(
        self,
        queries: Iterable[str],
        documents: Iterable[D],
        top_k: int | None = None,
        instruction: str | None = None,
        ratio: int | None = None,
        threshold: ThresholdLike | None = None,
        show_progress: bool | None = None,
        *,
        text: TextOf[D] | None = None,
        calibrated: bool = False,
    ) -> Rankings[D]:
        """Order the same passages for each of several queries, in requests of one query each, one after the other.

        The arguments and the result are those of `KaLMReranker.rank_many`; without `threshold` nothing is left out,
        whatever the server's.

        Raises:
            TypeError, ValueError: an argument is wrong; the message names it and its value.
            ServerError: the server refuses a request, has another model, or is away, whatever `on_failure` is.
        """
        began = time.monotonic()
        asked = [(query, repair_text(query)[1]) for query in iter_queries(queries)]
        limit = read_limit(threshold, calibrated)
        wanted = limit.wanted(None if top_k is None else check_positive("top_k", top_k))
        given = list(iter_documents(documents, text))
        fields = self._fields(instruction, ratio) | {"top_n": len(given), "threshold": 0.0}
        self.repairs.add(sum(changed for _, changed in asked) + sum(passage.repaired for passage in given))
        answers: dict[str, Answer] = {}
        for query, _ in asked:
            if given and query not in answers:
                deadline = Deadline(self._server.timeout)
                answers[query] = self._answer(query, given, lambda: fields, deadline, complete=True)
        if answers and limit.profile is not None:
            limit.profile.check(self._scope(fields))
        hits = [
            sorted(ranked(answers[query], given, limit), key=lambda hit: hit.index) if given else []
            for query, _ in asked
        ]
        rankings = Rankings(hits, wanted)
        total = len(asked) * len(given)
        counts, timings = summed_up(answers.values())
        rankings.counts = replace(counts, passages=total, scored=total, cut=total - sum(map(len, rankings)))
        rankings.timings = replace(timings, total=time.monotonic() - began)
        self._totals.add(rankings.counts, rankings.timings)
        return cast("Rankings[D]", rankings)

    def predict(
        self,
        pairs: Iterable[Sequence[Any]],
        instruction: str | None = None,
        ratio: int | None = None,
        show_progress: bool | None = None,
    ) -> list[float]:
        """Score `(query, passage)` pairs; as many a request as the server accepts.

        Returns:
            `P(yes)` of each pair, in input order.

        Raises:
            TypeError, ValueError: an argument is wrong; the message names it and its value.
            ServerError: the server refuses a request, has another model, or is away, whatever `on_failure` is.
        """
        given = list(iter_pairs(pairs))
        fields = self._fields(instruction, ratio)
        self.repairs.add(sum(repair_text(part)[1] for pair in given for part in pair))
        scores: list[float] = []
        for some in in_parts(self._connection, given):
            own = fields | {"queries": [query for query, _ in some], "documents": [text for _, text in some]}
            read = partial(_read_scores, count=len(some))
            scores += self._connection.send("/v1/score", partial(dict, own), read)
        return scores

    def encode(
        self, documents: Iterable[D], show_progress: bool | None = None, *, text: TextOf[D] | None = None
    ) -> EncodeReport:
        """Encode passages on the server ahead of the queries that will need them.

        Args:
            documents: as in `KaLMReranker.rank`; a generator is consumed in parts.
            show_progress: True, False, or None for a bar when standard error is a terminal.
            text: as in `KaLMReranker.rank`.

        Returns:
            How many passages were new, known already, truncated and repaired. After a request that broke off and was
            sent again, what the first attempt encoded counts as known.

        Raises:
            TypeError, ValueError: a passage is wrong; the message names its position.
            ServerError: the server refuses a request, has another model, or is away, whatever `on_failure` is.
        """
        total = len(documents) if isinstance(documents, Sequence) else None
        found = {"new": 0, "known": 0, "truncated": 0, "repaired": 0}
        with Progress(total, "encoding", show=show_progress) as progress:
            for some in texts_in_parts(self._connection, documents, text):
                counts = self._connection.send(
                    "/v1/encode",
                    partial(dict, documents=some),
                    partial(_read_encoded, count=len(some)),
                    Deadline(self._server.timeout, renews=True),
                )
                progress.advance(len(some))
                self.repairs.add(counts["repaired"])
                self.truncations.add(counts["truncated"])
                found = {name: number + counts[name] for name, number in found.items()}
        return EncodeReport(**found)

    def forget(self, documents: Iterable[D], *, text: TextOf[D] | None = None) -> ForgetReport:
        """Delete what the server keeps of passages; see `KaLMReranker.forget`.

        After a request that broke off and was sent again, what the first attempt deleted is not counted.

        Raises:
            TypeError: a passage is wrong; the message names its position. The passages before it may be forgotten.
            ServerError: the server refuses a request, has another model, or is away, whatever `on_failure` is.
        """
        reports = [
            self._connection.send("/v1/forget", partial(dict, documents=some), _read_forgotten)
            for some in texts_in_parts(self._connection, documents, text)
        ]
        return together(reports, texts=sum(report.texts for report in reports))

    async def arank(
        self,
        query: str,
        documents: Iterable[D],
        top_k: int | None = None,
        instruction: str | None = None,
        ratio: int | None = None,
        threshold: ThresholdLike | None = None,
        show_progress: bool | None = None,
        *,
        text: TextOf[D] | None = None,
        calibrated: bool = False,
        first_stage: FirstStage | None = None,
        budget_ms: float | None = None,
        on_unknown: OnUnknown | None = None,
    ) -> Ranking[D] | PartialRanking[D]:
        """`rank` for asynchronous programs: the event loop stays free while the request runs.

        Calls wait in threads of this instance's own, 16 side by side. A call that is cancelled sends no further
        attempt, but a request that was sent runs to its end. Nothing is bound to an event loop.
        """
        began = time.monotonic()

        def run() -> Ranking[D] | PartialRanking[D]:
            left = cast("float | None", budget_left(budget_ms, began))  # waiting for a thread counts too
            return self.rank(
                query, documents, top_k, instruction, ratio, threshold, show_progress,
                text=text, calibrated=calibrated, first_stage=first_stage, budget_ms=left, on_unknown=on_unknown,
            )  # fmt: skip

        return await self._calls.run("rank", run)

    async def arank_many(
        self,
        queries: Iterable[str],
        documents: Iterable[D],
        top_k: int | None = None,
        instruction: str | None = None,
        ratio: int | None = None,
        threshold: ThresholdLike | None = None,
        show_progress: bool | None = None,
        *,
        text: TextOf[D] | None = None,
        calibrated: bool = False,
    ) -> Rankings[D]:
        """`rank_many` for asynchronous programs; see `arank`."""
        rank_many = partial(self.rank_many, text=text, calibrated=calibrated)
        return await self._calls.run(
            "rank", rank_many, queries, documents, top_k, instruction, ratio, threshold, show_progress
        )

    async def apredict(
        self,
        pairs: Iterable[Sequence[Any]],
        instruction: str | None = None,
        ratio: int | None = None,
        show_progress: bool | None = None,
    ) -> list[float]:
        """`predict` for asynchronous programs; see `arank`."""
        return await self._calls.run("rank", self.predict, pairs, instruction, ratio, show_progress)

    async def aencode(
        self, documents: Iterable[D], show_progress: bool | None = None, *, text: TextOf[D] | None = None
    ) -> EncodeReport:
        """`encode` for asynchronous programs; see `arank`."""
        return await self._calls.run("encode", partial(self.encode, text=text), documents, show_progress)

    async def aforget(self, documents: Iterable[D], *, text: TextOf[D] | None = None) -> ForgetReport:
        """`forget` for asynchronous programs; see `arank`."""
        return await self._calls.run("encode", partial(self.forget, text=text), documents)

    def stats(self) -> RerankerStats:
        """Return what the calls of `rank` and `rank_many` of this instance took; `background` stays empty."""
        return self._totals.stats(BackgroundStats())

    @property
    def failures(self) -> int:
        """How many calls and parts of calls found the server away until their last attempt."""
        return self._connection.failures


def _read_scores(parts: Iterable[bytes], count: int) -> list[float]:
    return read_scores(read_object(parts), count)


def _read_encoded(parts: Iterable[bytes], count: int) -> dict[str, int]:
    return read_encoded(read_lines(parts), count)


def _read_forgotten(parts: Iterable[bytes]) -> ForgetReport:
    return read_report(read_object(parts))
