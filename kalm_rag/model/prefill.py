"""Prefilled passages: a warm query only runs its own few tokens.

The decoder is causal, its prompt begins the same for every query under one instruction, and passage keys and values
carry no rotary position. So for one passage, ratio and instruction the keys and values of the passage and of the
prompt's prefix are the same for every query, in every layer: they are computed once and kept. A query then runs only
its own tokens and the closing ones, and reads two rows of the output matrix at the last position.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kalm_rag.model.batching import launch_tokens, plan, run_halving
from kalm_rag.model.decoder import YesNoHead
from kalm_rag.model.loading import LoadedModel
from kalm_rag.model.merged_attention import PrefillUnsupportedError, cache_argument, install
from kalm_rag.model.padding import host_integers, right_pad_states, to_device
from kalm_rag.model.passage import PassageKV
from kalm_rag.model.pooling import PassageStates
from kalm_rag.model.prefill_layout import PrefillLayout
from kalm_rag.model.prompts import Prompt, Prompts
from kalm_rag.settings import Settings
from kalm_rag.utils.turns import Turns

if TYPE_CHECKING:
    import torch

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


def precision_names(dtype: str) -> list[str]:
    """Return every `PrefilledDecoder.name` that a model of this dtype may have, on any CPU."""
    names = [dtype, "int8"]
    if dtype == "float32":  # what a model with int8 weights keeps everything else in
        from kalm_rag.model.cpu_weights import BFloat16Weight, PackedWeight

        weights = (PackedWeight.key_name, BFloat16Weight.key_name)
        names += [_int8_name(kept, weight) for kept in ("bfloat16", "int8") for weight in weights]
    return names


def _int8_name(kept: str, weights: str) -> str:
    return f"{kept}, int8 weights, {weights}"


@dataclass(frozen=True, slots=True)
class PrefilledPair:
    """A prompt that starts with the prefix, and a prefilled passage to score."""

    prompt: Prompt
    passage: PassageKV


class PrefilledDecoder:
    """Prefills passages, and scores queries on them through the stock decoder.

    Args:
        loaded: the model; its decoder gets the attention of `kalm_rag.model.merged_attention`.
        settings: batch sizes.
        turns: taken for each batch; it guards `_layout` and `_verified`.
        int8: keep keys and values in 8 bits.
    """

    def __init__(self, loaded: LoadedModel, settings: Settings, turns: Turns, *, int8: bool = False) -> None:
        self._loaded = loaded
        self._settings = settings
        self._turns = turns
        self._int8 = int8
        self._decoder = loaded.model.get_decoder()
        self._config = self._decoder.config
        self._head = YesNoHead(loaded)
        self._verified = False
        self._layout = PrefillLayout(loaded, self._config)
        self._cache_argument = cache_argument(self._decoder)
        install(self._decoder)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Layers, kv heads and head width of the decoder."""
        config = self._config
        return config.num_hidden_layers, config.num_key_value_heads, config.head_dim

    @property
    def name(self) -> str:
        """The precision of keys and values, as part of their cache key."""
        kept = "int8" if self._int8 else str(self._loaded.prefill_dtype).removeprefix("torch.")
        if not self._loaded.int8:
            return kept
        from kalm_rag.model.cpu_kernels import int8_weights

        return _int8_name(kept, int8_weights().projection.key_name)

    def bytes_of(self, positions: int) -> int:
        """Bytes of a prefilled passage of so many positions."""
        layers, heads, width = self.shape
        item = 1 if self._int8 else self._loaded.prefill_dtype.itemsize
        return 2 * layers * heads * positions * (width * item + (4 if self._int8 else 0))

    def batches(self, prefix: PromptPrefix, passages: Sequence[PassageStates]) -> Iterator[list[int]]:
        """Positions into `passages` that are prefilled together."""
        return self._plan([len(prefix) + len(passage.states) for passage in passages])

    def prefill(self, prefix: PromptPrefix, passages: Sequence[PassageStates]) -> list[PassageKV]:
        """Run the prompt's prefix on one batch of passages; the caller holds the model's turn.

        Args:
            prefix: tokens of the prompt's prefix.
            passages: pooled states, at the ratio that queries will be scored at.

        Returns:
            In input order, on the model's device.
        """
        return run_halving(lambda rows: self._prefill(prefix, rows), passages)

    def _prefill(self, prefix: PromptPrefix, passages: Sequence[PassageStates]) -> list[PassageKV]:
        import torch
        from transformers import DynamicCache, EncoderDecoderCache

        loaded = self._loaded
        with self._loaded.computing():
            states, mask = right_pad_states([passage.states for passage in passages], loaded)
            cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
            ids = to_device(host_integers([prefix.ids]), loaded.device).expand(len(passages), -1)
            self._decoder(
                input_ids=ids,
                encoder_hidden_states=states,
                encoder_attention_mask=mask,
                use_cache=True,
                **{self._cache_argument: cache},
            )
            layers = list(zip(cache.self_attention_cache.layers, cache.cross_attention_cache.layers, strict=True))
            found = []
            for row, passage in enumerate(passages):
                groups = len(passage.states)
                both = [
                    torch.stack(
                        [
                            torch.cat([getattr(own, name)[row], getattr(cross, name)[row, :, :groups]], dim=1)
                            for own, cross in layers
                        ]
                    )
                    for name in ("keys", "values")
                ]
                prefilled = PassageKV(
                    torch.stack(both).to(loaded.prefill_dtype), None, passage.tokens, passage.ratio, passage.truncated
                )
                found.append(prefilled.quantized() if self._int8 else prefilled)
            return found

    def margins(self, prefix: PromptPrefix, pairs: Sequence[PrefilledPair]) -> list[float]:
        """`z_yes - z_no` of each pair, in input order; not finite where the model overflows.

        Args:
            prefix: what the passages were prefilled with.
            pairs: prompts that start with it, and prefilled passages.
        """
        found = [0.0] * len(pairs)
        prefix_length = len(prefix)
        for batch in self._plan([len(pair.prompt.ids) - prefix_length + pair.passage.positions for pair in pairs]):
            with self._turns:
                margins = run_halving(
                    lambda rows: self._forward(prefix_length, rows), [pairs[place] for place in batch]
                )
            for place, margin in zip(batch, margins, strict=True):
                found[place] = margin
        return found

    def _plan(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        on_cpu = self._loaded.device.type == "cpu"
        return plan(
            lengths,
            # A GPU takes a whole candidate list in one pass.
            batch_size=self._settings.batch_size * (1 if on_cpu else 8),
            batch_tokens=self._settings.batch_tokens,
            # Only attention sees padding here, and it is a twentieth of the work of a pass.
            padding_tokens=20 * launch_tokens(self._loaded.device.type),
        )

    def _forward(self, prefix_length: int, pairs: Sequence[PrefilledPair]) -> list[float]:
        import torch

        device, dtype = self._loaded.device, self._loaded.compute_dtype
        with self._loaded.computing():
            rows = [pair.prompt.ids[prefix_length:] for pair in pairs]
            lengths = [len(row) for row in rows]
            query_length = max(lengths)
            embeddings = self._embed(rows, query_length)
            last = to_device(host_integers(lengths) - 1, device)
            passages = [pair.passage for pair in pairs]
            verify = not self._verified
            key_values = self._layout.key_values(prefix_length, query_length, last, passages, verify=verify)
            nothing = torch.empty(len(pairs), 0, self._config.hidden_size, device=device, dtype=dtype)
            own = torch.empty(1, 1, query_length, query_length, device=device, dtype=torch.bool)
            none = torch.empty(1, 1, query_length, 0, device=device, dtype=torch.bool)
            hidden = self._decoder(
                inputs_embeds=embeddings,
                position_ids=torch.arange(prefix_length, prefix_length + query_length, device=device)[None],
                # The masks that count are those of `key_values`; these only have the shapes that the decoder joins.
                attention_mask={"full_attention": own, "sliding_attention": own},
                encoder_hidden_states=nothing,
                encoder_attention_mask={"full_attention": none},
                use_cache=True,
                key_values=key_values,
                **{self._cache_argument: self._no_passage(len(pairs))},
            ).last_hidden_state
            if len(key_values.used) != self._config.num_hidden_layers:
                msg = "this version of transformers does not pass arguments on to the attention function"
                raise PrefillUnsupportedError(msg)
            self._verified = True
            # The last layer ran on the last token only, or on all of them.
            final = hidden[:, 0] if hidden.shape[1] == 1 else hidden[torch.arange(len(pairs), device=device), last]
            margins: list[float] = self._head.margins(final).tolist()
            return margins

    def _no_passage(self, batch: int) -> Any:
        """Return an empty cache that claims to hold every layer's passage: `KeyValues` has it."""
        import torch
        from transformers import DynamicCache, EncoderDecoderCache

        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        layers, kv_heads, width = self.shape
        empty = torch.empty(batch, kv_heads, 0, width, device=self._loaded.device, dtype=self._loaded.compute_dtype)
        for layer in range(layers):
            cache.cross_attention_cache.update(empty, empty, layer)
            cache.is_updated[layer] = True
        return cache

    def _embed(self, rows: Sequence[Sequence[int]], query_length: int) -> torch.Tensor:
        """Embeddings of the query's tokens, shape `(batch, query_length, width)`; equal rows are looked up once."""
        unique = list(dict.fromkeys(tuple(row) for row in rows))
        pad = self._loaded.tokenizer.pad_id
        ids = to_device(
            host_integers([[*row, *[pad] * (query_length - len(row))] for row in unique]), self._loaded.device
        )
        found: torch.Tensor = self._decoder.get_input_embeddings()(ids)
        if len(unique) == 1:
            return found.expand(len(rows), -1, -1)
        places = {row: place for place, row in enumerate(unique)}
        return found[[places[tuple(row)] for row in rows]]
