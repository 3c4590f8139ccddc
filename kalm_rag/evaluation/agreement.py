"""Compares two rankings without judgements: how far they agree, where they differ, and which pairs to judge."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kalm_rag.errors import MissingExtraError
from kalm_rag.evaluation.metrics import mean_intervals
from kalm_rag.evaluation.trec import Ranking
from kalm_rag.retrieval.corpus import Corpus
from kalm_rag.utils.checks import check_positive
from kalm_rag.utils.display import HIDDEN, Shown

PERSISTENCE = 0.9
"""Of rank-biased overlap: the first ten places have 86 % of the weight."""
PAIRS = 30
"""Pairs that are written to be judged."""


@dataclass(frozen=True, slots=True)
class QueryAgreement:
    """How far two rankings of one query agree.

    Attributes:
        query: its id.
        overlap: share of the first `k` places that both have, 0 to 1.
        rbo: rank-biased overlap, 0 to 1; the first places weigh most.
        tau: Kendall's rank correlation of the passages that both rank, -1 to 1; None with fewer than two.
        same_first: whether both put the same passage first.
    """

    query: str
    overlap: float
    rbo: float
    tau: float | None
    same_first: bool


@dataclass(frozen=True, slots=True, repr=False)
class Agreement(Shown):
    """How far two runs agree.

    Attributes:
        k: places that the overlap looks at.
        queries: one per query, those that differ most first.
        means: of `overlap`, `rbo`, `tau` and `same_first`; a mean without values is left out.
        intervals: their 95 % intervals, by the bootstrap over queries.
        only_one: queries that one run has and the other has not; they are not compared.
    """

    k: int
    queries: tuple[QueryAgreement, ...]
    means: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]
    only_one: int

    def as_json(self) -> dict[str, Any]:
        """Return everything, for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Pair:
    """A query and a passage that one run ranks much higher than the other.

    Attributes:
        query: the query's id.
        passage: the passage's id.
        weight: difference of the passage's discount in nDCG at `k`, 0 to 1.
    """

    query: str
    passage: str
    weight: float


def compare_runs(one: Mapping[str, Ranking], other: Mapping[str, Ranking], k: int = 10) -> Agreement:
    """Compare two runs query by query.

    Args:
        one: query id to passages, best first.
        other: the same.
        k: places that the overlap looks at.

    Raises:
        MissingExtraError: SciPy is not installed.
        ValueError: `k` is below 1, or no query is in both runs.
    """
    check_positive("k", k)
    shared = [query for query, ranking in one.items() if ranking and other.get(query)]
    if not shared:
        msg = (
            f"no query is in both runs: one has {len(one)} queries and the other {len(other)}; "
            "compare runs of the same queries"
        )
        raise ValueError(msg)
    found = [_compare(query, _ids(one[query]), _ids(other[query]), k) for query in shared]
    values = {
        "overlap": [query.overlap for query in found],
        "rbo": [query.rbo for query in found],
        "tau": [query.tau for query in found if query.tau is not None],
        "same_first": [float(query.same_first) for query in found],
    }
    means = {name: sum(column) / len(column) for name, column in values.items() if column}
    intervals = {name: mean_intervals([values[name]])[0] for name in means}
    queries = {query for run in (one, other) for query, ranking in run.items() if ranking}
    ordered = tuple(sorted(found, key=lambda query: (query.rbo, query.overlap)))
    return Agreement(k, ordered, means, intervals, len(queries) - len(shared))


def _ids(ranking: Ranking) -> list[str]:
    return [passage for passage, _ in ranking]


def _compare(query: str, one: Sequence[str], other: Sequence[str], k: int) -> QueryAgreement:
    places = min(k, max(len(one), len(other)))
    overlap = len(set(one[:k]) & set(other[:k])) / places
    return QueryAgreement(query, overlap, rank_biased_overlap(one, other), _tau(one, other), one[0] == other[0])


def rank_biased_overlap(one: Sequence[str], other: Sequence[str], persistence: float = PERSISTENCE) -> float:
    """Rank-biased overlap of two rankings down to the depth of the shorter one, extrapolated.

    Args:
        one: passage ids, best first, each once, at least one.
        other: the same.
        persistence: how far down a reader looks, between 0 and 1.

    Source: Webber, Moffat and Zobel, ACM TOIS 28 (2010), equation 30.
    """
    depth = min(len(one), len(other))
    seen: set[str] = set()
    common, total = 0, 0.0
    for place in range(depth):
        for passage in (one[place], other[place]):
            common += passage in seen
            seen.add(passage)
        total += common / (place + 1) * persistence ** (place + 1)
    return common / depth * persistence**depth + (1 - persistence) / persistence * total


def _tau(one: Sequence[str], other: Sequence[str]) -> float | None:
    try:
        from scipy import stats
    except ImportError as error:
        raise MissingExtraError("scipy", "eval") from error
    places = {passage: place for place, passage in enumerate(other)}
    both = [places[passage] for passage in one if passage in places]
    return float(stats.kendalltau(range(len(both)), both).statistic) if len(both) > 1 else None


def worth_judging(
    one: Mapping[str, Ranking], other: Mapping[str, Ranking], k: int = 10, most: int = PAIRS
) -> list[Pair]:
    """Return the pairs whose judgement says most about which run is better.

    A judgement moves the difference in nDCG by how differently the runs discount the passage's place: most for a
    passage that one run puts first and the other not among its first `k`.

    Args:
        one: query id to passages, best first.
        other: the same.
        k: places that count.
        most: pairs at most.

    Returns:
        Pairs by falling weight; those without a difference are left out.
    """
    pairs = []
    for query in one:
        if one[query] and other.get(query):
            sides = [_discounts(run[query][:k]) for run in (one, other)]
            for passage in dict.fromkeys([*sides[0], *sides[1]]):
                weight = abs(sides[0].get(passage, 0.0) - sides[1].get(passage, 0.0))
                pairs.append(Pair(query, passage, weight))
    return sorted((pair for pair in pairs if pair.weight > 0), key=lambda pair: -pair.weight)[:most]


def _discounts(ranking: Ranking) -> dict[str, float]:
    return {passage: 1 / math.log2(place + 1) for place, (passage, _) in enumerate(ranking, start=1)}


def write_pairs(path: Path, pairs: Sequence[Pair], corpus: Corpus) -> None:
    """Write pairs with their texts as JSON lines to be filled in; `read_qrels` reads them.

    They are sorted by query and passage, so that nothing tells the judge which run ranks a passage higher.

    Raises:
        FileExistsError: the file exists; it may hold judgements.
    """
    lines = []
    for pair in sorted(pairs, key=lambda pair: (pair.query, pair.passage)):
        row = {
            "query_id": pair.query,
            "passage_id": pair.passage,
            "relevance": None,
            "query": corpus.queries[pair.query],
            "passage": corpus.passages[pair.passage],
        }
        lines.append(json.dumps(row, ensure_ascii=False).translate(_ESCAPED) + "\n")
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "w", encoding="utf-8") as file:
        file.writelines(lines)


_ESCAPED = {code: f"\\u{code:04x}" for code in HIDDEN if code >= 0x7F}
"""Characters that would change how an editor shows a line; JSON itself escapes those below."""
