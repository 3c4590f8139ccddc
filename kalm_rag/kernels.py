"""The same arithmetic in fewer and faster steps, on a CPU.

torch multiplies float32 matrices through MKL, which leaves AVX-512 unused on AMD processors. oneDNN, which torch brings
along for bfloat16, uses it, and takes an activation or a gate into the same pass; its operators are the ones that
torch.compile emits. `speed_up` puts them behind the modules of a loaded model, each checked against what it replaces.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from kalm_rag.encoder_attention import install

logger = logging.getLogger(__name__)

_ROWS = 512
"""For how many rows oneDNN lays out a matrix; it multiplies any number of them."""

_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
_INT8_TOLERANCE = 0.1
"""How far a replacement may be from the original on random input, in parts of the largest number."""


class Matrix:
    """A matrix laid out for oneDNN, in the dtype of its weight.

    Args:
        linear: a layer without a bias; its weight has shape `(outputs, inputs)`.
    """

    def __init__(self, linear: nn.Linear) -> None:
        self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().contiguous(), _ROWS)

    def input(self, data: torch.Tensor) -> Any:
        """What products of this input with one or more matrices take."""
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


class Int8Matrix:
    """A matrix in 8 bits, with one scale per output. Input is brought to 8 bits as it comes, with one scale for all.

    Args:
        linear: a layer without a bias; its weight has shape `(outputs, inputs)`.
    """

    def __init__(self, linear: nn.Linear) -> None:
        weight = linear.weight.detach().float()
        self._scales = weight.abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny) / 127
        rounded = (weight / self._scales[:, None]).round().to(torch.int8)
        self._packed = torch.ops.onednn.qlinear_prepack(rounded, [_ROWS, weight.shape[1]])
        self._zeros = torch.zeros(len(weight), dtype=torch.int64)

    def input(self, data: torch.Tensor) -> Any:
        """The input in 8 bits, its scale, and the number that stands for zero."""
        low, high = (float(bound) for bound in torch.aminmax(data))
        low, high = min(low, 0.0), max(high, 0.0)
        scale = max((high - low) / 255, torch.finfo(torch.float32).tiny)
        zero = round(-low / scale)
        # Conversion to integers cuts; half a step more makes it round.
        return torch.add(zero + 0.5, data, alpha=1 / scale).to(torch.uint8), scale, zero

    def product(self, data: Any, activation: str = "none", algorithm: str = "") -> torch.Tensor:
        """`data @ weight.T` in float32."""
        weight = (self._packed, self._scales, self._zeros)
        found: torch.Tensor = torch.ops.onednn.qlinear_pointwise(
            *data, *weight, None, 1.0, 0, torch.float32, activation, [], algorithm
        )
        return found

    def gelu(self, data: Any) -> torch.Tensor:
        """`gelu(data @ weight.T)` in its tanh approximation."""
        return self.product(data, "gelu", "tanh")

    def gated(self, data: Any, gate: torch.Tensor) -> torch.Tensor:
        """`data @ weight.T * gate`; it overwrites the gate."""
        return gate.mul_(self.product(data))


class FastLinear(nn.Module):
    """`nn.Linear` without a bias."""

    def __init__(self, linear: nn.Linear, matrix: type[Matrix | Int8Matrix]) -> None:
        super().__init__()
        self.matrix = matrix(linear)

    def forward(self, data: torch.Tensor) -> torch.Tensor:
        """As of the original."""
        return self.matrix.product(self.matrix.input(data))


class FastMLP(nn.Module):
    """The gated feed-forward network: activation and gate join the products."""

    def __init__(self, mlp: Any, matrix: type[Matrix | Int8Matrix]) -> None:
        super().__init__()
        self.gate, self.up, self.down = (matrix(part) for part in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))

    def forward(self, data: torch.Tensor) -> torch.Tensor:
        """As of the original."""
        shared = self.gate.input(data)
        hidden = self.up.gated(shared, self.gate.gelu(shared))
        return self.down.product(self.down.input(hidden))


class FastRMSNorm(nn.Module):
    """The norm of Gemma 3, in float32 and by `1 + weight`, in three passes over the data instead of seven."""

    def __init__(self, norm: Any, _: Any) -> None:
        super().__init__()
        self.scale = 1.0 + norm.weight.detach().float()
        self.eps = norm.eps

    def forward(self, data: torch.Tensor) -> torch.Tensor:
        """As of the original."""
        wide = data.float()
        size = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        inverse = size.square_().mul_(1 / data.shape[-1]).add_(self.eps).rsqrt_()
        return torch.mul(wide, inverse).mul_(self.scale).to(data.dtype)


def speed_up(model: Any, *, int8: bool = False) -> None:
    """On a CPU, replace modules of a model's encoder and decoder wherever the replacement agrees, and its attention.

    Args:
        model: `T5Gemma2ForConditionalGeneration` in evaluation mode, in float32 or bfloat16.
        int8: bring the decoder's matrices to 8 bits.

    Raises:
        RuntimeError: torch cannot multiply 8-bit matrices on this machine. Of other modules, the original stays.
    """
    install(model.get_encoder())
    stay = _replace(model.get_encoder(), Matrix) + _replace(model.get_decoder(), Int8Matrix if int8 else Matrix)
    if stay:
        logger.info("oneDNN gives no numbers or other numbers for %d modules: these run as transformers has them", stay)


def _replace(module: nn.Module, matrix: type[Matrix | Int8Matrix]) -> int:
    """Replace what is below a module; returns for how many of the smallest modules this was not possible."""
    stay = 0
    for name, child in module.named_children():
        kind, width = _counterpart(child)
        fast = _checked(kind, child, width, matrix) if kind else None
        if fast is not None:
            setattr(module, name, fast)
        elif kind in (FastLinear, FastRMSNorm):
            stay += 1
        else:
            stay += _replace(child, matrix)
    return stay


def _counterpart(module: Any) -> tuple[Any, int]:
    """What may replace a module, and the width of its input."""
    if isinstance(module, nn.Linear) and module.bias is None:
        return FastLinear, module.in_features
    parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    if all(isinstance(part, nn.Linear) and part.bias is None for part in parts):
        return FastMLP, module.gate_proj.in_features
    if type(module).__name__.endswith("RMSNorm") and hasattr(module, "eps"):
        return FastRMSNorm, len(module.weight)
    return None, 0


def _checked(kind: Any, module: Any, width: int, matrix: type[Matrix | Int8Matrix]) -> nn.Module | None:
    """The replacement of a module, if it gives the same numbers."""
    weight = next(module.parameters())
    int8 = matrix is Int8Matrix and kind is not FastRMSNorm
    data = torch.randn(3, width, generator=torch.Generator().manual_seed(0)).to(weight.dtype)
    try:
        fast: nn.Module = kind(module, matrix)
        with torch.inference_mode():
            ours, original = fast(data).float(), module(data).float()
    except (RuntimeError, AttributeError):
        if int8:
            raise
        return None
    limit = (_INT8_TOLERANCE if int8 else _TOLERANCE[weight.dtype]) * float(original.abs().max())
    change = float((ours - original).abs().max())
    if change <= limit:
        return fast
    if int8 and kind is FastLinear:
        msg = f"8-bit products differ from float ones by {change:.3g}, more than {limit:.3g}"
        raise RuntimeError(msg)
    return None
