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

from kalm_rag.model.batching import launch_tokens, plan_pairs, run_halving
from kalm_rag.model.compact import CompactKV, Expansion, Reference, rows_of
from kalm_rag.model.decoder import YesNoHead
from kalm_rag.model.first_pass import AssumedKV
from kalm_rag.model.loading import INT8_ENCODER, LoadedModel
from kalm_rag.model.merged_attention import PrefillUnsupportedError, cache_argument, install
from kalm_rag.model.padding import host_integers, to_device
from kalm_rag.model.passage import PassageKV
from kalm_rag.model.pooling import PassageStates
from kalm_rag.model.prefill_layout import PrefillLayout
from kalm_rag.model.prefiller import Prefiller, PromptPrefix
from kalm_rag.model.prompts import Prompt
from kalm_rag.settings import PrefillStorage, Settings
from kalm_rag.utils.turns import Turns

if TYPE_CHECKING:
    import torch


def precision_names(dtype: str) -> list[str]:
    """Return every `PrefilledDecoder.name` that a model of this dtype may have, on any CPU."""
    names = [dtype, "int8"]
    if dtype in ("float32", INT8_ENCODER):  # what a model with int8 weights keeps everything else in
        from kalm_rag.model.cpu_weights import BFloat16Weight, PackedWeight

        weights = (PackedWeight.key_name, BFloat16Weight.key_name)
        names += [_int8_name(kept, weight) for kept in ("bfloat16", "int8") for weight in weights]
    return names


def _name(loaded: LoadedModel, kept: str) -> str:
    if not loaded.int8:
        return kept
    from kalm_rag.model.cpu_kernels import int8_weights

    return _int8_name(kept, int8_weights().projection.key_name)


def _int8_name(kept: str, weights: str) -> str:
    return f"{kept}, int8 weights, {weights}"


@dataclass(frozen=True, slots=True)
class PrefilledPair:
    """A prompt that starts with the prefix, and a prefilled passage to score, or one whose prefix is assumed."""

    prompt: Prompt
    passage: PassageKV | CompactKV | AssumedKV


def score_size(query: int, positions: int) -> float:
    """Return how many tokens a pair counts for: those of the query, and a part of those that they attend to."""
    return query + positions / 16


class PrefilledDecoder:
    """Prefills passages, and scores queries on them through the stock decoder.

    Args:
        loaded: the model; its decoder gets the attention of `kalm_rag.model.merged_attention`.
        settings: batch sizes.
        turns: taken for each batch; it guards `_layout` and `_verified`.
        storage: how keys and values are kept.

    Attributes:
        prefiller: prefills passages.
    """

    def __init__(
        self, loaded: LoadedModel, settings: Settings, turns: Turns, *, storage: PrefillStorage = "native"
    ) -> None:
        self._loaded = loaded
        self._settings = settings
        self._turns = turns
        self._storage = storage
        self._decoder = loaded.model.get_decoder()
        self._config = self._decoder.config
        self._head = YesNoHead(loaded)
        self._verified = False
        expansion = Expansion(loaded) if storage == "compact" or settings.refine else None
        self._layout = PrefillLayout(loaded, self._config, expansion)
        self._cache_argument = cache_argument(self._decoder)
        self.prefiller = Prefiller(loaded, expansion, int8=storage == "int8")
        install(self._decoder)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Layers, kv heads and head width of the decoder."""
        config = self._config
        return config.num_hidden_layers, config.num_key_value_heads, config.head_dim

    @property
    def precision(self) -> str:
        """What keys and values are computed in, as part of the key of a reference."""
        return _name(self._loaded, str(self._loaded.prefill_dtype).removeprefix("torch."))

    @property
    def name(self) -> str:
        """The precision of keys and values, as part of their cache key."""
        if self._storage == "compact":
            return f"int8, compact, {self.precision}"  # first of all what their frames hold: bytes and scales
        return _name(self._loaded, "int8") if self._storage == "int8" else self.precision

    def bytes_of(self, prefix_length: int, groups: int) -> int:
        """Bytes of a prefilled passage behind a prefix; in the compact form without its states."""
        layers, heads, width = self.shape
        if self._storage == "compact":
            return rows_of((2, layers - 1, heads, prefix_length), width // 2) * (width // 2 + 4)
        positions = prefix_length + groups
        item = 1 if self._storage == "int8" else self._loaded.prefill_dtype.itemsize
        return 2 * layers * heads * positions * (width * item + (4 if self._storage == "int8" else 0))

    def batches(self, prefix: PromptPrefix, passages: Sequence[PassageStates]) -> Iterator[list[int]]:
        """Positions into `passages` that are prefilled together."""
        return self._plan([len(prefix)] * len(passages), [len(passage.states) for passage in passages])

    def margins(
        self, prefix: PromptPrefix, pairs: Sequence[PrefilledPair], reference: Reference | None = None
    ) -> list[float]:
        """`z_yes - z_no` of each pair, in input order; not finite where the model overflows.

        Args:
            prefix: what the passages were prefilled with.
            pairs: prompts that start with it, and passages, all in one form.
            reference: what compact passages were kept against, and what assumed ones take their prefix from.
        """
        found = [0.0] * len(pairs)
        prefix_length = len(prefix)
        queries = [len(pair.prompt.ids) - prefix_length for pair in pairs]
        for batch in self._plan(queries, [pair.passage.positions for pair in pairs]):
            with self._turns.of("score") as turn:
                rows = [pairs[place] for place in batch]
                margins = run_halving(
                    lambda rows: self._loaded.compute(self._forward, prefix_length, rows, reference), rows
                )
                turn.size = sum(score_size(len(row.prompt.ids) - prefix_length, row.passage.positions) for row in rows)
                turn.rows = len(rows)
            for place, margin in zip(batch, margins, strict=True):
                found[place] = margin
        return found

    def _plan(self, queries: Sequence[int], passages: Sequence[int]) -> Iterator[list[int]]:
        on_cpu = self._loaded.device.type == "cpu"
        launch = launch_tokens(self._loaded.device.type)
        return plan_pairs(
            queries,
            passages,
            # A GPU takes a whole candidate list in one pass.
            batch_size=self._settings.batch_size * (1 if on_cpu else 8),
            batch_tokens=self._settings.batch_tokens,
            query_padding=launch,
            # Only attention sees padding of passages here, and it is a twentieth of the work of a pass.
            padding_tokens=20 * launch,
        )

    def _forward(self, prefix_length: int, pairs: Sequence[PrefilledPair], reference: Reference | None) -> list[float]:
        import torch

        device, dtype = self._loaded.device, self._loaded.compute_dtype
        rows = [pair.prompt.ids[prefix_length:] for pair in pairs]
        lengths = [len(row) for row in rows]
        query_length = max(lengths)
        embeddings = self._embed(rows, query_length)
        last = to_device(host_integers(lengths) - 1, device)
        passages = [pair.passage for pair in pairs]
        verify = not self._verified
        key_values = self._layout.key_values(prefix_length, query_length, last, passages, reference, verify=verify)
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
