"""One loaded model at work: which passages are known, which must be encoded, and what they score."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kalm_rag.checkpoint import Checkpoint
from kalm_rag.loading import LoadedModel, load_model, resolve_device, resolve_dtype
from kalm_rag.pooling import PassageStates
from kalm_rag.progress import Progress
from kalm_rag.prompts import Prompts
from kalm_rag.results import EncodeReport
from kalm_rag.scoring import Encoder, Pair, PlainScorer, probability
from kalm_rag.settings import Settings

if TYPE_CHECKING:
    import torch


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
    """Everything that exists only while a model is loaded. Calls may come from any thread and run one at a time."""

    def __init__(self, loaded: LoadedModel, checkpoint: Checkpoint, settings: Settings) -> None:
        self.loaded = loaded
        self.checkpoint = checkpoint
        self._settings = settings
        self._prompts = Prompts(loaded.tokenizer, settings)
        self._encoder = Encoder(loaded, settings)
        self._scorer = PlainScorer(loaded, settings)
        self._lock = threading.Lock()

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        *,
        settings: Settings,
        device: str | torch.device | None,
        dtype: str | torch.dtype | None,
    ) -> Engine:
        """Load a checkpoint onto a device."""
        place = resolve_device(device)
        loaded = load_model(checkpoint, settings=settings, device=place, dtype=resolve_dtype(dtype, place))
        return cls(loaded, checkpoint, settings)

    def encode(self, texts: Sequence[str], progress: Progress | None = None) -> EncodeReport:
        """Encode passages and keep what the cache keeps."""
        with self._lock:
            clean = [self.loaded.tokenizer.clean(text) for text in texts]
            unique = list(dict.fromkeys(clean))
            states = self._states(unique, self._settings.ratio, progress)
            if progress is not None:
                progress.advance(len(texts) - len(unique))
            truncated = sum(states[text].truncated for text in clean)
            return EncodeReport(len(unique), len(texts) - len(unique), truncated)

    def score(
        self,
        pairs: Sequence[tuple[str, str]],
        instruction: str,
        ratio: int,
        progress: Progress | None = None,
    ) -> list[Score]:
        """Score `(query, passage)` pairs, in input order; each passage and each query is read once."""
        with self._lock:
            clean = [self.loaded.tokenizer.clean(text) for _, text in pairs]
            states = self._states(list(dict.fromkeys(clean)), ratio)
            prompts = {query: self._prompts.prompt(query, instruction) for query in dict.fromkeys(q for q, _ in pairs)}
            rows = [Pair(prompts[query], states[text]) for (query, _), text in zip(pairs, clean, strict=True)]
            margins = self._scorer.margins(rows, progress)
            return [
                Score(margin, row.passage.truncated, row.prompt.truncated)
                for margin, row in zip(margins, rows, strict=True)
            ]

    def _states(self, texts: Sequence[str], ratio: int, progress: Progress | None = None) -> dict[str, PassageStates]:
        states = self._encoder.encode(self._prompts.passages(texts), ratio, progress)
        return dict(zip(texts, states, strict=True))
