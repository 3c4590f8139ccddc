"""What a request of any dialect asks for, and what it gets: what the dialects have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kalm_rag.serving.tokens import Side

if TYPE_CHECKING:
    from kalm_rag.results import PartialRanking, Ranking


@dataclass(frozen=True, slots=True)
class Truncation:
    """How much of texts is read.

    Attributes:
        passage_tokens: of a passage; None is as many as the server reads.
        query_tokens: of a query, likewise.
        pair_tokens: of query and passage together, likewise.
        chunks: windows of a passage, where long passages are read in windows.
        side: which end is cut off.
        refused: whether a text that is longer is an error.
    """

    passage_tokens: int | None = None
    query_tokens: int | None = None
    pair_tokens: int | None = None
    chunks: int | None = None
    side: Side = "right"
    refused: bool = False


@dataclass(frozen=True, slots=True)
class Ask:
    """A query and its passages.

    Attributes:
        query: the query.
        texts: of the passages.
        places: where their results stand in the response; None is in the order of the ranking.
    """

    query: str
    texts: Sequence[str]
    places: Sequence[int] | None = None


@dataclass(frozen=True, slots=True)
class Asked:
    """What a request asks for.

    Attributes:
        asks: queries with their passages: one, or those of `/score`.
        documents: as they were given, for responses that return them.
        top_n: results at most; None for all.
        with_documents: whether the response returns the documents.
        margins: whether the scores are margins instead of `P(yes)`.
        truncation: how much of texts is read.
        model: the name that the client sent.
        instruction: as in `KaLMReranker.rank`.
        ratio: as in `KaLMReranker.rank`.
        budget_ms: as in `KaLMReranker.rank`.
        on_unknown: as in `KaLMReranker.rank`.
        threshold: as in `KaLMReranker.rank`; None is the server's.
        long_passages: as in `KaLMReranker`; None is the server's.
        return_margin: whether each result has a margin too.
        details: whether each result has all that the library says of it.
        return_source: whether each result says where its passage came from.
    """

    asks: Sequence[Ask]
    documents: Sequence[Any] = ()
    top_n: int | None = None
    with_documents: bool = False
    margins: bool = False
    truncation: Truncation = field(default_factory=Truncation)
    model: str | None = None
    instruction: str | None = None
    ratio: int | None = None
    budget_ms: float | None = None
    on_unknown: str | None = None
    threshold: float | None = None
    long_passages: str | None = None
    return_margin: bool = False
    details: bool = False
    return_source: bool = False

    @property
    def passages(self) -> int:
        """How many passages there are."""
        return sum(len(ask.texts) for ask in self.asks)


@dataclass(frozen=True, slots=True)
class Answered:
    """A query's ranking.

    Attributes:
        ask: what was asked.
        ranking: of its passages.
        cut: which passages were cut by the request's own limits, and where what was read of them begins.
        query_cut: whether the query was.
        sources: where each passage came from, as in `recording_sources`, None if it is not known; empty unless it was
            asked for.
    """

    ask: Ask
    ranking: Ranking[str] | PartialRanking[str]
    cut: dict[int, int]
    query_cut: bool
    sources: Sequence[str | None] = ()


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a request gets.

    Attributes:
        answers: one for each query that was asked.
        model: the real name of the model.
        request_id: of the request.
        tokens: of queries and passages that were read.
    """

    answers: Sequence[Answered]
    model: str
    request_id: str
    tokens: int

    @property
    def truncated(self) -> int:
        """How many of the passages that are returned were not read to their end."""
        return sum(
            getattr(hit, "passage_truncated", False) or hit.index in answer.cut
            for answer in self.answers
            for hit in answer.ranking
        )

    @property
    def queries_truncated(self) -> int:
        """How many queries were not read to their end."""
        return sum(
            answer.query_cut or any(hit.query_truncated for hit in answer.ranking[:1]) for answer in self.answers
        )

    @property
    def unscored(self) -> int:
        """How many of the passages that are returned have no score."""
        return sum(not hit.scored for answer in self.answers for hit in answer.ranking)
