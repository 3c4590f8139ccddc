"""Orders one query's candidates with a system."""

from __future__ import annotations

from kalm_rag.evaluation.systems import System
from kalm_rag.evaluation.trec import Ranking
from kalm_rag.reranker import KaLMReranker
from kalm_rag.retrieval.corpus import Corpus


def rank_candidates(
    reranker: KaLMReranker, system: System, corpus: Corpus, query: str, ranking: Ranking
) -> tuple[list[tuple[str, float]], bool]:
    """Order one query's candidates with a system.

    Args:
        reranker: with the system's model and forms.
        system: its instruction, ratio and depth.
        corpus: the texts.
        query: the query's id.
        ranking: its candidates, best first.

    Returns:
        `(passage id, margin)`, best first, and whether the query was longer than the model reads. Below the system's
        depth the candidates keep their order; their margins are made up, 1, 2, ... below the lowest.
    """
    hits = reranker.rank(
        corpus.queries[query],
        [corpus.passages[name] for name, _ in ranking[: system.depth]],
        instruction=system.instruction,
        ratio=system.ratio,
        show_progress=False,
    )
    ordered = [(ranking[hit.index][0], hit.margin) for hit in hits]
    ordered += [(name, ordered[-1][1] - place) for place, (name, _) in enumerate(ranking[len(hits) :], start=1)]
    return ordered, any(hit.query_truncated for hit in hits)
