"""Scores pairs of texts with one loaded model."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kalm_rag.cache import PassageCache
from kalm_rag.cache.scores import ScoreCache
from kalm_rag.cache.spaces import Space
from kalm_rag.errors import ForkError, ScoringError
from kalm_rag.model.checkpoint import Checkpoint
from kalm_rag.model.decoder import Decoder, Pair
from kalm_rag.model.first_pass import AssumedKV
from kalm_rag.model.identity import identify
from kalm_rag.model.loading import LoadedModel, load_model, resolve_device
from kalm_rag.model.merged_attention import PrefillUnsupportedError
from kalm_rag.model.pooling import PassageStates
from kalm_rag.model.prefill import PrefilledPair
from kalm_rag.model.prompts import Prompt, Prompts
from kalm_rag.passage_kv import BehindPrefix, PassageKVSource
from kalm_rag.results import EncodeReport
from kalm_rag.settings import AT_ONCE, Settings
from kalm_rag.states import StatesSource, key_space
from kalm_rag.utils import forks
from kalm_rag.utils.margins import probability
from kalm_rag.utils.progress import Progress
from kalm_rag.utils.refining import Wanted, refine
from kalm_rag.utils.turns import Turns
from kalm_rag.windows.source import WindowSource
from kalm_rag.windows.splitter import Span

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Score:
    """One pair and what it scored.

    Attributes:
        prompt: the query as the decoder reads it.
        passage: the passage, cleaned.
        margin: `z_yes - z_no`.
        passage_truncated: whether a part of the passage was not read.
        exact: False for a margin of a first pass.
        span: the window that the score is of, in the passage as it was given; None if the passage was not split.
    """

    prompt: Prompt
    passage: str
    margin: float = math.nan
    passage_truncated: bool = False
    exact: bool = True
    span: Span | None = None

    @property
    def probability(self) -> float:
        """`P(yes)`, between 0 and 1."""
        return probability(self.margin)


class Scorer:
    """Everything that exists only while a model is loaded.

    Calls may come from any thread. They run side by side and give way to each other after every batch, in the order of
    asking (`turns`); a cancelled one stops there. What a call computes does not depend on the others.

    Args:
        loaded: the model.
        checkpoint: where it came from.
        settings: how passages and queries become scores.
        cache: what keeps encoded passages.

    Attributes:
        loaded: the model.
        settings: how passages and queries become scores.
        identity: digests of the model's content.
        prompts: text to token ids.
        windows: what is read of long passages.
        keys: the cache's keys for this model and these settings.
        turns: who may use the model next. It guards the model and all that a forward pass uses.
        states: encoder states of passages.
        passage_kv: keys and values of prefilled passages.
        score_cache: scores of pairs that were seen before.
    """

    def __init__(self, loaded: LoadedModel, checkpoint: Checkpoint, settings: Settings, cache: PassageCache) -> None:
        _check_lengths(loaded, settings)
        self.loaded = loaded
        self.settings = settings
        self.identity = identify(checkpoint)
        self.keys = key_space(
            self.identity,
            max_length=settings.max_length,
            dtype=loaded.encoder_precision,
            storage=cache.storage,
        )
        self.prompts = Prompts(loaded.tokenizer, settings, loaded.model.config.decoder.max_position_embeddings)
        self.windows = WindowSource(loaded.tokenizer, settings)
        self.turns = Turns()
        self.states = StatesSource(loaded, settings, cache, self.keys, self.prompts, self.turns)
        self.passage_kv = PassageKVSource(loaded, settings, cache, self.keys, self.prompts, self.states, self.turns)
        self.score_cache = ScoreCache(settings.score_memory, cache, Space(self.keys, loaded.tokenizer.control))
        self._decoder = Decoder(loaded, settings, self.turns)
        self._cache = cache
        self._prefills = self.passage_kv.is_used
        self._passes = _Passes(self.passage_kv, self.states, settings)
        self._was_forked = False
        forks.watch(self)

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        *,
        settings: Settings,
        cache: PassageCache,
        device: str | torch.device | None,
        dtype: str | torch.dtype | None,
    ) -> Scorer:
        """Load a checkpoint onto a device."""
        forks.ready_to_compute()
        with forks.native():
            place = resolve_device(device)
            loaded = load_model(checkpoint, settings=settings, device=place, dtype=dtype)
            return cls(loaded, checkpoint, settings, cache)

    def after_fork_in_child(self) -> None:
        """Note the fork: the model is usable in the child only on a CPU."""
        self._was_forked = True

    def check_process(self) -> None:
        """Check that this process can use the model.

        Raises:
            ForkError: it was forked after the model was loaded onto an accelerator.
        """
        forks.ready_to_compute()
        if self._was_forked and self.loaded.device.type != "cpu":
            msg = (
                f"this process was forked after the model was loaded on {self.loaded.device}, which a forked process "
                "cannot use: load the model after the fork, or start processes with the method 'spawn'"
            )
            raise ForkError(msg)

    def clean(self, texts: Sequence[str]) -> list[str]:
        """Return passages as they are encoded and cached."""
        return [self.loaded.tokenizer.clean(text) for text in texts]

    def spaces(self) -> list[Space]:
        """Return the cache's key spaces of this model and these settings."""
        own = BehindPrefix(self.passage_kv.prefix(self.settings.instruction), self.settings.ratio)
        found = (self.states.space(self._cache.base_ratio), self.passage_kv.space(own))
        return [space for space in found if space is not None]

    def encode(self, texts: Sequence[str], progress: Progress | None = None) -> EncodeReport:
        """Encode the passages that the cache does not hold, and prefill them if its store keeps that too.

        The windows of a long passage are passages of their own here.
        """
        self.check_process()
        passages = self.windows.expand(texts)
        new = 0
        truncated = self.windows.incomplete(texts)
        for start in range(0, len(passages), AT_ONCE):
            some = passages[start : start + AT_ONCE]
            report = self.states.encode(some, progress)
            self.passage_kv.encode(some)
            new, truncated = new + report.new, truncated + report.truncated
        return EncodeReport(new, len(passages) - new, truncated)

    def score(
        self,
        pairs: Sequence[tuple[str, str]],
        instruction: str,
        ratio: int,
        progress: Progress | None = None,
        wanted: Wanted | None = None,
    ) -> list[Score]:
        """Score `(query, passage)` pairs, in input order; each passage and each query is read once.

        The model runs for pairs whose score is not remembered. With the setting `refine` and `wanted`, which is of one
        query, pairs that do not decide what is returned may get an approximate margin, which is not remembered.

        Raises:
            ScoringError: a margin is not finite, as happens in float16.
            ValueError: a prompt has more tokens than the model has positions.
        """
        self.check_process()
        scores = self._prompt(pairs, instruction)
        keys = self.score_cache.keys([score.prompt.ids for score in scores], [score.passage for score in scores], ratio)
        known = self.score_cache.get_many(keys)
        new = _recall(scores, known, progress)
        if wanted is not None:
            wanted = wanted.beside([found[0] for found in known if found is not None])
        left = self._score_from_prefix(new, instruction, ratio, progress, wanted)
        self._score_in_full(left, self.states.get(_passages(left), ratio), progress)
        self._rescore_nonfinite(new, instruction, ratio)
        self.loaded.files.check()
        _check_finite(scores, self.loaded.dtype)
        self.score_cache.put_many(
            {
                key: (score.margin, score.passage_truncated)
                for key, score, found in zip(keys, scores, known, strict=True)
                if found is None and score.exact
            }
        )
        return scores

    def _prompt(self, pairs: Sequence[tuple[str, str]], instruction: str) -> list[Score]:
        queries = dict.fromkeys(query for query, _ in pairs)
        prompts = {query: self.prompts.prompt(query, instruction) for query in queries}
        self.prompts.unknown.add(sum(prompt.unknown for prompt in prompts.values()))
        return [Score(prompts[query], self.loaded.tokenizer.clean(text)) for query, text in pairs]

    def _score_from_prefix(
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
        prefix = self.passage_kv.prefix(instruction)
        ready = [score for score in scores if prefix.starts(score.prompt)]
        self.passage_kv.cached.count(full_prompts=len(scores) - len(ready))
        try:
            request = self.passage_kv.request(instruction, ratio)
            if wanted is not None:
                ready = self._passes.leave_out(ready, request, wanted, progress)
            self._passes.exactly(ready, request, progress)
        except PrefillUnsupportedError as error:
            if self._prefills:
                self._prefills = False
                logger.warning("%s: every query runs its full prompt", error)
            self.passage_kv.cached.memory.clear()
            return list(scores)
        return [score for score in scores if not prefix.starts(score.prompt)]

    def _score_in_full(
        self, scores: Sequence[Score], states: Mapping[str, PassageStates], progress: Progress | None = None
    ) -> None:
        """Score pairs on encoder states, running the whole prompt."""
        pairs = [Pair(score.prompt, states[score.passage]) for score in scores]
        for score, pair, margin in zip(scores, pairs, self._decoder.margins(pairs, progress), strict=True):
            score.margin, score.passage_truncated, score.exact = margin, pair.passage.truncated, True

    def _rescore_nonfinite(self, scores: Sequence[Score], instruction: str, ratio: int) -> None:
        """Score pairs without a finite margin again from their text.

        A cached entry may hold NaN with a valid checksum, if somebody wrote it on purpose: the cache must not cause an
        error.
        """
        bad = [score for score in scores if not math.isfinite(score.margin)]
        if not bad:
            return
        passages = _passages(bad)
        keys = self.keys.states_keys(passages)
        if self._prefills:
            keys += self.passage_kv.keys(passages, self.passage_kv.request(instruction, ratio))
        self._cache.discard(keys)
        self._score_in_full(bad, self.states.make_all(passages, ratio))


def _recall(
    scores: Sequence[Score], known: Sequence[tuple[float, bool] | None], progress: Progress | None
) -> list[Score]:
    """Fill in the scores that are remembered; returns those left to score."""
    left = []
    for score, found in zip(scores, known, strict=True):
        if found is None:
            left.append(score)
        else:
            score.margin, score.passage_truncated = found
    if progress is not None:
        progress.advance(len(scores) - len(left))
    return left


class _Passes:
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
                score.margin, score.passage_truncated, score.exact = margin, pair.passage.truncated, True
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
        states = self._states.get(_passages(scores), request.ratio)
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


def _passages(scores: Sequence[Score]) -> list[str]:
    return list(dict.fromkeys(score.passage for score in scores))


def _check_lengths(loaded: LoadedModel, settings: Settings) -> None:
    positions = loaded.model.config.encoder.text_config.max_position_embeddings
    if settings.max_length > positions:
        msg = f"max_length={settings.max_length} is more than the {positions} positions of this model"
        raise ValueError(msg)


def _check_finite(scores: Sequence[Score], dtype: torch.dtype) -> None:
    bad = sum(not math.isfinite(score.margin) for score in scores)
    if bad:
        msg = (
            f"the model gave non-finite logits for {bad} of {len(scores)} passages in {dtype}: "
            "use dtype='bfloat16' or dtype='float32' (float16 overflows), and check the checkpoint if it persists"
        )
        raise ScoringError(msg)
