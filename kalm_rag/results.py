"""The results of the public calls: frozen records of Python numbers, never tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kalm_rag.cache.store import StoreStats

Document = str | Mapping[str, Any]
"""A passage: its text, or a mapping with the text under `"text"` (other keys are carried along untouched)."""


@dataclass(frozen=True, slots=True)
class RankedPassage:
    """One passage of a ranking.

    Attributes:
        index: position of the passage in the list that was given.
        score: `P(yes)`, between 0 and 1.
        margin: `z_yes - z_no`, the raw score; it keeps telling passages apart where `score` saturates.
        document: the very object that was given.
        passage_truncated: the passage was longer than `max_length` tokens and its tail was not read.
        query_truncated: the query was longer than `query_max_length` tokens and its tail was not read.
        passage_repaired: the passage holds half a surrogate pair, which was read as U+FFFD; `document` is unchanged.
        query_repaired: the same, of the query.
    """

    index: int
    score: float
    margin: float
    document: Document
    passage_truncated: bool = False
    query_truncated: bool = False
    passage_repaired: bool = False
    query_repaired: bool = False


@dataclass(frozen=True, slots=True)
class EncodeReport:
    """Counts the passages of an `encode` call.

    Attributes:
        new: passages that were encoded now.
        known: passages that were found encoded already, or that occurred earlier in the same call.
        truncated: among both, those longer than `max_length` tokens.
        repaired: among both, those with half a surrogate pair, which was read as U+FFFD.
    """

    new: int
    known: int
    truncated: int
    repaired: int = 0

    @property
    def total(self) -> int:
        """Passages that were given."""
        return self.new + self.known


@dataclass(frozen=True, slots=True)
class Estimate:
    """What encoding passages takes.

    Attributes:
        tokens: of each passage, as many as the encoder reads.
        states_bytes: bytes of all encoder states in the cache.
        prefilled_bytes: bytes of all passages if they are kept prefilled as well.
    """

    tokens: tuple[int, ...]
    states_bytes: int
    prefilled_bytes: int


@dataclass(slots=True)
class PrefillCounters:
    """Counts prefilled passages since the model was loaded.

    Attributes:
        hits: passages that were prefilled in memory.
        stored: passages that were prefilled in the cache's store (`PassageCache(keep="prefilled")`).
        misses: passages that were prefilled for the call.
        full_prompts: pairs whose prompt did not begin as expected, so that it ran in full; the score is the same.
    """

    hits: int = 0
    stored: int = 0
    misses: int = 0
    full_prompts: int = 0


@dataclass(frozen=True, slots=True)
class PrefillStats:
    """Counters of the prefilled level and its size in memory."""

    counters: PrefillCounters
    size: StoreStats
