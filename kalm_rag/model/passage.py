"""A passage as the decoder reads it: keys and values of every layer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kalm_rag.model.quantization import quantize

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class PassageKV:
    """Keys and values of one passage behind one prompt prefix.

    Attributes:
        key_values: shape `(2, layers, kv_heads, positions, head_dim)`, keys first; the positions are those of the
            prompt's prefix, then the passage's groups. In int8 with `scales`.
        scales: with int8, one float32 per vector, shape `(2, layers, kv_heads, positions, 1)`; else None.
        tokens: tokens of the passage that the encoder read.
        ratio: of the pooled states.
        truncated: whether the passage was longer than `max_length` tokens.
    """

    key_values: torch.Tensor
    scales: torch.Tensor | None
    tokens: int
    ratio: int
    truncated: bool

    @property
    def positions(self) -> int:
        """Number of positions that a query attends to besides its own."""
        return int(self.key_values.shape[3])

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        parts = [self.key_values] if self.scales is None else [self.key_values, self.scales]
        return sum(int(part.numel() * part.element_size()) for part in parts)

    def quantized(self) -> PassageKV:
        """Return the same in 8 bits: the largest number of each vector becomes 127."""
        small, scales = quantize(self.key_values)
        return replace(self, key_values=small, scales=scales)
