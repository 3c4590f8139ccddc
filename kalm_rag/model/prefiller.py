"""The part of a prompt that every query under one instruction shares, and passages prefilled with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kalm_rag.model.batching import run_halving
from kalm_rag.model.compact import CompactKV, Expansion, Reference, compacted
from kalm_rag.model.loading import LoadedModel
from kalm_rag.model.merged_attention import LastLayer, PrefillUnsupportedError, cache_argument
from kalm_rag.model.padding import host_integers, right_pad_states, to_device
from kalm_rag.model.passage import PassageKV
from kalm_rag.model.pooling import PassageStates
from kalm_rag.model.prompts import Prompt, Prompts

if TYPE_CHECKING:
    import torch

_BOTH = ("keys", "values")
_PROBES = ("", "a", " a", "A", "1", '"', "\n", "?", "的", "🦜")


@dataclass(frozen=True, slots=True)
class PromptPrefix:
    """The tokens that start every prompt under one instruction."""

    ids: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.ids)

    def starts(self, prompt: Prompt) -> bool:
        """Whether a prompt starts with it; a query may join its first characters with the template's last ones."""
        return len(prompt.ids) > len(self) and tuple(prompt.ids[: len(self)]) == self.ids


def find_prompt_prefix(prompts: Prompts, instruction: str) -> PromptPrefix:
    """Return the longest prefix that the prompts of very different queries share.

    Where a tokenizer joins characters across the border between template and query, the border moves; it is found
    here once per instruction, and verified for each query (`PromptPrefix.starts`).
    """
    rows = [prompts.prompt(probe, instruction).ids for probe in _PROBES]
    shared = 0
    for column in zip(*rows, strict=False):
        if len(set(column)) > 1:
            break
        shared += 1
    # At least one token must be left to a query.
    return PromptPrefix(tuple(rows[0][: min(shared, min(map(len, rows)) - 1)]))


class Prefiller:
    """Runs the prefix of a prompt on passages.

    Args:
        loaded: the model; its decoder has the attention of `kalm_rag.model.merged_attention`.
        expansion: for the compact form; its projection is checked against the decoder's in the first batch.
        int8: whether keys and values become 8-bit numbers.
    """

    def __init__(self, loaded: LoadedModel, expansion: Expansion | None, *, int8: bool) -> None:
        self._loaded = loaded
        self._expansion = expansion
        self._int8 = int8
        self._decoder = loaded.model.get_decoder()
        self._cache_argument = cache_argument(self._decoder)
        self._is_checked = self._is_last_checked = False

    def prefill(
        self, prefix: PromptPrefix, passages: Sequence[PassageStates], reference: Reference | None = None
    ) -> list[PassageKV | CompactKV]:
        """Run the prompt's prefix on one batch of passages; the caller holds the model's turn.

        Args:
            prefix: tokens of the prompt's prefix.
            passages: pooled states, at the ratio that queries will be scored at.
            reference: of this prefix and ratio, for the compact form.

        Returns:
            In input order, on the model's device.
        """
        if reference is not None:
            return run_halving(lambda rows: self._loaded.compute(self._compacted, prefix, rows, reference), passages)
        return run_halving(lambda rows: self._loaded.compute(self._prefilled, prefix, rows), passages)

    def prefixes(self, prefix: PromptPrefix, passages: Sequence[PassageStates]) -> list[torch.Tensor]:
        """Return the keys and values of the prefix alone, by passage; the caller holds the model's turn.

        Returns:
            Each of shape `(2, layers, kv_heads, prefix_length, head_dim)`.
        """
        return run_halving(lambda rows: list(self._loaded.compute(self._run_prefix, prefix, rows)[0]), passages)

    def _run_prefix(
        self, prefix: PromptPrefix, passages: Sequence[PassageStates]
    ) -> tuple[torch.Tensor, torch.Tensor, list[Any]]:
        """Run the prefix on a batch.

        Returns:
            Its own keys and values, shape `(batch, 2, layers, kv_heads, prefix_length, head_dim)`; the states, padded;
            and the layers of the cache of the passages' keys and values.
        """
        import torch
        from transformers import DynamicCache, EncoderDecoderCache

        loaded = self._loaded
        states, mask = right_pad_states([passage.states for passage in passages], loaded)
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        ids = to_device(host_integers([prefix.ids]), loaded.device).expand(len(passages), -1)
        last = LastLayer()
        self._decoder(
            input_ids=ids,
            encoder_hidden_states=states,
            encoder_attention_mask=mask,
            use_cache=True,
            last_layer=last,
            **{self._cache_argument: cache},
        )
        layers = cache.self_attention_cache.layers
        if last.keys is None or last.values is None:  # this version of transformers ran it on all tokens
            last.keys, last.values = layers[-1].keys, layers[-1].values
        self._check_last(last, layers[-1])
        found = [[getattr(layer, name) for layer in layers[:-1]] for name in _BOTH]
        own = [torch.stack([*kept, final], dim=1) for kept, final in zip(found, (last.keys, last.values), strict=True)]
        return torch.stack(own, dim=1), states, cache.cross_attention_cache.layers

    def _check_last(self, last: Any, own: Any) -> None:
        """Compare the last token's keys and values with the layer's own, once.

        Raises:
            PrefillUnsupportedError: they differ by more than rounding.
        """
        if self._is_last_checked:
            return
        for ours, stock in ((last.keys, own.keys), (last.values, own.values)):
            tolerance = 1e-4 if stock.element_size() == 4 else 3e-2
            if (ours[:, :, -1].float() - stock[:, :, -1].float()).abs().max() > tolerance * stock.abs().max().float():
                msg = "this version of transformers computes keys and values differently than kalm-rag expects"
                raise PrefillUnsupportedError(msg)
        self._is_last_checked = True

    def _prefilled(self, prefix: PromptPrefix, passages: Sequence[PassageStates]) -> list[PassageKV | CompactKV]:
        import torch

        found: list[PassageKV | CompactKV] = []
        own, _, layers = self._run_prefix(prefix, passages)
        for row, passage in enumerate(passages):
            groups = len(passage.states)
            cross = torch.stack(
                [torch.stack([getattr(layer, name)[row, :, :groups] for layer in layers]) for name in _BOTH]
            )
            both = torch.cat([own[row], cross], dim=3).to(self._loaded.prefill_dtype)
            prefilled = PassageKV(both, None, passage.tokens, passage.ratio, passage.truncated)
            found.append(prefilled.quantized() if self._int8 else prefilled)
        return found

    def _compacted(
        self, prefix: PromptPrefix, passages: Sequence[PassageStates], reference: Reference
    ) -> list[PassageKV | CompactKV]:
        own, states, layers = self._run_prefix(prefix, passages)
        if not self._is_checked and self._expansion is not None:
            last = len(layers) - 1
            self._expansion.check(states, layers[last].keys, layers[last].values, last)
            self._is_checked = True
        return [compacted(row, reference, passage) for row, passage in zip(own, passages, strict=True)]
