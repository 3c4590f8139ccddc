"""The rankings of several queries over one list of passages, and how they become one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, get_args

from kalm_rag.results import D, RankedPassage, Ranking
from kalm_rag.utils.checks import check_choice, check_count, check_positive
from kalm_rag.utils.fusion import RRF_CONSTANT, best_first, reciprocal_ranks
from kalm_rag.utils.refining import Wanted

if TYPE_CHECKING:
    from kalm_rag.latency.records import RankCounts, Timings

How = Literal["max", "rrf"]
"""How `Rankings.fused` orders passages."""


class Rankings(list[Ranking[D]]):
    """The rankings that `rank_many` returns: a list with one `Ranking` per query, in the order of the queries.

    It equals a plain list of the same rankings. `fused` makes one ranking of them.

    Args:
        hits: every passage for each query, in the order of the passages.
        wanted: which of them a ranking shows.

    Attributes:
        counts: as in `Ranking`, of all queries together: a passage counts once for each query that it is scored for,
            and once where it comes from.
        timings: as in `Ranking`, of all queries together.
    """

    counts: RankCounts | None = None
    timings: Timings | None = None

    def __init__(self, hits: Sequence[Sequence[RankedPassage[D]]], wanted: Wanted) -> None:
        self._hits = hits
        self._wanted = wanted
        super().__init__(
            self._shown([own[place] for place, _ in best_first([hit.margin for hit in own], None)], wanted.top_k)
            for own in hits
        )

    def __repr__(self) -> str:
        heading = f"{type(self).__name__} of {len(self)} {'query' if len(self) == 1 else 'queries'}"
        parts = [f"query {number}: {ranking!r}" for number, ranking in enumerate(self)]
        return "\n\n".join([f"{heading}{':' if self else ''}", *parts])

    def fused(self, how: How = "max", top_k: int | None = None, k: int = RRF_CONSTANT) -> Ranking[D]:
        """Make one ranking of the rankings of all queries.

        Every passage counts with its margin for every query, whatever the `top_k` of `rank_many` left out, and
        whatever this list has become since. A query that was given twice counts twice in `rrf`.

        Args:
            how: `max` takes a passage's largest margin over the queries; `rrf` adds 1 / (k + rank) over the
                queries, where a passage has the rank that it has among all passages for that query, from 1. Equal
                margins share the best rank.
            top_k: how many to return, default all.
            k: the constant of `rrf`, 60 in the method's paper. A smaller one gives the first ranks more
                weight.

        Returns:
            Passages by falling `fused`, the value described under `how`; equal ones keep the order of the list that was
            given. All other fields are those of the query for which the passage has its largest margin, of equal ones
            the first. With a `threshold`, a passage is returned if it reaches it for at least one query.

        Raises:
            TypeError, ValueError: an argument is wrong; the message names it and its value.
        """
        check_choice("how", how, get_args(How))
        top_k = None if top_k is None else check_positive("top_k", top_k)
        k = check_count("k", k)
        best = [max(same, key=lambda hit: hit.margin) for same in zip(*self._hits, strict=True)]
        values = [hit.margin for hit in best]
        if how == "rrf":
            values = reciprocal_ranks([[hit.margin for hit in own] for own in self._hits], k)
        order = [place for place, _ in best_first(values, None)]
        return self._shown([replace(best[place], fused=values[place]) for place in order], top_k)

    def _shown(self, hits: Sequence[RankedPassage[D]], top_k: int | None) -> Ranking[D]:
        """Return the first `top_k` of those that reach the threshold."""
        return Ranking(hit for hit in hits if self._wanted.admits(hit.margin))[:top_k]
