"""The compact form of a prefilled passage: its states, and what its prefix differs by from a reference.

The keys and values of a passage's own positions are a projection of its encoder states, so they are computed again when
they are needed. Those of the prompt's prefix hardly depend on the passage: a reference holds their mean over a few
fixed texts and the directions in which these texts differ most. Of a passage, its place along the directions is kept,
and what is left in 4 bits. The first layer sees nothing of the passage there, so it is not kept at all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from kalm_rag.model.loading import LoadedModel
from kalm_rag.model.merged_attention import PrefillUnsupportedError
from kalm_rag.model.padding import right_pad_states
from kalm_rag.model.pooling import PassageStates
from kalm_rag.model.quantization import empty_words, pack_nibbles, unpack_nibbles

if TYPE_CHECKING:
    import torch


DIRECTIONS = 8
"""Directions of a reference: they more than halve the error; more of them hardly help (`benchmarks/compact.py`)."""


@dataclass(frozen=True, slots=True, eq=False)
class Reference:
    """What passages are kept against: statistics of the keys and values of a prompt's prefix.

    Attributes:
        numbers: of `reference_numbers`, shape `(1 + directions, 2, layers, kv_heads, prefix_length, head_dim)`.
        digest: of these numbers; part of the key of whatever is kept against it.
    """

    numbers: torch.Tensor
    digest: str

    def at(self, along: torch.Tensor, layer: int) -> torch.Tensor:
        """Return one layer's keys and values at places along the directions.

        Args:
            along: shape `(batch, directions)`.
            layer: which.

        Returns:
            Shape `(2, batch, kv_heads, prefix_length, head_dim)`.
        """
        import torch

        numbers = self.numbers[:, :, layer]
        both = torch.cat([torch.ones_like(along[:, :1]), along], dim=1).to(numbers)
        found = torch.stack([both @ numbers[:, kind].flatten(1) for kind in range(2)])
        return found.view(2, len(along), *numbers.shape[2:])


def reference_numbers(prefixes: torch.Tensor, directions: int = DIRECTIONS) -> torch.Tensor:
    """Return mean and directions of prefixes.

    Args:
        prefixes: of several passages, shape `(passages, 2, layers, kv_heads, prefix_length, head_dim)`.
        directions: how many.

    Returns:
        float32 in host memory, of shape `(1 + directions, ...)`: the mean, then the directions in which the passages
        differ most, of length 1, and zeros for those that they do not have. Keys come first in the second dimension.
    """
    import torch

    wide = prefixes.detach().cpu().double()
    finite = wide[wide.flatten(1).isfinite().all(dim=1)]  # float16 may overflow
    found = torch.zeros(1 + directions, *prefixes.shape[1:], dtype=torch.float32, device="cpu")
    if len(finite) == 0:
        return found
    mean = finite.mean(dim=0)
    found[0] = mean
    rest = (finite - mean).flatten(1)
    values, vectors = torch.linalg.eigh(rest @ rest.T)
    least = 1e-12 * float(finite.square().sum())  # below it is the rounding of float32
    for place in range(min(directions, len(rest) - 1)):
        size = float(values[-1 - place])
        if size > least:
            found[1 + place] = ((vectors[:, -1 - place] @ rest) / size**0.5).view_as(mean)
    return found


@dataclass(frozen=True, slots=True)
class CompactKV:
    """A prefilled passage in its compact form.

    Attributes:
        rest: of the prefix from the second layer on, without what reference and `along` give: two 4-bit numbers a byte,
            shape `(2, layers - 1, kv_heads, prefix_length, head_dim / 2)`.
        scales: one float32 per vector of it, shape `(2, layers - 1, kv_heads, prefix_length, 1)`.
        along: its place along each direction, float32.
        tokens: tokens of the passage that the encoder read.
        ratio: of the states.
        truncated: whether the passage was longer than `max_length` tokens.
        states: pooled encoder states, shape `(groups, width)`; None as long as they were not looked up.
    """

    rest: torch.Tensor
    scales: torch.Tensor
    along: torch.Tensor
    tokens: int
    ratio: int
    truncated: bool
    states: torch.Tensor | None = None

    @property
    def positions(self) -> int:
        """Number of positions that a query attends to besides its own."""
        return int(self.rest.shape[3]) - (-self.tokens // self.ratio)

    @property
    def nbytes(self) -> int:
        """Size in bytes, states included."""
        parts = [self.rest, self.scales, self.along, *([] if self.states is None else [self.states])]
        return sum(int(part.numel() * part.element_size()) for part in parts)

    def with_states(self, states: PassageStates) -> CompactKV:
        """Return the same passage with its states."""
        return replace(self, states=states.states)


def compacted(prefix: torch.Tensor, reference: Reference, states: PassageStates) -> CompactKV:
    """Return the compact form of one passage.

    Args:
        prefix: keys and values of its prefix, shape `(2, layers, kv_heads, prefix_length, head_dim)`.
        reference: of the same prompt prefix.
        states: what the passage was prefilled from.
    """
    numbers = reference.numbers[:, :, 1:].float()
    difference = prefix[:, 1:].float() - numbers[0]
    directions = numbers[1:].flatten(1)
    along = directions @ difference.flatten()
    rest, scales = pack_nibbles(difference - (along @ directions).view_as(difference))
    return CompactKV(rest, scales, along, states.tokens, states.ratio, states.truncated, states.states)


def to_rows(passage: CompactKV) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a passage without its states as rows of bytes with a scale each, as a frame keeps them.

    The last rows are the bytes of `along`, with the scale 1.
    """
    import torch

    width = passage.rest.shape[-1]
    numbers = passage.along.float().cpu().contiguous().view(torch.uint8)
    last = torch.zeros(-(-len(numbers) // width) * width, dtype=torch.uint8, device="cpu")
    last[: len(numbers)] = numbers
    rows = torch.cat([passage.rest.cpu().reshape(-1, width), last.view(-1, width)])
    ones = torch.ones(len(rows) - passage.scales.numel(), dtype=torch.float32, device="cpu")
    return rows.view(torch.int8), torch.cat([passage.scales.cpu().flatten(), ones])[:, None]


def from_rows(
    rows: torch.Tensor, scales: torch.Tensor, shape: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Undo `to_rows`.

    Args:
        rows: the bytes.
        scales: one each.
        shape: of `rest`, without its last dimension.

    Returns:
        `rest`, `scales` and `along`.
    """
    import torch

    count = math.prod(shape)
    along = rows[count:].reshape(-1).view(torch.uint8)[: 4 * DIRECTIONS].clone().view(torch.float32)
    return rows[:count].view(torch.uint8).view(*shape, -1), scales[:count].view(*shape, 1), along


def rows_of(shape: tuple[int, ...], width: int) -> int:
    """Return how many rows `to_rows` gives for this shape of `rest`, its last dimension being `width`."""
    return math.prod(shape) - (-4 * DIRECTIONS // width)


class Expansion:
    """Turns compact passages back into keys and values.

    Args:
        loaded: the model, whose decoder projects the states.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        self._loaded = loaded
        self._layers: list[Any] = list(loaded.model.get_decoder().layers)

    def of_states(self, states: torch.Tensor, layer: int, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return one layer's keys and values of states.

        Args:
            states: shape `(batch, groups, width)`, in the dtype that the model computes in.
            layer: which.
            heads: kv heads.

        Returns:
            Each of shape `(batch, kv_heads, groups, head_dim)`.

        Raises:
            PrefillUnsupportedError: the layer is not built as expected.
        """
        shape = (*states.shape[:2], heads, -1)
        try:
            own = self._layers[layer].self_attn
            keys, values = own.k_norm(own.k_proj(states).view(shape).transpose(1, 2)), own.v_proj(states).view(shape)
        except AttributeError as error:
            msg = f"the compact form needs a decoder whose layers project and norm as those of T5Gemma 2 ({error})"
            raise PrefillUnsupportedError(msg) from None
        return keys, values.transpose(1, 2)

    def fill(self, room: torch.Tensor, passages: Sequence[CompactKV], reference: Reference) -> None:
        """Write the keys and values of a batch.

        Args:
            room: shape `(2, layers, batch, kv_heads, positions, head_dim)`: positions are those of the longest passage.
            passages: a row each, with states.
            reference: what they were compacted against.
        """
        import torch

        prefix, heads = int(reference.numbers.shape[4]), int(room.shape[3])
        states, _ = right_pad_states([_states_of(passage) for passage in passages], self._loaded)
        along = torch.stack([passage.along for passage in passages])
        rest = torch.stack([passage.rest for passage in passages], dim=2)
        scales = torch.stack([passage.scales for passage in passages], dim=2).to(room.dtype)
        words = empty_words(rest[:, 0], room.dtype)
        for layer in range(len(self._layers)):  # what one layer needs stays in the processor's cache
            keys, values = self.of_states(states, layer, heads)
            room[0, layer, :, :, prefix:] = keys
            room[1, layer, :, :, prefix:] = values
            near = reference.at(along, layer).to(room.dtype)
            place = room[:, layer, :, :, :prefix]
            if layer == 0:
                place.copy_(near)
            else:
                numbers = unpack_nibbles(rest[:, layer - 1], room.dtype, words)
                torch.add(near, numbers.mul_(scales[:, layer - 1]), out=place)

    def check(self, states: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, layer: int) -> None:
        """Compare a projection with the decoder's own keys and values of the same states.

        Raises:
            PrefillUnsupportedError: they differ by more than rounding.
        """
        tolerance = 1e-4 if states.element_size() == 4 else 3e-2
        for ours, own in zip(self.of_states(states, layer, int(keys.shape[1])), (keys, values), strict=True):
            if (ours.float() - own.float()).abs().max() > tolerance * own.abs().max().float():
                msg = "this version of transformers projects passages differently than kalm-rag expects"
                raise PrefillUnsupportedError(msg)


def _states_of(passage: CompactKV) -> torch.Tensor:
    if passage.states is None:
        msg = "a compact passage without its states cannot be expanded"
        raise RuntimeError(msg)
    return passage.states
