"""What work costs on this machine, learned while it is done."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Literal, TypeAlias

from kalm_rag.utils import forks

Work: TypeAlias = Literal["encode", "prefill", "score"]
"""What a turn of the model is used for."""

_WINDOW = 64
"""The last steps of each kind that count: other programs come and go."""
SAFETY = 1.25
"""Times what the steps so far make likely."""


class Costs:
    """Seconds of a step by its size, as a fixed part and a part per token. Calls may come from any thread."""

    def __init__(self) -> None:
        self._lock = forks.Lock()  # of the next line
        self._seen: dict[Work, deque[tuple[float, float]]] = {}

    def learn(self, work: Work, size: float, seconds: float) -> None:
        """Take in a step.

        Args:
            work: its kind.
            size: tokens that it ran.
            seconds: that it took.
        """
        if size > 0 and math.isfinite(seconds):
            with self._lock:
                self._seen.setdefault(work, deque(maxlen=_WINDOW)).append((size, max(0.0, seconds)))

    def knows(self, work: Work) -> bool:
        """Whether any step of a kind was seen."""
        with self._lock:
            return work in self._seen

    def predict(self, sizes: Mapping[Work, float]) -> float:
        """Return the seconds of steps of these sizes, one of each kind; infinite where a kind is unknown."""
        return SAFETY * sum(self._one(work, size) for work, size in sizes.items() if size > 0)

    def _one(self, work: Work, size: float) -> float:
        with self._lock:
            seen = list(self._seen.get(work, ()))
        if not seen:
            return math.inf
        fixed, each = _line(seen)
        return fixed + each * size


def _line(points: list[tuple[float, float]]) -> tuple[float, float]:
    """Return the line through points by least squares, of which neither part is negative."""
    mean_size = sum(size for size, _ in points) / len(points)
    mean_seconds = sum(seconds for _, seconds in points) / len(points)
    spread = sum((size - mean_size) ** 2 for size, _ in points)
    together = sum((size - mean_size) * (seconds - mean_seconds) for size, seconds in points)
    each = together / spread if spread > 0 else 0.0
    fixed = mean_seconds - each * mean_size
    if each <= 0 or fixed < 0:  # equal sizes, or noise: all of the time is by token
        return 0.0, mean_seconds / mean_size
    return fixed, each
