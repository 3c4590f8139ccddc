"""What a threshold does to judged queries, and which scores it holds for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from kalm_rag.utils.display import Shown, shorten


class Figure(NamedTuple):
    """A value and the 95 % bootstrap interval over queries."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, repr=False)
class Figures(Shown):
    """What a threshold does to the candidates of some queries. A figure that has no cases is None.

    Attributes:
        queries: queries.
        unanswered: of these, those without a relevant candidate.
        precision: of the passages that stay, the share that is relevant.
        recall: of the relevant candidates, the share that stays.
        f1: harmonic mean of the two.
        kept: passages that stay, per query.
        emptied: of the queries with a relevant candidate, the share that is left with nothing.
        abstained: of the queries without one, the share that rightly gets nothing.
    """

    queries: int
    unanswered: int
    precision: Figure | None
    recall: Figure | None
    f1: Figure | None
    kept: Figure | None
    emptied: Figure | None
    abstained: Figure | None


MEASURES = ("precision", "recall", "f1", "kept", "emptied", "abstained")
"""The figures among the fields of `Figures`."""


@dataclass(frozen=True, slots=True, repr=False)
class Scope(Shown):
    """The scores that a threshold holds for.

    Attributes:
        model: digest of the model's content, adapter included, in 24 hexadecimal digits: `ModelIdentity.mark`.
        ratio: encoder states averaged into one.
        instruction: what "relevant" means.
        system_prompt: the sentence before it.
    """

    model: str
    ratio: int
    instruction: str
    system_prompt: str

    def differences(self, other: Scope) -> list[str]:
        """Name what differs from another scope, with both values."""
        found = []
        if self.model != other.model:
            found.append(f"the model with digest {self.model}, not {other.model}")
        if self.ratio != other.ratio:
            found.append(f"ratio {self.ratio}, not {other.ratio}")
        for name in ("instruction", "system_prompt"):
            own, others = getattr(self, name), getattr(other, name)
            if own != others:
                found.append(f"the {name.replace('_', ' ')} {_quoted(own, others)}, not {_quoted(others, own)}")
        return found


def _quoted(text: str, other: str) -> str:
    """Return a text in quotes, cut where it differs from another, if it is long."""
    places = (place for place, (one, two) in enumerate(zip(text, other, strict=False)) if one != two)
    same = next(places, min(len(text), len(other)))
    start = 0 if same < 60 else same - 20
    return f"{'…' if start else ''}{shorten(text[start:], 80)!r}"
