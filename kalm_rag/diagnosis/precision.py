"""Measures which precision is the fastest on this machine."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from kalm_rag.model.cpu_kernels import has_fast_bfloat16, optimize_network, shortest_times, slowdown, why_no_int8

PRECISIONS = ("float32", "bfloat16", "int8", "int8-all", "float16")
"""Every name that `dtype` takes."""

ROWS, WIDTH, HIDDEN = 64, 640, 2048
"""A feed-forward network of Nano on 64 rows: the larger part of what a query computes."""

_SLOWEST = 8.0
"""How many times as long as float32 a precision may take to be run at all."""

_ROUNDS = 8
"""Measurements, of which the shortest counts: on a busy machine one alone may tell of other programs."""


@dataclass(frozen=True, slots=True)
class Timing:
    """The time of one precision.

    Attributes:
        precision: the name to give as `dtype`.
        milliseconds: one feed-forward network of Nano on 64 rows, or None if it was not run.
        note: why it was not run, or what computes instead.
    """

    precision: str
    milliseconds: float | None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Precisions:
    """The times of all precisions on one device.

    Attributes:
        device: where they were measured.
        timings: one per precision.
    """

    device: str
    timings: tuple[Timing, ...]

    @property
    def fastest(self) -> str:
        """The precision with the shortest time."""
        seconds = {timing.precision: timing.milliseconds or math.inf for timing in self.timings}
        return min(seconds, key=seconds.__getitem__)

    def as_json(self) -> dict[str, Any]:
        """Return the times by precision, and the fastest."""
        times = {
            timing.precision: {"milliseconds": timing.milliseconds, "note": timing.note} for timing in self.timings
        }
        return {"device": self.device, "fastest": self.fastest, "feed_forward_network": times}


def why_not(precision: str, device: torch.device) -> str:
    """Return why a precision does not run on a device, or is too slow to try; empty if it runs."""
    if precision in ("int8", "int8-all"):
        return why_no_int8() if device.type == "cpu" else f"{precision} runs only on a CPU, not on {device.type}"
    if precision == "float16" and device.type == "cpu" and (times := slowdown("float16")) > _SLOWEST:
        return f"{times:.0f} times as slow as float32 on this CPU"
    return ""


def measure_precisions(device: torch.device) -> Precisions:
    """Time a feed-forward network in every precision that runs on a device, in about a second."""
    actions: dict[str, Callable[[], object]] = {}
    precisions = [name for name in PRECISIONS if name != "int8-all"]  # it is int8, as far as a query is concerned
    notes = {precision: why_not(precision, device) for precision in precisions}
    with torch.inference_mode(), torch.autocast(device.type, enabled=False):
        for precision in precisions:
            if notes[precision]:
                continue
            try:
                network = _Network(precision, device)
                network.run()
            except (RuntimeError, AttributeError) as error:
                notes[precision] = f"torch cannot run it here: {(str(error).splitlines() or [''])[0]:.100}"
                continue
            actions[precision] = network.run
            if precision == "bfloat16" and device.type == "cpu" and not has_fast_bfloat16():
                notes[precision] = "products in float32: this CPU multiplies bfloat16 more slowly"
        rounds = [shortest_times(actions) for _ in range(_ROUNDS)]
    seconds = {name: min(times[name] for times in rounds) for name in actions}
    return Precisions(
        str(device),
        tuple(Timing(name, 1000 * seconds[name] if name in seconds else None, notes[name]) for name in precisions),
    )


class _Network(nn.Module):
    """A gated feed-forward network as a loaded model has it, with its input.

    Args:
        precision: as `dtype`.
        device: where it runs.
    """

    def __init__(self, precision: str, device: torch.device) -> None:
        super().__init__()
        dtype = torch.float32 if precision == "int8" else getattr(torch, precision)
        random = partial(
            torch.randn, generator=torch.Generator(device="cpu").manual_seed(0), dtype=torch.float32, device="cpu"
        )

        def linear(inputs: int, outputs: int) -> nn.Linear:
            made = nn.Linear(inputs, outputs, bias=False, device="meta")
            weight = random(outputs, inputs) * inputs**-0.5
            made.weight = nn.Parameter(weight.to(device, dtype), requires_grad=False)
            return made

        self.mlp = _MLP(linear(WIDTH, HIDDEN), linear(WIDTH, HIDDEN), linear(HIDDEN, WIDTH))
        if device.type == "cpu" and precision != "float16":
            optimize_network(self, int8=precision == "int8")
        # Activations of a bfloat16 model are in float32 where its products are.
        is_wide = precision == "bfloat16" and device.type == "cpu" and not has_fast_bfloat16()
        self._rows = random(ROWS, WIDTH).to(device, torch.float32 if is_wide else dtype)
        self._device = device

    def run(self) -> None:
        """Run it once, to its end."""
        self.mlp(self._rows)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        elif self._device.type == "mps":
            torch.mps.synchronize()


class _MLP(nn.Module):
    """The network with the names that transformers gives its parts."""

    def __init__(self, gate: nn.Linear, up: nn.Linear, down: nn.Linear) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate, up, down

    def forward(self, data: torch.Tensor) -> torch.Tensor:
        """As of Gemma 3."""
        hidden = nn.functional.gelu(self.gate_proj(data), approximate="tanh") * self.up_proj(data)
        found: torch.Tensor = self.down_proj(hidden)
        return found
