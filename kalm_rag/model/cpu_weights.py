"""Matrices laid out for oneDNN, in several precisions, behind one interface."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

_KERNELS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128", "LRU_CACHE_CAPACITY": "8"}
"""Compiled kernels that oneDNN keeps in the process, and that torch keeps of them in each thread; 1,024 by default.

A kernel is for one number of rows and takes 0.6 MB, and hardly two batches have the same number: with the defaults a
process grows by 600 MB, and by as much again for each thread that encodes, to save 0.6 ms a kernel. The layers of one
batch find theirs among 8.
"""
for _name, _number in _KERNELS.items():
    # Here, since both are read when the first matrix is laid out.
    os.environ.setdefault(_name, _number)

_ROWS = 512
"""For how many rows oneDNN lays out a matrix; it multiplies any number of them."""

_TINY = torch.finfo(torch.float32).tiny


class PackedWeight:
    """A matrix laid out for oneDNN, in the dtype of its weight.

    Args:
        linear: a layer without a bias; its weight has shape `(outputs, inputs)`.

    Attributes:
        tolerance: how far a product may be from torch's on random input, in parts of the largest number.
    """

    key_name = "Matrix"
    """Part of the cache's keys for what it computes, so it must not change."""

    def __init__(self, linear: nn.Linear) -> None:
        self.tolerance = 1e-5 if linear.weight.dtype == torch.float32 else 2e-2
        self._packed = self._pack(linear.weight.detach())

    def _pack(self, weight: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS)
        return found

    def input(self, data: torch.Tensor) -> Any:
        """Prepare an input for products with one or more matrices."""
        return data

    def product(self, data: Any) -> torch.Tensor:
        """`data @ weight.T`."""
        found: torch.Tensor = torch.ops.mkldnn._linear_pointwise(data, self._packed, None, "none", [], "")
        return found

    def gelu(self, data: Any) -> torch.Tensor:
        """`gelu(data @ weight.T)` in its tanh approximation."""
        found: torch.Tensor = torch.ops.mkldnn._linear_pointwise(data, self._packed, None, "gelu", [], "tanh")
        return found

    def gated(self, data: Any, gate: torch.Tensor) -> torch.Tensor:
        """`data @ weight.T * gate`."""
        found: torch.Tensor = torch.ops.mkldnn._linear_pointwise.binary(data, gate, self._packed, None, "mul")
        return found


class BFloat16Weight(PackedWeight):
    """A matrix in bfloat16, for input and output in float32."""

    key_name = "NarrowMatrix"

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self.tolerance = 2e-2

    def _pack(self, weight: torch.Tensor) -> torch.Tensor:
        return super()._pack(weight.bfloat16())

    def input(self, data: torch.Tensor) -> Any:
        """The input in bfloat16."""
        return data.bfloat16()

    def product(self, data: Any) -> torch.Tensor:
        """`data @ weight.T`."""
        return super().product(data).float()


class WidenedWeight:
    """A matrix kept in bfloat16 and multiplied in float32, for a CPU that multiplies bfloat16 slowly.

    It is brought to float32 at each use: compared with the product that costs little, and it takes half the memory.

    Args:
        linear: the layer.

    Attributes:
        tolerance: as of `PackedWeight`; the original is in float32 as well.
    """

    tolerance = 1e-5

    def __init__(self, linear: nn.Linear) -> None:
        self._weight = linear.weight.detach()
        self._bias = None if linear.bias is None else linear.bias.detach().float()

    def input(self, data: torch.Tensor) -> torch.Tensor:
        """The input as it is, in float32."""
        return data

    def product(self, data: torch.Tensor) -> torch.Tensor:
        """`data @ weight.T`, and a bias if there is one, in float32."""
        return nn.functional.linear(data, self._weight.float(), self._bias)


