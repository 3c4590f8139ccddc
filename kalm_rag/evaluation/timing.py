"""Times encoding and reranking by the length of the passages."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kalm_rag.reranker import KaLMReranker

if TYPE_CHECKING:
    from kalm_rag.evaluation.experiment import Experiment

_TIMED = 16
"""Passages per length that are timed."""


@dataclass(frozen=True, slots=True)
class LengthTiming:
    """Times of passages of one length.

    Attributes:
        tokens: mean tokens of a passage.
        encode_ms: to encode one passage.
        rank_ms: per passage, to rerank passages known already with a query that is new.
    """

    tokens: float
    encode_ms: float
    rank_ms: float


def time_lengths(
    reranker: KaLMReranker, experiment: Experiment, texts: Sequence[str], tokens: Sequence[int], ratio: int
) -> list[LengthTiming]:
    """Time encoding and reranking of candidates by length: batches of 16 at evenly spaced ranks of length.

    Encoding reports the faster of two runs; reranking reports the fastest of three, each with its own query, after a
    run that prefills the passages.
    """
    if not texts:
        return []
    states = reranker.scorer.states
    ordered = sorted(range(len(texts)), key=tokens.__getitem__)
    query = experiment.corpus.queries[next(iter(experiment.candidates.rankings))]
    found = []
    starts = [
        round(number * max(0, len(texts) - _TIMED) / max(1, experiment.lengths - 1))
        for number in range(experiment.lengths)
    ]
    for start in dict.fromkeys(starts):
        group = ordered[start : start + _TIMED]
        chosen = [texts[place] for place in group]
        encode = min(states.time_encoding(chosen) for _ in range(2))
        rank = math.inf
        for attempt in range(4):
            began = time.perf_counter()
            reranker.rank(f"{query} ({attempt})", chosen, ratio=ratio, show_progress=False)
            if attempt:
                rank = min(rank, time.perf_counter() - began)
        mean = sum(tokens[place] for place in group) / len(group)
        found.append(LengthTiming(mean, 1000 * encode / len(group), 1000 * rank / len(group)))
    return found
