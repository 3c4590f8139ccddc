"""Ranking the passages of a query with a held model."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast, overload

from kalm_rag.documents import REPAIRED, TRUNCATED, TextCounter, TextOf, iter_documents, repair_text
from kalm_rag.latency.limit import OnUnknown, TimeLimit, budget_left, limit_of
from kalm_rag.latency.records import RankCounts, Timings, Totals, counts_of, timings_of
from kalm_rag.latency.tracing import traced
from kalm_rag.reranker.held_model import HeldModel
from kalm_rag.reranker.ordering import ordered
from kalm_rag.results import D, PartialRanking, Ranking
from kalm_rag.settings import Settings
from kalm_rag.thresholds import Scope, ThresholdLike, ThresholdProfile, read_limit
from kalm_rag.utils import forks
from kalm_rag.utils.checks import check_positive, check_ratio, check_string, warn_untrained
from kalm_rag.utils.fusion import FirstStage
from kalm_rag.utils.recording import Recording, recording
from kalm_rag.utils.refining import Wanted

if TYPE_CHECKING:
    from kalm_rag.scoring.score import Score

logger = logging.getLogger(__name__)


class RankingModel(HeldModel):
    """A held model that ranks passages, and tells what its calls took.

    Args:
        settings: as in `HeldModel`.
        arguments: as in `HeldModel`.

    Attributes:
        repairs: counts texts with half a surrogate pair.
        truncations: counts texts that were not read to their end.
    """

    def __init__(self, settings: Settings, arguments: dict[str, Any]) -> None:
        super().__init__(settings, arguments)
        self._show_progress: bool | None = arguments["show_progress"]
        self.repairs = TextCounter(REPAIRED)
        self.truncations = TextCounter(TRUNCATED)
        self._totals = Totals()

    @overload
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
        budget_ms: None = None,
        on_unknown: None = None,
    ) -> Ranking[D]: ...

    @overload
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
        budget_ms: float,
        on_unknown: OnUnknown | None = None,
    ) -> PartialRanking[D]: ...

    @overload
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
        on_unknown: OnUnknown,
    ) -> PartialRanking[D]: ...

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
        """Order passages by how well they answer a query.

        Args:
            query: the query.
            documents: passages in any iterable: strings, mappings with the text under `"text"`, or documents of
                LangChain (`page_content`), LlamaIndex (a node's text for embedding) or Haystack (`content`).
            top_k: how many to return, default all.
            instruction: for this call, instead of the instance's.
            ratio: for this call, instead of the instance's.
            threshold: passages with a lower score (`P(yes)`) are left out; or a `ThresholdProfile`, or the path of
                one, which must have been made for this model, ratio and instruction.
            show_progress: for this call, instead of the instance's.
            text: where the text of a document is, if it is elsewhere: a key of a mapping, an attribute, or a function.
            calibrated: scores are the shares of relevant passages that the profile in `threshold` was fitted to,
                instead of `P(yes)`. Which passages are returned, and their order, stay the same.
            first_stage: the first stage's scores of these passages, to be joined with the margins. Passages then come
                by falling `fused`; `score` and `margin` stay the model's, and `threshold` still refers to `score`. All
                passages get exact scores, whatever `top_k`, so that `refine` saves nothing.
            budget_ms: milliseconds that the call may take, from its beginning. The passages that are cheapest to score
                are first, those that must be encoded last. What is not reached follows the scored ones in the order
                given, as `UnscoredPassage`, and is encoded in the background. The call may take longer by the longest
                step that cannot be divided: one passage in one pass of the model, or loading it, so `load()` before.
            on_unknown: `skip` leaves passages that are not encoded without a score, in the same way; `wait`, the
                default, encodes them, under `budget_ms` while time lasts.

        Returns:
            Passages by falling margin; equal ones keep their order. An empty list returns an empty one
            without loading the model. With `refine=True` and `top_k`, all that are returned have exact scores. With a
            `threshold` alone, those far above it keep the score of the first pass, and `exact` is False. With neither,
            `refine` changes nothing. With `budget_ms` or `on_unknown`, a list in which passages may lack a score:
            `threshold` does not cut those, `top_k` counts them, and `refine` takes no first pass.

        Raises:
            TypeError, ValueError: an argument is wrong; the message names it and its value.
            CheckpointError: the model cannot be found or used.
            ScoringError: the model gave non-finite numbers.
        """
        limit = limit_of(budget_ms, on_unknown, time.monotonic())
        with recording() as recorded:
            query, query_repaired = repair_text(check_string("query", query))
            cut = read_limit(threshold, calibrated)
            wanted = cut.wanted(None if top_k is None else check_positive("top_k", top_k))
            given = list(iter_documents(documents, text))
            self.repairs.add(query_repaired + sum(passage.repaired for passage in given))
            pairs = [(query, passage.text) for passage in given]
            if first_stage is not None:
                first_stage.check(len(given))
            # All margins are needed, and exact, where they are joined with other scores.
            needed = wanted if first_stage is None else Wanted()
            scored = self._score(pairs, instruction, ratio, show_progress, needed, cut.profile, limit)
            ranking = ordered(
                given, scored, wanted, cut, first_stage, query_repaired=query_repaired, partial=limit is not None
            )
        ranking.counts, ranking.timings = self._tell(recorded, scored, len(ranking))
        return ranking

    @overload
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
        budget_ms: None = None,
        on_unknown: None = None,
    ) -> Ranking[D]: ...

    @overload
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
        budget_ms: float,
        on_unknown: OnUnknown | None = None,
    ) -> PartialRanking[D]: ...

    @overload
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
        on_unknown: OnUnknown,
    ) -> PartialRanking[D]: ...

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
        """`rank` for asynchronous programs: the event loop stays free while the model runs.

        Calls wait in threads of this instance's own, so that they do not fill the pool that other work shares, and take
        turns batch by batch. A call that is cancelled ends at its next batch. Nothing is bound to an event loop.
        """
        rank, began = cast("Any", self.rank), time.monotonic()

        def run() -> Ranking[D] | PartialRanking[D]:
            found: Ranking[D] | PartialRanking[D] = rank(
                query, documents, top_k, instruction, ratio, threshold, show_progress,
                text=text, calibrated=calibrated, first_stage=first_stage, on_unknown=on_unknown,
                budget_ms=budget_left(budget_ms, began),  # waiting for a thread counts too
            )  # fmt: skip
            return found

        return await self._calls.run("rank", run)

    def _score(
        self,
        pairs: Sequence[tuple[str, str]],
        instruction: str | None,
        ratio: int | None,
        show_progress: bool | None,
        wanted: Wanted | None = None,
        profile: ThresholdProfile | None = None,
        limit: TimeLimit | None = None,
    ) -> list[Score]:
        task = self.settings.instruction if instruction is None else check_string("instruction", instruction)
        instruction, changed = repair_text(task)
        ratio = self.settings.ratio if ratio is None else check_ratio("ratio", ratio)
        if not pairs:
            return []
        self.repairs.add(changed)
        warn_untrained(ratio)
        with forks.native():  # a fork in the middle of an import would leave its lock held in the child
            from kalm_rag.windows.passages import count_truncated, score_passages

        if limit is not None and limit.deadline is not None and self._scorer is None:
            logger.warning("the model is loaded within a call with budget_ms; call load() first")
        scorer = self.scorer
        if profile is not None:
            profile.check(Scope(scorer.identity.mark, ratio, instruction, self.settings.system_prompt))
        show = self._show_progress if show_progress is None else show_progress
        scores = score_passages(scorer, pairs, instruction, ratio, show, wanted, limit)
        self.truncations.add(count_truncated(pairs, scores))
        return scores

    def _tell(self, recorded: Recording, scored: Sequence[Score], returned: int) -> tuple[RankCounts, Timings]:
        """Return what a call took, and add it to the sums."""
        reached = sum(score.reached for score in scored)
        counts = counts_of(
            recorded,
            passages=len(scored),
            scored=reached,
            skipped=len(scored) - reached,
            cut=len(scored) - returned,
            truncated=sum(score.passage_truncated for score in scored),
        )
        timings = timings_of(recorded)
        self._totals.add(counts, timings)
        return counts, timings
