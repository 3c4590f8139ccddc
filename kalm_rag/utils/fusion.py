"""Joins a reranker's margins with other scores of the same candidates. This module knows numbers only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from kalm_rag.utils.checks import check_choice, check_finite, check_share

Fusion = Literal["weighted", "rrf"]
RRF_CONSTANT = 60
"""As in the method's paper: Cormack, Clarke and Buettcher, SIGIR 2009."""


@dataclass(frozen=True, slots=True)
class FirstStage:
    """The first stage's scores of the passages that `rank` is given, and how they are joined with the margins.

    Attributes:
        scores: one number per passage, in the order of the passages; a higher score is better. They are copied.
        fusion: `weighted` scales margins and scores to 0 to 1 within the call and takes their weighted mean; `rrf`
            (reciprocal-rank fusion) adds 1 / (60 + rank) of both orders, and ignores how far scores are apart.
        weight: of the margins in `weighted`, between 0 (the first stage alone) and 1 (the reranker alone).

    Raises:
        TypeError, ValueError: a value is wrong; the message names it and the rule.
    """

    scores: Sequence[float]
    fusion: Fusion = "weighted"
    weight: float = 0.5

    def __post_init__(self) -> None:
        check_choice("fusion", self.fusion, get_args(Fusion))
        scores = tuple(check_finite(f"scores[{place}]", score) for place, score in enumerate(self.scores))
        object.__setattr__(self, "scores", scores)
        object.__setattr__(self, "weight", check_share("weight", self.weight))

    def check(self, count: int) -> None:
        """Raise if there is not one score for each of `count` passages."""
        if len(self.scores) != count:
            msg = f"first_stage must hold one score per passage, got {len(self.scores)} scores for {count} passages"
            raise ValueError(msg)

    def of(self, places: Sequence[int]) -> FirstStage:
        """Return the same for some of the passages."""
        return replace(self, scores=[self.scores[place] for place in places])

    def fused(self, margins: Sequence[float]) -> list[float]:
        """Return the joined score of each passage, in the order given."""
        if self.fusion == "rrf":
            return reciprocal_ranks([margins, self.scores])
        scaled = zip(_scaled(margins), _scaled(self.scores), strict=True)
        return [self.weight * margin + (1 - self.weight) * score for margin, score in scaled]


def reciprocal_ranks(scores: Sequence[Sequence[float]], k: int = RRF_CONSTANT) -> list[float]:
    """Return each candidate's sum of 1 / (k + rank) over several orders.

    Args:
        scores: for each order, one number per candidate, higher is better; equal ones share the best rank.
        k: the method's constant, at least 0.
    """
    return [sum(1 / (k + rank) for rank in ranks) for ranks in zip(*map(_ranks, scores), strict=True)]


def best_first(margins: Sequence[float], first_stage: FirstStage | None) -> list[tuple[int, float | None]]:
    """Return the position and the joined score of each passage, best first; equal ones keep their order.

    Args:
        margins: of the passages.
        first_stage: None orders by margins, and there are no joined scores.
    """
    if first_stage is None:
        return [(place, None) for place in sorted(range(len(margins)), key=lambda place: -margins[place])]
    fused = first_stage.fused(margins)
    return [(place, fused[place]) for place in sorted(range(len(fused)), key=lambda place: -fused[place])]


def _scaled(values: Sequence[float]) -> list[float]:
    """Map the lowest value to 0 and the highest to 1; equal values are all 0."""
    if not values:
        return []
    # Halved, because the distance of two finite numbers may be infinite.
    low, width = min(values) / 2, max(values) / 2 - min(values) / 2
    return [(value / 2 - low) / width if width else 0.0 for value in values]


def _ranks(values: Sequence[float]) -> list[int]:
    """Return the rank of each value from 1, the highest first; equal values share the best rank."""
    ranks: dict[float, int] = {}
    for rank, value in enumerate(sorted(values, reverse=True), start=1):
        ranks.setdefault(value, rank)
    return [ranks[value] for value in values]
