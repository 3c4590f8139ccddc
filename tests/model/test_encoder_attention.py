"""Passages side by side give the states that each gives alone in the stock encoder."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from machine import needs_int8
from torch import nn

from kalm_rag import KaLMReranker
from kalm_rag.model import encoder, encoder_attention
from kalm_rag.model.checkpoint import find_checkpoint
from kalm_rag.model.encoder_attention import PackedEncoder, Packing
from kalm_rag.model.loading import load_model
from kalm_rag.settings import Settings

BEFORE, AFTER = 4, 3
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""Parts of the largest number."""


def change(ours: torch.Tensor, expected: torch.Tensor) -> float:
    return float((ours.float() - expected.float()).abs().max() / expected.float().abs().max())


@pytest.fixture
def small_blocks(monkeypatch: Any) -> None:
    """Blocks smaller than the passages."""
    monkeypatch.setattr(encoder_attention, "_ROWS_IN_WINDOW", 16)
    monkeypatch.setattr(encoder_attention, "_ROWS", 48)
    monkeypatch.setattr(encoder_attention, "_MOST_SCORES", 2000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("heads", [(4, 2), (4, 1), (2, 2)])
@pytest.mark.parametrize("lengths", [[50], [150, 33, 1, 50], [130, 7]])
@torch.inference_mode()
def test_packed_attention_equals_the_fused_kernel(
    small_blocks: None, dtype: torch.dtype, window: int | None, heads: tuple[int, int], lengths: list[int]
) -> None:
    generator = torch.Generator().manual_seed(0)
    many, few = heads
    tokens = sum(lengths)
    query = torch.randn(1, many, tokens, 8, generator=generator).to(dtype)
    key, value = (torch.randn(1, few, tokens, 8, generator=generator).to(dtype) for _ in range(2))
    packing = Packing(lengths, BEFORE, AFTER)
    module = nn.Module()
    module.layer_idx = 5  # type: ignore[assignment]
    ours, weights = encoder_attention.encoder_attention(
        module, query, key, value, None, scaling=0.3, sliding_window=window, packing=packing
    )
    assert (weights, packing.used) == (None, {5})
    passage = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    distance = torch.arange(tokens) - torch.arange(tokens)[:, None]
    mask = passage == passage[:, None]
    if window is not None:
        mask &= (distance >= -BEFORE) & (distance <= AFTER)
    original = nn.functional.scaled_dot_product_attention(
        query, *(part.repeat_interleave(many // few, dim=1) for part in (key, value)), attn_mask=mask, scale=0.3
    ).transpose(1, 2)
    assert ours.shape == original.shape
    assert change(ours, original) <= LIMITS[dtype]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_packed_states_equal_those_of_the_stock_encoder(
    checkpoint: Path, passages: list[str], small_blocks: None, dtype: str
) -> None:
    """The checkpoint's window is smaller than the longest passages."""
    texts = [passages[0] * 4, "x", *passages[:5], passages[0]]
    stock = load_model(
        find_checkpoint(str(checkpoint)), settings=Settings(), device=torch.device("cpu"), dtype=dtype, fast=False
    )
    scorer = KaLMReranker(checkpoint, device="cpu", cache=None, dtype=dtype).scorer
    tokens = scorer.prompts.passages(texts)
    ours = scorer.states.encoder.encode(tokens, 4)
    for passage, found in zip(tokens, ours, strict=True):
        assert (found.tokens, found.ratio) == (len(passage.ids), 4)
        with torch.inference_mode():
            hidden = stock.model.get_encoder()(input_ids=torch.tensor([passage.ids])).last_hidden_state[0]
        expected = torch.stack([part.float().mean(dim=0) for part in hidden.split(4)])
        assert change(found.states, expected) <= {"float32": 1e-5, "bfloat16": 5e-2}[dtype]


def test_states_do_not_hold_the_whole_batch(checkpoint: Path, passages: list[str]) -> None:
    scorer = KaLMReranker(checkpoint, device="cpu", cache=None).scorer
    for ratio in (1, 4):
        for states in scorer.states.encoder.encode(scorer.prompts.passages(passages[:3]), ratio):
            assert states.states.untyped_storage().nbytes() == states.nbytes


def test_a_batch_on_a_cpu_is_small(checkpoint: Path, passages: list[str], monkeypatch: Any) -> None:
    """Whatever `batch_tokens` says: it is an upper bound."""
    monkeypatch.setattr(encoder, "_CPU_TOKENS", 100)
    scorer = KaLMReranker(checkpoint, device="cpu", cache=None).scorer
    tokens = scorer.prompts.passages([text[:100] for text in passages[:20]])
    batches = list(scorer.states.encoder.batches(tokens))
    assert sorted(place for batch in batches for place in batch) == list(range(20))
    assert all(len(batch) == 1 or sum(len(tokens[place].ids) for place in batch) <= 100 for batch in batches)
    assert max(map(len, batches)) > 1


@pytest.mark.parametrize("fault", ["not passed on", "no dictionary of masks", "another window"])
def test_a_version_that_cannot_pack_encodes_with_padding(
    checkpoint: Path, passages: list[str], monkeypatch: Any, caplog: Any, fault: str
) -> None:
    expected = KaLMReranker(checkpoint, device="cpu", cache=None).predict([("query", text) for text in passages[:5]])
    if fault == "another window":
        from transformers.models.t5gemma2 import modeling_t5gemma2

        monkeypatch.delattr(modeling_t5gemma2, "sliding_window_mask_function")
        assert not PackedEncoder(load(checkpoint).model.get_encoder()).is_usable
        return
    reranker = KaLMReranker(checkpoint, device="cpu", cache=None)
    model = reranker.scorer.loaded.model.get_encoder()
    forward = model.forward

    def older(**kwargs: Any) -> Any:
        if kwargs.pop("packing", None) is not None and fault == "no dictionary of masks":
            raise TypeError("masks must be tensors")
        return forward(**kwargs)

    monkeypatch.setattr(model, "forward", older)
    with caplog.at_level(logging.WARNING, "kalm_rag"):
        ours = reranker.predict([("query", text) for text in passages[:5]])
        reranker.encode(passages[5:8])
    assert max(abs(a - b) for a, b in zip(ours, expected, strict=True)) <= 1e-5
    assert caplog.text.count("with padding") == 1


def load(checkpoint: Path) -> Any:
    return load_model(
        find_checkpoint(str(checkpoint)), settings=Settings(), device=torch.device("cpu"), dtype="float32"
    )


@torch.inference_mode()
def test_other_calls_of_the_encoder_are_the_stock_ones(checkpoint: Path) -> None:
    fast = load(checkpoint).model.get_encoder()
    PackedEncoder(fast)
    stock = load_model(
        find_checkpoint(str(checkpoint)), settings=Settings(), device=torch.device("cpu"), dtype="float32", fast=False
    ).model.get_encoder()
    ids = torch.arange(10, 100)[None]
    assert change(fast(input_ids=ids).last_hidden_state, stock(input_ids=ids).last_hidden_state) <= 1e-5


@needs_int8
def test_an_int8_encoder_is_near_and_has_entries_of_its_own(
    checkpoint: Path, passages: list[str], tmp_path: Path
) -> None:
    """And its states do not depend on what shares a batch."""
    pairs = [("query", text) for text in passages[:6]]
    exact = KaLMReranker(checkpoint, device="cpu", cache=tmp_path)
    expected = exact.predict(pairs)
    exact.cache.flush()
    whole = KaLMReranker(checkpoint, device="cpu", cache=tmp_path, dtype="int8-all")
    assert whole.unknown(passages[:6]) == list(dict.fromkeys(passages[:6]))
    assert max(abs(a - b) for a, b in zip(whole.predict(pairs), expected, strict=True)) < 0.03
    assert whole.scorer.loaded.precision == "int8 decoder and encoder"
    assert not [
        module
        for module in whole.scorer.loaded.model.get_encoder().modules()
        if isinstance(module, nn.Linear) and module.bias is None
    ]
    tokens = whole.scorer.prompts.passages(passages[:4])
    together = whole.scorer.states.encoder.encode(tokens, 4)
    alone = [whole.scorer.states.encoder.encode([one], 4)[0] for one in tokens]
    assert all(change(a.states, b.states) <= 1e-5 for a, b in zip(together, alone, strict=True))
    assert exact.forget(passages[:6]).total > 0
    whole.close()
    assert KaLMReranker(checkpoint, device="cpu", cache=tmp_path, dtype="int8-all").unknown(passages[:6]) == list(
        dict.fromkeys(passages[:6])
    )
