"""One pair and what it scored."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kalm_rag.errors import ScoringError
from kalm_rag.model.prompts import Prompt
from kalm_rag.utils.margins import probability
from kalm_rag.utils.progress import Progress
from kalm_rag.windows.splitter import Span

if TYPE_CHECKING:
    import torch


@dataclass(slots=True)
class Score:
    """One pair and what it scored.

    Attributes:
        prompt: the query as the decoder reads it.
        passage: the passage, cleaned.
        margin: `z_yes - z_no`.
        passage_truncated: whether a part of the passage was not read.
        exact: False for a margin of a first pass.
        reached: False if a limit ended the call before the pair was scored.
        span: the window that the score is of, in the passage as it was given; None if the passage was not split.
    """

    prompt: Prompt
    passage: str
    margin: float = math.nan
    passage_truncated: bool = False
    exact: bool = True
    span: Span | None = None
    reached: bool = True

    def reach(self, margin: float, *, truncated: bool) -> None:
        """Fill in what was found."""
        self.margin, self.passage_truncated, self.exact, self.reached = margin, truncated, True, True

    @property
    def probability(self) -> float:
        """`P(yes)`, between 0 and 1."""
        return probability(self.margin)


def passages_of(scores: Sequence[Score]) -> list[str]:
    """Return the distinct passages of pairs."""
    return list(dict.fromkeys(score.passage for score in scores))


def recall(
    scores: Sequence[Score], known: Sequence[tuple[float, bool] | None], progress: Progress | None
) -> list[Score]:
    """Fill in the scores that are remembered; returns those left to score."""
    left = []
    for score, found in zip(scores, known, strict=True):
        if found is None:
            left.append(score)
        else:
            score.margin, score.passage_truncated = found
    if progress is not None:
        progress.advance(len(scores) - len(left))
    return left


def check_finite(scores: Sequence[Score], dtype: torch.dtype) -> None:
    """Raise `ScoringError` if a margin is not finite."""
    bad = sum(not math.isfinite(score.margin) for score in scores)
    if bad:
        msg = (
            f"the model gave non-finite logits for {bad} of {len(scores)} passages in {dtype}: "
            "use dtype='bfloat16' or dtype='float32' (float16 overflows), and check the checkpoint if it persists"
        )
        raise ScoringError(msg)
