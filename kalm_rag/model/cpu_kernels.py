"""Runs the same arithmetic in fewer and faster steps on a CPU.

torch multiplies float32 matrices through MKL, which leaves AVX-512 unused on AMD processors. oneDNN, which torch
includes for bfloat16, uses it, and takes an activation or a gate into the same pass; its operators are the ones that
torch.compile emits. Which of the two is faster depends on the CPU: `optimize_for_cpu` measures both, and uses
oneDNN only where it is faster and gives the same numbers.
"""

from __future__ import annotations

import copy
import logging
import math
import platform
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kalm_rag.model.cpu_weights import (
    BFloat16Weight,
    Int8Weight,
    PackedWeight,
    PackedWeights,
    RowInt8Weight,
    WidenedWeight,
)

logger = logging.getLogger(__name__)

_MEASURED_ROWS = {"encoder": 256, "decoder": 64}
"""Rows of the products that are measured: enough that more rows give the same answer. A query has few of them."""

_MOST_TIME = {"matrix": 0.97, "feed-forward network": 1.03}
"""Share of the original's time that a replacement may take; otherwise the original stays.

A tie keeps a matrix as it is. In a feed-forward network oneDNN takes activation and gate into the products, which
spares passes over the data; these cost more with the rows of a whole batch than with the rows that are measured.
"""

_FEWEST, _MOST_SECONDS = 4, 0.1
"""Fewest repetitions of a measurement, and when it ends at the latest."""

_MOST_MEASUREMENTS, _MANY_TIMES = 5, 8
"""How often a doubtful answer about a dtype is measured again, and how many times slower leaves no doubt."""


def has_exact_int8() -> bool:
    """Whether sums of 8-bit products are exact: without VNNI instructions, pairs of large products overflow."""
    matrix = Int8Weight(_layer(torch.ones(16, 64, dtype=torch.float32, device="cpu")))
    largest = torch.full((3, 64), 255, dtype=torch.uint8, device="cpu")
    return bool((matrix.product((largest, 1.0, 0)) - 255 * 64).abs().max() < 1)


@dataclass(frozen=True, slots=True)
class Choice:
    """One measurement on this machine, and the resulting choice.

    Attributes:
        what: the products.
        used: the name of what runs them.
        seconds: the shortest time of each, by name.
        spent: seconds that it took to find out.
    """

    what: str
    used: str
    seconds: Mapping[str, float]
    spent: float

    def __str__(self) -> str:
        """For a log line."""
        times = ", ".join(f"{name} {1e6 * value:.0f} us" for name, value in self.seconds.items())
        return f"{self.what}: {self.used} ({times})"


_choices: dict[tuple[Any, ...], Choice] = {}
_choosing = threading.RLock()
"""Guards `_choices`, and lets one thread measure at a time."""


def choices() -> list[Choice]:
    """Return this process's measurements so far, in order."""
    with _choosing:
        return list(_choices.values())


