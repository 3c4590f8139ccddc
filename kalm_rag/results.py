"""The results of the public calls: frozen records of Python numbers, never tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, SupportsIndex, overload

from kalm_rag.utils.display import Shown, html_table, short_repr, shown_document, text_of

if TYPE_CHECKING:
    from typing_extensions import Self, TypeVar  # every type checker brings it; `typing` has no default before 3.13

    from kalm_rag.cache.store import StoreStats
    from kalm_rag.documents import Passage
    from kalm_rag.latency.records import RankCounts, Timings
    from kalm_rag.scoring.score import Score

Document = str | Mapping[str, Any]
"""A passage: its text, or a mapping with the text under `"text"` (other keys are carried along untouched)."""

if TYPE_CHECKING:
    D = TypeVar("D", default=Document)
    """The type of the documents that were given."""
    D_co = TypeVar("D_co", default=Document, covariant=True)
    """The same, of a record that only gives its document out."""
    H = TypeVar("H", bound="RankedPassage[Any] | UnscoredPassage[Any]")
    """The type of a ranking's passages."""
else:
    from typing import TypeVar

    D = TypeVar("D")
    D_co = TypeVar("D_co", covariant=True)
    H = TypeVar("H")

_ROWS = 10
"""Passages of a ranking that a terminal shows."""
_HTML_ROWS = 20
"""Passages of a ranking that a notebook shows."""


# No slots: until Python 3.12, `RankedPassage[str](...)` raises for a frozen data class that has them.
@dataclass(frozen=True, repr=False)
class RankedPassage(Shown, Generic[D_co]):
    """One passage of a ranking.

    Its `repr` cuts a long document and leaves out flags that have their default.

    Attributes:
        index: position of the passage in the list that was given.
        score: `P(yes)`, between 0 and 1; with `calibrated=True`, what the threshold profile makes of the margin.
        margin: `z_yes - z_no`, the raw score; it keeps telling passages apart where `score` saturates.
        document: the very object that was given.
        passage_truncated: the passage was longer than `max_length` tokens, or than `max_windows` windows, and its tail
            was not read.
        query_truncated: the query was longer than `query_max_length` tokens and its tail was not read.
        passage_repaired: the passage holds half a surrogate pair, which was read as U+FFFD; `document` is unchanged.
        query_repaired: the same, of the query.
        exact: False if `score` and `margin` are those of a first pass (`refine=True`, with a threshold and without
            `top_k`).
        span: with `long_passages="windows"`, the best window of a passage that was split: the place of its first
            character in the text that was given, and the place after its last. Score and margin are that window's.
        fused: what the passage is ranked by if `rank` was given the first stage's scores, or in `Rankings.fused`;
            else None.
        scored: True; False in `UnscoredPassage`.
    """

    index: int
    score: float
    margin: float
    document: D_co
    passage_truncated: bool = False
    query_truncated: bool = False
    passage_repaired: bool = False
    query_repaired: bool = False
    exact: bool = True
    span: tuple[int, int] | None = None
    fused: float | None = None

    scored: ClassVar[Literal[True]] = True


def ranked_passage(
    index: int, shown: float, score: Score, passage: Passage, query_repaired: bool, fused: float | None = None
) -> RankedPassage[Any]:
    """Return what a ranking says of a passage.

    Args:
        index: its position in the list that was given.
        shown: the score that it shows.
        score: what the scorer found.
        passage: the passage.
        query_repaired: as in `RankedPassage`.
        fused: as in `RankedPassage`.
    """
    return RankedPassage(
        index,
        shown,
        score.margin,
        passage.document,
        score.passage_truncated,
        score.prompt.truncated,
        passage.repaired,
        query_repaired,
        score.exact,
        passage.original_span(score.span),
        fused,
    )


@dataclass(frozen=True, repr=False)
class UnscoredPassage(Shown, Generic[D_co]):
    """A passage that `rank` did not score, because its budget ended or because it is not encoded yet.

    Attributes:
        index: position of the passage in the list that was given.
        document: the very object that was given.
        passage_repaired: as in `RankedPassage`.
        query_truncated: as in `RankedPassage`.
        query_repaired: as in `RankedPassage`.
        score: None.
        margin: None.
        scored: False.
    """

    index: int
    document: D_co
    passage_repaired: bool = False
    query_truncated: bool = False
    query_repaired: bool = False

    score: ClassVar[None] = None
    margin: ClassVar[None] = None
    scored: ClassVar[Literal[False]] = False


