"""The same arithmetic in fewer and faster steps, on a CPU.

torch multiplies float32 matrices through MKL, which leaves AVX-512 unused on AMD processors. oneDNN, which torch brings
along for bfloat16, uses it, and takes an activation or a gate into the same pass; its operators are the ones that
torch.compile emits. `speed_up` puts them behind the modules of a loaded model, each checked against what it replaces.
"""

from __future__ import annotations

import logging
import math
import platform
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kalm_rag.encoder_attention import install

logger = logging.getLogger(__name__)

_ROWS = 512
"""For how many rows oneDNN lays out a matrix; it multiplies any number of them."""

_TINY = torch.finfo(torch.float32).tiny


class Matrix:
    """A matrix laid out for oneDNN, in the dtype of its weight.

    Args:
        linear: a layer without a bias; its weight has shape `(outputs, inputs)`.

    Attributes:
        tolerance: how far a product may be from torch's on random input, in parts of the largest number.
    """

    def __init__(self, linear: nn.Linear) -> None:
        self.tolerance = 1e-5 if linear.weight.dtype == torch.float32 else 2e-2
        self._packed = self._pack(linear.weight.detach())

    def _pack(self, weight: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS)
        return found

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


class NarrowMatrix(Matrix):
    """A matrix in bfloat16, for input and output in float32."""

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


class Int8Matrix:
    """A matrix in 8 bits, with one scale per output. Input is brought to 8 bits as it comes, with one scale for all.

    A row's result depends a little on what shares its batch.

    Args:
        linear: a layer without a bias; its weight has shape `(outputs, inputs)`.

    Attributes:
        tolerance: as of `Matrix`.
    """

    tolerance = 0.1

    def __init__(self, linear: nn.Linear) -> None:
        weight = linear.weight.detach().float()
        self._scales = weight.abs().amax(dim=1).clamp_min(_TINY) / 127
        rounded = (weight / self._scales[:, None]).round().to(torch.int8)
        self._packed = torch.ops.onednn.qlinear_prepack(rounded, [_ROWS, weight.shape[1]])
        self._zeros = torch.zeros(len(weight), dtype=torch.int64)

    def input(self, data: torch.Tensor) -> Any:
        """The input in 8 bits, its scale, and the number that stands for zero."""
        low, high = (float(bound) for bound in torch.aminmax(data))
        if not math.isfinite(high - low):
            # So that every product becomes what is noticed, and computed anew.
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


class RowInt8Matrix(Int8Matrix):
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


@dataclass(frozen=True, slots=True)
class Matrices:
    """Which kind of matrix takes which place in a layer.

    Attributes:
        projection: to queries, keys and values.
        output: of attention.
        hidden: gate and up of the feed-forward network.
        down: its output.
    """

    projection: type[Matrix] = Matrix
    output: Callable[[nn.Linear], Any] = Matrix
    hidden: Callable[[nn.Linear], Any] = Matrix
    down: Callable[[nn.Linear], Any] = Matrix


def has_exact_int8() -> bool:
    """Whether sums of 8-bit products are exact: without VNNI instructions, pairs of large products overflow."""
    linear = nn.Linear(64, 16, bias=False)
    nn.init.ones_(linear.weight)
    matrix = Int8Matrix(linear)
    largest = torch.full((3, 64), 255, dtype=torch.uint8)
    return bool((matrix.product((largest, 1.0, 0)) - 255 * 64).abs().max() < 1)


def int8_matrices() -> Matrices:
    """8 bits where they move scores no further than bfloat16 does (`benchmarks/precision.py` on `mini`).

    In queries, keys and values they would by themselves: attention turns their rounding into other weights.
    """
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    fast_bfloat16 = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return Matrices(NarrowMatrix if fast_bfloat16 else Matrix, RowInt8Matrix, Int8Matrix, RowInt8Matrix)


class FastLinear(nn.Module):
    """`nn.Linear` without a bias."""

    def __init__(self, linear: nn.Linear, kind: Callable[[nn.Linear], Any]) -> None:
        super().__init__()
        self.matrix = kind(linear)
        self.tolerance = self.matrix.tolerance

    def forward(self, data: torch.Tensor) -> torch.Tensor:
        """As of the original."""
        found: torch.Tensor = self.matrix.product(self.matrix.input(data))
        return found


