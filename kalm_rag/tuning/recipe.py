"""Everything that decides the result of a tuning besides data and model."""

from __future__ import annotations

import numbers
from dataclasses import dataclass

from kalm_rag.utils.checks import check_positive, check_ratio


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to tune. The defaults are what `benchmarks/tuning.py` measures.

    Attributes:
        ratios: compression ratios to train at. Half of the lists are scored at the first one, the others take turns.
        list_size: passages of a list: one that is relevant, and hard negatives.
        lists_per_step: lists whose gradients are summed for one step.
        epochs: passes over the training queries at most; early stopping may end sooner.
        rate: highest learning rate.
        rank: of the adapter's matrices.
        alpha: the adapter's product is multiplied by `alpha / rank`.
        answer: weight of the binary cross-entropy of `P(yes)`, which keeps the score's meaning.
        warmup: steps until the learning rate is at its highest; it falls linearly from there to 0.
        patience: how many times in a row the validation loss may fail to improve before training stops.
        negatives: best passages of the first stage that negatives are drawn from.
        depth: passages of the first stage that are reranked to measure.
        test: share of the queries that measure the result, and are used for nothing else.
        validation: share of the other queries that decides when to stop.
        seed: of the split, the batches and the adapter's first weights.

    Raises:
        TypeError, ValueError: a field is wrong; the message names it, its value and the rule.
    """

    ratios: tuple[int, ...] = (4, 8, 16, 32)
    list_size: int = 8
    lists_per_step: int = 8
    epochs: int = 2
    rate: float = 1.0e-3
    rank: int = 16
    alpha: int = 32
    answer: float = 0.3
    warmup: int = 20
    patience: int = 4
    negatives: int = 30
    depth: int = 50
    test: float = 0.25
    validation: float = 0.15
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.ratios:
            msg = "ratios must name at least one compression ratio, got none; (4, 8, 16, 32) is the default"
            raise ValueError(msg)
        checked: dict[str, object] = {"ratios": tuple(check_ratio("ratios", ratio) for ratio in self.ratios)}
        counts = ("lists_per_step", "epochs", "rank", "alpha", "warmup", "patience", "negatives", "depth")
        for name in (*counts, "list_size"):
            checked[name] = check_positive(name, getattr(self, name))
        if self.list_size < 2:
            msg = f"list_size must be at least 2 (a relevant passage and a negative), got {self.list_size}"
            raise ValueError(msg)
        for name in ("rate", "answer", "test", "validation"):
            value = getattr(self, name)
            is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
            if not (is_number and 0 < value < 1):
                msg = f"{name} must be a number above 0 and below 1, got {value!r}"
                raise ValueError(msg)
            checked[name] = float(value)
        if isinstance(self.seed, bool) or not isinstance(self.seed, numbers.Integral):
            msg = f"seed must be an integer, got {self.seed!r}"
            raise TypeError(msg)
        checked["seed"] = int(self.seed)
        for name, found in checked.items():
            object.__setattr__(self, name, found)  # frozen, and a number may have come as one of numpy's
