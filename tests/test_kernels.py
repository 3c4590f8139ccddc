"""Faster modules give the original's numbers, and what would give others, or none, stays as it was."""

from __future__ import annotations

import logging
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kalm_rag import KaLMReranker, encoder_attention, kernels
from kalm_rag.checkpoint import find_checkpoint
from kalm_rag.engine import Engine
from kalm_rag.loading import LoadedModel, load_model
from kalm_rag.settings import Settings

LIMITS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""Parts of the largest number."""


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
    """What `speed_up` wants of a model."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Identity(), nn.Sequential(*parts)
        self.encoder.set_attn_implementation = lambda _: None  # type: ignore[assignment]

    def get_encoder(self) -> Any:
        return self.encoder

    def get_decoder(self) -> Any:
        return self.decoder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [(1,), (3, 7), (2, 300)])
@torch.inference_mode()
def test_each_module_equals_the_original(checkpoint: Path, dtype: torch.dtype, rows: tuple[int, ...]) -> None:
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


def test_every_matrix_and_norm_is_replaced_and_the_encoder_attends_otherwise(
    checkpoint: Path, passages: list[str], monkeypatch: Any
) -> None:
    calls: list[int | None] = []
    columns = encoder_attention._columns

    def spy(rows: slice, tokens: int, mask: Any, window: int | None) -> slice:
        calls.append(window)
        return columns(rows, tokens, mask, window)

    monkeypatch.setattr(encoder_attention, "_columns", spy)
    KaLMReranker(checkpoint, device="cpu", cache=None).encode(passages[:1])
    assert set(calls) == {None, 48}
    model = load(checkpoint).model
    for part in (model.get_encoder(), model.get_decoder()):
        kinds = [type(module).__name__ for module in part.modules()]
        assert not [kind for kind in kinds if kind == "Linear" or (kind.endswith("MLP") and kind != "FastMLP")]
        assert not [kind for kind in kinds if kind.endswith("RMSNorm") and kind != "FastRMSNorm"]


def test_the_whole_model_equals_the_stock_one(checkpoint: Path, passages: list[str], monkeypatch: Any) -> None:
    """Encoder, full prompts and prefilled passages; window and blocks are smaller than the passages."""
    monkeypatch.setattr(encoder_attention, "_ROWS_IN_WINDOW", 16)
    monkeypatch.setattr(encoder_attention, "_ROWS", 40)
    monkeypatch.setattr(encoder_attention, "_SCORES", 10_000)
    pairs = [(query, text) for query in ("how to sort", "") for text in ["", *passages[:6], passages[0] * 4]]
    margins = {}
    for fast in (False, True):
        for memory in (0, 10**9):
            settings = Settings(prefill_memory=memory)
            checkpoint_ = find_checkpoint(str(checkpoint))
            loaded = load_model(checkpoint_, settings=settings, device=torch.device("cpu"), dtype="float32", fast=fast)
            cache = KaLMReranker(checkpoint, cache=None).cache
            engine = Engine(loaded, checkpoint_, settings, cache)
            margins[fast, memory] = torch.tensor([s.margin for s in engine.score(pairs, settings.instruction, 4)])
    plain = margins[False, 0]
    assert plain.std() > 0.01
    for found in margins.values():
        assert (found - plain).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 9, 16])
