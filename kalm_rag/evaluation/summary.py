"""The results of an evaluation as plain numbers, for the table, the JSON file, the plots and the report."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from kalm_rag._version import __version__
from kalm_rag.evaluation.compared import ComparedRun
from kalm_rag.evaluation.entries import Entry, Interval, make_entries
from kalm_rag.evaluation.experiment import Encoding, Experiment, SystemResult, count_tokens, data_digests
from kalm_rag.evaluation.metrics import best_order, means
from kalm_rag.evaluation.systems import label_key, labels
from kalm_rag.utils.display import html_table, visible_line
from kalm_rag.utils.machine import Machine, this_machine, utc_now, versions

_LISTED = 10
"""Queries that gained most, and that lost most, in the JSON of each row."""


@dataclass(frozen=True, slots=True, repr=False)
class Summary:
    """Results together with their baselines.

    Attributes:
        metrics: names of the metrics, the main one first.
        first_name: what the first stage is called.
        first: its mean metrics.
        best: mean metrics of the best possible order of the candidates.
        first_per_query: its metrics per query.
        results: one per system.
        encodings: one per model and precision.
        warnings: what was odd about the input or the passages.
        rankings: the first stage's candidates.
        qrels: judgements.
        queries: texts of the queries.
        conditions: depth, device, `max_length` and the like.
        data: SHA-256 digests of the input, by what it is.
        date: when, in UTC.
        machine: where.
        versions: of Python and the packages.
        entries: every row of the table but the first and the last, in order.
        first_intervals: 95 % intervals of `first`.
        passages: texts of the candidates.
    """

    metrics: list[str]
    first_name: str
    first: dict[str, float]
    best: dict[str, float]
    first_per_query: dict[str, dict[str, float]]
    results: Sequence[SystemResult]
    encodings: Sequence[Encoding]
    warnings: tuple[str, ...]
    rankings: Mapping[str, Sequence[tuple[str, float]]]
    qrels: Mapping[str, Mapping[str, int]]
    queries: Mapping[str, str]
    conditions: Mapping[str, Any]
    data: Mapping[str, str]
    date: str
    machine: Machine
    versions: Mapping[str, str]
    entries: Sequence[Entry] = ()
    first_intervals: Mapping[str, Interval] = field(default_factory=dict)
    passages: Mapping[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        name = self.metrics[0]
        best = max((result.means[name] for result in self.results), default=self.first[name])
        first = f"{visible_line(self.first_name)} {self.first[name]:.4f}"
        return f"Summary(queries={len(self.rankings)}, systems={len(self.results)}, {name}: {first}, best {best:.4f})"

    def _repr_html_(self) -> str:
        caption = f"{len(self.rankings)} queries, candidates of {self.first_name}"
        return html_table(*self.columns(), caption, left=0)

    def labels(self) -> dict[tuple[str | None, ...], str]:
        """Return a short distinct name for each model, adapter, precision, instruction, form and depth."""
        return labels(result.system for result in self.results)

    def label(self, result: SystemResult) -> str:
        """What a result is called, the ratio aside."""
        return self.labels()[label_key(result.system)]

    def columns(self) -> tuple[list[str], list[list[str]]]:
        """Heading and rows of the table of quality and cost."""
        rows = [
            [self.first_name, "", *self._cells(self.first), "", ""],
            *(self._row(entry) for entry in self.entries),
            ["best possible", "", *self._cells(self.best), "", ""],
        ]
        return ["system", "ratio", *self.metrics, "KB", "ms"], rows

    def differences(self) -> tuple[list[str], list[list[str]]]:
        """Heading and rows of the table of differences to the first stage in the first metric."""
        rows = []
        for entry in self.entries:
            low, high = entry.gain_interval
            ratio = "" if entry.ratio is None else str(entry.ratio)
            mean = interval_text(entry.intervals[self.metrics[0]])
            change = [f"{entry.gain:+.4f}", f"{low:+.3f} to {high:+.3f}"]
            rows.append([entry.name, ratio, mean, *change, _p_text(entry.p), _p_text(entry.p_holm)])
        return ["system", "ratio", "95 % interval", "change", "95 % interval", "p", "Holm"], rows

    def _cells(self, values: Mapping[str, float]) -> list[str]:
        return [f"{values[name]:.4f}" for name in self.metrics]

    def _row(self, entry: Entry) -> list[str]:
        return [
            entry.name,
            "" if entry.ratio is None else str(entry.ratio),
            *self._cells(entry.means),
            "" if entry.passage_bytes is None else f"{entry.passage_bytes / 1000:.1f}",
            "" if entry.milliseconds is None else f"{entry.milliseconds:.0f}",
        ]

    def movements(self) -> dict[str, str]:
        """The queries that the first system helped most and hurt most, if there are such: plot name to query."""
        name = self.metrics[0]
        gains = {
            query: value - self.first_per_query[name][query]
            for query, value in self.results[0].per_query[name].items()
            if self.rankings[query]
        }
        if not gains:
            return {}
        most, least = max(gains, key=gains.__getitem__), min(gains, key=gains.__getitem__)
        chosen = {"moved-up": most} if gains[most] > 0 else {}
        return chosen | ({"moved-down": least} if gains[least] < 0 else {})

    def provenance(self) -> list[tuple[str, str]]:
        """Return when, where and with what this was measured, as names and texts for people."""
        machine = self.machine
        rows = [
            ("date", self.date.replace("T", " ").replace("Z", " UTC")),
            ("machine", f"{machine.cpu}, {machine.system}, {machine.architecture}"),
            ("CPU features", " ".join(machine.features) or "unknown"),
            ("threads", f"{machine.threads} of torch ({machine.torch_cpu}), for {machine.cpus} usable processors"),
            ("GPU", ", ".join(machine.gpus) or "none"),
            ("environment", " ".join(f"{name}={value}" for name, value in machine.environment.items())),
            ("versions", ", ".join(f"{name} {version}" for name, version in self.versions.items())),
        ]
        digests = {encoding.name: encoding.digest for encoding in self.encodings}
        rows += [(f"model {name}", digest) for name, digest in digests.items()]
        rows += [(f"{name}, SHA-256", digest) for name, digest in self.data.items()]
        return [(name, text) for name, text in rows if text]

    def as_json(self) -> dict[str, Any]:
        """Return everything except texts, for JSON."""
        return {
            "kalm_rag": __version__,
            "date": self.date,
            "machine": self.machine.as_json(),
            "versions": dict(self.versions),
            "data": dict(self.data),
            "queries": len(self.rankings),
            **self.conditions,
            "first_stage": {"name": self.first_name, "means": self.first, "per_query": self.first_per_query},
            "best_possible": self.best,
            "first_stage_intervals": {name: list(ends) for name, ends in self.first_intervals.items()},
            "systems": [
                {
                    **asdict(result.system),
                    "means": result.means,
                    "p": result.p,
                    "bytes_per_passage": round(result.passage_bytes),
                    "prefilled_bytes_per_passage": round(result.prefilled_bytes),
                    "encoded_again": result.encoded_again,
                    "kept_queries": result.kept,
                    "milliseconds_median": statistics.median(result.milliseconds) if result.milliseconds else None,
                    "per_query": result.per_query,
                }
                for result in self.results
            ],
            "encoding": [asdict(encoding) for encoding in self.encodings],
            "rows": [self._entry_json(entry) for entry in self.entries],
            "warnings": list(self.warnings),
        }

    def _entry_json(self, entry: Entry) -> dict[str, Any]:
        gains = entry.gains(self.first_per_query[self.metrics[0]])
        found = {
            "gained_most": [[query, gain] for query, gain in gains[:_LISTED] if gain > 0],
            "lost_most": [[query, gain] for query, gain in gains[: -_LISTED - 1 : -1] if gain < 0],
        }
        # The values of systems stand under "systems".
        values = {} if entry.kind == "system" else {"per_query": entry.per_query}
        return entry.as_json() | found | values


def _p_text(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def interval_text(ends: Interval | None, digits: int = 3) -> str:
    """Write an interval; nothing if there is none."""
    return "" if ends is None else f"{ends[0]:.{digits}f} to {ends[1]:.{digits}f}"


def summarise(
    experiment: Experiment,
    results: Sequence[SystemResult],
    encodings: Sequence[Encoding],
    compared: Sequence[ComparedRun] = (),
) -> Summary:
    """Put results beside the first stage, the best possible order, fusions, and the runs of other rerankers."""
    candidates = experiment.candidates
    count_tokens(experiment)
    first = experiment.per_query(candidates.rankings)
    best = experiment.per_query(best_order(candidates.rankings, candidates.qrels))
    entries, first_intervals = make_entries(experiment, results, compared, first)
    warnings = [*candidates.warnings, *(warning for run in compared for warning in run.warnings)]
    warnings += [
        f"{encoding.truncated} of {encoding.passages} passages are longer than {experiment.max_length} tokens for "
        f"{encoding.name}; their tails were not read"
        for encoding in encodings
        if encoding.truncated
    ]
    cut = max(result.truncated_queries for result in results)
    if cut:
        warnings.append(f"{cut} queries are longer than the model reads; their tails were not read")
    again = sum(result.encoded_again for result in results)
    if again:
        warnings.append(
            f"{again} passages were encoded again while ranking, because the cache could not hold them; ms includes it"
        )
    kept, asked = sum(result.kept for result in results), sum(len(result.rankings) for result in results)
    if kept:
        warnings.append(
            f"{kept} of {asked} rankings were kept from an earlier start, maybe of another day or machine; their times "
            "are of then"
        )
    depth = max(map(len, candidates.rankings.values()))
    name, cutoff = experiment.metrics.deepest()
    if cutoff > depth:
        warnings.append(f"{name} looks deeper than the {depth} candidates; what lies below them counts as not found")
    return Summary(
        experiment.metrics.names,
        candidates.name,
        means(first),
        means(best),
        first,
        results,
        encodings,
        tuple(warnings),
        candidates.rankings,
        candidates.qrels,
        experiment.corpus.queries,
        {
            "depth": depth,
            "device": experiment.device,
            "max_length": experiment.max_length,
            "metrics": experiment.metrics.names,
        },
        data_digests(experiment) | {f"run of {run.name}": run.digest for run in compared},
        utc_now(),
        this_machine(),
        versions(),
        entries,
        first_intervals,
        {name: experiment.corpus.passages[name] for ranking in candidates.rankings.values() for name, _ in ranking},
    )
