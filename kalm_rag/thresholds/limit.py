"""What a call does with a threshold: which passages stay, and which score they show."""

from __future__ import annotations

import contextlib
import numbers
from pathlib import Path
from typing import NamedTuple, TypeAlias

from kalm_rag.thresholds.profile import ThresholdProfile
from kalm_rag.utils.checks import check_flag, check_share
from kalm_rag.utils.margins import probability
from kalm_rag.utils.paths import user_path
from kalm_rag.utils.refining import Wanted

ThresholdLike: TypeAlias = float | str | Path | ThresholdProfile
"""A threshold: `P(yes)`, a profile, or the path of one."""


class Limit(NamedTuple):
    """The threshold of a call.

    Attributes:
        score: passages with a lower `P(yes)` are left out; None for none, or if there is a profile.
        profile: says which margins stay.
        calibrated: whether scores are mapped through the profile's fit.
    """

    score: float | None = None
    profile: ThresholdProfile | None = None
    calibrated: bool = False

    def wanted(self, top_k: int | None) -> Wanted:
        """Return what a call wants that returns at most `top_k` passages."""
        return Wanted(top_k, self.score, margin=None if self.profile is None else self.profile.margin)

    def shown(self, margin: float) -> float:
        """Return the score that a passage of this margin shows."""
        if self.calibrated and self.profile is not None:
            return self.profile.calibrated(margin)
        return probability(margin)


def check_threshold(name: str, value: object) -> float | ThresholdProfile:
    """Return a number between 0 and 1, or a profile: the one given, or the one in the file that is named.

    Raises:
        TypeError, ValueError: it is none of these, or the file is not a valid profile.
    """
    if isinstance(value, ThresholdProfile):
        return value
    if isinstance(value, (str, Path)):
        return _read(name, value)
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        msg = f"{name} must be a number between 0 and 1, got {value!r:.80}; or a threshold profile, or its path"
        raise TypeError(msg)
    return check_share(name, value)


def _read(name: str, value: str | Path) -> ThresholdProfile:
    file = user_path(value, name)
    if not file.is_file():
        why = "and there is no such file"
        with contextlib.suppress(ValueError):
            why = f"which is a text: give the number {float(str(value))}"
        msg = f"{name} must be a number between 0 and 1 or the path of a threshold profile, got {str(value)!r}, {why}"
        raise ValueError(msg)
    return ThresholdProfile.load(file)


def read_limit(threshold: object, calibrated: object) -> Limit:
    """Check the two arguments of a call.

    Raises:
        TypeError, ValueError: the threshold is wrong, or scores cannot be calibrated without a profile.
    """
    mapped = check_flag("calibrated", calibrated)
    found = None if threshold is None else check_threshold("threshold", threshold)
    if isinstance(found, ThresholdProfile):
        return Limit(profile=found, calibrated=mapped)
    if mapped:
        msg = (
            f"calibrated=True needs a threshold profile, whose fit it maps scores through, got threshold={found!r}; "
            "make one with `kalm-rag eval --calibrate` and give it, or its path, as the threshold"
        )
        raise ValueError(msg)
    return Limit(found)
