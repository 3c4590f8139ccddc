"""The results of an evaluation as plain numbers, for the table, the JSON file, the plots and the report."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kalm_rag._version import __version__
from kalm_rag.evaluation.experiment import Encoding, Experiment, System, SystemResult, data_digests
from kalm_rag.evaluation.metrics import best_order, means
from kalm_rag.utils.display import html_table, visible_line
from kalm_rag.utils.machine import Machine, this_machine, utc_now, versions


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

    def __repr__(self) -> str:
        name = self.metrics[0]
        best = max((result.means[name] for result in self.results), default=self.first[name])
        first = f"{visible_line(self.first_name)} {self.first[name]:.4f}"
        return f"Summary(queries={len(self.rankings)}, systems={len(self.results)}, {name}: {first}, best {best:.4f})"

    def _repr_html_(self) -> str:
        caption = f"{len(self.rankings)} queries, candidates of {self.first_name}"
        return html_table(*self.columns(), caption, left=0)

    def labels(self) -> dict[tuple[str | None, ...], str]:
        """Return a short distinct name for each model, adapter, precision and instruction."""
        systems = [result.system for result in self.results]
        dtypes = {system.dtype for system in systems}
        instructions = {system.instruction for system in systems}
        found = {}
        for system in systems:
            parts = [system.name]
            if len(dtypes) > 1:
                parts.append(system.dtype or "default")
            if len(instructions) > 1:
                parts.append("default instruction" if system.instruction is None else repr(system.instruction[:40]))
            found[_parts(system)] = " / ".join(parts)
        several = Counter(found.values())
        # Two folders of one name, or two long instructions: both are named in full.
        return {
            key: label if several[label] == 1 else " / ".join(part for part in key if part is not None)
            for key, label in found.items()
        }

    def label(self, result: SystemResult) -> str:
        """What a result is called, the ratio aside."""
        return self.labels()[_parts(result.system)]

    def columns(self) -> tuple[list[str], list[list[str]]]:
        """Heading and rows of the table."""
        rows = [
            [self.first_name, "", *self._cells(self.first), "", "", ""],
            *(self._row(result) for result in self.results),
            ["best possible", "", *self._cells(self.best), "", "", ""],
        ]
        return ["system", "ratio", *self.metrics, "p", "KB", "ms"], rows

    def _cells(self, values: Mapping[str, float]) -> list[str]:
        return [f"{values[name]:.4f}" for name in self.metrics]

    def _row(self, result: SystemResult) -> list[str]:
        return [
            self.label(result),
            str(result.system.ratio),
            *self._cells(result.means),
            "<0.001" if result.p < 0.001 else f"{result.p:.3f}",
            f"{result.passage_bytes / 1000:.1f}",
            f"{statistics.median(result.milliseconds):.0f}" if result.milliseconds else "",
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
            "systems": [
                {
                    **asdict(result.system),
                    "means": result.means,
                    "p": result.p,
                    "bytes_per_passage": round(result.passage_bytes),
                    "encoded_again": result.encoded_again,
                    "kept_queries": result.kept,
                    "milliseconds_median": statistics.median(result.milliseconds) if result.milliseconds else None,
                    "per_query": result.per_query,
                }
                for result in self.results
            ],
            "encoding": [asdict(encoding) for encoding in self.encodings],
            "warnings": list(self.warnings),
        }


def _parts(system: System) -> tuple[str | None, ...]:
    return system.model, system.lora, system.dtype, system.instruction


def summarise(experiment: Experiment, results: Sequence[SystemResult], encodings: Sequence[Encoding]) -> Summary:
    """Put results beside the first stage and the best possible order."""
    candidates = experiment.candidates
    first = experiment.metrics.per_query(candidates.rankings, candidates.qrels)
    best = experiment.metrics.per_query(best_order(candidates.rankings, candidates.qrels), candidates.qrels)
    warnings = list(candidates.warnings)
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
        data_digests(experiment),
        utc_now(),
        this_machine(),
        versions(),
    )
