"""The loss: the relevant passage first in its list, and `P(yes)` as before in meaning."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def list_loss(margins: torch.Tensor, answer: float) -> torch.Tensor:
    """Softmax cross-entropy over a list, plus binary cross-entropy of `P(yes)`.

    Relevant and irrelevant passages weigh the same in the second part, as they did when the models were trained, so
    that a score of 0.5 keeps its meaning.

    Args:
        margins: `z_yes - z_no`, shape `(passages,)`; the relevant passage is the first.
        answer: weight of the second part.
    """
    from torch.nn import functional

    ranking = -functional.log_softmax(margins, dim=0)[0]
    yes = functional.softplus(-margins[0]) + functional.softplus(margins[1:]).mean()
    return ranking + answer * 0.5 * yes
