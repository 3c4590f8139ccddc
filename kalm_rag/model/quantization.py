"""Vectors in 8 or 4 bits with one scale each: a vector's largest number becomes 127 or 7."""

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


def pack_nibbles(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return numbers in 4 bits, two to a byte, and one float32 scale per vector of the last dimension.

    A vector is cut into quarters, and each 16-bit word holds one number of every quarter, the first one in the lowest
    bits: unpacking then writes four runs.

    Args:
        tensor: shape `(..., width)`; the width is a multiple of 4.

    Returns:
        uint8 of shape `(..., width / 2)`, and scales of shape `(..., 1)`.
    """
    import torch

    wide = tensor.float()
    scales = wide.abs().amax(dim=-1, keepdim=True) / 7
    numbers = torch.round(wide / scales.clamp(min=1e-30)).to(torch.int32) + 8
    words = torch.zeros_like(numbers[..., : numbers.shape[-1] // 4])
    for place, quarter in enumerate(numbers.chunk(4, dim=-1)):
        words |= quarter << 4 * place
    return words.to(torch.int16).view(torch.uint8), scales


def unpack_nibbles(packed: torch.Tensor, dtype: torch.dtype, room: torch.Tensor | None = None) -> torch.Tensor:
    """Return the numbers of `pack_nibbles` before scaling, -7 to 7.

    They are made by integer operations alone, because these are many times faster than conversions of bytes: a number
    put into the lowest bits of a float whose last bit counts 1 adds itself to that float.

    Args:
        packed: uint8 of shape `(..., width / 2)`.
        dtype: float32, bfloat16 or float16.
        room: `empty_words` of this shape and dtype, for reuse; what it was returned for before is overwritten.

    Returns:
        Shape `(..., width)`.
    """
    import torch

    # The bits of a number, and the number, whose last bit counts 1.
    bits, base = {
        torch.float32: (0x4B000000, 2**23),
        torch.bfloat16: (0x4300, 128),
        torch.float16: (0x6400, 1024),
    }[dtype]
    room = empty_words(packed, dtype) if room is None else room
    words = packed.view(torch.int16).to(room.dtype)
    for place in range(4):
        torch.bitwise_right_shift(words, 4 * place, out=room[..., place, :])
    found = room.bitwise_and_(15).bitwise_or_(bits).view(dtype).flatten(-2)
    return found.sub_(base + 8)


def empty_words(packed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return memory for what `unpack_nibbles` makes of such numbers."""
    import torch

    word = torch.int32 if dtype.itemsize == 4 else torch.int16
    return torch.empty(*packed.shape[:-1], 4, packed.shape[-1] // 2, dtype=word, device=packed.device)
