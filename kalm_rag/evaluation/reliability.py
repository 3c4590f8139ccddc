"""How scores compare with the share of candidates that is relevant, and the monotone fit from the one to the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from kalm_rag.errors import MissingExtraError
from kalm_rag.evaluation.judged_scores import Floats, JudgedScores, figure, resampled_sums, share
from kalm_rag.thresholds import Figure

_BINS = 10


@dataclass(frozen=True, slots=True)
class Bin:
    """Candidates whose scores are near each other.

    Attributes:
        count: how many.
        score: their mean score.
        relevant: the share of them that is relevant.
    """

    count: int
    score: float
    relevant: Figure


@dataclass(frozen=True, slots=True)
class Reliability:
    """The reliability curve of a score between 0 and 1.

    Attributes:
        bins: ten ranges of equal width at most, by rising score; those without a candidate are left out.
        error: the mean distance between score and share over the candidates (the expected calibration error).
    """

    bins: tuple[Bin, ...]
    error: float

    @classmethod
    def of(cls, judged: JudgedScores, scores: Floats) -> Reliability:
        """Compare the scores of candidates, between 0 and 1, with their judgements."""
        ranges = np.minimum((scores * _BINS).astype(np.int64), _BINS - 1)
        bins = []
        for number in np.unique(ranges):
            inside = ranges == number
            counts = judged.per_query(inside)
            sums = resampled_sums(np.stack([judged.per_query(inside & judged.relevant), counts], axis=1))
            relevant = figure(share(sums[:, 0], sums[:, 1]))
            if relevant is not None:
                bins.append(Bin(int(counts.sum()), float(scores[inside].mean()), relevant))
        distance = sum(item.count * abs(item.score - item.relevant.value) for item in bins)
        return cls(tuple(bins), distance / max(1, len(scores)))

    def as_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def check_fit() -> None:
    """Check that the package for the fit is installed.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    try:
        import sklearn.isotonic  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("scikit-learn", "eval") from error


def monotone_fit(judged: JudgedScores) -> tuple[tuple[float, float], ...]:
    """Fit the share of relevant candidates as a function of the margin that never falls (isotonic regression).

    Returns:
        Margins, rising, and shares; between them the function is linear, beyond them constant.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    check_fit()
    from sklearn.isotonic import IsotonicRegression

    fit = IsotonicRegression(y_min=0.0, y_max=1.0, out_of_bounds="clip").fit(judged.margins, judged.relevant)
    shares = np.maximum.accumulate(np.clip(fit.y_thresholds_, 0.0, 1.0))  # rounding may let neighbours fall
    return tuple(zip(map(float, fit.X_thresholds_), map(float, shares), strict=True))


def calibrated_scores(fit: Sequence[tuple[float, float]], margins: Floats) -> Floats:
    """Apply a fit to many margins, as `ThresholdProfile.calibrated` does to one."""
    places, shares = zip(*fit, strict=True)
    found: Floats = np.interp(margins, places, shares)
    return found
