"""Ranking metrics by `ir_measures` (trec_eval's arithmetic) and a randomisation test by SciPy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kalm_rag.errors import MissingExtraError
from kalm_rag.evaluation.trec import Ranking

DEFAULT_METRICS = ("nDCG@10", "MRR@10", "R@10", "MAP")
_RESAMPLES = 9_999
_VALUES_AT_ONCE = 2_000_000
Qrels = Mapping[str, Mapping[str, int]]


class Metrics:
    """A choice of metrics, computed per query.

    Args:
        names: as `ir_measures` spells them, for example `nDCG@10`, `MRR@10`, `R@100`, `MAP`; case does not matter.
            Plots and tests use the first one.

    Raises:
        MissingExtraError: `ir_measures` is not installed.
        ValueError: a name is unknown, cannot be computed here, or names the same metric as another.
    """

    def __init__(self, names: Sequence[str] = DEFAULT_METRICS) -> None:
        try:
            import ir_measures
        except ImportError as error:
            raise MissingExtraError("ir-measures", "eval") from error
        if not names:
            msg = "metrics must name at least one metric, for example nDCG@10"
            raise ValueError(msg)
        self._library: Any = ir_measures
        self._measures: dict[str, Any] = {}
        for name in names:
            measure = self._parse(name)
            for other, known in self._measures.items():
                if known == measure:
                    msg = f"metrics must differ, but {other!r} and {name!r} are the same; drop one"
                    raise ValueError(msg)
            self._measures[name] = measure

    @property
    def names(self) -> list[str]:
        """The names, as given."""
        return list(self._measures)

    def _parse(self, name: str) -> Any:
        spellings = {known.lower(): known for known in self._library.measures.registry}
        base, at, rest = name.partition("@")
        try:
            measure = self._library.parse_measure(spellings.get(base.lower(), base) + at + rest)
        except (NameError, SyntaxError, TypeError, ValueError) as error:
            msg = f"unknown metric {name!r} ({error}); use for example nDCG@10, MRR@10, R@100, MAP or P@5"
            raise ValueError(msg) from None
        cutoff = measure.params.get("cutoff", 1)
        if cutoff < 1:  # a C library would end the process
            msg = f"the cutoff of a metric must be at least 1, got {name!r}"
            raise ValueError(msg)
        try:
            list(self._library.iter_calc([measure], {"q": {"p": 1}}, {"q": {"p": 1.0}}))
        except Exception as error:  # noqa: BLE001 - some measures need programs that are not installed
            msg = f"the metric {name!r} cannot be computed here ({type(error).__name__}); use for example nDCG@10"
            raise ValueError(msg) from None
        return measure

    def deepest(self) -> tuple[str, int]:
        """The metric with the largest cutoff, and that cutoff; 0 if none has one."""
        cutoffs = {name: int(measure.params.get("cutoff", 0)) for name, measure in self._measures.items()}
        name = max(cutoffs, key=cutoffs.__getitem__)
        return name, cutoffs[name]

    def per_query(self, rankings: Mapping[str, Ranking], qrels: Qrels) -> dict[str, dict[str, float]]:
        """Each metric of each query in `qrels`; a query without candidates has 0.

        The order of the candidates counts, not their scores, so that equal scores are not reordered.
        """
        run = {
            query: {passage: float(-place) for place, (passage, _) in enumerate(rankings.get(query, ()))}
            for query in qrels
        }
        found: dict[str, dict[str, float]] = {name: dict.fromkeys(qrels, 0.0) for name in self._measures}
        names = {measure: name for name, measure in self._measures.items()}
        judged = {query: dict(values) for query, values in qrels.items()}
        for metric in self._library.iter_calc(list(names), judged, {q: r for q, r in run.items() if r}):
            found[names[metric.measure]][metric.query_id] = float(metric.value)
        return found


def means(per_query: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The mean of each metric over the queries."""
    return {name: sum(values.values()) / len(values) for name, values in per_query.items()}


def best_order(rankings: Mapping[str, Ranking], qrels: Qrels) -> dict[str, list[tuple[str, float]]]:
    """Return the ideal order: the same candidates sorted by their judgements."""
    return {
        query: sorted(ranking, key=lambda item: -qrels[query].get(item[0], 0)) for query, ranking in rankings.items()
    }


def p_value(new: Mapping[str, float], old: Mapping[str, float]) -> float:
    """Two-sided paired randomisation test (Fisher) of the difference in means.

    9,999 sign flips with a fixed seed, or all of them where there are fewer (13 queries or less).

    Source: Smucker, Allan and Carterette, CIKM 2007, who recommend it over the sign and Wilcoxon tests.
    """
    try:
        from scipy import stats
    except ImportError as error:
        raise MissingExtraError("scipy", "eval") from error
    import numpy as np

    differences = np.array([new[query] - old[query] for query in old])
    if len(differences) < 2 or not differences.any():
        return 1.0
    made = stats.permutation_test(
        (differences,),
        np.mean,
        permutation_type="samples",
        vectorized=True,
        n_resamples=_RESAMPLES,
        batch=max(1, _VALUES_AT_ONCE // len(differences)),
        rng=np.random.default_rng(0),
    )
    return float(made.pvalue)


def difference_interval(new: Mapping[str, float], old: Mapping[str, float]) -> tuple[float, float]:
    """95 % interval of the difference in means by the paired bootstrap: 9,999 resamples of the queries, a fixed seed.

    With few queries it is too narrow: read it together with `p_value`.
    """
    import numpy as np

    differences = np.array([new[query] - old[query] for query in old])
    rng = np.random.default_rng(0)
    at_once = max(1, _VALUES_AT_ONCE // len(differences))
    found: list[Any] = []
    for start in range(0, _RESAMPLES, at_once):
        shape = (min(at_once, _RESAMPLES - start), len(differences))
        found.append(differences[rng.integers(len(differences), size=shape)].mean(axis=1))
    low, high = np.quantile(np.concatenate(found), (0.025, 0.975))
    return float(low), float(high)
