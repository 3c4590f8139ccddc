"""A moving average of the weights, which is what is measured and saved."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor


class Average:
    """The exponential moving average of some weights.

    Args:
        weights: by name. They are changed while the average stands in for them only.
        stays: share of the average that stays at each step; 0 is the weights themselves. It rises to that during the
            first steps, so that the weights at the start are soon forgotten.

    Attributes:
        tensors: the average, by the same names.
    """

    def __init__(self, weights: Mapping[str, Tensor], stays: float) -> None:
        self._weights, self._stays = weights, stays
        self.tensors = {name: weight.detach().clone() for name, weight in weights.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after a step, counted from 0."""
        stays = min(self._stays, (1 + step) / (10 + step))
        for name, weight in self._weights.items():
            self.tensors[name].lerp_(weight, 1.0 - stays)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Put the average in the place of the weights; afterwards the weights are as they were."""
        held = {name: weight.detach().clone() for name, weight in self._weights.items()}
        try:
            copy_into(self._weights, self.tensors)
            yield
        finally:
            copy_into(self._weights, held)


@torch.no_grad()
def copy_into(weights: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Set weights to other values, by name."""
    for name, weight in weights.items():
        weight.copy_(tensors[name])
