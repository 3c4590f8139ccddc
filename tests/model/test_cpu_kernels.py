"""Faster modules give the original's numbers, and what would give others, or none, stays as it was."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from machine import HAS_BFLOAT16, ON_X86, needs_bfloat16, needs_int8, needs_x86
from torch import nn

from kalm_rag import KaLMReranker
from kalm_rag.model import cpu_kernels as kernels
from kalm_rag.model import encoder_attention
from kalm_rag.model.checkpoint import find_checkpoint
from kalm_rag.model.loading import LoadedModel, load_model
from kalm_rag.scorer import Scorer
from kalm_rag.settings import Settings

DTYPES = [torch.float32, pytest.param(torch.bfloat16, marks=needs_bfloat16)]

LIMITS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""Parts of the largest number."""


class Machine:
    """A machine on which the named products are the fastest, whatever the one is that the tests run on."""

    def __init__(self, *fast: str) -> None:
        self.fast = fast
        self.measured = 0

    def __call__(self, actions: Mapping[str, Callable[[], object]]) -> dict[str, float]:
        self.measured += 1
        for action in actions.values():
            action()
        return {name: 1.0 if name in self.fast else 2.0 for name in actions}


@pytest.fixture
def nothing_measured(monkeypatch: Any) -> None:
    """A process that has measured nothing yet."""
    monkeypatch.setattr(kernels, "_choices", {})
    monkeypatch.setattr(kernels, "_warned", threading.Event())


@pytest.fixture(params=["oneDNN", "torch"])
def faster(request: Any, monkeypatch: Any, nothing_measured: None) -> str:
    """Machines on which oneDNN is faster, and on which torch is; both have bfloat16 instructions if this one has."""
    monkeypatch.setattr(kernels, "shortest_times", Machine(request.param, "bfloat16" if HAS_BFLOAT16 else "float32"))
    return str(request.param)


@pytest.fixture
def onednn_is_faster(monkeypatch: Any, nothing_measured: None) -> Machine:
    machine = Machine("oneDNN", "bfloat16" if HAS_BFLOAT16 else "float32")
    monkeypatch.setattr(kernels, "shortest_times", machine)
    return machine


@pytest.fixture
def no_bfloat16(monkeypatch: Any, nothing_measured: None) -> Machine:
    """A machine on which float32 is faster than bfloat16."""
    machine = Machine("oneDNN", "float32")
    monkeypatch.setattr(kernels, "shortest_times", machine)
    return machine


def load(checkpoint: Path, dtype: Any = "float32", *, fast: bool = True) -> LoadedModel:
    return load_model(
        find_checkpoint(str(checkpoint)), settings=Settings(), device=torch.device("cpu"), dtype=dtype, fast=fast
    )


def change(ours: torch.Tensor, original: torch.Tensor) -> float:
    """The largest difference, in parts of the largest number."""
    return float((ours.float() - original.float()).abs().max() / original.float().abs().max())


