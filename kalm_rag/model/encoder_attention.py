"""The encoder's attention on a CPU: plain matrix products, block by block, and only where the sliding window reaches.

At a head width of 256 plain products beat torch's fused kernel in bfloat16. In five of six layers a token sees its
neighbours only: the fused kernel computes all pairs and throws most away, which for 4,096 tokens is nine tenths.
"""

from __future__ import annotations

from typing import Any

import torch

IMPLEMENTATION = "kalm_rag_encoder"
"""Name under which the attention is registered with transformers."""

_ROWS_IN_WINDOW, _ROWS = 128, 512
"""Query tokens per block, in layers with and without a sliding window; without one, fewer for long passages."""

_SCORES = 500_000
"""Scores at a time of passages that share a block: as float32, about what a core's cache holds."""

_MOST_SCORES = 2_000_000
"""Scores at a time of one passage, as far as blocks of 64 tokens allow."""

_UNSEEN = -1e30
"""Added to the score of what is not seen. Not infinity: a token of padding may see nothing, and must not become NaN."""


def encoder_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Compute the stock attention's result block by block.

    Args:
        module: the attention layer.
        query: shape `(batch, heads, tokens, head_dim)`.
        key: shape `(batch, kv_heads, tokens, head_dim)`.
        value: the same.
        attention_mask: what sees what, boolean of shape `(batch, 1, tokens, tokens)`; None: everything.
        scaling: of the scores; default: `head_dim ** -0.5`.
        sliding_window: how many tokens see each other, or None.
        options: for the stock attention, which runs if the mask is of another kind.

    Returns:
        Shape `(batch, tokens, heads, head_dim)`.
    """
    if attention_mask is not None and attention_mask.dtype != torch.bool:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        stock = ALL_ATTENTION_FUNCTIONS["sdpa"]
        out, _ = stock(module, query, key, value, attention_mask, scaling=scaling, **options)
        return out, None
    batch, heads, tokens, width = query.shape
    scale = width**-0.5 if scaling is None else scaling
    out = query.new_empty(batch, tokens, heads, width)
    block = _ROWS_IN_WINDOW
    if sliding_window is None:
        block = max(64, min(_ROWS, _MOST_SCORES // (heads * tokens)))
    for start in range(0, tokens, block):
        rows = slice(start, min(start + block, tokens))
        columns = _columns(rows, tokens, attention_mask, sliding_window)
        together = max(1, _SCORES // (heads * (rows.stop - rows.start) * (columns.stop - columns.start)))
        for first in range(0, batch, together):
            passages = slice(first, first + together)
            mask = None if attention_mask is None else attention_mask[passages, :, rows, columns]
            found = _attend(
                query[passages, :, rows], key[passages, :, columns], value[passages, :, columns], mask, scale
            )
            out[passages, rows] = found.transpose(1, 2)
    return out, None


def _columns(rows: slice, tokens: int, mask: torch.Tensor | None, window: int | None) -> slice:
    """Return the range of tokens that any row of a block may see; the mask decides within it."""
    if mask is None or window is None:
        return slice(0, tokens)
    reach = window // 2 + 1
    columns = slice(max(0, rows.start - reach), min(tokens, rows.stop + reach))
    if mask[:, :, rows, : columns.start].any() or mask[:, :, rows, columns.stop :].any():
        return slice(0, tokens)
    return columns


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """One block; scores are float32, as inside of the fused kernel."""
    batch, heads, tokens, width = query.shape
    kv_heads, seen = key.shape[1:3]
    rows = query.reshape(batch * kv_heads, heads // kv_heads * tokens, width).float()
    columns = key.reshape(batch * kv_heads, seen, width).float().transpose(1, 2)
    if mask is None:
        scores = torch.bmm(rows, columns).mul_(scale)
    else:
        bias = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device).masked_fill_(~mask, _UNSEEN)
        bias = bias.expand(-1, heads, -1, -1).reshape(len(rows), -1, seen)
        scores = torch.baddbmm(bias, rows, columns, alpha=scale)
    weights = torch.softmax(scores, dim=-1).to(value.dtype)
    found = torch.bmm(weights, value.reshape(batch * kv_heads, seen, width))
    return found.view(batch, heads, tokens, width)


def install(encoder: Any) -> None:
    """Let an encoder use `encoder_attention`."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(IMPLEMENTATION, encoder_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
    # On its text part: transformers warns about a vision tower that a config names and a model lacks.
    getattr(encoder, "text_model", encoder).set_attn_implementation(IMPLEMENTATION)
