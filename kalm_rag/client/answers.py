"""The answers of a server, checked, as the records that the library returns."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeGuard, TypeVar

from kalm_rag.cache.forgetting import ForgetReport, Forgotten
from kalm_rag.documents import Passage
from kalm_rag.latency.records import BackgroundStats, RankCounts, Timings, Totals
from kalm_rag.results import PartialRanking, RankedPassage, Ranking, UnscoredPassage
from kalm_rag.thresholds.limit import Limit
from kalm_rag.utils.fusion import FirstStage, best_first
from kalm_rag.utils.refining import Wanted

R = TypeVar("R")

_FLAGS = ("passage_truncated", "query_truncated", "passage_repaired", "query_repaired", "exact")


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server says of one query's passages.

    Attributes:
        scored: what is known of the passages that have a score, by their places.
        unscored: the same of those that have none.
        counts: where the passages came from.
        timings: where the server's time went.
    """

    scored: dict[int, dict[str, Any]]
    unscored: dict[int, dict[str, Any]]
    counts: RankCounts
    timings: Timings

    def check_complete(self, count: int) -> None:
        """Refuse an answer that says nothing of some of the passages.

        Raises:
            ValueError: there is not something of each of `count` passages.
        """
        if len(self.scored) + len(self.unscored) != count:
            msg = (
                f"it must tell of {count} passages, got {len(self.scored)} with and {len(self.unscored)} without score"
            )
            raise ValueError(msg)


def read_answer(body: Mapping[str, Any], count: int) -> Answer:
    """Read the answer to a ranking of `count` passages with `details`.

    Raises:
        ValueError: a part is missing or wrong; the message names it.
    """
    scored: dict[int, dict[str, Any]] = {}
    for place, result in _objects(body, "results", count):
        margin = result.get("margin")
        if not _is_number(margin):
            msg = f"results[{place}].margin must be a number, got {margin!r:.40}"
            raise ValueError(msg)
        known = {name: _flag(result, name) for name in _FLAGS}
        scored[place] = {"margin": float(margin), "span": _span(result.get("span")), **known}
    unscored: dict[int, dict[str, Any]] = {}
    if "unscored" in body:
        for place, result in _objects(body, "unscored", count):
            unscored[place] = {
                name: _flag(result, name) for name in ("passage_repaired", "query_truncated", "query_repaired")
            }
    if not scored.keys().isdisjoint(unscored):
        msg = "a passage is among those with a score and among those without"
        raise ValueError(msg)
    calls = body.get("calls")
    call = calls[0] if isinstance(calls, list) and calls and isinstance(calls[0], dict) else {}
    counts = _record(RankCounts, call.get("counts"), _is_count)
    return Answer(scored, unscored, counts, _record(Timings, call.get("timings"), _is_number))


def joined(parts: Sequence[tuple[int, Answer]]) -> Answer:
    """Return one answer of several requests.

    Args:
        parts: each answer, and the place of its first passage.
    """
    counts, timings = summed_up([answer for _, answer in parts])
    scored = {start + place: own for start, answer in parts for place, own in answer.scored.items()}
    unscored = {start + place: own for start, answer in parts for place, own in answer.unscored.items()}
    return Answer(scored, unscored, counts, timings)


def summed_up(answers: Iterable[Answer]) -> tuple[RankCounts, Timings]:
    """Return the sums of what answers count."""
    totals = Totals()
    for answer in answers:
        totals.add(answer.counts, answer.timings)
    sums = totals.stats(BackgroundStats())
    return sums.counts, sums.timings


def ranked(
    answer: Answer, given: Sequence[Passage], limit: Limit, first_stage: FirstStage | None = None
) -> list[RankedPassage[Any]]:
    """Return the passages that have a score, best first.

    Args:
        answer: what the server says of them.
        given: the passages.
        limit: what scores are shown as.
        first_stage: as in `KaLMReranker.rank`.
    """
    reached = sorted(answer.scored)
    stage = first_stage if first_stage is None or len(reached) == len(given) else first_stage.of(reached)
    hits = []
    for place, fused in best_first([answer.scored[place]["margin"] for place in reached], stage):
        index = reached[place]
        own = answer.scored[index]
        hits.append(
            RankedPassage(index, limit.shown(own["margin"]), document=given[index].document, fused=fused, **own)
        )
    return hits


def ranking_of(
    answer: Answer,
    given: Sequence[Passage],
    wanted: Wanted,
    limit: Limit,
    first_stage: FirstStage | None,
    *,
    partial: bool,
) -> Ranking[Any] | PartialRanking[Any]:
    """Return the ranking that `rank` returns; the arguments are those of `kalm_rag.reranker.ordering.ordered`."""
    hits = [hit for hit in ranked(answer, given, limit, first_stage) if wanted.admits(hit.margin)]
    if not partial and not answer.unscored:
        return Ranking(hits)[: wanted.top_k]
    rest = [UnscoredPassage(index, given[index].document, **own) for index, own in sorted(answer.unscored.items())]
    return PartialRanking([*hits, *rest])[: wanted.top_k]


