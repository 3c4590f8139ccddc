"""Scores of passages to the ranking that a call returns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kalm_rag.documents import Passage
from kalm_rag.results import PartialRanking, RankedPassage, Ranking, UnscoredPassage, ranked_passage
from kalm_rag.thresholds.limit import Limit
from kalm_rag.utils.fusion import FirstStage, best_first
from kalm_rag.utils.refining import Wanted

if TYPE_CHECKING:
    from kalm_rag.scoring.score import Score


def ordered(
    given: Sequence[Passage],
    scored: Sequence[Score],
    wanted: Wanted,
    limit: Limit,
    first_stage: FirstStage | None,
    *,
    query_repaired: bool,
    partial: bool,
) -> Ranking[Any] | PartialRanking[Any]:
    """Return the passages best first, then those that were not reached in the order given; `top_k` counts both.

    Args:
        given: the passages.
        scored: what the scorer found of each.
        wanted: which of them are returned.
        limit: what scores are shown as.
        first_stage: as in `KaLMReranker.rank`.
        query_repaired: as in `RankedPassage`.
        partial: whether passages without a score may be among them.
    """
    reached = [place for place, score in enumerate(scored) if score.reached]
    stage = first_stage if first_stage is None or len(reached) == len(scored) else first_stage.of(reached)
    hits: list[RankedPassage[Any]] = []
    for place, fused in best_first([scored[place].margin for place in reached], stage):
        index = reached[place]
        score = scored[index]
        if wanted.admits(score.margin):
            shown = limit.shown(score.margin)
            hits.append(ranked_passage(index, shown, score, given[index], query_repaired, fused))
    if not partial:
        return Ranking(hits)[: wanted.top_k]
    rest = [
        UnscoredPassage(index, given[index].document, given[index].repaired, score.prompt.truncated, query_repaired)
        for index, score in enumerate(scored)
        if not score.reached
    ]
    return PartialRanking([*hits, *rest])[: wanted.top_k]
