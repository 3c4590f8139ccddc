"""Vectors in 8 bits with one scale each: a vector's largest number becomes 127."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def quantize(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Int8 numbers, and one float32 scale per vector of the last dimension, which is kept with size 1."""
    import torch

    scales = tensor.float().abs().amax(dim=-1, keepdim=True) / 127
    return torch.round(tensor.float() / scales.clamp(min=1e-30)).to(torch.int8), scales


def dequantize(numbers: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The vectors in float32."""
    return numbers.float() * scales
