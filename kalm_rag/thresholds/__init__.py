"""Score thresholds: numbers, and profiles that were chosen on judged queries and say for which model they hold.

`kalm_rag.evaluation` makes profiles; reading and applying one needs no extra.
"""

from kalm_rag.thresholds.aim import Aim
from kalm_rag.thresholds.limit import Limit, ThresholdLike, check_threshold, read_limit
from kalm_rag.thresholds.profile import ThresholdProfile
from kalm_rag.thresholds.records import MEASURES, Figure, Figures, Scope

__all__ = [
    "MEASURES",
    "Aim",
    "Figure",
    "Figures",
    "Limit",
    "Scope",
    "ThresholdLike",
    "ThresholdProfile",
    "check_threshold",
    "read_limit",
]