def shortest_times(actions: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Return the shortest time of each action in seconds.

    Actions take turns, so that other load on the machine meets all of them. A time counts once it is reached twice,
    since on a busy machine only short times measure the action itself. Times that are not settled by `_MOST_SECONDS`
    are compared as they are.
    """
    times: dict[str, list[float]] = {name: [] for name in actions}
    for action in actions.values():
        action()  # The first call prepares its kernel.
    start = time.perf_counter()
    while time.perf_counter() - start < _MOST_SECONDS:
        for name, action in actions.items():
            before = time.perf_counter()
            action()
            times[name].append(time.perf_counter() - before)
        if all(_is_settled(sorted(found)) for found in times.values()):
            break
    return {name: min(found) for name, found in times.items()}


def _is_settled(times: list[float]) -> bool:
    """Whether the shortest time was reached again; times come in order."""
    return len(times) >= _FEWEST and times[1] <= 1.03 * times[0]


def _layer(weight: torch.Tensor) -> nn.Linear:
    """Make a layer of this weight without drawing random numbers."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def _random(rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Return the same random input each time, without touching the global generator."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    return torch.randn(rows, width, generator=generator, dtype=torch.float32, device="cpu").to(dtype)


def has_fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 at least as fast as float32; measured once per process.

    A CPU with the instructions is at least 1.5 times as fast in bfloat16, one without is up to 200 times slower. The
    CPU's own feature flags are not used: oneDNN can be limited to older instructions, and a virtual machine can hide
    flags.
    """
    return _is_fast("bfloat16")


def has_fast_float16() -> bool:
    """Whether this CPU multiplies float16 at least as fast as float32; measured once per process."""
    return _is_fast("float16")


def slowdown(dtype: str) -> float:
    """Return how many times as long as in float32 a product takes in `bfloat16` or `float16`; measured once."""
    _is_fast(dtype)
    with _choosing:
        seconds = _choices[(dtype,)].seconds
    return seconds[dtype] / seconds["float32"]


def _is_fast(dtype: str) -> bool:
    key = (dtype,)
    with _choosing:
        if key not in _choices:
            start = time.perf_counter()
            with torch.inference_mode(), torch.autocast("cpu", enabled=False):
                seconds = _clear_times({name: _product(getattr(torch, name)) for name in ("float32", dtype)})
            used = min(seconds, key=lambda name: seconds[name])
            _choices[key] = Choice(f"products of {dtype} matrices", used, seconds, time.perf_counter() - start)
        return _choices[key].used == dtype


def _clear_times(actions: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Return the shortest times of two actions, measured again while the answer is doubtful.

    A CPU without the instructions is many times slower. A busy machine can make a fast CPU look a little slower, so
    such a result is measured again.
    """
    first, other = actions
    seconds: dict[str, float] = {}
    for _ in range(_MOST_MEASUREMENTS):
        again = shortest_times(actions)
        seconds = {name: min(again[name], seconds.get(name, math.inf)) for name in actions}
        if seconds[other] <= seconds[first] or seconds[other] > _MANY_TIMES * seconds[first]:
            break
    return seconds


def _product(dtype: torch.dtype) -> Callable[[], object]:
    """A product of the size of a small layer's, by oneDNN in bfloat16 where it can, otherwise by torch."""
    linear, rows = _layer(_random(512, 512, dtype)), _random(64, 512, dtype)
    if dtype == torch.bfloat16:
        try:
            matrix = PackedWeight(linear)
            matrix.product(rows)
        except (RuntimeError, AttributeError):
            logger.debug("oneDNN does not multiply bfloat16 on this CPU")
        else:
            return lambda: matrix.product(rows)
    return lambda: linear(rows)


def int8_weights() -> PackedWeights:
    """Choose 8 bits where they move scores no further than bfloat16 does (`benchmarks/precision.py` on `mini`).

    Queries, keys and values stay wider: attention turns their rounding into different weights.
    """
    return PackedWeights(
        BFloat16Weight if has_fast_bfloat16() else PackedWeight, RowInt8Weight, Int8Weight, RowInt8Weight
    )


INT8_ENCODER_WEIGHTS = PackedWeights(RowInt8Weight, RowInt8Weight, RowInt8Weight, RowInt8Weight)
"""An encoder in 8 bits. One scale per row: what is kept of a passage must not depend on what it was encoded with."""


class FastLinear(nn.Module):
    """`nn.Linear` without a bias."""

    def __init__(self, linear: nn.Linear, kind: Callable[[nn.Linear], Any]) -> None:
        super().__init__()
        self.matrix = kind(linear)
        self.tolerance = self.matrix.tolerance

    def forward(self, data: torch.Tensor) -> torch.Tensor:
        """Same contract as the module it replaces."""
        found: torch.Tensor = self.matrix.product(self.matrix.input(data))
        return found


class FastMLP(nn.Module):
    """The gated feed-forward network: activation and gate join the products."""

    def __init__(self, mlp: Any, matrices: PackedWeights) -> None:
        super().__init__()
        self.gate, self.up = matrices.hidden(mlp.gate_proj), matrices.hidden(mlp.up_proj)
        self.down = matrices.down(mlp.down_proj)
        self.tolerance = self.gate.tolerance

    def forward(self, data: torch.Tensor) -> torch.Tensor:
        """Same contract as the module it replaces."""
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
        """Same contract as the module it replaces."""
        wide = data.float()
        size = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        inverse = size.square_().mul_(1 / data.shape[-1]).add_(self.eps).rsqrt_()
        return torch.mul(wide, inverse).mul_(self.scale).to(data.dtype)


def optimize_for_cpu(
    model: Any,
    *,
    int8: bool = False,
    int8_encoder: bool = False,
    parts: Collection[str] = ("encoder", "decoder"),
) -> torch.dtype:
    """On a CPU, replace modules of encoder and decoder where that is faster and agrees.

    Matrices are replaced only on x86; other processors were not measured. A bfloat16 model on a CPU that multiplies
    bfloat16 slowly is brought to float32 activations on any processor.

    Args:
        model: `T5Gemma2ForConditionalGeneration` in evaluation mode, in float32 or bfloat16.
        int8: bring the decoder's matrices to 8 bits, see `int8_weights`.
        int8_encoder: and the encoder's, see `INT8_ENCODER_WEIGHTS`.
        parts: which of the two; the other's weights need not be there.

    Returns:
        The dtype of the model's activations.

    Raises:
        RuntimeError: torch cannot multiply 8-bit matrices on this machine. Of other modules, the original stays.
        AttributeError: it does not know them.
    """
    encoder, decoder = model.get_encoder(), model.get_decoder()
    dtype: torch.dtype = next(decoder.parameters()).dtype
    before = len(choices())
    wide = dtype == torch.bfloat16 and not has_fast_bfloat16()
    on_x86 = _is_x86()
    if int8 and (msg := why_no_int8()):
        raise RuntimeError(msg)
    if not on_x86 and not wide:
        return dtype
    replacer = _Replacer(wide=wide, onednn=on_x86)
    matrices = INT8_ENCODER_WEIGHTS if int8_encoder else PackedWeights()
    stay = 0
    if "encoder" in parts:
        stay += replacer.run(encoder, matrices, "encoder", measured=not int8_encoder)
    if "decoder" in parts:
        stay += replacer.run(decoder, int8_weights() if int8 else PackedWeights(), "decoder", measured=not int8)
    chosen = {"encoder": encoder, "decoder": decoder}
    is_narrow = {"encoder": int8_encoder, "decoder": int8}
    narrow = [chosen[part] for part in parts if is_narrow[part]]
    if any(isinstance(module, nn.Linear) and module.bias is None for part in narrow for module in part.modules()):
        msg = "8-bit products are unavailable, or not near the float ones"
        raise RuntimeError(msg)
    if stay:
        logger.info("%d modules differ under oneDNN, or it does not run them: they keep their implementation", stay)
    measured = choices()[before:]
    if measured:
        spent = 1000 * sum(choice.spent for choice in measured)
        logger.info("products measured in %.0f ms: %s", spent, "; ".join(map(str, measured)))
    if wide:
        _widen_embeddings(*(chosen[part] for part in parts))
        _warn_of_slow_bfloat16()
        return torch.float32
    return dtype


def optimize_network(network: nn.Module, *, int8: bool = False) -> None:
    """Replace what is below one network of a decoder, as `optimize_for_cpu` does in a whole model.

    Args:
        network: in float32 or bfloat16; it holds the modules that are replaced.
        int8: bring its matrices to 8 bits.
    """
    dtype = next(network.parameters()).dtype
    wide = dtype == torch.bfloat16 and not has_fast_bfloat16()
    matrices = int8_weights() if int8 else PackedWeights()
    _Replacer(wide=wide, onednn=_is_x86()).run(network, matrices, "decoder", measured=not int8)


def _is_x86() -> bool:
    """Whether oneDNN's products are used at all: other processors were not measured."""
    return platform.machine().lower() in ("x86_64", "amd64")


def why_no_int8() -> str:
    """Return why this machine does not run 8-bit matrices; empty if it does."""
    if not _is_x86():
        return f"8-bit matrices are for x86 processors, this is {platform.machine()}"
    return "" if has_exact_int8() else "it has no instructions (VNNI) for exact sums of 8-bit products"


def _widen_embeddings(*parts: Any) -> None:
    """Look up and scale tokens in bfloat16, as other devices do; what follows is float32."""
    for part in parts:
        for module in part.modules():
            if isinstance(module, nn.Embedding):
                module.register_forward_hook(_widen)


def _widen(_module: Any, _args: Any, output: torch.Tensor) -> torch.Tensor:
    return output.float()


_warned = threading.Event()


def _warn_of_slow_bfloat16() -> None:
    """Say it once per process."""
    if _warned.is_set():
        return
    _warned.set()
    logger.warning(
        "this CPU multiplies bfloat16 more slowly than float32: with dtype='bfloat16', weights and states stay in "
        "bfloat16 (half the memory) and products are computed in float32; dtype='float32' is as fast and more exact"
    )


class _Replacer:
    """Replaces modules by faster ones that agree.

    Args:
        wide: every matrix becomes a `WidenedWeight`.
        onednn: oneDNN's products may be used.
    """

    def __init__(self, *, wide: bool, onednn: bool) -> None:
        self._wide = wide
        self._onednn = onednn

    def run(self, module: nn.Module, matrices: PackedWeights, part: str, *, measured: bool = True) -> int:
        """Replace what is below a module.

        Args:
            module: whose children are replaced.
            matrices: by what.
            part: `encoder` or `decoder`, see `_MEASURED_ROWS`.
            measured: whether products are replaced only where that is faster.

        Returns:
            For how many of the smallest modules no replacement agrees.
        """
        stay = 0
        for name, child in module.named_children():
            make, width = self._counterpart(name, child, matrices)
            key = self._key(child, part) if measured and make is not None else None
            if key is not None and _is_stock(key):
                continue
            fast = None if make is None else _checked(make, child, width, wide=self._wide)
            if fast is not None:
                if key is None or _is_faster(key, child, fast, width):
                    setattr(module, name, fast)
            elif make is None or any(True for _ in child.children()):
                stay += self.run(child, matrices, part, measured=measured)
            else:
                stay += 1
        return stay

    def _counterpart(self, name: str, module: Any, matrices: PackedWeights) -> tuple[Callable[[], Any] | None, int]:
        """Return how to make a module's replacement, and the width of its input."""
        if isinstance(module, nn.Linear) and self._wide:
            return lambda: FastLinear(module, WidenedWeight), module.in_features
        if self._onednn and isinstance(module, nn.Linear) and module.bias is None:
            kind = matrices.projection if name in ("q_proj", "k_proj", "v_proj") else matrices.output
            return lambda: FastLinear(module, kind), module.in_features
        if self._onednn and not self._wide and _is_mlp(module):
            return lambda: FastMLP(module, matrices), module.gate_proj.in_features
        if self._onednn and type(module).__name__.endswith("RMSNorm") and hasattr(module, "eps"):
            return lambda: FastRMSNorm(module), len(module.weight)
        return None, 0

    def _key(self, module: Any, part: str) -> tuple[Any, ...] | None:
        """Return what determines which product is faster, or None if there is no choice."""
        if self._wide or not (isinstance(module, nn.Linear) or _is_mlp(module)):
            return None
        first = module if isinstance(module, nn.Linear) else module.gate_proj
        kind = "matrix" if first is module else "feed-forward network"
        return part, kind, first.in_features, first.out_features, first.weight.dtype, torch.get_num_threads()


def _is_mlp(module: Any) -> bool:
    parts = [getattr(module, part, None) for part in ("gate_proj", "up_proj", "down_proj")]
    return all(isinstance(part, nn.Linear) and part.bias is None for part in parts)


def _is_stock(key: tuple[Any, ...]) -> bool:
    """Whether torch's own product is already known to be the faster one."""
    with _choosing:
        return key in _choices and _choices[key].used == "torch"


def _is_faster(key: tuple[Any, ...], module: Any, fast: Any, width: int) -> bool:
    """Whether a replacement is faster, measured once per process for all modules of one shape."""
    with _choosing:
        if key not in _choices:
            part, kind, inputs, outputs, dtype, _ = key
            data = _random(_MEASURED_ROWS[part], width, dtype)
            start = time.perf_counter()
            with torch.inference_mode(), torch.autocast("cpu", enabled=False):
                seconds = shortest_times({"torch": lambda: module(data), "oneDNN": lambda: fast(data)})
            used = "oneDNN" if seconds["oneDNN"] <= _MOST_TIME[kind] * seconds["torch"] else "torch"
            name = str(dtype).removeprefix("torch.")
            what = f"{part}, {kind} {inputs}x{outputs} in {name}"
            _choices[key] = Choice(what, used, seconds, time.perf_counter() - start)
        return _choices[key].used == "oneDNN"


def _checked(make: Callable[[], Any], module: Any, width: int, *, wide: bool) -> nn.Module | None:
    """Return a module's replacement if it gives the same numbers on random input."""
    original = copy.deepcopy(module).float() if wide else module
    data = _random(3, width, next(original.parameters()).dtype)
    try:
        fast: Any = make()
        with torch.inference_mode(), torch.autocast("cpu", enabled=False):
            ours, expected = fast(data).float(), original(data).float()
    except (RuntimeError, AttributeError) as error:
        logger.debug("no replacement for %s: %s", type(module).__name__, error)
        return None
    limit = fast.tolerance * float(expected.abs().max())
    return fast if float((ours - expected).abs().max()) <= limit else None
