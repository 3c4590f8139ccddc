"""Scores the example that a model card prints, and compares the scores with the printed ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kalm_rag.diagnosis.paths import PATHS, take
from kalm_rag.model.checkpoint import Checkpoint
from kalm_rag.model.loading import LoadedModel
from kalm_rag.settings import DEFAULT_INSTRUCTION

TOLERANCE = 0.15
"""How far a margin in bfloat16 may be from the card's, of bfloat16 on a GPU: batching alone moves it nearly as far."""


@dataclass(frozen=True, slots=True)
class CardExample:
    """An example and its published margins.

    Attributes:
        query: the query.
        passages: the passages.
        instruction: what "relevant" means.
        margins: `z_yes - z_no` of each passage in bfloat16, at ratio 4.
    """

    query: str
    passages: tuple[str, ...]
    instruction: str
    margins: tuple[float, ...]


_QUERY = "What is the capital of China?"
_PASSAGES = ("The capital of China is Beijing.", "Gravity attracts bodies toward one another.")

EXAMPLES: dict[str, tuple[CardExample, ...]] = {
    "KaLM-Embedding/KaLM-Reranker-V1-Large": (
        CardExample(_QUERY, _PASSAGES, DEFAULT_INSTRUCTION, (8.78125, -14.1875)),
        CardExample(
            _QUERY,
            _PASSAGES,
            "Given a web search query, retrieve passages that answer the query.",
            (5.90625, -14.34375),
        ),
    ),
}
"""What model cards publish, by hub id. Successors (`-R2`) are other weights with other scores.

For the second example the card prints probabilities, 0.997285 and 5.896418e-07; the margins are their logits.
"""


@dataclass(frozen=True, slots=True)
class CardResult:
    """One passage of an example.

    Attributes:
        instruction: of the example.
        passage: the passage.
        path: by which path it was scored.
        expected: the published margin.
        margin: the margin found.
        score: `P(yes)` found.
    """

    instruction: str
    passage: str
    path: str
    expected: float
    margin: float
    score: float

    @property
    def agrees(self) -> bool:
        """Whether the margin is within `TOLERANCE`."""
        return abs(self.margin - self.expected) <= TOLERANCE


def check_card(examples: Sequence[CardExample], loaded: LoadedModel, checkpoint: Checkpoint) -> list[CardResult]:
    """Score the examples with a model in bfloat16, by the whole prompt and on prefilled passages.

    Raises:
        KaLMError, RuntimeError: the model cannot score them.
    """
    found = []
    for example in examples:
        pairs = [(example.query, passage) for passage in example.passages]
        for path in PATHS[:2]:
            scores = take(path, loaded, checkpoint, pairs, None, example.instruction)
            for score, expected in zip(scores, example.margins, strict=True):
                found.append(
                    CardResult(example.instruction, score.passage, path.name, expected, score.margin, score.probability)
                )
    return found