@pytest.mark.parametrize("lengths", [[50], [50, 33, 1, 50], [130, 7]])
@torch.inference_mode()
def test_encoder_attention_equals_the_fused_kernel(
    monkeypatch: Any, dtype: torch.dtype, window: int | None, lengths: list[int]
) -> None:
    monkeypatch.setattr(encoder_attention, "_ROWS_IN_WINDOW", 16)
    monkeypatch.setattr(encoder_attention, "_ROWS", 48)
    monkeypatch.setattr(encoder_attention, "_SCORES", 4 * 16 * 40)
    tokens = max(lengths)
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(len(lengths), 4, tokens, 8, generator=generator).to(dtype)
    key, value = (torch.randn(len(lengths), 2, tokens, 8, generator=generator).to(dtype) for _ in range(2))
    place = torch.arange(tokens)
    distance = place[:, None] - place
    seen = torch.ones(tokens, tokens, dtype=torch.bool)
    if window is not None:
        seen = (distance < (window + 1) // 2) & (-distance < window // 2 + 1)
    mask = seen & (place < torch.tensor(lengths)[:, None])[:, None, None, :]
    ours, weights = encoder_attention.encoder_attention(
        None, query, key, value, mask, scaling=0.3, sliding_window=window
    )
    original = nn.functional.scaled_dot_product_attention(
        query, *(part.repeat_interleave(2, dim=1) for part in (key, value)), attn_mask=mask, scale=0.3
    ).transpose(1, 2)
    assert weights is None
    assert ours.shape == original.shape
    assert torch.isfinite(ours).all()
    for row, length in enumerate(lengths):
        assert change(ours[row, :length], original[row, :length]) <= LIMITS[dtype]


@torch.inference_mode()
def test_encoder_attention_believes_the_mask_more_than_the_window(monkeypatch: Any) -> None:
    """Of a model whose window reaches further than it says."""
    monkeypatch.setattr(encoder_attention, "_ROWS_IN_WINDOW", 8)
    query, key, value = (torch.randn(1, 2, 60, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    mask = torch.ones(1, 1, 60, 60, dtype=torch.bool)
    ours, _ = encoder_attention.encoder_attention(None, query, key, value, mask, sliding_window=4)
    original = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)
    assert change(ours, original) <= 1e-5


def test_what_gives_other_numbers_stays(caplog: Any) -> None:
    model = Model(StrangeRMSNorm(), MLP(nn.functional.silu), nn.Linear(24, 24))
    original = list(model.get_decoder())
    data = torch.randn(3, 24, generator=torch.Generator().manual_seed(2))
    expected = [part(data) for part in original]
    with caplog.at_level(logging.INFO, "kalm_rag"):
        kernels.speed_up(model)
    assert list(model.get_decoder()) == original
    assert type(model.get_decoder()[1].gate_proj) is kernels.FastLinear
    for part, before in zip(original, expected, strict=True):
        assert torch.allclose(part(data), before, atol=1e-5)
    assert "other numbers for 1 modules" in caplog.text


def test_without_onednn_the_stock_modules_run(checkpoint: Path, passages: list[str], monkeypatch: Any) -> None:
    pairs = [("query", text) for text in passages[:4]]
    expected = KaLMReranker(checkpoint, device="cpu", cache=None).predict(pairs)

    def missing(*_: Any) -> None:
        msg = "'_OpNamespace' 'mkldnn' object has no attribute '_linear_pointwise'"
        raise AttributeError(msg)

    monkeypatch.setattr(kernels.Matrix, "__init__", missing)
    reranker = KaLMReranker(checkpoint, device="cpu", cache=None)
    assert torch.nn.Linear in {type(m) for m in reranker._loaded().loaded.model.get_decoder().layers.modules()}
    for ours, theirs in zip(reranker.predict(pairs), expected, strict=True):
        assert abs(ours - theirs) < 1e-5
    monkeypatch.setattr(kernels.Int8Matrix, "__init__", missing)
    with pytest.raises(ValueError, match=r"torch .* cannot run int8 matrices on this machine .*: use bfloat16"):
        KaLMReranker(checkpoint, device="cpu", dtype="int8").load()


def test_wrong_int8_products_are_an_error(checkpoint: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(kernels, "has_exact_int8", lambda: True)
    product = kernels.Int8Matrix._product
    monkeypatch.setattr(kernels.Int8Matrix, "_product", lambda self, *args: product(self, *args).clamp_max(0.1))
    with pytest.raises(ValueError, match=r"cannot run int8 matrices .*not near the float ones.*: use bfloat16"):
        KaLMReranker(checkpoint, device="cpu", dtype="int8").load()


_OLD_PROCESSOR = """
import sys
from kalm_rag import KaLMReranker
exact = KaLMReranker(sys.argv[1], device="cpu", cache=None).predict([("query", "a passage")])
print(exact[0])
try:
    KaLMReranker(sys.argv[1], device="cpu", dtype="int8").load()
except ValueError as error:
    print(error)
"""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="of x86 instruction sets")
def test_a_processor_whose_8_bit_sums_overflow(checkpoint: Path, reranker: KaLMReranker) -> None:
    """oneDNN can be told to use an older instruction set, and then overflows as it does there."""
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    command = [sys.executable, "-c", _OLD_PROCESSOR, str(checkpoint)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    score, message = done.stdout.splitlines()
    assert abs(float(score) - reranker.predict([("query", "a passage")])[0]) < 1e-5
    assert "no instructions (VNNI) for exact sums of 8-bit products" in message


def test_other_processors_keep_the_stock_modules(checkpoint: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert nn.Linear in {type(module) for module in load(checkpoint).model.get_decoder().layers.modules()}
    with pytest.raises(ValueError, match=r"8-bit matrices are for x86 processors, this is aarch64.*: use bfloat16"):
        KaLMReranker(checkpoint, device="cpu", dtype="int8").load()


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
        rounded, scale, zero = kernels.Int8Matrix(linear).input(torch.tensor([low, high, 0.0]))
        found = (rounded.float() - zero) * scale
        assert (found - torch.tensor([low, high, 0.0])).abs().max() <= scale


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_caller_s_autocast_changes_nothing(checkpoint: Path, passages: list[str], dtype: str) -> None:
    """Passages of such different lengths that a token of padding sees nothing in its window."""
    pairs = [("query", text) for text in ["x", "two words", passages[0] * 2, *passages[:3]]]
    expected = KaLMReranker(checkpoint, device="cpu", cache=None, dtype=dtype).predict(pairs)
    with torch.autocast("cpu", torch.bfloat16):
        assert KaLMReranker(checkpoint, device="cpu", cache=None, dtype=dtype).predict(pairs) == expected


@pytest.mark.parametrize("kind", [kernels.Int8Matrix, kernels.RowInt8Matrix, kernels.NarrowMatrix])
@torch.inference_mode()
def test_narrow_products_are_near(kind: Any) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 48, bias=False)
    matrix = kind(linear)
    for data in (torch.randn(20, 64), torch.rand(2, 5, 64) + 3, -torch.rand(4, 64), torch.zeros(2, 64)):
        ours = matrix.product(matrix.input(data))
        assert ours.dtype == torch.float32
        assert (ours - linear(data)).abs().max() <= 0.02 * (1 + data.abs().max())


@torch.inference_mode()
def test_a_row_scale_is_exact_where_rows_differ() -> None:
    """Next to a row a thousand times as large, one scale for all leaves nothing of a row."""
    torch.manual_seed(0)
    linear = nn.Linear(64, 48, bias=False)
    data = torch.randn(2, 64) * torch.tensor([[1.0], [1000.0]])
    small = linear(data)[0]
    errors = [
        float((matrix.product(matrix.input(data))[0] - small).abs().max() / small.abs().max())
        for matrix in (kernels.Int8Matrix(linear), kernels.RowInt8Matrix(linear))
    ]
    assert errors[1] < 0.02 < 0.5 < errors[0]


@pytest.mark.parametrize("capabilities", [{}, {"avx512_bf16": True}])
def test_int8_projections_are_what_the_processor_is_fast_at(
    checkpoint: Path, passages: list[str], monkeypatch: Any, capabilities: dict[str, bool]
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    expected = KaLMReranker(checkpoint, device="cpu", cache=None).predict([("query", text) for text in passages[:6]])
    reranker = KaLMReranker(checkpoint, device="cpu", cache=None, dtype="int8")
    layer = reranker._loaded().loaded.model.get_decoder().layers[0]
    assert type(layer.self_attn.k_proj.matrix) is (kernels.NarrowMatrix if capabilities else kernels.Matrix)
    assert type(layer.self_attn.o_proj.matrix) is type(layer.mlp.down) is kernels.RowInt8Matrix
    assert type(layer.mlp.gate) is type(layer.mlp.up) is kernels.Int8Matrix
    for ours, exact in zip(reranker.predict([("query", text) for text in passages[:6]]), expected, strict=True):
        assert abs(ours - exact) < 0.03


def test_checking_leaves_the_random_numbers_of_others_alone() -> None:
    model = Model(nn.Linear(24, 24, bias=False))
    before = torch.get_rng_state()
    kernels.speed_up(model)
    assert type(model.get_decoder()[0]) is kernels.FastLinear
    assert torch.equal(torch.get_rng_state(), before)
