"""How many bytes of memory prefilled passages may take: a number, or a share of what is free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from kalm_rag.utils.display import size_text
from kalm_rag.utils.machine import free_memory

if TYPE_CHECKING:
    import torch

SHARE = 4
""""auto" takes one part in so many of what is free: another two are room to work in, and one is left to others."""

LEAST = 16_000_000
"""What "auto" takes at least: less would hold a few passages, which is no help."""

MOST = 4_000_000_000
"""What "auto" takes at most of the host's memory, which others use too."""

MOST_ON_CUDA = 16_000_000_000
"""What "auto" takes at most of a GPU."""

UNKNOWN = 1_000_000_000
"""What "auto" takes where the system does not tell how much is free."""


@dataclass(frozen=True, slots=True)
class MemoryBudget:
    """A number of bytes, and where it comes from.

    Attributes:
        bytes: that may be taken.
        source: for people.
    """

    bytes: int
    source: str


def memory_budget(asked: int | Literal["auto"], device: torch.device) -> MemoryBudget:
    """Return a budget for values on a device.

    Args:
        asked: a number of bytes, or `auto` for a share of what is free there now: a quarter, at most `MOST`, or
            `MOST_ON_CUDA` on a GPU of its own; 0 if a quarter is less than `LEAST`.
        device: where the values are.
    """
    if asked != "auto":
        return MemoryBudget(asked, "a number that was given")
    free, kind = free_memory(device)
    if free is None:
        return MemoryBudget(UNKNOWN, "auto: this system does not tell how much memory is free")
    share = free // SHARE
    if share < LEAST:
        return MemoryBudget(
            0,
            f"auto: a quarter of {size_text(free)} of free {kind} is less than {size_text(LEAST)}, too little to help",
        )
    most = MOST_ON_CUDA if device.type == "cuda" else MOST
    if share > most:
        return MemoryBudget(most, f"auto: at most {size_text(most)}, of {size_text(free)} of free {kind}")
    return MemoryBudget(share, f"auto: a quarter of {size_text(free)} of free {kind}")
