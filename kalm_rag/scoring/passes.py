"""Scores pairs on prefilled passages: all of them, or in two passes those that count."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from kalm_rag.model.first_pass import AssumedKV
from kalm_rag.model.merged_attention import PrefillUnsupportedError
from kalm_rag.model.pooling import PassageStates
from kalm_rag.model.prefill import PrefilledPair
from kalm_rag.passage_kv import BehindPrefix, PassageKVSource
from kalm_rag.scoring.score import Score, passages_of
from kalm_rag.settings import Settings
from kalm_rag.states import StatesSource
from kalm_rag.utils.progress import Progress
from kalm_rag.utils.refining import Wanted, refine

logger = logging.getLogger(__name__)


class Passes:
    """Scores pairs on prefilled passages: all of them, or in two passes those that count.

    Args:
        passage_kv: prefills passages, and learns the error of a first pass.
        states: what a first pass needs of passages.
        settings: whether to take two passes.
    """

    def __init__(self, passage_kv: PassageKVSource, states: StatesSource, settings: Settings) -> None:
        self._passage_kv = passage_kv
        self._states = states
        self._refines = settings.refine

    def exactly(
        self,
        scores: Sequence[Score],
        request: BehindPrefix,
        progress: Progress | None,
        states: Mapping[str, PassageStates] | None = None,
    ) -> None:
        """Score pairs; with `states`, as in `PassageKVSource.in_groups`, those of passages without any keep NaN."""
        by_passage: dict[str, list[Score]] = {}
        for score in scores:
            by_passage.setdefault(score.passage, []).append(score)
        for passages in self._passage_kv.in_groups(list(by_passage), request, states):
            group = [score for passage in passages for score in by_passage[passage]]
            pairs = [PrefilledPair(score.prompt, passages[score.passage]) for score in group]
            margins = self._passage_kv.decoder.margins(request.prefix, pairs, request.reference)
            for score, pair, margin in zip(group, pairs, margins, strict=True):
                score.reach(margin, truncated=pair.passage.truncated)
            del pairs, pair  # the next group may need their memory
            if progress is not None:
                progress.advance(len(group))

    def leave_out(
        self, scores: list[Score], request: BehindPrefix, wanted: Wanted, progress: Progress | None
    ) -> list[Score]:
        """Score pairs in two passes where that saves time; returns those that are left to score exactly."""
        if not (self._refines and wanted.saves(len(scores))):
            return scores
        for score in scores:
            score.exact = False
        self.exactly(scores, request, progress, states={})
        known = [*wanted.known, *(score.margin for score in scores if score.exact)]
        scores = [score for score in scores if not score.exact]
        return [] if wanted.saves(len(scores)) and self._refine(scores, known, request, wanted, progress) else scores

    def _refine(
        self,
        scores: Sequence[Score],
        known: Sequence[float],
        request: BehindPrefix,
        wanted: Wanted,
        progress: Progress | None,
    ) -> bool:
        """Take both passes over pairs of passages that are not prefilled; False if this decoder cannot."""
        source, prefix = self._passage_kv, request.prefix
        states = self._states.get(passages_of(scores), request.ratio)
        pairs = [PrefilledPair(score.prompt, AssumedKV(states[score.passage], len(prefix))) for score in scores]
        try:
            near = source.decoder.margins(prefix, pairs, source.references.get(prefix, request.ratio))
        except PrefillUnsupportedError as error:
            self._refines = False
            logger.warning("%s: refine=True has no effect", error)
            return False
        for score, pair, margin in zip(scores, pairs, near, strict=True):
            score.margin, score.passage_truncated = margin, pair.passage.truncated

        def exactly(places: list[int]) -> list[float]:
            chosen = [scores[place] for place in places]
            self.exactly(chosen, request, progress, states)
            return [score.margin for score in chosen]

        found = refine(near, known, wanted, source.cached.bounds.get((prefix, request.ratio)), exactly)
        skipped = len(scores) - len(found.exact)
        source.cached.count(
            approximated=len(scores), skipped=skipped, sampled=found.sampled, bound_failures=found.failures
        )
        if progress is not None:
            progress.advance(skipped)
        return True
