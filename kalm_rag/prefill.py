"""Prefilled passages: a warm query pays for its own few tokens alone.

The decoder is causal, its prompt begins the same for every query under one instruction, and passage keys and values
carry no rotary position. So for one passage, ratio and instruction the keys and values of the passage and of the
prompt's beginning are the same for every query, in every layer: they are computed once and kept. A query then runs only
its own tokens and the closing ones, and reads two rows of the output matrix at the last position.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from kalm_rag.attention import KeyValues, PrefillUnsupportedError, cache_argument, install
from kalm_rag.batching import launch_tokens, plan, run_halving
from kalm_rag.cache.frame import Frame, FrameError, pack_tensor, quantise
from kalm_rag.loading import LoadedModel
from kalm_rag.pooling import PassageStates
from kalm_rag.prompts import Prompt, Prompts
from kalm_rag.scoring import YesNoHead, host_integers, right_pad_states, to_device
from kalm_rag.settings import Settings
from kalm_rag.turns import Turns

if TYPE_CHECKING:
    import torch

_PROBES = ("", "a", " a", "A", "1", '"', "\n", "?", "的", "🦜")


@dataclass(frozen=True, slots=True)
class Prefilled:
    """Keys and values of one passage behind one prompt beginning.

    Attributes:
        key_values: shape `(2, layers, kv_heads, positions, head_dim)`, keys first; the positions are those of the
            prompt's beginning, then the passage's groups. In int8 with `scales`.
        scales: with int8, one float32 per vector, shape `(2, layers, kv_heads, positions, 1)`; else None.
        tokens: tokens of the passage that the encoder read.
        ratio: of the pooled states.
        truncated: whether the passage was longer than `max_length` tokens.
    """

    key_values: torch.Tensor
    scales: torch.Tensor | None
    tokens: int
    ratio: int
    truncated: bool

    @property
    def positions(self) -> int:
        """Positions that a query attends to besides its own."""
        return int(self.key_values.shape[3])

    @property
    def nbytes(self) -> int:
        """Bytes it takes."""
        parts = [self.key_values] if self.scales is None else [self.key_values, self.scales]
        return sum(int(part.numel() * part.element_size()) for part in parts)

    def quantised(self) -> Prefilled:
        """The same in 8 bits: the largest number of each vector becomes 127."""
        small, scales = quantise(self.key_values)
        return replace(self, key_values=small, scales=scales)

    def frame(self, key: str, model: bytes, secret: bytes | None = None) -> bytes:
        """As verified bytes; see `kalm_rag.cache.frame`."""
        sizes = (self.ratio, self.tokens)
        return pack_tensor(
            key,
            model,
            self.key_values,
            self.scales,
            sizes=sizes,
            truncated=self.truncated,
            prefilled=True,
            secret=secret,
        )

    @classmethod
    def from_frame(cls, frame: Frame, shape: tuple[int, int, int], beginning: int, device: Any) -> Prefilled:
        """From verified bytes.

        Args:
            frame: a frame of a prefilled passage.
            shape: layers, kv heads and head width of the decoder.
            beginning: tokens of the prompt's beginning.
            device: where to.

        Raises:
            FrameError: it has another shape.
        """
        layers, heads, width = shape
        positions = beginning - (-frame.tokens // frame.ratio)
        if not frame.prefilled or (frame.rows, frame.width) != (2 * layers * heads * positions, width):
            msg = f"{frame.rows} x {frame.width} numbers are no prefilled passage of {positions} positions"
            raise FrameError(msg)
        tensor, scales = frame.tensors()
        full = (2, layers, heads, positions)
        if scales is not None:
            scales = to_device(scales.view(*full, 1), device)
        return cls(to_device(tensor.view(*full, width), device), scales, frame.tokens, frame.ratio, frame.truncated)


@dataclass(frozen=True, slots=True)
class Beginning:
    """The prompt's beginning under one instruction: the tokens that no query changes."""

    ids: tuple[int, ...]

    def fits(self, prompt: Prompt) -> bool:
        """Whether a prompt begins so; a query may join its first characters with the template's last ones."""
        return len(prompt.ids) > len(self.ids) and tuple(prompt.ids[: len(self.ids)]) == self.ids


def find_beginning(prompts: Prompts, instruction: str) -> Beginning:
    """The longest beginning that prompts of very different queries share.

    Where a tokenizer joins characters across the border between template and query, the border moves; it is found
    here once per instruction, and verified for each query (`Beginning.fits`).
    """
    rows = [prompts.prompt(probe, instruction).ids for probe in _PROBES]
    shared = 0
    for column in zip(*rows, strict=False):
        if len(set(column)) > 1:
            break
        shared += 1
    # At least one token must be left to a query.
    return Beginning(tuple(rows[0][: min(shared, min(map(len, rows)) - 1)]))


