"""KaLM-Reranker as a cross-encoder, for what takes one."""

from __future__ import annotations

from langchain_core.cross_encoders import BaseCrossEncoder

from langchain_kalm.base import KalmBase


class KalmCrossEncoder(KalmBase, BaseCrossEncoder):
    """Scores `(query, passage)` pairs, for example for LangChain's `CrossEncoderReranker`.

    That class keeps no scores; `KalmReranker` does.
    """

    instruction: str | None = None
    """What "relevant" means, in a sentence; by default the model's own."""

    def score(self, text_pairs: list[tuple[str, str]]) -> list[float]:
        """`P(yes)` of each pair, in input order."""
        return self.reranker.predict(text_pairs, self.instruction)
