"""Scores of judged candidates as arrays, and sums over resampled queries."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kalm_rag.evaluation.metrics import Qrels
from kalm_rag.evaluation.trec import Ranking
from kalm_rag.thresholds import Figure, Figures

_RESAMPLES = 9_999
_VALUES_AT_ONCE = 2_000_000

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class JudgedScores:
    """The candidates of some queries, by falling margin.

    Attributes:
        queries: how many queries there are.
        margins: of each candidate.
        relevant: whether it is judged relevant; one without a judgement is not.
        query: place of its query, from 0.
    """

    queries: int
    margins: Floats
    relevant: npt.NDArray[np.bool_]
    query: npt.NDArray[np.int64]

    @classmethod
    def of(cls, queries: Sequence[str], rankings: Mapping[str, Ranking], qrels: Qrels) -> JudgedScores:
        """Join margins and judgements of these queries."""
        rows = [
            (margin, qrels[query].get(passage, 0) > 0, place)
            for place, query in enumerate(queries)
            for passage, margin in rankings[query]
        ]
        rows.sort(key=lambda row: -row[0])
        margins, relevant, places = zip(*rows, strict=True) if rows else ((), (), ())
        return cls(
            len(queries), np.array(margins, np.float64), np.array(relevant, np.bool_), np.array(places, np.int64)
        )

    def per_query(self, chosen: npt.NDArray[np.bool_], weights: Floats | None = None) -> Floats:
        """Return how many of the chosen candidates each query has, or the sum of their weights."""
        given = None if weights is None else weights[chosen]
        return np.bincount(self.query[chosen], given, self.queries).astype(np.float64)

    def figures(self, cuts: Sequence[float]) -> list[Figures]:
        """Return what each of these thresholds does, given as margins."""
        stay = [self.margins >= cut for cut in cuts]
        kept = np.stack([self.per_query(chosen) for chosen in stay], axis=1)
        hits = np.stack([self.per_query(chosen & self.relevant) for chosen in stay], axis=1)
        relevant = self.per_query(self.relevant)[:, None]
        answered = relevant > 0
        nothing = kept == 0
        parts = [kept, hits, nothing & answered, nothing & ~answered, relevant, answered, np.ones_like(relevant)]
        sums = resampled_sums(np.concatenate([part.astype(np.float64) for part in parts], axis=1))
        ends = np.cumsum([part.shape[1] for part in parts])[:-1]
        kept, hits, emptied, abstained, relevant, answers, queries = np.split(sums, ends, axis=1)
        measures = (
            share(hits, kept),
            share(hits, relevant),
            share(2 * hits, kept + relevant),
            share(kept, queries),
            share(emptied, answers),
            share(abstained, queries - answers),
        )
        unanswered = self.queries - int(answered.sum())
        return [
            Figures(self.queries, unanswered, *(figure(values[:, place]) for values in measures))
            for place in range(len(cuts))
        ]


def resampled_sums(values: Floats) -> Floats:
    """Sum over the queries, once as they are and 9,999 times over as many that are drawn with a fixed seed.

    Args:
        values: `(queries, columns)`.

    Returns:
        `(10,000, columns)`; the first row is of the queries as they are.
    """
    count = len(values)
    rng = np.random.default_rng(0)
    found = [values.sum(axis=0, keepdims=True)]
    at_once = max(1, _VALUES_AT_ONCE // count)
    for start in range(0, _RESAMPLES, at_once):
        times = rng.multinomial(count, np.full(count, 1 / count), size=min(at_once, _RESAMPLES - start))
        found.append(times @ values)
    return np.concatenate(found)


def share(part: Floats, whole: Floats) -> Floats:
    """Divide; NaN where there is nothing to divide by."""
    part, whole = np.broadcast_arrays(part, whole)
    found = np.full(part.shape, math.nan)
    np.divide(part, whole, out=found, where=whole > 0)
    return found


def figure(values: Floats) -> Figure | None:
    """Return the first value, and the 95 % interval of the others; None without a value."""
    if math.isnan(values[0]):
        return None
    low, high = np.nanquantile(values, (0.025, 0.975))
    return Figure(float(values[0]), float(low), float(high))
