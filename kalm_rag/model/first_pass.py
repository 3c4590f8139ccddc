"""The first of two passes: a passage that is not prefilled, behind a prompt prefix that does not know it.

Keys and values of the prompt's prefix hardly depend on the passage, so those of a reference stand in for them. Nothing
is prefilled, and margins are near the exact ones. Which passages need the exact pass is decided elsewhere
(`kalm_rag.utils.refining`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kalm_rag.model.compact import Expansion, Reference
from kalm_rag.model.loading import LoadedModel
from kalm_rag.model.padding import right_pad_states
from kalm_rag.model.pooling import PassageStates

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class AssumedKV:
    """A passage whose prefix is assumed to be the mean of a reference.

    Attributes:
        states: the passage.
        prefix_length: tokens of the prompt's prefix.
    """

    states: PassageStates
    prefix_length: int

    @property
    def positions(self) -> int:
        """Number of positions that a query attends to besides its own."""
        return self.prefix_length + len(self.states.states)

    @property
    def truncated(self) -> bool:
        """Whether the passage was longer than `max_length` tokens."""
        return self.states.truncated


def assume(
    room: torch.Tensor,
    passages: Sequence[AssumedKV],
    reference: Reference,
    expansion: Expansion,
    loaded: LoadedModel,
) -> None:
    """Write the keys and values of a batch.

    Args:
        room: shape `(2, layers, batch, kv_heads, positions, head_dim)`: positions are those of the longest passage.
        passages: a row each.
        reference: of the prompt's prefix.
        expansion: projects states.
        loaded: the model.

    Raises:
        PrefillUnsupportedError: the decoder does not project as expected.
    """
    prefix, heads = int(reference.numbers.shape[4]), int(room.shape[3])
    states, _ = right_pad_states([passage.states.states for passage in passages], loaded)
    for layer in range(int(room.shape[1])):
        keys, values = expansion.of_states(states, layer, heads)
        room[0, layer, :, :, prefix:] = keys
        room[1, layer, :, :, prefix:] = values
        room[:, layer, :, :, :prefix] = reference.numbers[0, :, layer][:, None]
