"""Matryoshka embedding pooling (MEP): the mean over every `ratio` consecutive encoder states.

Source: arXiv 2606.22807, section 3 (compression ratios 1 to 32). A mean of means, weighted by how many tokens each
of them holds, is the mean itself: states kept at one ratio give every multiple of it exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_ALWAYS_WHOLE = 128


@dataclass(frozen=True, slots=True)
class PassageStates:
    """One encoded passage.

    Attributes:
        states: pooled encoder states, shape `(groups, width)` with `groups = ceil(tokens / ratio)`.
        tokens: tokens the encoder read, prefix included.
        ratio: tokens per group; the last group holds what is left.
        truncated: whether the passage was longer than `max_length` tokens.
    """

    states: torch.Tensor
    tokens: int
    ratio: int
    truncated: bool

    @property
    def nbytes(self) -> int:
        """Bytes of the states."""
        return int(self.states.numel() * self.states.element_size())

    def at(self, ratio: int) -> PassageStates:
        """The same passage at a coarser ratio.

        Raises:
            ValueError: `ratio` is not a multiple of this encoding's ratio.
        """
        if ratio == self.ratio:
            return self
        if ratio % self.ratio:
            msg = f"states kept at ratio {self.ratio} give its multiples, not ratio {ratio}"
            raise ValueError(msg)
        import torch

        starts = range(0, self.tokens, self.ratio)
        sizes = [min(self.ratio, self.tokens - start) for start in starts]
        weights = torch.tensor(sizes, dtype=torch.float32, device="cpu").to(self.states.device)
        merged = mean_groups(self.states, weights, ratio // self.ratio)
        return PassageStates(merged, self.tokens, ratio, self.truncated)


def mean_groups(rows: torch.Tensor, weights: torch.Tensor, count: int) -> torch.Tensor:
    """Weighted mean of every `count` consecutive rows.

    Args:
        rows: shape `(..., n, width)`.
        weights: how many tokens each row stands for, 0 for padding; float32, shape `(..., n)`.
        count: rows per group; the last group averages the rows it really has.

    Returns:
        Shape `(..., ceil(n / count), width)` in the dtype of `rows`; the arithmetic is float32. A group of padding
        only is zero.
    """
    if count == 1:
        return rows
    from torch.nn.functional import pad

    *batch, length, width = rows.shape
    # The memory this takes never depends on the ratio. At the ratios in use all groups of one size are summed alike,
    # however short the rows: a passage's numbers do not depend on the batch it is in.
    count = min(count, max(length, _ALWAYS_WHOLE))
    groups = -(-length // count)
    missing = groups * count - length
    weights = pad(weights, (0, missing)).view(*batch, groups, count)
    summands = pad(rows.float(), (0, 0, 0, missing)).view(*batch, groups, count, width) * weights[..., None]
    return (summands.sum(dim=-2) / weights.sum(dim=-1, keepdim=True).clamp(min=1)).to(rows.dtype)
