"""What tuning gained on queries that it never saw, and whether that is more than noise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from kalm_rag.evaluation.experiment import Experiment, evaluate
from kalm_rag.evaluation.metrics import difference_interval, means, p_value
from kalm_rag.evaluation.systems import System
from kalm_rag.utils.display import Shown

METRIC = "nDCG@10"


@dataclass(frozen=True, slots=True)
class Comparison:
    """One compression ratio before and after tuning, on the held-out queries.

    Attributes:
        ratio: the compression ratio.
        queries: how many there are.
        first: mean nDCG@10 of the first stage.
        before: of the model as it was.
        after: of the tuned model.
        low, high: 95 % interval of `after - before`, paired bootstrap over the queries.
        p: two-sided p-value of `after - before`, paired randomisation test.
    """

    ratio: int
    queries: int
    first: float
    before: float
    after: float
    low: float
    high: float
    p: float

    @property
    def difference(self) -> float:
        """`after - before`."""
        return self.after - self.before

    @property
    def verdict(self) -> str:
        """`gain` or `loss`, if both interval and test say so; otherwise the difference may be noise."""
        if self.p < 0.05 and self.low > 0:
            return "gain"
        if self.p < 0.05 and self.high < 0:
            return "loss"
        return "within the noise"

    def as_json(self) -> dict[str, Any]:
        """Return everything, for JSON."""
        return {**asdict(self), "difference": self.difference, "verdict": self.verdict}


@dataclass(slots=True, repr=False)
class Tuned(Shown):
    """The result of a tuning.

    Attributes:
        folder: holds the adapter, for `KaLMReranker(lora=...)`; None if no step made the model better on the validation
            queries, and only the report was written.
        comparisons: one per ratio that was measured.
        steps: steps done.
        best_step: step whose adapter was kept.
        losses: `(step, training loss)`.
        validation: `(step, validation loss)`; step 0 is the model as it was.
        ended: why training ended.
        queries: how many train, decide when to stop, and measure.
        encoded: passages that had to be encoded; the cache held the others.
        estimate: seconds that training was said to take at most.
        seconds: seconds that training took.
        warnings: what was odd about the judgements.
        owner: digest of the model, the judgements and the recipe.
    """

    folder: Path | None
    comparisons: list[Comparison]
    steps: int
    best_step: int
    losses: list[tuple[int, float]]
    validation: list[tuple[int, float]]
    ended: str
    queries: tuple[int, int, int]
    encoded: int
    estimate: float
    seconds: float
    warnings: list[str] = field(default_factory=list)
    owner: str = ""

    def columns(self) -> tuple[list[str], list[list[str]]]:
        """Heading and rows of the table of the held-out queries."""
        rows = [
            [
                str(one.ratio),
                f"{one.first:.4f}",
                f"{one.before:.4f}",
                f"{one.after:.4f}",
                f"{one.difference:+.4f}",
                f"{one.low:+.4f} to {one.high:+.4f}",
                "<0.001" if one.p < 0.001 else f"{one.p:.3f}",
                one.verdict,
            ]
            for one in self.comparisons
        ]
        return ["ratio", "BM25", "before", "after", "change", "95 % interval", "p", "verdict"], rows

    def as_json(self) -> dict[str, Any]:
        """Return everything, for JSON; a number that is NaN or infinite, which JSON lacks, is None."""
        found = {name: getattr(self, name) for name in self.__dataclass_fields__}
        found["folder"] = None if self.folder is None else str(self.folder)
        found["comparisons"] = [one.as_json() for one in self.comparisons]
        return {name: _finite(value) for name, value in found.items()}


def _finite(value: Any) -> Any:
    """Replace NaN and infinity in lists and mappings by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    return [_finite(part) for part in value] if isinstance(value, (list, tuple)) else value


def compare(experiment: Experiment, tuned: Sequence[System]) -> list[Comparison]:
    """Rerank with each system before and after tuning, and compare query by query.

    Args:
        experiment: the held-out queries, and the systems before.
        tuned: the same systems after, in the same order.
    """
    plain = list(experiment.systems)
    results, _ = evaluate(replace(experiment, systems=[*plain, *tuned]))
    found = {result.system: result.per_query[METRIC] for result in results}
    candidates = experiment.candidates
    first = experiment.metrics.per_query(candidates.rankings, candidates.qrels)[METRIC]
    return [_compared(old.ratio, first, found[old], found[new]) for old, new in zip(plain, tuned, strict=True)]


def _compared(
    ratio: int, first: Mapping[str, float], before: Mapping[str, float], after: Mapping[str, float]
) -> Comparison:
    mean = means({"first": first, "before": before, "after": after})
    low, high = difference_interval(after, before)
    return Comparison(
        ratio, len(first), mean["first"], mean["before"], mean["after"], low, high, p_value(after, before)
    )