class FastMLP(nn.Module):
    """The gated feed-forward network: activation and gate join the products."""

    def __init__(self, mlp: Any, matrices: Matrices) -> None:
        super().__init__()
        self.gate, self.up = matrices.hidden(mlp.gate_proj), matrices.hidden(mlp.up_proj)
        self.down = matrices.down(mlp.down_proj)
        self.tolerance = self.gate.tolerance

    def forward(self, data: torch.Tensor) -> torch.Tensor:
        """As of the original."""
        shared = self.gate.input(data)
        hidden = self.up.gated(shared, self.gate.gelu(shared))
        found: torch.Tensor = self.down.product(self.down.input(hidden))
        return found


class FastRMSNorm(nn.Module):
    """The norm of Gemma 3, in float32 and by `1 + weight`, in three passes over the data instead of seven."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.scale = 1.0 + norm.weight.detach().float()
        self.eps = norm.eps
        self.tolerance = 1e-5 if norm.weight.dtype == torch.float32 else 2e-2

    def forward(self, data: torch.Tensor) -> torch.Tensor:
        """As of the original."""
        wide = data.float()
        size = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        inverse = size.square_().mul_(1 / data.shape[-1]).add_(self.eps).rsqrt_()
        return torch.mul(wide, inverse).mul_(self.scale).to(data.dtype)


def speed_up(model: Any, *, int8: bool = False) -> None:
    """On a CPU, replace the encoder's attention, and modules of encoder and decoder wherever the replacement agrees.

    Modules are replaced on x86 alone; on other processors nothing of this was measured.

    Args:
        model: `T5Gemma2ForConditionalGeneration` in evaluation mode, in float32 or bfloat16.
        int8: bring the decoder's matrices to 8 bits, see `int8_matrices`.

    Raises:
        RuntimeError: torch cannot multiply 8-bit matrices on this machine. Of other modules, the original stays.
        AttributeError: it does not know them.
    """
    encoder, decoder = model.get_encoder(), model.get_decoder()
    install(encoder)
    if platform.machine().lower() not in ("x86_64", "amd64"):
        if int8:
            msg = f"8-bit matrices are for x86 processors, this is {platform.machine()}"
            raise RuntimeError(msg)
        return
    if int8 and not has_exact_int8():
        msg = "it has no instructions (VNNI) for exact sums of 8-bit products"
        raise RuntimeError(msg)
    stay = _replace(encoder, Matrices()) + _replace(decoder, int8_matrices() if int8 else Matrices())
    if int8 and any(isinstance(module, nn.Linear) and module.bias is None for module in decoder.modules()):
        msg = "8-bit products cannot be had, or are not near the float ones"
        raise RuntimeError(msg)
    if stay:
        logger.info("oneDNN gives no numbers or other numbers for %d modules: these run as transformers has them", stay)


def _replace(module: nn.Module, matrices: Matrices) -> int:
    """Replace what is below a module; returns for how many of the smallest modules this was not possible."""
    stay = 0
    for name, child in module.named_children():
        make, width = _counterpart(name, child, matrices)
        fast = None if make is None else _checked(make, child, width)
        if fast is not None:
            setattr(module, name, fast)
        elif make is None or any(True for _ in child.children()):
            stay += _replace(child, matrices)
        else:
            stay += 1
    return stay


def _counterpart(name: str, module: Any, matrices: Matrices) -> tuple[Callable[[], Any] | None, int]:
    """How to make what may replace a module, and the width of its input."""
    if isinstance(module, nn.Linear) and module.bias is None:
        kind = matrices.projection if name in ("q_proj", "k_proj", "v_proj") else matrices.output
        return lambda: FastLinear(module, kind), module.in_features
    parts = [getattr(module, part, None) for part in ("gate_proj", "up_proj", "down_proj")]
    if all(isinstance(part, nn.Linear) and part.bias is None for part in parts):
        return lambda: FastMLP(module, matrices), module.gate_proj.in_features
    if type(module).__name__.endswith("RMSNorm") and hasattr(module, "eps"):
        return lambda: FastRMSNorm(module), len(module.weight)
    return None, 0


def _checked(make: Callable[[], Any], module: Any, width: int) -> nn.Module | None:
    """The replacement of a module, if it gives the same numbers on random input."""
    dtype = next(module.parameters()).dtype
    data = torch.randn(3, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    try:
        fast: Any = make()
        with torch.inference_mode(), torch.autocast("cpu", enabled=False):
            ours, original = fast(data).float(), module(data).float()
    except (RuntimeError, AttributeError) as error:
        logger.debug("no replacement for %s: %s", type(module).__name__, error)
        return None
    limit = fast.tolerance * float(original.abs().max())
    return fast if float((ours - original).abs().max()) <= limit else None
