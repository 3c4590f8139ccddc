"""Prefilled passages of one batch laid out side by side, with room for the query's own keys and values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch

from kalm_rag.model.compact import CompactKV, Expansion, Reference
from kalm_rag.model.first_pass import AssumedKV, assume
from kalm_rag.model.loading import LoadedModel
from kalm_rag.model.merged_attention import KeyValues
from kalm_rag.model.padding import host_integers, to_device
from kalm_rag.model.passage import PassageKV

LaidOut: TypeAlias = PassageKV | CompactKV | AssumedKV
"""A passage in any form that a query can be run on."""


class PrefillLayout:
    """Lays out batches in reused memory; for one thread at a time.

    Args:
        loaded: the model.
        config: of its decoder.
        expansion: turns compact and assumed passages into keys and values.
    """

    def __init__(self, loaded: LoadedModel, config: Any, expansion: Expansion | None = None) -> None:
        self._loaded = loaded
        self._expansion = expansion
        self._config = config
        self._attention_dtype = loaded.attention_dtype
        self._rooms: dict[torch.dtype, torch.Tensor] = {}

    def key_values(
        self,
        prefix_length: int,
        query_length: int,
        last: torch.Tensor,
        passages: Sequence[LaidOut],
        reference: Reference | None = None,
        *,
        verify: bool,
    ) -> KeyValues:
        """Lay out what the decoder's attention reads in one pass.

        Args:
            prefix_length: tokens of the prompt's prefix.
            query_length: tokens of the longest query.
            last: position of each query's last token, shape `(batch,)`.
            passages: a row each, all in one form.
            reference: what compact passages were kept against, and what assumed ones take their prefix from.
            verify: whether to compare what the last layer writes with what the model computes.
        """
        config = self._config
        layers, kv_heads, width = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
        positions = max(passage.positions for passage in passages)
        shape = (2, layers, len(passages), kv_heads, positions + query_length, width)
        both = self._scratch(shape, self._attention_dtype)
        compact = [passage for passage in passages if isinstance(passage, CompactKV)]
        if compact and self._expansion is not None and reference is not None:
            self._expansion.fill(both[:, :, :, :, :positions], compact, reference)
        assumed = [passage for passage in passages if isinstance(passage, AssumedKV)]
        if assumed and self._expansion is not None and reference is not None:
            assume(both[:, :, :, :, :positions], assumed, reference, self._expansion, self._loaded)
        for row, passage in enumerate(passages):
            if not isinstance(passage, PassageKV):
                continue
            place = both[:, :, row, :, : passage.positions]
            if passage.scales is None:
                place.copy_(passage.key_values)
            else:
                place.copy_(passage.key_values * passage.scales)
            both[:, :, row, :, passage.positions : positions].zero_()
        masks = self._masks(prefix_length, query_length, positions, passages)
        wide = self._scratch(shape[2:], torch.float32) if self._widens else None
        types = list(self._config.layer_types)
        return KeyValues(both[0], both[1], query_length, last, masks, types, verify, wide)

    @property
    def _widens(self) -> bool:
        """Whether keys are brought to float32 for exact scores, as the fused kernel of other devices does inside."""
        return self._loaded.device.type == "cpu" and self._attention_dtype.itemsize < 4

    def _scratch(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Return reused memory for a batch: touching fresh memory costs more than filling it."""
        numbers = math.prod(shape)
        if dtype not in self._rooms or self._rooms[dtype].numel() < numbers:
            self._rooms.pop(dtype, None)
            self._rooms[dtype] = torch.empty(numbers, device=self._loaded.device, dtype=dtype)
        return self._rooms[dtype][:numbers].view(*shape)

    def _masks(
        self,
        prefix_length: int,
        query_length: int,
        positions: int,
        passages: Sequence[LaidOut],
    ) -> dict[str, torch.Tensor]:
        """Additive masks by layer type: padding of short passages, causality, and the sliding window."""
        device = self._loaded.device
        lengths = to_device(host_integers([passage.positions for passage in passages]), device)
        columns = torch.arange(positions, device=device)
        known = (columns < lengths[:, None])[:, None, :].expand(-1, query_length, -1)
        step = torch.arange(query_length, device=device)
        own = step[:, None] >= step
        window = self._config.sliding_window
        found = {}
        for kind in set(self._config.layer_types):
            seen, mine = known, own
            if kind == "sliding_attention" and window is not None and prefix_length + query_length > window:
                # Only the prompt's own positions slide; a passage is seen whole from everywhere.
                distance = prefix_length + step[:, None] - columns
                seen = known & ((columns >= prefix_length) | (distance < window))
                mine = own & (step[:, None] - step < window)
            allowed = torch.cat([seen, mine.expand(len(passages), -1, -1)], dim=-1)
            mask = torch.zeros(allowed.shape, device=device, dtype=torch.float32).masked_fill_(~allowed, float("-inf"))
            heads = self._config.num_attention_heads // self._config.num_key_value_heads
            found[kind] = mask.repeat(1, heads, 1)[:, None]
        return found
