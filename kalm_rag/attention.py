"""Attention of a query's few tokens over a prefilled passage, plugged into the stock decoder.

The decoder's merged attention is one softmax over its own keys and the passage's (T5Gemma 2). Everything but the
query's own tokens is known beforehand, so it is laid out once for all layers, with room for the new keys at the end: no
layer copies it again. transformers' public `AttentionInterface` hands the decoder's attention to `merged_attention`,
and a keyword argument of the decoder's forward carries the `KeyValues`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

IMPLEMENTATION = "kalm_rag_merged"
"""Name under which the attention is registered with transformers."""


@dataclass(slots=True)
class KeyValues:
    """Keys and values of a batch of prefilled passages, and the masks over them.

    Attributes:
        keys: shape `(layers, batch, kv_heads, positions + new, head_dim)`; the last `new` positions are written by
            each layer as it runs.
        values: the same.
        new: how many tokens are new.
        masks: additive float32 mask by layer type, shape `(batch, 1, heads_per_kv_head * new, positions + new)`.
        layer_types: by layer.
        used: layers that have read it, so that a forward that did not pass it on is noticed.
    """

    keys: torch.Tensor
    values: torch.Tensor
    new: int
    masks: dict[str, torch.Tensor]
    layer_types: list[str]
    used: set[int] = field(default_factory=set)

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None
    ) -> torch.Tensor:
        """One layer's attention.

        Args:
            layer: which.
            query: shape `(batch, heads, new, head_dim)`.
            key: the new tokens' keys, shape `(batch, kv_heads, new, head_dim)`.
            value: the same.
            scaling: of the scores.

        Returns:
            Shape `(batch, new, heads, head_dim)`.
        """
        self.used.add(layer)
        keys, values = self.keys[layer], self.values[layer]
        keys[..., -self.new :, :] = key
        values[..., -self.new :, :] = value
        batch, heads, new, width = query.shape
        kv_heads = keys.shape[1]
        # Heads that share keys become more rows of one head: the keys are read once instead of once per head.
        rows = query.reshape(batch, kv_heads, heads // kv_heads * new, width)
        scale = width**-0.5 if scaling is None else scaling
        attend = _attend_on_cpu if query.device.type == "cpu" else _attend_fused
        out = attend(rows, keys, values, self.masks[self.layer_types[layer]], scale)
        return out.reshape(batch, heads, new, width).transpose(1, 2).contiguous()


def _attend_fused(
    rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    from torch.nn.functional import scaled_dot_product_attention

    return scaled_dot_product_attention(rows, keys, values, attn_mask=mask.to(rows.dtype), scale=scale)


def _attend_on_cpu(
    rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    """Plain matrix products: on a CPU, at a head width of 256, they beat the fused kernel, in bfloat16 by half.

    Scores are float32, as they are inside of the fused kernel. Keys in a narrower dtype than the model's, as with int8
    weights, are a choice of speed over exactness, and scores follow it.
    """
    import torch

    exact = keys.dtype == rows.dtype
    queries, flat_keys, flat_values = (tensor.flatten(0, 1) for tensor in (rows, keys, values))
    bias = mask.expand(-1, keys.shape[1], -1, -1).flatten(0, 1)
    if exact:
        queries, flat_keys = queries.float(), flat_keys.float()
    else:
        queries, bias = queries.to(keys.dtype), bias.to(keys.dtype)
    scores = torch.baddbmm(bias, queries, flat_keys.transpose(1, 2), alpha=scale)
    weights = torch.softmax(scores, dim=-1).to(keys.dtype)
    return torch.bmm(weights, flat_values).to(rows.dtype).view_as(rows)


def merged_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    key_values: KeyValues | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """The stock attention, or, for a query on prefilled passages, the one over `key_values`."""
    if key_values is None:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        stock = ALL_ATTENTION_FUNCTIONS["sdpa"]
        out, _ = stock(module, query, key, value, attention_mask, scaling=scaling, **options)
        return out, None
    # Of the keys that the layer merged, the passage's are none: `encoder_hidden_states` was empty.
    return key_values.attend(module.layer_idx, query, key, value, scaling), None


def install(decoder: Any) -> None:
    """Let a decoder use `merged_attention`; its other forwards stay what they were."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(IMPLEMENTATION, merged_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
    decoder.set_attn_implementation(IMPLEMENTATION)
