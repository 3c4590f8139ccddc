"""What training asks of the model, from dense signals to the labels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from training.start import WIDTH
from training.teacher import WIDTH as TEACHER_WIDTH

SATURATION = 0.9
"""BM25's k1: how soon repetitions of a term stop counting."""


class Heads(nn.Module):
    """Linear readings of the model's states, for training alone."""

    def __init__(self) -> None:
        super().__init__()
        self.states = nn.Linear(WIDTH, TEACHER_WIDTH)
        self.query = nn.Linear(WIDTH, TEACHER_WIDTH)
        self.passage = nn.Linear(WIDTH, TEACHER_WIDTH)
        self.term = nn.Linear(WIDTH, 1)
        self.pair = nn.Linear(WIDTH, 2)


@dataclass(slots=True)
class Targets:
    """What is known of each row, that is of each (query, passage).

    Attributes:
        labels: 1 where the passage answers the query, shape `(rows,)`.
        terms: BM25's saturated count of each query token in the passage, in [0, 1), shape `(rows, query tokens)`.
        lexical: their mean weighted by inverse document frequency, shape `(rows,)`.
        cosine: the teacher's similarity, shape `(rows,)`.
        query: the teacher's unit vector of the query, shape `(rows, 384)`.
        passage: the teacher's unit vector of the passage, shape `(rows, 384)`.
        lists: rows that compete with one another, shape `(lists, candidates)`, -1 for none.
    """

    labels: Tensor
    terms: Tensor
    lexical: Tensor
    cosine: Tensor
    query: Tensor
    passage: Tensor
    lists: Tensor


def states_loss(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """One minus the cosine between the student's reading and the teacher's token states, and between their means.

    Args:
        student: shape `(batch, tokens, 384)`.
        teacher: the same shape.
        mask: 1 for tokens, shape `(batch, tokens)`.
    """
    weights = mask.float()
    tokens = 1.0 - functional.cosine_similarity(student, teacher, dim=-1)
    mean, wanted = ((states * weights[..., None]).sum(1) for states in (student, teacher))
    sentence = 1.0 - functional.cosine_similarity(mean, wanted, dim=-1)
    return (tokens * weights).sum() / weights.sum() + sentence.mean()


def soft_targets(targets: Targets, weights: tuple[float, float, float]) -> Tensor:
    """The distribution over each list's candidates that the student is to match.

    The teacher's cosine and the share of the query's terms found are right about different queries; the label
    decides between them.

    Returns:
        Probabilities of shape `(lists, candidates)`, 0 where there is no candidate.
    """
    cosine, lexical, label = weights
    raw = cosine * targets.cosine + lexical * targets.lexical + label * targets.labels
    return distribution(raw, targets.lists)


def distribution(values: Tensor, lists: Tensor) -> Tensor:
    """The softmax of the rows' values over each list, of shape `(lists, candidates)`; 0 where there is no candidate."""
    return torch.softmax(_listed(values, lists), dim=-1)


def _listed(values: Tensor, lists: Tensor) -> Tensor:
    return values[lists.clamp(min=0)].masked_fill(lists < 0, float("-inf"))


def ranking_loss(margins: Tensor, targets: Tensor, lists: Tensor) -> Tensor:
    """Cross-entropy between target and the student's distribution over each list."""
    student = torch.log_softmax(_listed(margins, lists), dim=-1).masked_fill(lists < 0, 0.0)
    return -(targets * student).sum(-1).mean()


def answer_loss(margins: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy of `P(yes)`, relevant and irrelevant passages weighing the same."""
    losses = functional.binary_cross_entropy_with_logits(margins, labels, reduction="none")
    positive = labels > 0
    return 0.5 * (losses[positive].mean() + losses[~positive].mean())


def dense_losses(heads: Heads, states: Tensor, last: Tensor, where: Tensor, present: Tensor, t: Targets) -> Tensor:
    """The dense signals: terms at the query's positions, vectors and similarities at the last one.

    Args:
        heads: the readings.
        states: states before the last decoder layer, shape `(rows, tokens, 256)`.
        last: final state of the last position, shape `(rows, 256)`.
        where: positions of the query tokens, shape `(rows, query tokens)`.
        present: which of them exist, same shape.
        t: what they should be.
    """
    rows = torch.arange(len(states), device=states.device)[:, None]
    terms = heads.term(states[rows, where]).squeeze(-1)
    squared = (terms - t.terms).square() * present
    pair = heads.pair(last)
    total: Tensor = (
        4.0 * squared.sum() / present.sum()
        + 4.0 * (pair[:, 0] - t.lexical).square().mean()
        + 4.0 * (pair[:, 1] - t.cosine).square().mean()
        + 0.5 * (1.0 - functional.cosine_similarity(heads.query(last), t.query, dim=-1)).mean()
        + 0.5 * (1.0 - functional.cosine_similarity(heads.passage(last), t.passage, dim=-1)).mean()
    )
    return total