class _Rows(list[H]):
    """A list of passages that shows itself as a table.

    Attributes:
        counts: how many passages came from where, were scored, skipped or cut; None in a list that `rank` did not make.
        timings: where the time went; None likewise.
    """

    counts: RankCounts | None = None
    timings: Timings | None = None

    @overload
    def __getitem__(self, place: SupportsIndex, /) -> H: ...

    @overload
    def __getitem__(self, place: slice, /) -> Self: ...

    def __getitem__(self, place: SupportsIndex | slice, /) -> H | Self:
        if not isinstance(place, slice):
            return super().__getitem__(place)
        part = type(self)(super().__getitem__(place))
        part.counts, part.timings = self.counts, self.timings
        return part

    def __repr__(self) -> str:
        lines = [f"{type(self).__name__} of {_passages(len(self))}{':' if self else ''}"]
        if self:
            lines.append("rank   score  margin  index  document")
        for place, hit in enumerate(self[:_ROWS], start=1):
            score, margin = ("", "") if hit.score is None else (f"{hit.score:.4f}", f"{hit.margin:.2f}")
            line = f"{place:>4}  {score:>6}  {margin:>6}  {hit.index:>5}  "
            lines.append(line + short_repr(shown_document(hit.document), 78 - len(line)))
        if len(self) > _ROWS:
            lines.append(f"… and {len(self) - _ROWS} more")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        flags = [name for name in _FLAGS if any(getattr(hit, name, False) for hit in self)]
        flags += [] if all(getattr(hit, "exact", True) for hit in self) else ["exact"]
        has_spans = any(getattr(hit, "span", None) for hit in self)
        rows = [
            (
                str(place),
                text_of(hit.document),
                "" if hit.score is None else f"{hit.score:.4f}",
                "" if hit.margin is None else f"{hit.margin:.2f}",
                str(hit.index),
                *("yes" if getattr(hit, flag, False) else "" for flag in flags),
                *([_span_text(getattr(hit, "span", None))] if has_spans else []),
            )
            for place, hit in enumerate(self[:_HTML_ROWS], start=1)
        ]
        if len(self) > _HTML_ROWS:
            rows.append(("…", f"and {len(self) - _HTML_ROWS} more"))
        heading = ["rank", "document", "score", "margin", "index", *(flag.replace("_", " ") for flag in flags)]
        heading += ["span"] if has_spans else []
        return html_table(heading, rows, f"{type(self).__name__} of {_passages(len(self))}")


class Ranking(_Rows[RankedPassage[D]]):
    """The passages that `rank` returns, best first: a list that shows itself as a table.

    It equals a plain list of the same passages. A slice is a ranking too.

    Attributes:
        counts: how many passages came from where, were scored or cut; None in a list that `rank` did not make.
        timings: where the time went; None likewise.
    """


class PartialRanking(_Rows["RankedPassage[D] | UnscoredPassage[D]"]):
    """What `rank` returns under `budget_ms` or `on_unknown`: scored passages, best first, then those without a score.

    Attributes:
        counts: as in `Ranking`.
        timings: as in `Ranking`.
    """


def _span_text(span: tuple[int, int] | None) -> str:
    return "" if span is None else "{}:{}".format(*span)


_FLAGS = ("passage_truncated", "query_truncated", "passage_repaired", "query_repaired")


def _passages(count: int) -> str:
    return f"{count} passage" if count == 1 else f"{count} passages"


@dataclass(frozen=True, slots=True, repr=False)
class EncodeReport(Shown):
    """Counts the passages of an `encode` call. With `long_passages="windows"`, windows count as passages.

    Attributes:
        new: passages that were encoded now.
        known: passages that were found encoded already, or that occurred earlier in the same call.
        truncated: among both, those longer than `max_length` tokens; with windows, the passages of more than
            `max_windows`.
        repaired: among both, those with half a surrogate pair, which was read as U+FFFD.
    """

    new: int
    known: int
    truncated: int
    repaired: int = 0

    @property
    def total(self) -> int:
        """Passages that were given, or their windows."""
        return self.new + self.known


@dataclass(frozen=True, slots=True, repr=False)
class Estimate(Shown):
    """What encoding passages takes.

    Its `repr` shows how many passages there are and the sum of their tokens.

    Attributes:
        tokens: of each passage, as many as the encoder reads; those of all windows, if it is split.
        states_bytes: bytes of all encoder states in the cache.
        prefilled_bytes: bytes of all passages if they are kept prefilled as well.
    """

    tokens: tuple[int, ...]
    states_bytes: int
    prefilled_bytes: int

    def _facts(self, *, defaults: bool) -> list[tuple[str, str]]:
        counts = [("passages", str(len(self.tokens))), ("tokens", str(sum(self.tokens)))]
        return [*counts, *super(Estimate, self)._facts(defaults=defaults)[1:]]


@dataclass(slots=True, repr=False)
class PrefillCounters(Shown):
    """Counts prefilled passages since the model was loaded.

    Attributes:
        hits: passages that were prefilled in memory.
        stored: passages that were prefilled in the cache's store (`PassageCache(keep="prefilled")`).
        misses: passages that were prefilled for the call.
        full_prompts: pairs whose prompt did not begin as expected, so that it ran in full; the score is the same.
        approximated: pairs that took a first pass (`refine=True`).
        skipped: of these, the pairs that did not need the exact pass.
        sampled: of these, the pairs that would have been skipped, but took the exact pass to check the error bound.
        bound_failures: of `sampled`, the pairs whose margin was further off than the bound.
    """

    hits: int = 0
    stored: int = 0
    misses: int = 0
    full_prompts: int = 0
    approximated: int = 0
    skipped: int = 0
    sampled: int = 0
    bound_failures: int = 0


@dataclass(frozen=True, slots=True, repr=False)
class PrefillStats(Shown):
    """Counters of the prefilled level and its size in memory.

    Attributes:
        counters: since the model was loaded.
        size: in memory; its `limit` is what `prefill_memory` came to.
        limit_source: where that limit comes from, for people.
        error_bound: how far a margin of the first pass can be off, learned from the pairs that took both; the largest
            over instructions and ratios. None as long as nothing is learned.
    """

    counters: PrefillCounters
    size: StoreStats
    limit_source: str = ""
    error_bound: float | None = None

    def _facts(self, *, defaults: bool) -> list[tuple[str, str]]:
        facts = [*self.counters._facts(defaults=defaults), *self.size._facts(defaults=defaults)]
        facts += [("limit_source", self.limit_source)] * bool(self.limit_source or defaults)
        return facts if self.error_bound is None else [*facts, ("error_bound", f"{self.error_bound:.3g}")]
