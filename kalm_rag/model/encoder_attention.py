"""The encoder's attention on a CPU: passages side by side without padding, and only where the sliding window reaches.

A batch is one long row of tokens. Its layers multiply no padding, and need no masks: each passage attends to itself, as
plain matrix products, which at a head width of 256 beat torch's fused kernel. In five of six layers a token sees its
neighbours only: the fused kernel computes all pairs and throws most away, which for 4,096 tokens is nine tenths.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from kalm_rag.utils.turns import give_way

logger = logging.getLogger(__name__)

IMPLEMENTATION = "kalm_rag_encoder"
"""Name under which the attention is registered with transformers."""

_ROWS_IN_WINDOW, _ROWS = 128, 512
"""Query tokens per block, in layers with and without a sliding window; without one, fewer for long passages."""

_MOST_SCORES = 2_000_000
"""Scores at a time, as far as blocks of 64 tokens allow."""


@dataclass(slots=True)
class Packing:
    """Passages side by side in one row of tokens.

    Attributes:
        lengths: tokens of each passage, in order.
        before: how many earlier tokens a token sees in a layer with a sliding window.
        after: how many later ones.
        used: layers that have read it, so that a forward that did not pass it on is noticed.
    """

    lengths: Sequence[int]
    before: int
    after: int
    used: set[int] = field(default_factory=set)

    def passages(self) -> Iterator[slice]:
        """Yield the place of each passage."""
        start = 0
        for length in self.lengths:
            yield slice(start, start + length)
            start += length


def encoder_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    packing: Packing | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Compute the attention of packed passages; without `packing`, the stock attention.

    Args:
        module: the attention layer.
        query: shape `(1, heads, tokens, head_dim)`, all passages side by side.
        key: shape `(1, kv_heads, tokens, head_dim)`.
        value: the same.
        attention_mask: for the stock attention.
        scaling: of the scores; default: `head_dim ** -0.5`.
        sliding_window: not None in a layer in which a token sees its neighbours only.
        packing: where the passages are.
        options: for the stock attention.

    Returns:
        Shape `(1, tokens, heads, head_dim)`.
    """
    if packing is None:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        stock = ALL_ATTENTION_FUNCTIONS["sdpa"]
        out, _ = stock(module, query, key, value, attention_mask, scaling=scaling, **options)
        return out, None
    give_way()
    packing.used.add(module.layer_idx)
    _, heads, tokens, width = query.shape
    kv_heads = key.shape[1]
    scale = width**-0.5 if scaling is None else scaling
    queries = query[0].transpose(0, 1).reshape(tokens, kv_heads, heads // kv_heads, width)
    found = torch.empty_like(queries)
    reach = None if sliding_window is None else (packing.before, packing.after)
    for place in packing.passages():
        for head in range(kv_heads):
            _attend(queries[place, head], key[0, head, place], value[0, head, place], scale, reach, found[place, head])
    return found.view(1, tokens, heads, width), None


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    reach: tuple[int, int] | None,
    out: torch.Tensor,
) -> None:
    """Write the attention of one passage to itself; scores are float32, as inside of the fused kernel.

    Args:
        query: shape `(tokens, heads, head_dim)`, of the heads that share the keys.
        key: shape `(tokens, head_dim)`.
        value: the same.
        scale: of the scores.
        reach: how many tokens before and after itself a token sees, or None for all.
        out: like `query`.
    """
    tokens, heads, width = query.shape
    columns = key.float()
    block = max(64, min(_ROWS, _MOST_SCORES // (heads * tokens))) if reach is None else _ROWS_IN_WINDOW
    before, after = (tokens, tokens) if reach is None else reach
    if before >= tokens - 1 <= after and heads * tokens * tokens <= _MOST_SCORES:
        block = tokens
    for start in range(0, tokens, block):
        stop = min(start + block, tokens)
        seen = slice(max(0, start - before), min(tokens, stop + after))
        rows = query[start:stop].reshape(-1, width)
        scores = (rows * scale if rows.dtype == torch.float32 else rows.float().mul_(scale)) @ columns[seen].T
        if stop - 1 - before > seen.start or start + after < seen.stop - 1:
            distance = torch.arange(seen.start, seen.stop) - torch.arange(start, stop)[:, None]
            hidden = (distance < -before) | (distance > after)
            scores.view(stop - start, heads, -1).masked_fill_(hidden[:, None], -torch.inf)
        weights = torch.softmax(scores, dim=-1).to(value.dtype)
        out[start:stop] = (weights @ value[seen]).view(stop - start, heads, width)


class PackedEncoder:
    """Runs a stock encoder on packed passages.

    Args:
        encoder: of transformers, on a CPU.

    Attributes:
        is_usable: whether this version of transformers can run packed passages.
    """

    def __init__(self, encoder: Any) -> None:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask

        self._encoder = encoder
        text = getattr(encoder, "text_model", encoder)
        self._layers = int(text.config.num_hidden_layers)
        self._types = set(text.config.layer_types)
        reach = _reach(text)
        self.is_usable = reach is not None
        self._before, self._after = reach or (0, 0)
        AttentionInterface.register(IMPLEMENTATION, encoder_attention)
        AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
        # On the text part: transformers warns about a vision tower that a config names and a model lacks.
        text.set_attn_implementation(IMPLEMENTATION)

    def run(self, passages: Sequence[Sequence[int]]) -> list[torch.Tensor] | None:
        """Return the last hidden states of each passage, shape `(tokens, width)`.

        Args:
            passages: token ids.

        Returns:
            None if this version of transformers does not pass on what the attention needs.
        """
        packing = Packing([len(ids) for ids in passages], self._before, self._after)
        ids = torch.tensor([token for ids in passages for token in ids], dtype=torch.int64, device="cpu")
        places = torch.cat([torch.arange(length, device="cpu") for length in packing.lengths])
        hidden = None
        try:
            hidden = self._encoder(
                input_ids=ids[None],
                position_ids=places[None],
                attention_mask=dict.fromkeys(self._types),
                packing=packing,
            ).last_hidden_state[0]
        except TypeError as error:
            logger.debug("the encoder does not take packed passages: %s", error)
        if hidden is None or len(packing.used) < self._layers:
            self.is_usable = False
            logger.warning(
                "this version of transformers does not pass arguments on to the encoder's attention: passages are "
                "encoded with padding, which takes longer"
            )
            return None
        return [hidden[place] for place in packing.passages()]


def _reach(text: Any) -> tuple[int, int] | None:
    """Return how many tokens before and after itself a token sees in a windowed layer, as transformers has it.

    None if it has it otherwise than as a range of neighbours.
    """
    window = getattr(text.config, "sliding_window", None)
    if window is None or "sliding_attention" not in text.config.layer_types:
        return 0, 0
    try:
        mask = sys.modules[type(text).__module__].sliding_window_mask_function(window, is_causal=False)
        distance = torch.arange(-2 * window, 2 * window + 1, device="cpu")
        seen = distance[mask(0, 0, torch.zeros_like(distance), distance)]
    except (AttributeError, KeyError, TypeError):
        logger.debug("this version of transformers has no sliding window as expected", exc_info=True)
        return None
    first, last = int(seen[0]), int(seen[-1])
    if len(seen) != last - first + 1 or not first <= 0 <= last or max(-first, last) == 2 * window:
        return None
    return -first, last
