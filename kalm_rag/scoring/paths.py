"""Every way from a pair to its margin."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence

from kalm_rag.cache import PassageCache
from kalm_rag.cache.keys import KeySpace
from kalm_rag.model.decoder import Decoder, Pair
from kalm_rag.model.merged_attention import PrefillUnsupportedError
from kalm_rag.model.pooling import PassageStates
from kalm_rag.passage_kv import BehindPrefix, PassageKVSource
from kalm_rag.scoring.passes import Passes
from kalm_rag.scoring.score import Score, passages_of
from kalm_rag.settings import Settings
from kalm_rag.states import StatesSource
from kalm_rag.utils.progress import Progress
from kalm_rag.utils.refining import Wanted

logger = logging.getLogger(__name__)


class Paths:
    """Scores pairs on prefilled passages where the model can, else on encoder states.

    Args:
        passage_kv: prefills passages.
        states: encodes passages.
        decoder: runs full prompts.
        settings: whether to take two passes.
        cache: where entries that gave no finite margin are deleted.
        keys: the cache's keys.
    """

    def __init__(
        self,
        passage_kv: PassageKVSource,
        states: StatesSource,
        decoder: Decoder,
        settings: Settings,
        cache: PassageCache,
        keys: KeySpace,
    ) -> None:
        self._passage_kv, self._states, self._decoder = passage_kv, states, decoder
        self._cache, self._keys = cache, keys
        self._prefills = passage_kv.is_used
        self._passes = Passes(passage_kv, states, settings)

    def request(self, instruction: str, ratio: int) -> BehindPrefix | None:
        """What asks for prefilled passages; None if this model runs full prompts."""
        return self._passage_kv.request(instruction, ratio) if self._prefills else None

    def run_full_prompts(self, error: PrefillUnsupportedError) -> None:
        """From now on, run full prompts: this version of transformers cannot prefill."""
        if self._prefills:
            self._prefills = False
            logger.warning("%s: every query runs its full prompt", error)
        self._passage_kv.cached.memory.clear()

    def from_prefix(
        self,
        scores: Sequence[Score],
        instruction: str,
        ratio: int,
        progress: Progress | None,
        wanted: Wanted | None,
    ) -> list[Score]:
        """Score pairs on prefilled passages, where only the query's own tokens are run; returns those left to score."""
        if not self._prefills:
            return list(scores)
        prefix = self._passage_kv.prefix(instruction)
        ready = [score for score in scores if prefix.starts(score.prompt)]
        self._passage_kv.cached.count(full_prompts=len(scores) - len(ready))
        try:
            request = self._passage_kv.request(instruction, ratio)
            if wanted is not None:
                ready = self._passes.leave_out(ready, request, wanted, progress)
            self._passes.exactly(ready, request, progress)
        except PrefillUnsupportedError as error:
            self.run_full_prompts(error)
            return list(scores)
        return [score for score in scores if not prefix.starts(score.prompt)]

    def in_full(
        self, scores: Sequence[Score], states: Mapping[str, PassageStates], progress: Progress | None = None
    ) -> None:
        """Score pairs on encoder states, running the whole prompt."""
        pairs = [Pair(score.prompt, states[score.passage]) for score in scores]
        for score, pair, margin in zip(scores, pairs, self._decoder.margins(pairs, progress), strict=True):
            score.reach(margin, truncated=pair.passage.truncated)

    def again(self, scores: Sequence[Score], instruction: str, ratio: int) -> None:
        """Score pairs without a finite margin again from their text.

        A cached entry may hold NaN with a valid checksum, if somebody wrote it on purpose: the cache must not cause an
        error.
        """
        bad = [score for score in scores if not math.isfinite(score.margin)]
        if not bad:
            return
        passages = passages_of(bad)
        keys = self._keys.states_keys(passages)
        if self._prefills:
            keys += self._passage_kv.keys(passages, self._passage_kv.request(instruction, ratio))
        self._cache.discard(keys)
        self.in_full(bad, self._states.make_all(passages, ratio))
