"""What a margin says."""

from __future__ import annotations

import math


def probability(margin: float) -> float:
    """`P(yes)` of a margin: the softmax over the logits of `yes` and `no` is the sigmoid of their difference."""
    if margin >= 0:
        return 1.0 / (1.0 + math.exp(-margin))
    return math.exp(margin) / (1.0 + math.exp(margin))
