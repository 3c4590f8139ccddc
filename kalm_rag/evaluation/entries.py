"""The rows that an evaluation compares: its systems, their fusions with the first stage, and other rerankers' runs."""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from kalm_rag.evaluation.compared import ComparedRun
from kalm_rag.evaluation.experiment import Experiment, SystemResult
from kalm_rag.evaluation.metrics import holm, mean_intervals, means, median_interval, p_value
from kalm_rag.evaluation.systems import label_key, labels
from kalm_rag.utils.display import Shown
from kalm_rag.utils.fusion import FirstStage, Fusion

WEIGHTS = tuple(step / 10 for step in range(11))
"""Weights of the reranker that the weighted fusion chooses from."""

Rankings = Mapping[str, Sequence[tuple[str, float]]]
Interval = tuple[float, float]


@dataclass(frozen=True, slots=True, repr=False)
class Entry(Shown):
    """One row of the table. All differences are to the first stage, in the first metric.

    Attributes:
        kind: `system`, `fusion` of a system's margins with the first stage's scores, or `compared`, another's run.
        name: what it is called, the ratio aside.
        ratio: of the system, None of a compared run.
        slug: name of its run file.
        rankings: query id to `(passage id, score)`, best first.
        per_query: metric to query id to value.
        means: metric to mean over the queries.
        intervals: metric to the 95 % interval of that mean.
        gain: mean difference.
        gain_interval: its 95 % interval, by the paired bootstrap.
        p: two-sided p-value of that difference.
        p_holm: the same, corrected for all rows of the table.
        milliseconds: one query, median; None if not known.
        milliseconds_interval: 95 % interval of that median; None if not known.
        passage_bytes: mean bytes of an encoded passage; None if not known.
        prefilled_bytes: mean bytes of a passage prefilled in memory; None if not known.
        weights: of the reranker in a weighted fusion, for each half of the queries; chosen on the other half.
    """

    kind: Literal["system", "fusion", "compared"]
    name: str
    ratio: int | None
    slug: str
    rankings: Rankings
    per_query: Mapping[str, Mapping[str, float]]
    means: Mapping[str, float]
    intervals: Mapping[str, Interval]
    gain: float
    gain_interval: Interval
    p: float
    p_holm: float
    milliseconds: float | None = None
    milliseconds_interval: Interval | None = None
    passage_bytes: float | None = None
    prefilled_bytes: float | None = None
    weights: tuple[float, ...] = ()

    def gains(self, base: Mapping[str, float]) -> list[tuple[str, float]]:
        """Return each query with its difference to `base` in the first metric, the largest gain first."""
        values = next(iter(self.per_query.values()))
        return sorted(((query, values[query] - base[query]) for query in base), key=lambda item: -item[1])

    def as_json(self) -> dict[str, Any]:
        """Return what was computed, without rankings and values per query."""
        return {
            "kind": self.kind,
            "name": self.name,
            "ratio": self.ratio,
            "means": dict(self.means),
            "intervals": {metric: list(ends) for metric, ends in self.intervals.items()},
            "gain": self.gain,
            "gain_interval": list(self.gain_interval),
            "p": self.p,
            "p_holm": self.p_holm,
            "milliseconds": self.milliseconds,
            "milliseconds_interval": None if self.milliseconds_interval is None else list(self.milliseconds_interval),
            "bytes_per_passage": None if self.passage_bytes is None else round(self.passage_bytes),
            "prefilled_bytes_per_passage": None if self.prefilled_bytes is None else round(self.prefilled_bytes),
            "weights": list(self.weights),
        }


@dataclass(frozen=True, slots=True)
class _Row:
    """An entry before it is compared with the others."""

    kind: Literal["system", "fusion", "compared"]
    name: str
    ratio: int | None
    slug: str
    rankings: Rankings
    per_query: Mapping[str, Mapping[str, float]]
    costs: tuple[float | None, Interval | None, float | None, float | None]
    weights: tuple[float, ...] = ()
    p: float | None = None