class MLP(nn.Module):
    """Gated, as in Gemma 3."""

    def __init__(self, activation: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(24, 40, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(40, 24, bias=False)
        self.activation = activation

    def forward(self, data: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.activation(self.gate_proj(data)) * self.up_proj(data))


class StrangeRMSNorm(nn.Module):
    """Scales by its weight, not by 1 + weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.full((24,), 0.5)), 1e-6

    def forward(self, data: torch.Tensor) -> torch.Tensor:
        return data * torch.rsqrt(data.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class Model(nn.Module):
    """What `optimize_for_cpu` wants of a model."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Identity(), nn.Sequential(*parts)

    def get_encoder(self) -> Any:
        return self.encoder

    def get_decoder(self) -> Any:
        return self.decoder


@needs_x86
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [(1,), (3, 7), (2, 300)])
@torch.inference_mode()
def test_each_module_equals_the_original(
    checkpoint: Path, dtype: torch.dtype, rows: tuple[int, ...], onednn_is_faster: Machine
) -> None:
    stock, fast = (load(checkpoint, dtype, fast=choice).model.get_decoder().layers[0] for choice in (False, True))
    generator = torch.Generator().manual_seed(1)
    compared = 0
    for name, module in fast.named_modules():
        if isinstance(module, kernels.FastLinear | kernels.FastMLP | kernels.FastRMSNorm):
            original = stock.get_submodule(name)
            sizes = {"self_attn.o_proj": 128, "self_attn.q_norm": 32, "self_attn.k_norm": 32}
            data = torch.randn(*rows, sizes.get(name, 64), generator=generator).to(dtype)
            assert change(module(data), original(data)) <= LIMITS[dtype], name
            turned = data.transpose(0, -2) if len(rows) > 1 else data
            assert change(module(turned), original(turned)) <= LIMITS[dtype], name
            assert module(data).dtype == dtype
            compared += 1
    assert compared == 4 + 1 + 6


@needs_x86
def test_every_matrix_and_norm_is_replaced(checkpoint: Path, onednn_is_faster: Machine) -> None:
    model = load(checkpoint).model
    for part in (model.get_encoder(), model.get_decoder()):
        kinds = [type(module).__name__ for module in part.modules()]
        assert not [kind for kind in kinds if kind == "Linear" or (kind.endswith("MLP") and kind != "FastMLP")]
        assert not [kind for kind in kinds if kind.endswith("RMSNorm") and kind != "FastRMSNorm"]


def test_the_whole_model_equals_the_stock_one(
    checkpoint: Path, passages: list[str], monkeypatch: Any, faster: str
) -> None:
    """Encoder, full prompts and prefilled passages; window and blocks are smaller than the passages."""
    monkeypatch.setattr(encoder_attention, "_ROWS_IN_WINDOW", 16)
    monkeypatch.setattr(encoder_attention, "_ROWS", 40)
    monkeypatch.setattr(encoder_attention, "_MOST_SCORES", 10_000)
    pairs = [(query, text) for query in ("how to sort", "") for text in ["", *passages[:6], passages[0] * 4]]
    margins = {}
    for fast in (False, True):
        for memory in (0, 10**9):
            settings = Settings(prefill_memory=memory)
            checkpoint_ = find_checkpoint(str(checkpoint))
            loaded = load_model(checkpoint_, settings=settings, device=torch.device("cpu"), dtype="float32", fast=fast)
            cache = KaLMReranker(checkpoint, cache=None).cache
            engine = Scorer(loaded, checkpoint_, settings, cache)
            margins[fast, memory] = torch.tensor([s.margin for s in engine.score(pairs, settings.instruction, 4)])
    plain = margins[False, 0]
    assert plain.std() > 0.01
    for found in margins.values():
        assert (found - plain).abs().max() < 1e-5


@needs_x86
def test_what_gives_other_numbers_stays(caplog: Any, onednn_is_faster: Machine) -> None:
    model = Model(StrangeRMSNorm(), MLP(nn.functional.silu), nn.Linear(24, 24))
    original = list(model.get_decoder())
    data = torch.randn(3, 24, generator=torch.Generator().manual_seed(2))
    expected = [part(data) for part in original]
    with caplog.at_level(logging.INFO, "kalm_rag"):
        kernels.optimize_for_cpu(model)
    assert list(model.get_decoder()) == original
    assert type(model.get_decoder()[1].gate_proj) is kernels.FastLinear
    for part, before in zip(original, expected, strict=True):
        assert torch.allclose(part(data), before, atol=1e-5)
    assert "1 modules differ under oneDNN" in caplog.text


@needs_x86
def test_what_was_measured_faster_runs(checkpoint: Path, faster: str, caplog: Any) -> None:
    """In each part of the model; each kind of shape is measured once per process, and the log tells the choice."""
    with caplog.at_level(logging.INFO, "kalm_rag"):
        model = load(checkpoint).model
    for part in (model.get_encoder(), model.get_decoder()):
        kinds = {type(module) for module in part.layers.modules()} if hasattr(part, "layers") else set()
        kinds = kinds or {type(module) for module in part.modules()}
        assert (kernels.FastMLP in kinds) == (kernels.FastLinear in kinds) == (faster == "oneDNN")
        assert (nn.Linear in kinds) == (faster == "torch")
        assert kernels.FastRMSNorm in kinds
    found = kernels.choices()
    assert {choice.used for choice in found} == {faster}
    assert {choice.what.split(",")[0] for choice in found} == {"encoder", "decoder"}
    assert len({choice.what for choice in found}) == len(found) == 2 * 4
    assert caplog.text.count("products measured in") == 1
    assert all(choice.what in caplog.text for choice in found)
    load(checkpoint)
    assert kernels.choices() == found
    assert kernels.shortest_times.measured == len(found)  # type: ignore[attr-defined]


@needs_x86
@pytest.mark.parametrize(("onednn", "networks"), [(0.98, True), (1.02, True), (1.04, False)])
def test_a_tie_keeps_a_matrix_and_replaces_a_network(
    checkpoint: Path, nothing_measured: None, monkeypatch: Any, onednn: float, networks: bool
) -> None:
    """In a network oneDNN spares passes over the data, which count for more with more rows than are measured."""
    monkeypatch.setattr(kernels, "shortest_times", lambda actions: {"torch": 1.0, "oneDNN": onednn})
    kinds = {type(module) for module in load(checkpoint).model.get_decoder().layers.modules()}
    assert nn.Linear in kinds
    assert kernels.FastLinear not in kinds
    assert (kernels.FastMLP in kinds) == networks


class Clock:
    """A clock that actions move on."""

    def __init__(self, monkeypatch: Any) -> None:
        self.now = 0.0
        monkeypatch.setattr("time.perf_counter", lambda: self.now)

    def action(self, *times: float) -> Callable[[], None]:
        """Takes these times in turn, then the last one again and again; the first call is not timed."""
        left = iter([0.0, *times])

        def run() -> None:
            self.now += next(left, times[-1])

        return run


@pytest.mark.parametrize("slow", [0, 1])
def test_a_busy_machine_does_not_change_the_choice(monkeypatch: Any, slow: int) -> None:
    """Other processes make most runs ten times longer; the shortest time counts once it was reached twice."""
    clock = Clock(monkeypatch)
    busy = clock.action(0.01, 0.012, 0.001, 0.015, 0.014, 0.02, 0.001, 0.03)
    idle = clock.action(0.002)
    actions = {"one": busy, "two": idle} if slow else {"two": idle, "one": busy}
    assert kernels.shortest_times(actions) == pytest.approx({"one": 0.001, "two": 0.002})


def test_measuring_ends(monkeypatch: Any) -> None:
    """Also where no time is reached twice."""
    clock = Clock(monkeypatch)
    kernels.shortest_times({"one": clock.action(*(0.5**number for number in range(3, 60)))})
    assert clock.now < 0.3


def test_without_onednn_the_stock_modules_run(checkpoint: Path, passages: list[str], monkeypatch: Any) -> None:
    pairs = [("query", text) for text in passages[:4]]
    expected = KaLMReranker(checkpoint, device="cpu", cache=None).predict(pairs)

    def missing(*_: Any) -> None:
        msg = "'_OpNamespace' 'mkldnn' object has no attribute '_linear_pointwise'"
        raise AttributeError(msg)

    monkeypatch.setattr(kernels, "_choices", {})
    monkeypatch.setattr(kernels.PackedWeight, "__init__", missing)
    reranker = KaLMReranker(checkpoint, device="cpu", cache=None)
    assert torch.nn.Linear in {type(m) for m in reranker.scorer.loaded.model.get_decoder().layers.modules()}
    for ours, theirs in zip(reranker.predict(pairs), expected, strict=True):
        assert abs(ours - theirs) < 1e-5
    monkeypatch.setattr(kernels.Int8Weight, "__init__", missing)
    with pytest.raises(ValueError, match=r"torch .* cannot run dtype='int8' on this machine .*: use dtype='"):
        KaLMReranker(checkpoint, device="cpu", dtype="int8").load()


@needs_x86
def test_wrong_int8_products_are_an_error(checkpoint: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(kernels, "has_exact_int8", lambda: True)
    product = kernels.Int8Weight._product
    monkeypatch.setattr(kernels.Int8Weight, "_product", lambda self, *args: product(self, *args).clamp_max(0.1))
    with pytest.raises(ValueError, match=r"cannot run dtype='int8' .*not near the float ones.*: use dtype='"):
        KaLMReranker(checkpoint, device="cpu", dtype="int8").load()


@pytest.mark.parametrize("fast", [True, False])
def test_the_way_out_of_int8_helps_on_this_machine(checkpoint: Path, monkeypatch: Any, fast: bool) -> None:
    """bfloat16 is only advised where the CPU is fast at it."""
    monkeypatch.setattr(kernels, "has_exact_int8", lambda: False)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(kernels, "has_fast_bfloat16", lambda: fast)
    with pytest.raises(ValueError, match="no instructions") as raised:
        KaLMReranker(checkpoint, device="cpu", dtype="int8").load()
    advice = str(raised.value).split("products): ")[1]
    assert advice.startswith("use dtype='bfloat16'" if fast else "use dtype='float32'")
    assert ("prefill_storage='int8'" in advice) == (not fast)


@pytest.mark.parametrize("fast", [True, False])
def test_slow_float16_is_said(checkpoint: Path, monkeypatch: Any, caplog: pytest.LogCaptureFixture, fast: bool) -> None:
    monkeypatch.setattr(kernels, "has_fast_float16", lambda: fast)
    monkeypatch.setattr(kernels, "has_fast_bfloat16", lambda: False)
    KaLMReranker(checkpoint, device="cpu", cache=None, dtype="float16").load()
    said = "dtype='float16' is slower than float32 on this CPU: use dtype='float32'" in caplog.text
    assert said == (not fast)


_OLD_PROCESSOR = """
import sys
import textwrap
from kalm_rag import KaLMReranker
from kalm_rag.model import cpu_kernels as kernels
for dtype in ("float32", "bfloat16"):
    reranker = KaLMReranker(sys.argv[1], device="cpu", cache=None, dtype=dtype)
    print(reranker.predict([("query", "a passage")])[0])
print(reranker.scorer.loaded.compute_dtype)
try:
    KaLMReranker(sys.argv[1], device="cpu", dtype="int8").load()
except ValueError as error:
    print(error)
"""


@needs_x86
def test_a_processor_without_bfloat16_and_vnni(checkpoint: Path, reranker: KaLMReranker) -> None:
    """oneDNN and torch can be limited to an older instruction set, and then behave as they do there."""
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _OLD_PROCESSOR, str(checkpoint)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    exact, narrow, computes, message = done.stdout.splitlines()
    score = reranker.predict([("query", "a passage")])[0]
    assert abs(float(exact) - score) < 1e-5
    assert abs(float(narrow) - score) < 0.02
    assert computes == "torch.float32"
    assert done.stderr.count("multiplies bfloat16 more slowly than float32") == 1
    assert "no instructions (VNNI) for exact sums of 8-bit products" in message
    assert "use dtype='float32'" in message


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_slow_bfloat16_is_computed_in_float32(
    checkpoint: Path, passages: list[str], tmp_path: Path, monkeypatch: Any, no_bfloat16: Machine, machine: str
) -> None:
    """Weights, states and prefilled passages stay in bfloat16; every product, the attention's too, is in float32."""
    monkeypatch.setattr("platform.machine", lambda: machine)
    pairs = [("query", text) for text in ["", *passages[:3], passages[0] * 2]]
    exact = KaLMReranker(checkpoint, device="cpu", cache=None).predict(pairs)
    reranker = KaLMReranker(checkpoint, device="cpu", dtype="bfloat16", cache=tmp_path, score_memory=0)
    engine = reranker.scorer
    products: set[torch.dtype] = set()
    for name in ("linear", "bmm", "baddbmm"):
        place = nn.functional if name == "linear" else torch
        original = getattr(place, name)

        def spy(first: torch.Tensor, *args: Any, original: Any = original, **options: Any) -> Any:
            products.update(value.dtype for value in (first, *args) if isinstance(value, torch.Tensor))
            return original(first, *args, **options)

        monkeypatch.setattr(place, name, spy)
    found = reranker.predict(pairs)
    warm = reranker.predict(pairs)
    assert found == warm
    assert products == {torch.float32}
    assert max(abs(ours - theirs) for ours, theirs in zip(found, exact, strict=True)) < 0.02
    assert found != exact
    assert engine.loaded.dtype == torch.bfloat16
    assert {weight.dtype for weight in engine.loaded.model.parameters()} == {torch.bfloat16}
    assert {item.key_values.dtype for item in engine.passage_kv.cached.memory.values()} == {torch.bfloat16}
    [states] = engine.states.encoder.encode(engine.prompts.passages(passages[:1]), 4)
    assert states.states.dtype == torch.bfloat16
    again = KaLMReranker(checkpoint, device="cpu", dtype="bfloat16", cache=tmp_path)
    assert again.encode([text for _, text in pairs]).new == 0
    plain = KaLMReranker(checkpoint, device="cpu", dtype="bfloat16", cache=tmp_path, prefill_memory=0)
    assert max(abs(a - b) for a, b in zip(plain.predict(pairs), found, strict=True)) < 0.02


def test_the_warning_of_slow_bfloat16_comes_once(checkpoint: Path, no_bfloat16: Machine, caplog: Any) -> None:
    for dtype in ("float32", "bfloat16", "bfloat16"):
        KaLMReranker(checkpoint, device="cpu", cache=None, dtype=dtype).load()
        warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
        assert len(warnings) == (dtype == "bfloat16")
    assert "products are computed in float32" in warnings[0].getMessage()


@needs_bfloat16
def test_fast_bfloat16_stays_bfloat16(checkpoint: Path, onednn_is_faster: Machine) -> None:
    loaded = load(checkpoint, "bfloat16")
    assert loaded.compute_dtype == loaded.attention_dtype == torch.bfloat16
    assert not [m for m in loaded.model.modules() if isinstance(getattr(m, "matrix", None), kernels.WidenedWeight)]


@pytest.mark.parametrize("bias", [False, True])
@torch.inference_mode()
def test_a_wide_matrix_multiplies_in_float32(bias: bool) -> None:
    linear = nn.Linear(64, 48, bias=bias).bfloat16()
    data = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(kernels.WidenedWeight(linear).product(data), linear.float()(data))


@contextlib.contextmanager
def foreign_default(kind: str) -> Iterator[None]:
    """What a host program may set for itself."""
    if kind == "dtype":
        torch.set_default_dtype(torch.bfloat16)
    else:
        torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


@pytest.mark.parametrize("kind", ["dtype", "device"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", pytest.param("int8", marks=needs_int8)])
def test_the_defaults_of_the_host_program_change_nothing(
    checkpoint: Path, passages: list[str], tmp_path: Path, dtype: str, kind: str
) -> None:
    """Loading, encoding, reading from disk, and every ratio, under another default dtype and another default device."""

    def scores(folder: str) -> list[float]:
        found = []
        for memory in (10**9, 0):  # The second one reads what the first one wrote, and runs full prompts.
            options: dict[str, Any] = {"dtype": dtype, "prefill_memory": memory, "cache": tmp_path / folder}
            with KaLMReranker(checkpoint, device="cpu", **options) as reranker:
                for ratio in (4, 8, 6):
                    found += reranker.predict([("query", text[:200]) for text in passages[:2]], ratio=ratio)
        return found

    expected = scores("own")
    with foreign_default(kind):
        assert scores("foreign") == expected


@pytest.mark.parametrize("kind", ["dtype", "device"])
def test_the_machine_is_measured_alike_under_foreign_defaults(nothing_measured: None, kind: str) -> None:
    exact = ON_X86 and kernels.has_exact_int8()
    with foreign_default(kind):
        assert kernels.has_fast_bfloat16() == HAS_BFLOAT16
        assert kernels.choices()[0].seconds.keys() == {"float32", "bfloat16"}
        assert (ON_X86 and kernels.has_exact_int8()) == exact


@pytest.mark.parametrize(
    ("times", "fast", "measured"),
    [
        ([(1.0, 0.5)], True, 1),
        ([(1.0, 9.0)], False, 1),
        ([(1.0, 2.0), (1.1, 0.6)], True, 2),
        ([(2.0, 3.0), (1.0, 3.0), (1.0, 1.2), (1.0, 1.3), (1.0, 1.4)], False, 5),
    ],
)
def test_a_doubtful_time_of_bfloat16_is_measured_again(
    nothing_measured: None, monkeypatch: Any, times: list[tuple[float, float]], fast: bool, measured: int
) -> None:
    """A busy machine must not make a fast CPU a slow one."""
    left = list(times)
    monkeypatch.setattr(kernels, "shortest_times", lambda actions: dict(zip(actions, left.pop(0), strict=True)))
    assert kernels.has_fast_bfloat16() == fast
    assert len(times) - len(left) == measured


def test_other_processors_keep_the_stock_modules(checkpoint: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert nn.Linear in {type(module) for module in load(checkpoint).model.get_decoder().layers.modules()}
    with pytest.raises(ValueError, match=r"8-bit matrices are for x86 processors, this is aarch64.*: use dtype='"):
        KaLMReranker(checkpoint, device="cpu", dtype="int8").load()


@needs_x86
@torch.inference_mode()
def test_the_largest_number_stays_the_largest() -> None:
    """Whatever way the zero is rounded, nothing goes over the edge of 8 bits."""
    linear = nn.Linear(8, 8, bias=False)
    for low, high in [
        (-3.0, 3.0),
        (-1.0, 3.0),
        (-0.49, 126.51),
        (-126.51, 0.49),
        (0.0, 5.0),
        (-5.0, 0.0),
        (-1.5, 252.5),
    ]:
        rounded, scale, zero = kernels.Int8Weight(linear).input(torch.tensor([low, high, 0.0]))
        found = (rounded.float() - zero) * scale
        assert (found - torch.tensor([low, high, 0.0])).abs().max() <= scale


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", pytest.param("int8", marks=needs_int8)])
def test_a_caller_s_autocast_changes_nothing(checkpoint: Path, passages: list[str], dtype: str) -> None:
    """Passages of such different lengths that a token of padding sees nothing in its window."""
    pairs = [("query", text) for text in ["x", "two words", passages[0] * 2, *passages[:3]]]
    expected = KaLMReranker(checkpoint, device="cpu", cache=None, dtype=dtype).predict(pairs)
    with torch.autocast("cpu", torch.bfloat16):
        assert KaLMReranker(checkpoint, device="cpu", cache=None, dtype=dtype).predict(pairs) == expected


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kernels.Int8Weight, marks=needs_int8),
        pytest.param(kernels.RowInt8Weight, marks=needs_int8),
        pytest.param(kernels.BFloat16Weight, marks=needs_bfloat16),
    ],
)
@torch.inference_mode()
def test_narrow_products_are_near(kind: Any) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 48, bias=False)
    matrix = kind(linear)
    for data in (torch.randn(20, 64), torch.rand(2, 5, 64) + 3, -torch.rand(4, 64), torch.zeros(2, 64)):
        ours = matrix.product(matrix.input(data))
        assert ours.dtype == torch.float32
        assert (ours - linear(data)).abs().max() <= 0.02 * (1 + data.abs().max())


@needs_int8
@torch.inference_mode()
def test_a_row_scale_is_exact_where_rows_differ() -> None:
    """Next to a row a thousand times as large, one scale for all leaves nothing of a row."""
    torch.manual_seed(0)
    linear = nn.Linear(64, 48, bias=False)
    data = torch.randn(2, 64) * torch.tensor([[1.0], [1000.0]])
    small = linear(data)[0]
    errors = [
        float((matrix.product(matrix.input(data))[0] - small).abs().max() / small.abs().max())
        for matrix in (kernels.Int8Weight(linear), kernels.RowInt8Weight(linear))
    ]
    assert errors[1] < 0.02 < 0.5 < errors[0]


@needs_int8
@pytest.mark.parametrize("fast", [False, pytest.param(True, marks=needs_bfloat16)])
def test_int8_projections_are_what_the_processor_is_fast_at(
    checkpoint: Path, passages: list[str], monkeypatch: Any, nothing_measured: None, fast: bool
) -> None:
    """And so is the attention, whose prefilled keys and values are kept in bfloat16."""
    monkeypatch.setattr(kernels, "shortest_times", Machine("oneDNN", "bfloat16" if fast else "float32"))
    expected = KaLMReranker(checkpoint, device="cpu", cache=None).predict([("query", text) for text in passages[:6]])
    reranker = KaLMReranker(checkpoint, device="cpu", cache=None, dtype="int8")
    loaded = reranker.scorer.loaded
    layer = loaded.model.get_decoder().layers[0]
    assert type(layer.self_attn.k_proj.matrix) is (kernels.BFloat16Weight if fast else kernels.PackedWeight)
    assert type(layer.self_attn.o_proj.matrix) is type(layer.mlp.down) is kernels.RowInt8Weight
    assert type(layer.mlp.gate) is type(layer.mlp.up) is kernels.Int8Weight
    assert loaded.prefill_dtype == torch.bfloat16
    assert loaded.attention_dtype == (torch.bfloat16 if fast else torch.float32)
    for ours, exact in zip(reranker.predict([("query", text) for text in passages[:6]]), expected, strict=True):
        assert abs(ours - exact) < 0.03


@needs_x86
def test_checking_and_measuring_leave_the_random_numbers_of_others_alone(nothing_measured: None) -> None:
    model = Model(nn.Linear(24, 24, bias=False))
    before = torch.get_rng_state()
    kernels.has_fast_bfloat16()
    kernels.has_exact_int8()
    kernels.optimize_for_cpu(model)
    assert len(kernels.choices()) == 2
    assert torch.equal(torch.get_rng_state(), before)


@needs_x86
def test_a_process_keeps_few_kernels() -> None:
    """oneDNN compiles one for each number of rows, and would keep 1,024 of them; a user's own number stays."""
    script = """
        import os
        import torch
        from kalm_rag.model.cpu_weights import PackedWeight

        def resident():
            return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

        matrix = PackedWeight(torch.nn.Linear(64, 64, bias=False))
        with torch.inference_mode():
            matrix.product(torch.zeros(1, 64))
            before = resident()
            for rows in range(2, 402):
                matrix.product(torch.zeros(rows, 64))
        print(resident() - before, os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"], os.environ["LRU_CACHE_CAPACITY"])
    """
    if not Path("/proc/self/statm").exists():
        pytest.skip("reads resident memory from /proc")
    grown, numbers = [], []
    names = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
    inherited = {name: value for name, value in os.environ.items() if name not in names}
    for asked in ({}, dict.fromkeys(names, "1024")):
        run = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script)],
            env={**inherited, **asked},
            capture_output=True,
            text=True,
            check=True,
        )
        grew, *found = map(int, run.stdout.split())
        grown.append(grew)
        numbers.append(found)
    assert numbers == [[128, 8], [1024, 1024]], "the numbers of docs/how-to/speed.md"
    few, many = grown
    assert few < 0.6 * many
