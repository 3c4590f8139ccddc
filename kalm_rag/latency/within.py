"""Scores pairs while time lasts, cheapest passages first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

from kalm_rag.latency.limit import TimeLimit, next_step
from kalm_rag.model.decoder import Pair
from kalm_rag.model.pooling import PassageStates
from kalm_rag.model.prefill import PrefilledPair, score_size
from kalm_rag.passage_kv import BehindPrefix, Prefilled
from kalm_rag.utils.costs import Work
from kalm_rag.utils.recording import add_sources
from kalm_rag.utils.turns import LateError, until

if TYPE_CHECKING:
    from kalm_rag.scorer import Scorer
    from kalm_rag.scoring.score import Score

T = TypeVar("T")

_AT_ONCE = 32
"""Passages of a step, and passages that are looked up or tokenised at once."""


class LimitedRun:
    """Scores the pairs of one list until a limit ends it.

    Known passages are first: prefilled ones in memory, then those in the store, then those with encoder states, then
    unknown ones; within each, the order given. A passage whose cost exceeds the time left is not started, a shorter one
    after it may be.

    Args:
        scorer: of the loaded model.
        scores: pairs without a score; those that the limit leaves out keep `reached` False.
        request: asks for prefilled passages; None if this model runs full prompts.
        ratio: of the passages' states.
        limit: when to stop.

    Attributes:
        unknown: passages that are not encoded, once the run has ended.
    """

    def __init__(
        self, scorer: Scorer, scores: Iterable[Score], request: BehindPrefix | None, ratio: int, limit: TimeLimit
    ) -> None:
        self._scorer, self._request, self._ratio, self._limit = scorer, request, ratio, limit
        self._pairs = _Pairs(scores, request, ratio)
        self.unknown: list[str] = []

    def run(self) -> None:
        """Score what the limit lets."""
        try:
            with until(self._limit.deadline):
                left = self._use_prefilled(self._pairs.passages)
                self._use_encoder(self._use_states(left))
        except LateError:
            pass  # another call had the model until the end of the budget

    def _use_prefilled(self, texts: list[str]) -> list[str]:
        """Score pairs of passages that are prefilled, and return the others."""
        self.unknown = texts  # as long as they are not looked up
        if self._request is None:
            return texts
        source = self._scorer.passage_kv
        keys = dict(zip(source.keys(texts, self._request), texts, strict=True))
        ready = {keys[key]: found for key, found in source.cached.recall(list(keys), self._request).items()}
        source.cached.count(hits=len(ready))
        add_sources(memory=ready)
        self._steps(list(ready.items()), self._score_prefilled, self._pairs.size_prefilled)
        self.unknown = left = [text for text in texts if text not in ready]
        if not source.cached.cache.keeps("passage_kv"):
            return left
        rest: list[str] = []
        for start in range(0, len(left), _AT_ONCE):
            part = left[start : start + _AT_ONCE]
            stored = source.find(part, self._request) if self._limit.left > 0 else {}
            source.cached.count(misses=len(stored) - len(part) if stored else 0)  # nothing was made of them yet
            self._steps(list(stored.items()), self._score_prefilled, self._pairs.size_prefilled)
            rest += [text for text in part if text not in stored]
        return rest

    def _use_states(self, texts: list[str]) -> list[str]:
        """Score pairs of passages with encoder states, and return those without."""
        known: list[tuple[str, PassageStates]] = []
        unknown: list[str] = []
        for start in range(0, len(texts), _AT_ONCE):
            part = texts[start : start + _AT_ONCE]
            states = self._scorer.states.find(part, self._ratio) if self._limit.left > 0 else {}
            known += states.items()
            unknown += [text for text in part if text not in states]
        self.unknown = unknown
        self._steps(known, self._score_states, self._pairs.size_of_states)
        return unknown

    def _use_encoder(self, texts: list[str]) -> None:
        """Encode passages and score their pairs."""
        self.unknown = list(texts)
        for start in range(0, len(texts) if self._limit.encodes else 0, _AT_ONCE):
            if self._limit.left <= 0:
                return
            part = texts[start : start + _AT_ONCE]
            counts = [len(passage.ids) for passage in self._scorer.prompts.passages(part)]
            self._steps(list(zip(part, counts, strict=True)), self._encode, self._pairs.size_unknown)

    def _steps(
        self,
        items: Sequence[tuple[str, T]],
        run: Callable[[dict[str, T]], None],
        size: Callable[[tuple[str, T]], Mapping[Work, float]],
    ) -> None:
        """Run items in steps that fit into the time left, until none does."""
        predict = self._scorer.turns.costs.predict
        while items:
            places = next_step(items, size, predict, self._limit.left, _AT_ONCE)
            if not places:
                return
            run(dict(items[place] for place in places))
            chosen = set(places)
            items = [item for place, item in enumerate(items) if place not in chosen]

    def _encode(self, texts: Mapping[str, int]) -> None:
        for made, _ in self._scorer.states.make(list(texts), self._ratio):
            encoded = set(made)
            self.unknown = [text for text in self.unknown if text not in encoded]
            self._score_states(made)

    def _score_states(self, states: Mapping[str, PassageStates]) -> None:
        behind = [text for text in states if self._pairs.behind(text)]
        if behind and self._request is not None:
            source = self._scorer.passage_kv
            source.cached.count(misses=len(behind))
            for made, _ in source.make(behind, self._request, [states[text] for text in behind]):
                self._score_prefilled(made)
        left = [score for text in states for score in self._pairs.of(text) if not self._pairs.is_behind(score)]
        pairs = [Pair(score.prompt, states[score.passage]) for score in left]
        for score, margin in zip(left, self._scorer.decoder.margins(pairs), strict=True):
            score.reach(margin, truncated=states[score.passage].truncated)

    def _score_prefilled(self, passages: Mapping[str, Prefilled]) -> None:
        if self._request is None:
            return
        ready = [score for text in passages for score in self._pairs.behind(text)]
        pairs = [PrefilledPair(score.prompt, passages[score.passage]) for score in ready]
        margins = self._scorer.passage_kv.decoder.margins(self._request.prefix, pairs, self._request.reference)
        for score, margin in zip(ready, margins, strict=True):
            score.reach(margin, truncated=passages[score.passage].truncated)


class _Pairs:
    """The pairs of each passage, and how many tokens the model runs for them.

    Args:
        scores: the pairs; they are marked as not reached.
        request: as in `LimitedRun`.
        ratio: as in `LimitedRun`.
    """

    def __init__(self, scores: Iterable[Score], request: BehindPrefix | None, ratio: int) -> None:
        self._prefix = None if request is None else request.prefix
        self._ratio = ratio
        self._by_passage: dict[str, list[Score]] = {}
        for score in scores:
            score.reached = False
            self._by_passage.setdefault(score.passage, []).append(score)

    @property
    def passages(self) -> list[str]:
        """The distinct passages, in the order given."""
        return list(self._by_passage)

    def of(self, text: str) -> list[Score]:
        """All pairs of a passage."""
        return self._by_passage[text]

    def behind(self, text: str) -> list[Score]:
        """The pairs of a passage that can be scored on it prefilled."""
        return [score for score in self._by_passage[text] if self.is_behind(score)]

    def is_behind(self, score: Score) -> bool:
        """Whether a pair can be scored on a prefilled passage."""
        return self._prefix is not None and self._prefix.starts(score.prompt)

    def size_prefilled(self, item: tuple[str, Prefilled]) -> Mapping[Work, float]:
        """Tokens by kind of work, of a prefilled passage."""
        text, passage = item
        return {"score": self._score_size(text, passage.positions)}

    def size_of_states(self, item: tuple[str, PassageStates]) -> Mapping[Work, float]:
        """The same, of a passage with encoder states."""
        text, states = item
        return self._sizes(text, len(states.states))

    def size_unknown(self, item: tuple[str, int]) -> Mapping[Work, float]:
        """The same, of a passage of so many tokens that must be encoded."""
        text, tokens = item
        return {"encode": tokens, **self._sizes(text, -(-tokens // self._ratio))}

    def _sizes(self, text: str, groups: int) -> dict[Work, float]:
        positions = groups + (0 if self._prefix is None else len(self._prefix))
        return {"prefill": positions if self.behind(text) else 0, "score": self._score_size(text, positions)}

    def _score_size(self, text: str, positions: int) -> float:
        prefix = 0 if self._prefix is None else len(self._prefix)
        return sum(
            score_size(len(score.prompt.ids) - prefix, positions) if self.is_behind(score) else len(score.prompt.ids)
            for score in self._by_passage[text]
        )