def make_entries(
    experiment: Experiment,
    results: Sequence[SystemResult],
    compared: Sequence[ComparedRun],
    first: Mapping[str, Mapping[str, float]],
) -> tuple[tuple[Entry, ...], dict[str, Interval]]:
    """Compute all rows, and the intervals of the first stage's means.

    Each model, precision and so on is fused with the first stage at the first of its ratios and at the full depth only:
    every further row makes the corrected p-values of all rows larger.

    Args:
        experiment: what was done.
        results: one per system.
        compared: other rerankers' runs.
        first: the first stage's metrics per query.
    """
    names = labels(result.system for result in results)
    rows, fused = [], set()
    for result in results:
        name = names[label_key(result.system)]
        rows.append(_of_system(name, result))
        if name not in fused and result.system.depth is None:
            fused.add(name)
            rows += [_fusion(experiment, rows[-1], result, kind) for kind in ("weighted", "rrf")]
    rows += [_of_run(experiment, run) for run in compared]
    queries = list(next(iter(first.values())))
    main = experiment.metrics.names[0]
    columns = [[first[name][query] for query in queries] for name in first]
    for row in rows:
        columns += [[values[query] for query in queries] for values in row.per_query.values()]
        columns.append([row.per_query[main][query] - first[main][query] for query in queries])
    intervals = mean_intervals(columns)
    own, rest = dict(zip(first, intervals, strict=False)), intervals[len(first) :]
    p_values = [p_value(row.per_query[main], first[main]) if row.p is None else row.p for row in rows]
    entries = []
    for place, (row, p, corrected) in enumerate(zip(rows, p_values, holm(p_values), strict=True)):
        part = rest[place * (len(first) + 1) : (place + 1) * (len(first) + 1)]
        found = means(row.per_query)
        gain = found[main] - sum(first[main].values()) / len(queries)
        entries.append(
            Entry(
                row.kind,
                row.name,
                row.ratio,
                row.slug,
                row.rankings,
                row.per_query,
                found,
                dict(zip(row.per_query, part, strict=False)),
                gain,
                part[-1],
                p,
                corrected,
                *row.costs,
                row.weights,
            )
        )
    return tuple(entries), own


def _of_system(name: str, result: SystemResult) -> _Row:
    median = statistics.median(result.milliseconds) if result.milliseconds else None
    costs = (median, median_interval(result.milliseconds), result.passage_bytes, result.prefilled_bytes)
    system = result.system
    return _Row("system", name, system.ratio, system.slug, result.rankings, result.per_query, costs, p=result.p)


def _of_run(experiment: Experiment, run: ComparedRun) -> _Row:
    readable = "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in run.name)[:40]
    slug = f"compared-{readable}-{hashlib.sha256(run.name.encode('utf-8', 'replace')).hexdigest()[:8]}"
    per_query = experiment.per_query(run.rankings)
    return _Row("compared", run.name, None, slug, run.rankings, per_query, (run.milliseconds, None, None, None))


def _fusion(experiment: Experiment, row: _Row, result: SystemResult, kind: Fusion) -> _Row:
    """Fuse a system's margins with the first stage's scores.

    The weight is not chosen on the queries that it is measured on: each half of them, the first, third, ... and the
    others, gets the weight of `WEIGHTS` that is best on the other half. A single query gets the default.
    """
    names = {"weighted": "weighted", "rrf": "RRF"}
    chosen: tuple[float, ...] = ()
    if kind == "rrf":
        rankings = _fused(experiment, result, FirstStage((), "rrf"))
    else:
        queries = list(experiment.candidates.rankings)
        halves = [queries[::2], queries[1::2]]
        if len(queries) < 2:
            chosen = (FirstStage(()).weight,)
            rankings = _fused(experiment, result, FirstStage((), "weighted", chosen[0]))
        else:
            tried = {weight: _fused(experiment, result, FirstStage((), "weighted", weight)) for weight in WEIGHTS}
            main = experiment.metrics.names[0]
            values = {weight: experiment.per_query(found)[main] for weight, found in tried.items()}
            chosen = tuple(_best_weight(values, other) for other in reversed(halves))
            rankings = {
                query: tried[weight][query] for half, weight in zip(halves, chosen, strict=True) for query in half
            }
    rankings = {query: rankings[query] for query in experiment.candidates.rankings}
    name = f"{row.name} + {experiment.candidates.name} ({names[kind]})"
    per_query = experiment.per_query(rankings)
    return _Row("fusion", name, row.ratio, f"{row.slug}-{kind}", rankings, per_query, row.costs, chosen)


def _best_weight(values: Mapping[float, Mapping[str, float]], queries: Collection[str]) -> float:
    """Return the weight that is best on these queries; of equally good ones, the one nearest to the middle."""
    sums = {weight: sum(found[query] for query in queries) for weight, found in values.items()}
    return max(WEIGHTS, key=lambda weight: (round(sums[weight], 9), -abs(weight - 0.5)))


def _fused(experiment: Experiment, result: SystemResult, how: FirstStage) -> dict[str, list[tuple[str, float]]]:
    found = {}
    for query, ranking in experiment.candidates.rankings.items():
        scores = dict(ranking)
        passages = [passage for passage, _ in result.rankings[query]]
        first = FirstStage([scores[passage] for passage in passages], how.fusion, how.weight)
        joined = first.fused([margin for _, margin in result.rankings[query]])
        found[query] = sorted(zip(passages, joined, strict=True), key=lambda item: -item[1])
    return found
