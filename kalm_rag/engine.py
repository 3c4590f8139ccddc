"""One loaded model at work: which passages are known, which must be encoded, and what they score."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kalm_rag.cache import PassageCache
from kalm_rag.cache.keys import KeySpace
from kalm_rag.checkpoint import Checkpoint
from kalm_rag.identity import identify
from kalm_rag.loading import LoadedModel, load_model, resolve_device, resolve_dtype
from kalm_rag.pooling import PassageStates
from kalm_rag.progress import Progress
from kalm_rag.prompts import Prompts
from kalm_rag.results import EncodeReport
from kalm_rag.scoring import Encoder, Pair, PlainScorer, check_finite, probability
from kalm_rag.settings import Settings

if TYPE_CHECKING:
    import torch


logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Score:
    """What one pair scored; see `RankedPassage` for the fields."""

    margin: float
    passage_truncated: bool
    query_truncated: bool

    @property
    def probability(self) -> float:
        """`P(yes)`."""
        return probability(self.margin)


class Engine:
    """Everything that exists only while a model is loaded. Calls may come from any thread and run one at a time.

    Args:
        loaded: the model.
        checkpoint: where it came from.
        settings: how passages and queries become scores.
        cache: what keeps encoded passages.
    """

    def __init__(self, loaded: LoadedModel, checkpoint: Checkpoint, settings: Settings, cache: PassageCache) -> None:
        self.loaded = loaded
        self.checkpoint = checkpoint
        self._settings = settings
        self._cache = cache
        self._space = KeySpace(
            identify(checkpoint),
            max_length=settings.max_length,
            dtype=str(loaded.dtype).removeprefix("torch."),
            storage=cache.storage,
        )
        self._prompts = Prompts(loaded.tokenizer, settings)
        self._encoder = Encoder(loaded, settings)
        self._scorer = PlainScorer(loaded, settings)
        self._lock = threading.Lock()
        self._warned_ratios: set[int] = set()

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        *,
        settings: Settings,
        cache: PassageCache,
        device: str | torch.device | None,
        dtype: str | torch.dtype | None,
    ) -> Engine:
        """Load a checkpoint onto a device."""
        place = resolve_device(device)
        loaded = load_model(checkpoint, settings=settings, device=place, dtype=resolve_dtype(dtype, place))
        return cls(loaded, checkpoint, settings, cache)

    def encode(self, texts: Sequence[str], progress: Progress | None = None) -> EncodeReport:
        """Encode the passages that the cache does not hold, and keep them batch by batch."""
        with self._lock:
            ratio = self._cache.base_ratio
            clean = [self.loaded.tokenizer.clean(text) for text in texts]
            unique = list(dict.fromkeys(clean))
            cut = {text: known.truncated for text, known in self._lookup(unique, ratio).items()}
            missing = [text for text in unique if text not in cut]
            if progress is not None:
                progress.advance(len(texts) - len(missing))
            for encoded in self._encode(missing, ratio):
                cut |= {text: states.truncated for text, states in encoded.items()}
                if progress is not None:
                    progress.advance(len(encoded))
            return EncodeReport(len(missing), len(texts) - len(missing), sum(cut[text] for text in clean))

    def unknown(self, texts: Sequence[str]) -> list[str]:
        """The passages that `encode` would encode."""
        unique = dict.fromkeys(self.loaded.tokenizer.clean(text) for text in texts)
        known = self._lookup(list(unique), self._cache.base_ratio)
        return [text for text in unique if text not in known]

    def token_counts(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each passage that the encoder reads."""
        return [len(passage.ids) for passage in self._prompts.passages(texts)]

    def time_encoding(self, texts: Sequence[str]) -> float:
        """Seconds that encoding takes, after one passage to warm up. Nothing is kept."""
        with self._lock:
            for _ in self._encoder.encode(self._prompts.passages(texts[:1]), self._cache.base_ratio):
                pass
            start = time.perf_counter()
            for _ in self._encoder.encode(self._prompts.passages(texts), self._cache.base_ratio):
                pass
            return time.perf_counter() - start

    def score(
        self,
        pairs: Sequence[tuple[str, str]],
        instruction: str,
        ratio: int,
        progress: Progress | None = None,
    ) -> list[Score]:
        """Score `(query, passage)` pairs, in input order; each passage and each query is read once.

        Raises:
            ScoringError: a margin is not finite, as happens in float16.
        """
        with self._lock:
            clean = [self.loaded.tokenizer.clean(text) for _, text in pairs]
            unique = list(dict.fromkeys(clean))
            known = self._lookup(unique, ratio)
            fresh = self._encode_all([text for text in unique if text not in known], ratio)
            prompts = {query: self._prompts.prompt(query, instruction) for query in dict.fromkeys(q for q, _ in pairs)}
            states = known | fresh
            rows = [Pair(prompts[query], states[text]) for (query, _), text in zip(pairs, clean, strict=True)]
            margins = self._scorer.margins(rows, progress)
            self._replace_unusable(clean, known, rows, margins, ratio)
            check_finite(margins, self.loaded.dtype)
            return [
                Score(margin, row.passage.truncated, row.prompt.truncated)
                for margin, row in zip(margins, rows, strict=True)
            ]

    def _replace_unusable(
        self, texts: list[str], known: dict[str, PassageStates], rows: list[Pair], margins: list[float], ratio: int
    ) -> None:
        """Encode again what came from the cache and gave no finite margin.

        A checksum holds for numbers that somebody wrote on purpose, NaN included: that must not become an error.
        """
        bad = [
            place
            for place, (text, margin) in enumerate(zip(texts, margins, strict=True))
            if text in known and not math.isfinite(margin)
        ]
        if not bad:
            return
        spoiled = list(dict.fromkeys(texts[place] for place in bad))
        self._cache.forget(self._space, spoiled)
        fresh = self._encode_all(spoiled, ratio)
        for place in bad:
            rows[place] = Pair(rows[place].prompt, fresh[texts[place]])
        for place, margin in zip(bad, self._scorer.margins([rows[place] for place in bad]), strict=True):
            margins[place] = margin

    def _lookup(self, texts: Sequence[str], ratio: int) -> dict[str, PassageStates]:
        return self._cache.lookup(self._space, texts, ratio, self.loaded.dtype)

    def _encode_all(self, texts: Sequence[str], ratio: int) -> dict[str, PassageStates]:
        found: dict[str, PassageStates] = {}
        for encoded in self._encode(texts, ratio):
            found |= encoded
        return found

    def _encode(self, texts: Sequence[str], ratio: int) -> Iterator[dict[str, PassageStates]]:
        """Encode and keep passages, one batch at a time, and give them at `ratio`."""
        if not texts:
            return
        base = self._cache.base_ratio
        keep = ratio % base == 0
        if not keep and ratio not in self._warned_ratios:
            self._warned_ratios.add(ratio)
            logger.warning(
                "ratio %d is no multiple of the ratio %d at which the cache keeps passages: they are encoded anew at "
                "every call; make the cache with base_ratio=%d to keep them",
                ratio,
                base,
                ratio,
            )
        for batch, states in self._encoder.encode(self._prompts.passages(texts), base if keep else ratio):
            encoded = dict(zip([texts[place] for place in batch], states, strict=True))
            if keep:
                encoded = self._cache.keep(self._space, encoded)
            yield {text: passage.at(ratio) for text, passage in encoded.items()}
