"""Attention of a query's few tokens over a prefilled passage, plugged into the stock decoder.

The decoder's merged attention is one softmax over its own keys and the passage's (T5Gemma 2). Everything but the
query's own tokens is known beforehand, so it is laid out once for all layers, with room for the new keys at the end: no
layer copies it again. transformers' public `AttentionInterface` hands the decoder's attention to `merged_attention`,
and a keyword argument of the decoder's forward carries the `KeyValues`.

Only the last token of a prompt is scored, and of the last layer it needs nothing but the other tokens' keys and values:
a hook before that layer lets it run on one token (`one_token_only`). A prefix needs nothing but these of any layer.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

IMPLEMENTATION = "kalm_rag_merged"
"""Name under which the attention is registered with transformers."""


class PrefillUnsupportedError(RuntimeError):
    """The decoder of this version of transformers cannot run from prefilled passages; the full prompt still works."""


@dataclass(slots=True)
class KeyValues:
    """Keys and values of a batch of prefilled passages, and the masks over them.

    Attributes:
        keys: shape `(layers, batch, kv_heads, positions + query_length, head_dim)`; the last `query_length` positions
            are written by each layer as it runs.
        values: the same.
        query_length: tokens of the longest query, which are the new ones.
        last: position of each prompt's last token among the new ones, shape `(batch,)`.
        masks: additive float32 mask by layer type, shape
            `(batch, 1, heads_per_kv_head * query_length, positions + query_length)`.
        layer_types: by layer.
        verify: whether to compare what `one_token_only` wrote with what the layer itself makes of the last tokens.
        float32_keys: on a CPU, room for one layer's keys in float32, if they are narrower; the layers share it.
        written: layers whose new keys and values are in their place.
        used: layers that have read it, so that a forward that did not pass it on is noticed.
    """

    keys: torch.Tensor
    values: torch.Tensor
    query_length: int
    last: torch.Tensor
    masks: dict[str, torch.Tensor]
    layer_types: list[str]
    verify: bool = False
    float32_keys: torch.Tensor | None = None
    written: set[int] = field(default_factory=set)
    used: set[int] = field(default_factory=set)

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Write a layer's new keys and values, each `(batch, kv_heads, query_length, head_dim)`."""
        self.keys[layer, ..., -self.query_length :, :] = key
        self.values[layer, ..., -self.query_length :, :] = value
        self.written.add(layer)

    def compare(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Compare the last tokens' keys and values, each `(batch, kv_heads, 1, head_dim)`, with the written ones.

        Raises:
            PrefillUnsupportedError: they differ by more than rounding.
        """
        import torch

        place = torch.arange(len(self.last), device=self.last.device)
        for own, kept in ((key, self.keys), (value, self.values)):
            written = kept[layer, :, :, -self.query_length :][place, :, self.last].float()
            exact = kept.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
            tolerance = 1e-4 if exact else 2e-2
            if (written - own[:, :, 0].float()).abs().max() > tolerance * written.abs().max():
                msg = "this version of transformers computes keys and values differently than kalm-rag expects"
                raise PrefillUnsupportedError(msg)

    def attend(self, layer: int, query: torch.Tensor, scaling: float | None) -> torch.Tensor:
        """Compute one layer's attention over what has been written.

        Args:
            layer: which.
            query: of all new tokens, shape `(batch, heads, query_length, head_dim)`, or of the last ones, with 1 for
                `query_length`.
            scaling: of the scores.

        Returns:
            Shape `(batch, tokens, heads, head_dim)`.
        """
        self.used.add(layer)
        keys, values, mask = self.keys[layer], self.values[layer], self.masks[self.layer_types[layer]]
        batch, heads, tokens, width = query.shape
        kv_heads = keys.shape[1]
        # Heads that share keys become more rows of one head: the keys are read once instead of once per head.
        rows = query.reshape(batch, kv_heads, heads // kv_heads * tokens, width)
        if tokens < self.query_length:
            mask = self._of_last_tokens(mask)
        scale = width**-0.5 if scaling is None else scaling
        if query.device.type == "cpu":
            out = _attend_on_cpu(
                rows, keys if self.float32_keys is None else self.float32_keys.copy_(keys), values, mask, scale
            )
        else:
            out = _attend_fused(rows, keys, values, mask, scale)
        return out.view(batch, heads, tokens, width).transpose(1, 2).contiguous()

    def _of_last_tokens(self, mask: torch.Tensor) -> torch.Tensor:
        """One mask row per head of a group: that of the last token."""
        import torch

        by_head = mask.view(len(mask), 1, -1, self.query_length, mask.shape[3])
        return by_head[torch.arange(len(mask), device=mask.device), :, :, self.last]


@dataclass(slots=True)
class LastLayer:
    """Receives the last layer's keys and values of a prompt's prefix, so that the layer runs on one token.

    Attributes:
        keys: shape `(batch, kv_heads, prefix_length, head_dim)`; None as long as the layer did not run.
        values: the same.
    """

    keys: torch.Tensor | None = None
    values: torch.Tensor | None = None


def _attend_fused(
    rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    from torch.nn.functional import scaled_dot_product_attention

    return scaled_dot_product_attention(rows, keys, values, attn_mask=mask.to(rows.dtype), scale=scale)


def _attend_on_cpu(
    rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    """Plain matrix products: on a CPU, at a head width of 256, they beat the fused kernel, in bfloat16 by half.

    Keys, and so scores, are float32, as they are inside of the fused kernel.
    """
    import torch

    queries, flat_keys, flat_values = (tensor.flatten(0, 1) for tensor in (rows.float(), keys, values))
    bias = mask.expand(-1, keys.shape[1], -1, -1).flatten(0, 1)
    scores = torch.baddbmm(bias, queries, flat_keys.transpose(1, 2), alpha=scale)
    weights = torch.softmax(scores, dim=-1).to(values.dtype)
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
    last_layer: LastLayer | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Compute the stock attention, or for a query on prefilled passages the one over `key_values`."""
    if key_values is None:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        stock = ALL_ATTENTION_FUNCTIONS["sdpa"]
        out, _ = stock(module, query, key, value, attention_mask, scaling=scaling, **options)
        return out, None
    # Of the keys that the layer merged, the passage's are none: `encoder_hidden_states` was empty.
    if module.layer_idx not in key_values.written:
        key_values.write(module.layer_idx, key, value)
    elif key_values.verify:
        key_values.compare(module.layer_idx, key, value)
    return key_values.attend(module.layer_idx, query, scaling), None


def one_token_only(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Forward hook of the last decoder layer: compute the keys and values of all tokens, then run it on the last one.

    A query's are written to its `KeyValues`, those of a prefix to a `LastLayer`. If a version of transformers builds or
    calls the layer differently, it runs on all tokens; `KeyValues.compare` notices if it computes differently.
    """
    import torch

    receiver: KeyValues | LastLayer | None = kwargs.get("key_values") or kwargs.get("last_layer")
    if receiver is None:
        return None
    try:
        hidden, (cos, sin), *rest = args
        attention = layer.self_attn
        # The hook stands there once for each scorer of a loaded model; the first call has done the work.
        if isinstance(receiver, LastLayer):
            is_done = receiver.keys is not None
        else:
            is_done = attention.layer_idx in receiver.written
        if is_done:
            return None
        normed = layer.pre_self_attn_layernorm(hidden)
        heads = (*hidden.shape[:2], -1, attention.head_dim)
        key = attention.k_norm(attention.k_proj(normed).view(heads).transpose(1, 2))
        value = attention.v_proj(normed).view(heads).transpose(1, 2)
    except (AttributeError, TypeError, ValueError):
        return None
    first, second = key.chunk(2, dim=-1)
    key = key * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]
    if isinstance(receiver, LastLayer):
        receiver.keys, receiver.values = key, value
        # What the token attends to does not matter: nothing reads the layer's output.
        return (hidden[:, -1:], (cos[:, -1:], sin[:, -1:]), None, *rest[1:]), kwargs
    receiver.write(attention.layer_idx, key, value)
    last = receiver.last
    place = torch.arange(len(last), device=last.device)
    return (hidden[place, last][:, None], (cos[0, last][:, None], sin[0, last][:, None]), *rest), kwargs


def cache_argument(decoder: Any) -> str:
    """Return the name of the cache argument of a decoder's forward: transformers 5.24 renamed it."""
    return "cache" if "cache" in inspect.signature(type(decoder).forward).parameters else "past_key_values"


def install(decoder: Any) -> None:
    """Make a decoder use `merged_attention`; its other forwards are unchanged."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(IMPLEMENTATION, merged_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
    decoder.set_attn_implementation(IMPLEMENTATION)
    decoder.layers[-1].register_forward_pre_hook(one_token_only, with_kwargs=True)
