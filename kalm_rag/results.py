"""What the public calls return: plain frozen records holding Python numbers, never tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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
    """

    index: int
    score: float
    margin: float
    document: Document
    passage_truncated: bool = False
    query_truncated: bool = False


@dataclass(frozen=True, slots=True)
class EncodeReport:
    """What an `encode` call did; the unit is the passage.

    Attributes:
        new: passages that were encoded now.
        known: passages that were found encoded already, or that occurred earlier in the same call.
        truncated: among both, those longer than `max_length` tokens.
    """

    new: int
    known: int
    truncated: int

    @property
    def total(self) -> int:
        """Passages that were given."""
        return self.new + self.known