@dataclass(frozen=True, slots=True)
class WarmPair:
    """One thing to score: a prompt, whose beginning fits, against a prefilled passage."""

    prompt: Prompt
    passage: Prefilled


class PrefillScorer:
    """Prefills passages, and scores queries on them through the stock decoder.

    Args:
        loaded: the model; its decoder gets the attention of `kalm_rag.attention`.
        settings: batch sizes.
        turns: taken for each batch; it guards the rooms of `_scratch` and `_verified`.
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
        self._rooms: dict[torch.dtype, torch.Tensor] = {}
        self._cache_argument = cache_argument(self._decoder)
        self._attention_dtype = loaded.attention_dtype
        install(self._decoder)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Layers, kv heads and head width of the decoder."""
        config = self._config
        return config.num_hidden_layers, config.num_key_value_heads, config.head_dim

    @property
    def name(self) -> str:
        """What tells prefilled passages apart that were computed or are kept in another precision."""
        if not self._loaded.int8:
            return self.kind
        from kalm_rag.kernels import int8_matrices

        return f"{self.kind}, int8 weights, {int8_matrices().projection.__name__}"

    def bytes_of(self, positions: int) -> int:
        """Bytes of a prefilled passage of so many positions."""
        layers, heads, width = self.shape
        item = 1 if self._int8 else self._loaded.prefill_dtype.itemsize
        return 2 * layers * heads * positions * (width * item + (4 if self._int8 else 0))

    @property
    def kind(self) -> str:
        """What keys and values are kept in: a dtype, or `int8`."""
        return "int8" if self._int8 else str(self._loaded.prefill_dtype).removeprefix("torch.")

    def batches(self, beginning: Beginning, passages: Sequence[PassageStates]) -> Iterator[list[int]]:
        """Positions into `passages` that are prefilled together."""
        return self._plan([len(beginning.ids) + len(passage.states) for passage in passages])

    def prefill(self, beginning: Beginning, passages: Sequence[PassageStates]) -> list[Prefilled]:
        """Run the prompt's beginning on the passages of one batch, which needs the model's turn.

        Args:
            beginning: tokens of the prompt's beginning.
            passages: pooled states, at the ratio that queries will be scored at.

        Returns:
            In input order, on the model's device.
        """
        return run_halving(lambda rows: self._prefill(beginning, rows), passages)

    def _prefill(self, beginning: Beginning, passages: Sequence[PassageStates]) -> list[Prefilled]:
        import torch
        from transformers import DynamicCache, EncoderDecoderCache

        loaded = self._loaded
        with self._loaded.computing():
            states, mask = right_pad_states([passage.states for passage in passages], loaded)
            cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
            ids = to_device(host_integers([beginning.ids]), loaded.device).expand(len(passages), -1)
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
                prefilled = Prefilled(
                    torch.stack(both).to(loaded.prefill_dtype), None, passage.tokens, passage.ratio, passage.truncated
                )
                found.append(prefilled.quantised() if self._int8 else prefilled)
            return found

    def margins(self, beginning: Beginning, pairs: Sequence[WarmPair]) -> list[float]:
        """`z_yes - z_no` of each pair, in input order; not finite where the model overflows.

        Args:
            beginning: what the passages were prefilled with.
            pairs: prompts that begin so, and prefilled passages.
        """
        found = [0.0] * len(pairs)
        skip = len(beginning.ids)
        for batch in self._plan([len(pair.prompt.ids) - skip + pair.passage.positions for pair in pairs]):
            with self._turns:
                margins = run_halving(lambda rows: self._forward(skip, rows), [pairs[place] for place in batch])
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
            # Attention alone sees padding here, and it is a twentieth of the work of a pass.
            padding_tokens=20 * launch_tokens(self._loaded.device.type),
        )

    def _forward(self, skip: int, pairs: Sequence[WarmPair]) -> list[float]:
        import torch

        device, dtype = self._loaded.device, self._loaded.compute_dtype
        with self._loaded.computing():
            rows = [pair.prompt.ids[skip:] for pair in pairs]
            lengths = [len(row) for row in rows]
            new = max(lengths)
            embeddings = self._embed(rows, new)
            last = to_device(host_integers(lengths) - 1, device)
            key_values = self._key_values(skip, new, last, [pair.passage for pair in pairs])
            nothing = torch.empty(len(pairs), 0, self._config.hidden_size, device=device, dtype=dtype)
            own = torch.empty(1, 1, new, new, device=device, dtype=torch.bool)
            none = torch.empty(1, 1, new, 0, device=device, dtype=torch.bool)
            hidden = self._decoder(
                inputs_embeds=embeddings,
                position_ids=torch.arange(skip, skip + new, device=device)[None],
                # The masks that count are those of `key_values`; these only have the shapes that the decoder joins.
                attention_mask={"full_attention": own, "sliding_attention": own},
                encoder_hidden_states=nothing,
                encoder_attention_mask={"full_attention": none},
                use_cache=True,
                key_values=key_values,
                **{self._cache_argument: self._no_passage(len(pairs))},
            ).last_hidden_state
            if len(key_values.used) != self._config.num_hidden_layers:
                msg = "this version of transformers does not hand arguments on to the attention function"
                raise PrefillUnsupportedError(msg)
            self._verified = True
            # The last layer ran on the last token alone, or else on all of them.
            final = hidden[:, 0] if hidden.shape[1] == 1 else hidden[torch.arange(len(pairs), device=device), last]
            margins: list[float] = self._head.margins(final).tolist()
            return margins

    def _no_passage(self, batch: int) -> Any:
        """A cache that says every layer has its passage already, and holds none: `KeyValues` has it."""
        import torch
        from transformers import DynamicCache, EncoderDecoderCache

        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        layers, kv_heads, width = self.shape
        empty = torch.empty(batch, kv_heads, 0, width, device=self._loaded.device, dtype=self._loaded.compute_dtype)
        for layer in range(layers):
            cache.cross_attention_cache.update(empty, empty, layer)
            cache.is_updated[layer] = True
        return cache

    def _embed(self, rows: Sequence[Sequence[int]], new: int) -> torch.Tensor:
        """Embeddings of the new tokens, shape `(batch, new, width)`; equal rows are looked up once."""
        unique = list(dict.fromkeys(tuple(row) for row in rows))
        pad = self._loaded.tokenizer.pad_id
        ids = to_device(host_integers([[*row, *[pad] * (new - len(row))] for row in unique]), self._loaded.device)
        found: torch.Tensor = self._decoder.get_input_embeddings()(ids)
        if len(unique) == 1:
            return found.expand(len(rows), -1, -1)
        places = {row: place for place, row in enumerate(unique)}
        return found[[places[tuple(row)] for row in rows]]

    def _key_values(self, skip: int, new: int, last: torch.Tensor, passages: Sequence[Prefilled]) -> KeyValues:
        import torch

        layers, kv_heads, width = self.shape
        positions = max(passage.positions for passage in passages)
        shape = (2, layers, len(passages), kv_heads, positions + new, width)
        both = self._scratch(shape, self._attention_dtype)
        for row, passage in enumerate(passages):
            place = both[:, :, row, :, : passage.positions]
            if passage.scales is None:
                place.copy_(passage.key_values)
            else:
                place.copy_(passage.key_values * passage.scales)
            both[:, :, row, :, passage.positions : positions].zero_()
        masks = self._masks(skip, new, positions, passages)
        wide = self._scratch(shape[2:], torch.float32) if self._widens else None
        types = list(self._config.layer_types)
        return KeyValues(both[0], both[1], new, last, masks, types, not self._verified, wide)

    @property
    def _widens(self) -> bool:
        """Whether keys are brought to float32 for exact scores, as the fused kernel of other devices does inside."""
        return self._loaded.device.type == "cpu" and self._attention_dtype.itemsize < 4

    def _scratch(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Room for a batch, kept from one to the next: touching fresh memory costs more than filling it."""
        import torch

        numbers = math.prod(shape)
        if dtype not in self._rooms or self._rooms[dtype].numel() < numbers:
            self._rooms.pop(dtype, None)
            self._rooms[dtype] = torch.empty(numbers, device=self._loaded.device, dtype=dtype)
        return self._rooms[dtype][:numbers].view(*shape)

    def _masks(self, skip: int, new: int, positions: int, passages: Sequence[Prefilled]) -> dict[str, torch.Tensor]:
        """Additive masks by layer type: padding of short passages, causality, and the sliding window."""
        import torch

        device = self._loaded.device
        lengths = to_device(host_integers([passage.positions for passage in passages]), device)
        columns = torch.arange(positions, device=device)
        known = (columns < lengths[:, None])[:, None, :].expand(-1, new, -1)
        step = torch.arange(new, device=device)
        own = step[:, None] >= step
        window = self._config.sliding_window
        found = {}
        for kind in set(self._config.layer_types):
            seen, mine = known, own
            if kind == "sliding_attention" and window is not None and skip + new > window:
                # Only the prompt's own positions slide; a passage is seen whole from everywhere.
                distance = skip + step[:, None] - columns
                seen = known & ((columns >= skip) | (distance < window))
                mine = own & (step[:, None] - step < window)
            allowed = torch.cat([seen, mine.expand(len(passages), -1, -1)], dim=-1)
            mask = torch.zeros(allowed.shape, device=device, dtype=torch.float32).masked_fill_(~allowed, float("-inf"))
            heads = self._config.num_attention_heads // self._config.num_key_value_heads
            found[kind] = mask.repeat(1, heads, 1)[:, None]
        return found