class Int8Weight:
    """A matrix in 8 bits, with one scale per output. Input is brought to 8 bits as it comes, with one scale for all.

    A row's result depends a little on what shares its batch.

    Args:
        linear: a layer without a bias; its weight has shape `(outputs, inputs)`.

    Attributes:
        tolerance: as of `PackedWeight`.
    """

    tolerance = 0.1

    def __init__(self, linear: nn.Linear) -> None:
        weight = linear.weight.detach().float()
        self._scales = weight.abs().amax(dim=1).clamp_min(_TINY) / 127
        rounded = (weight / self._scales[:, None]).round().to(torch.int8)
        self._packed = torch.ops.onednn.qlinear_prepack(rounded, [_ROWS, weight.shape[1]])
        self._zeros = torch.zeros(len(weight), dtype=torch.int64, device="cpu")

    def input(self, data: torch.Tensor) -> Any:
        """The input in 8 bits, its scale, and the number that stands for zero."""
        low, high = (float(bound) for bound in torch.aminmax(data))
        if not math.isfinite(high - low):
            # NaN in every product, which is noticed: the pair is scored again.
            return torch.zeros_like(data, dtype=torch.uint8), math.nan, 0
        low, high = min(low, 0.0), max(high, 0.0)
        # 254 steps: with 255, a zero that was rounded up would push the largest number over the edge.
        scale = max((high - low) / 254, _TINY)
        zero = round(-low / scale)
        # Conversion to integers cuts; half a step more makes it round.
        return torch.add(zero + 0.5, data, alpha=1 / scale).to(torch.uint8), scale, zero

    def product(self, data: Any) -> torch.Tensor:
        """`data @ weight.T` in float32."""
        return self._product(data, "none", "")

    def gelu(self, data: Any) -> torch.Tensor:
        """`gelu(data @ weight.T)` in its tanh approximation."""
        return self._product(data, "gelu", "tanh")

    def gated(self, data: Any, gate: torch.Tensor) -> torch.Tensor:
        """`data @ weight.T * gate`; it overwrites the gate."""
        return gate.mul_(self.product(data))

    def _product(self, data: Any, activation: str, algorithm: str) -> torch.Tensor:
        weight = (self._packed, self._scales, self._zeros)
        found: torch.Tensor = torch.ops.onednn.qlinear_pointwise(
            *data, *weight, None, 1.0, 0, torch.float32, activation, [], algorithm
        )
        return found


class RowInt8Weight(Int8Weight):
    """The same with one scale per row of the input: more exact, and a row's result does not depend on the others."""

    def input(self, data: torch.Tensor) -> Any:
        """The input in 8 bits around 128, and the scale of each row."""
        # The largest number and the smallest: both are vectorised, the norm of infinite order is not.
        largest = torch.maximum(data.amax(dim=-1, keepdim=True), data.amin(dim=-1, keepdim=True).neg_())
        scales = largest.clamp_min_(_TINY).div_(127)
        return torch.mul(data, scales.reciprocal()).add_(128.5).to(torch.uint8), scales

    def product(self, data: Any) -> torch.Tensor:
        """`data @ weight.T` in float32."""
        rounded, scales = data
        return self._product((rounded, 1.0, 128), "none", "").mul_(scales)

    def gelu(self, data: Any) -> torch.Tensor:
        """`gelu(data @ weight.T)` in its tanh approximation."""
        found: torch.Tensor = torch.ops.aten.gelu_(self.product(data), approximate="tanh")
        return found


@dataclass(frozen=True, slots=True)
class PackedWeights:
    """The kind of matrix for each place in a layer.

    Attributes:
        projection: to queries, keys and values.
        output: of attention.
        hidden: gate and up of the feed-forward network.
        down: its output.
    """

    projection: type[Any] = PackedWeight
    output: Callable[[nn.Linear], Any] = PackedWeight
    hidden: Callable[[nn.Linear], Any] = PackedWeight
    down: Callable[[nn.Linear], Any] = PackedWeight
