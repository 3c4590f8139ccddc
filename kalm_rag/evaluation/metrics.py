"""Ranking metrics by `ir_measures` (trec_eval's arithmetic), a test by SciPy, and bootstrap intervals."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kalm_rag.errors import MissingExtraError
from kalm_rag.evaluation.trec import Ranking

if TYPE_CHECKING:
    import numpy as np

DEFAULT_METRICS = ("nDCG@10", "MRR@10", "R@10", "MAP")
RESAMPLES = 9_999
"""Sign flips of a test, and resamples of an interval."""
_BUDGET = re.compile(r"r(?:ecall)?@([0-9]+)t", re.IGNORECASE)
_VALUES_AT_ONCE = 2_000_000
Qrels = Mapping[str, Mapping[str, int]]


class Metrics:
    """A choice of metrics, computed per query.

    Args:
        names: as `ir_measures` spells them, for example `nDCG@10`, `MRR@10`, `R@100`, `MAP`; case does not matter.
            Plots and tests use the first one. `R@2000t` is the share of a query's relevant passages that fit into the
            first 2,000 tokens: passages are taken in order, and the first one that does not fit whole ends the count.

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
            budget = _BUDGET.fullmatch(name)
            measure = self._parse(name) if budget is None else _budget(name, budget[1])
            for other, known in self._measures.items():
                if known == measure:
                    msg = f"metrics must differ, but {other!r} and {name!r} are the same; drop one"
                    raise ValueError(msg)
            self._measures[name] = measure

    @property
    def names(self) -> list[str]:
        """The names, as given."""
        return list(self._measures)

    @property
    def needs_tokens(self) -> bool:
        """Whether a metric has a budget of tokens, so that `per_query` needs to know those of passages."""
        return any(isinstance(measure, int) for measure in self._measures.values())

    def _parse(self, name: str) -> Any:
        spellings = {known.lower(): known for known in self._library.measures.registry}
        base, at, rest = name.partition("@")
        try:
            measure = self._library.parse_measure(spellings.get(base.lower(), base) + at + rest)
        except (NameError, SyntaxError, TypeError, ValueError) as error:
            msg = f"unknown metric {name!r} ({error}); use for example nDCG@10, MRR@10, R@100, R@2000t, MAP or P@5"
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
        cutoffs = {
            name: 0 if isinstance(measure, int) else int(measure.params.get("cutoff", 0))
            for name, measure in self._measures.items()
        }
        name = max(cutoffs, key=cutoffs.__getitem__)
        return name, cutoffs[name]

    def per_query(
        self, rankings: Mapping[str, Ranking], qrels: Qrels, tokens: Mapping[str, int] | None = None
    ) -> dict[str, dict[str, float]]:
        """Each metric of each query in `qrels`; a query without candidates has 0.

        The order of the candidates counts, not their scores, so that equal scores are not reordered.

        Args:
            rankings: query id to passages, best first.
            qrels: judgements.
            tokens: passage id to its tokens, needed if `needs_tokens`.

        Raises:
            ValueError: a metric has a budget of tokens, and those of a ranked passage are not given.
        """
        run = {
            query: {passage: float(-place) for place, (passage, _) in enumerate(rankings.get(query, ()))}
            for query in qrels
        }
        found: dict[str, dict[str, float]] = {name: dict.fromkeys(qrels, 0.0) for name in self._measures}
        names = {measure: name for name, measure in self._measures.items() if not isinstance(measure, int)}
        judged = {query: dict(values) for query, values in qrels.items()}
        # The library fails without a metric.
        computed = self._library.iter_calc(list(names), judged, {q: r for q, r in run.items() if r}) if names else ()
        for metric in computed:
            found[names[metric.measure]][metric.query_id] = float(metric.value)
        for name, budget in self._measures.items():
            if isinstance(budget, int):
                for query, values in qrels.items():
                    found[name][query] = _within(budget, rankings.get(query, ()), values, tokens or {})
        return found


def _budget(name: str, tokens: str) -> int:
    if int(tokens) < 1:
        msg = f"the token budget of a metric must be at least 1, got {name!r}"
        raise ValueError(msg)
    return int(tokens)


def _within(budget: int, ranking: Ranking, judged: Mapping[str, int], tokens: Mapping[str, int]) -> float:
    """Return the share of the relevant passages that come before the first one that does not fit."""
    relevant = sum(value > 0 for value in judged.values())
    found = 0
    for passage, _ in ranking:
        if passage not in tokens:
            msg = f"the tokens of passage {passage!r} must be given for a metric with a token budget"
            raise ValueError(msg)
        budget -= tokens[passage]
        if budget < 0:
            break
        found += judged.get(passage, 0) > 0
    return found / relevant if relevant else 0.0


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
        n_resamples=RESAMPLES,
        batch=max(1, _VALUES_AT_ONCE // len(differences)),
        rng=np.random.default_rng(0),
    )
    return float(made.pvalue)


def holm(values: Sequence[float]) -> list[float]:
    """Correct p-values for their number by Holm's step-down method.

    It bounds the probability of any false difference among all comparisons, whatever their dependence.

    Source: Holm, Scandinavian Journal of Statistics 6 (1979).
    """
    corrected = [1.0] * len(values)
    highest = 0.0
    for done, place in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        highest = max(highest, min(1.0, (len(values) - done) * values[place]))
        corrected[place] = highest
    return corrected


def difference_interval(new: Mapping[str, float], old: Mapping[str, float]) -> tuple[float, float]:
    """95 % interval of the difference in means by the paired bootstrap: 9,999 resamples of the queries, a fixed seed.

    With few queries it is too narrow: read it together with `p_value`.
    """
    [interval] = mean_intervals([[new[query] - old[query] for query in old]])
    return interval


def mean_intervals(columns: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
    """95 % intervals of means by the bootstrap: 9,999 resamples of the queries, a fixed seed.

    Args:
        columns: each the values of the same queries in the same order. All columns share the resamples.

    Returns:
        Lower and upper end for each column; with one query both are its value.
    """
    import numpy as np

    if not columns:
        return []
    values = np.array(columns, dtype=np.float64).T
    drawn = [counts @ values / len(values) for counts in _resamples(len(values))]
    ends = np.quantile(np.concatenate(drawn), (0.025, 0.975), axis=0)
    return [(float(low), float(high)) for low, high in ends.T]


def _resamples(count: int) -> Iterator[np.ndarray[Any, Any]]:
    """Yield how often each of `count` queries is drawn, a row a resample."""
    import numpy as np

    rng = np.random.default_rng(0)
    at_once = max(1, _VALUES_AT_ONCE // count)
    for start in range(0, RESAMPLES, at_once):
        rows = min(at_once, RESAMPLES - start)
        drawn = rng.integers(count, size=(rows, count)) + count * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * count).reshape(rows, count).astype(np.float64)


def median_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % interval of the median by the bootstrap, as `mean_intervals`; None without values."""
    import numpy as np

    if not values:
        return None
    given, rng = np.array(values), np.random.default_rng(0)
    at_once = max(1, _VALUES_AT_ONCE // len(given))
    drawn = []
    for start in range(0, RESAMPLES, at_once):
        shape = (min(at_once, RESAMPLES - start), len(given))
        drawn.append(np.median(given[rng.integers(len(given), size=shape)], axis=1))
    low, high = np.quantile(np.concatenate(drawn), (0.025, 0.975))
    return float(low), float(high)
