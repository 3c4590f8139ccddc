"""Scores pairs of texts with one loaded model."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from kalm_rag.cache import PassageCache
from kalm_rag.cache.remote.patience import one_query
from kalm_rag.cache.scores import ScoreCache
from kalm_rag.cache.spaces import Space
from kalm_rag.errors import ForkError
from kalm_rag.latency.background import Background
from kalm_rag.latency.calibration import calibrate
from kalm_rag.latency.limit import TimeLimit
from kalm_rag.latency.within import LimitedRun
from kalm_rag.model.checkpoint import Checkpoint
from kalm_rag.model.decoder import Decoder
from kalm_rag.model.identity import identify
from kalm_rag.model.loading import LoadedModel, load_model, resolve_device
from kalm_rag.model.merged_attention import PrefillUnsupportedError
from kalm_rag.model.prompts import Prompts
from kalm_rag.passage_kv import BehindPrefix, PassageKVSource
from kalm_rag.results import EncodeReport
from kalm_rag.scoring.paths import Paths
from kalm_rag.scoring.score import Score, check_finite, passages_of, recall
from kalm_rag.settings import AT_ONCE, Settings
from kalm_rag.states import StatesSource, key_space
from kalm_rag.utils import forks
from kalm_rag.utils.computing import apart
from kalm_rag.utils.progress import Progress
from kalm_rag.utils.recording import add_count, add_sources
from kalm_rag.utils.refining import Wanted
from kalm_rag.utils.turns import Turns
from kalm_rag.windows.source import WindowSource

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


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
        decoder: runs full prompts.
        paths: every way from a pair to its margin.
        background: encodes passages that a limit left out.
        encoder_later: whether a call with a limit leaves out passages that are not encoded, instead of loading the
            encoder first; set by `KaLMReranker.load`.
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
        self.decoder = Decoder(loaded, settings, self.turns)
        self.background = Background(self.states, self.passage_kv, self.turns)
        cache.attach(self.background)
        self._cache = cache
        self.paths = Paths(self.passage_kv, self.states, self.decoder, settings, cache, self.keys)
        if cache.remote is not None:
            cache.remote.link.prepare()
        self.encoder_later = False
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

            def load() -> Scorer:
                loaded = load_model(checkpoint, settings=settings, device=place, dtype=dtype, encoder_later=True)
                return cls(loaded, checkpoint, settings, cache)

            return apart(load, place)

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
            with self.turns.call():
                report = self.states.encode(some, progress)
                self.passage_kv.encode(some)
            new, truncated = new + report.new, truncated + report.truncated
        return EncodeReport(new, len(passages) - new, truncated)

    def share(self, texts: Sequence[str]) -> int:
        """Write to the cache's shared tier what it lacks of passages, and wait; returns how many entries it lacks then.

        Raises:
            StoreError: it does not answer, or refuses.
        """
        passages = self.windows.expand(texts)
        left = self._cache.share("states", self.states.keys(passages, self._cache.base_ratio))
        if self._cache.keeps("passage_kv"):
            request = self.passage_kv.request(self.settings.instruction, self.settings.ratio)
            left += self._cache.share("passage_kv", self.passage_kv.keys(passages, request))
        return left

    def score(
        self,
        pairs: Sequence[tuple[str, str]],
        instruction: str,
        ratio: int,
        progress: Progress | None = None,
        wanted: Wanted | None = None,
        limit: TimeLimit | None = None,
    ) -> list[Score]:
        """Score `(query, passage)` pairs, in input order; each passage and each query is read once.

        The model runs for pairs whose score is not remembered. With the setting `refine` and `wanted`, which is of one
        query, pairs that do not decide what is returned may get an approximate margin, which is not remembered. A
        `limit` leaves pairs unreached, whose passages are encoded in the background; it takes no first pass.

        Raises:
            ScoringError: a margin is not finite, as happens in float16.
            ValueError: a prompt has more tokens than the model has positions.
        """
        self.check_process()
        scores = self._prompt(pairs, instruction)
        keys = self.score_cache.keys([score.prompt.ids for score in scores], [score.passage for score in scores], ratio)
        known = self.score_cache.get_many(keys)
        new = recall(scores, known, progress)
        if wanted is not None:
            wanted = wanted.beside([found[0] for found in known if found is not None])
        add_count("remembered", len(scores) - len(new))
        add_sources(remembered=[score.passage for score, found in zip(scores, known, strict=True) if found is not None])
        with self.turns.call(), one_query():
            if limit is None:
                left = self.paths.from_prefix(new, instruction, ratio, progress, wanted)
                self.paths.in_full(left, self.states.get(passages_of(left), ratio), progress)
            else:
                self._within(new, instruction, ratio, limit)
            self.paths.again([score for score in new if score.reached], instruction, ratio)
        self.loaded.files.check()
        check_finite([score for score in scores if score.reached], self.loaded.dtype)
        self.score_cache.put_many(
            {
                key: (score.margin, score.passage_truncated)
                for key, score, found in zip(keys, scores, known, strict=True)
                if found is None and score.exact and score.reached
            }
        )
        return scores

    def calibrate(self, instruction: str, ratio: int, *, encoder: bool = True) -> None:
        """Learn what steps cost on this machine, if no call has shown it yet; this takes about half a second.

        Args:
            instruction: of the prompt.
            ratio: of the passages' states.
            encoder: load the encoder too, and measure it.
        """
        if encoder:
            self.states.encoder.prepare()
        request = self.paths.request(instruction, ratio)
        apart(partial(calibrate, self, request, instruction, ratio, encoder=encoder), self.loaded.device)

    def _within(self, scores: Sequence[Score], instruction: str, ratio: int, limit: TimeLimit) -> None:
        self.calibrate(instruction, ratio, encoder=self.states.encoder.is_ready or not self.encoder_later)
        try:
            run = LimitedRun(self, scores, self.paths.request(instruction, ratio), ratio, limit)
            run.run()
        except PrefillUnsupportedError as error:
            self.paths.run_full_prompts(error)
            run = LimitedRun(self, scores, None, ratio, limit)
            run.run()
        if self.settings.encode_in_background:
            self.background.add(run.unknown)

    def _prompt(self, pairs: Sequence[tuple[str, str]], instruction: str) -> list[Score]:
        queries = dict.fromkeys(query for query, _ in pairs)
        prompts = {query: self.prompts.prompt(query, instruction) for query in queries}
        self.prompts.unknown.add(sum(prompt.unknown for prompt in prompts.values()))
        return [Score(prompts[query], self.loaded.tokenizer.clean(text)) for query, text in pairs]


def reading(scorer: Scorer, settings: Settings) -> Scorer:
    """Return a scorer of the same model that reads long passages as other settings say, and shares all else.

    Args:
        scorer: of the model.
        settings: those of the scorer, with other windows.
    """
    other = copy.copy(scorer)
    other.settings = settings
    other.windows = WindowSource(scorer.loaded.tokenizer, settings)
    forks.watch(other)
    return other


def _check_lengths(loaded: LoadedModel, settings: Settings) -> None:
    positions = loaded.model.config.encoder.text_config.max_position_embeddings
    if settings.max_length > positions:
        msg = f"max_length={settings.max_length} is more than the {positions} positions of this model"
        raise ValueError(msg)