def order_kept(
    given: Sequence[Passage], query_repaired: bool, top_k: int | None, first_stage: FirstStage | None
) -> PartialRanking[Any]:
    """Return the passages without scores, in the order given, or by the first stage's scores if there are some."""
    places: Iterable[int] = range(len(given))
    if first_stage is not None:
        places = sorted(places, key=lambda place: -first_stage.scores[place])
    left = [
        UnscoredPassage(place, given[place].document, given[place].repaired, query_repaired=query_repaired)
        for place in places
    ]
    return PartialRanking(left)[:top_k]


def read_scores(body: Mapping[str, Any], count: int) -> list[float]:
    """Read the answer to a request for the scores of `count` pairs.

    Raises:
        ValueError: a part is missing or wrong; the message names it.
    """
    found: dict[int, float] = {}
    for place, result in _objects(body, "data", count):
        score = result.get("score")
        if not _is_number(score) or not 0 <= score <= 1:
            msg = f"data[{place}].score must be a number between 0 and 1, got {score!r:.40}"
            raise ValueError(msg)
        found[place] = float(score)
    if len(found) != count:
        msg = f"data must have the scores of {count} pairs, got {len(found)}"
        raise ValueError(msg)
    return [found[place] for place in range(count)]


def read_report(body: Mapping[str, Any]) -> ForgetReport:
    """Read what was forgotten.

    Raises:
        ValueError: a part is missing or wrong.
    """
    levels = {name: _record(Forgotten, body.get(name), _is_count) for name in ("memory", "store", "remote")}
    names = {part.name for part in fields(ForgetReport)} - levels.keys()
    counts = {name: body.get(name) for name in names}
    wrong = [name for name, value in counts.items() if not _is_count(value)]
    if wrong:
        msg = f"{wrong[0]} must be a number of entries"
        raise ValueError(msg)
    return ForgetReport(**levels, **counts)  # type: ignore[arg-type]


def read_progress(line: Mapping[str, Any]) -> tuple[dict[str, int], bool]:
    """Read a line of progress of `/v1/encode`: counts by name, and whether it is the last one.

    Raises:
        ValueError: it tells of an error, or a part is missing or wrong.
    """
    if isinstance(line.get("error"), str):
        msg = f"it broke off: {line['error'][:300]}"
        raise ValueError(msg)
    counts = {name: line.get(name) for name in ("done", "new", "known", "truncated", "repaired")}
    if not all(_is_count(value) for value in counts.values()) or not isinstance(line.get("finished"), bool):
        msg = "a line of progress lacks a number"
        raise ValueError(msg)
    return {name: int(value) for name, value in counts.items() if value is not None}, bool(line["finished"])


def _objects(body: Mapping[str, Any], name: str, count: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the objects of a list, each with the place that it names, which no other one may name."""
    found = body.get(name)
    if not isinstance(found, list):
        msg = f"{name} must be a list, got {type(found).__name__}"
        raise ValueError(msg)
    seen: set[int] = set()
    for own in found:
        place = own.get("index") if isinstance(own, dict) else None
        if not _is_count(place) or not 0 <= place < count or place in seen:
            msg = f"{name} must name each of {count} places once at most, got {place!r:.40}"
            raise ValueError(msg)
        seen.add(place)
        yield place, own


def _flag(result: Mapping[str, Any], name: str) -> bool:
    value = result.get(name)
    if not isinstance(value, bool):
        msg = f"{name} of a result must be true or false, got {value!r:.40}"
        raise ValueError(msg)
    return value


def _span(value: Any) -> tuple[int, int] | None:
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 2 or not all(_is_count(part) for part in value):
        msg = f"span must be two places, got {value!r:.40}"
        raise ValueError(msg)
    return value[0], value[1]


def _record(kind: type[R], value: Any, check: Callable[[Any], bool]) -> R:
    """Return a record of numbers; what a later version of the server adds is left out."""
    if not isinstance(value, dict):
        msg = f"{kind.__name__} must be an object, got {type(value).__name__}"
        raise ValueError(msg)
    names = [part.name for part in fields(kind) if part.name in value]  # type: ignore[arg-type]
    wrong = [name for name in names if not check(value[name])]
    if wrong:
        msg = f"{wrong[0]} must be a number, got {value[wrong[0]]!r:.40}"
        raise ValueError(msg)
    return kind(**{name: value[name] for name in names})


def _is_number(value: Any) -> TypeGuard[float]:
    # JSON has whole numbers that no float holds.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def read_encoded(lines: Iterable[Mapping[str, Any]], count: int) -> dict[str, int]:
    """Read the progress of encoding `count` passages to its end, and return the counts of its last line.

    Raises:
        ValueError: a line tells of an error or is wrong, or the end is missing.
    """
    counts: dict[str, int] = {}
    finished = False
    for line in lines:
        counts, finished = read_progress(line)
    if not finished or counts["done"] != count:
        msg = f"it must end with {count} passages done, got {counts.get('done', 0)}"
        raise ValueError(msg)
    return counts
