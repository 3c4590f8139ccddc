"""A first stage for the demo and for evaluation: BM25 by the library `bm25s`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kalm_rag.errors import MissingExtraError
from kalm_rag.retrieval.segment import AUTO, Segmenter


class BM25:
    """An index over passages.

    Args:
        passages: id to text.
        language: whose stop words are left out, see `Segmenter`.
        fold_accents: read letters without their accents, see `Segmenter`.

    Attributes:
        language: whose stop words are left out, `none` for no language's.

    Raises:
        MissingExtraError: `bm25s` is not installed.
        ValueError: there are no passages, or no words in them; or an unknown language.
    """

    def __init__(self, passages: Mapping[str, str], *, language: str = AUTO, fold_accents: bool = False) -> None:
        try:
            import bm25s
        except ImportError as error:
            raise MissingExtraError("bm25s", "demo") from error
        if not passages:
            msg = "BM25 needs at least one passage, got none"
            raise ValueError(msg)
        self._ids = list(passages)
        self._index: Any = bm25s.BM25()
        texts = list(passages.values())
        self._segmenter = Segmenter(language, fold_accents=fold_accents, passages=texts)
        self.language = self._segmenter.language
        rows, numbers = self._segmenter.numbered(texts)
        if not numbers:
            msg = f"BM25 needs words, but none of the {len(passages)} passages holds one besides stop words"
            raise ValueError(msg)
        self._index.index((rows, numbers), show_progress=False)

    def search(self, query: str, k: int) -> list[tuple[str, float]]:
        """The `k` best passages as `(id, score)`, best first; fewer if fewer share a term with the query."""
        terms = self._segmenter.terms(query)
        found, scores = self._index.retrieve([terms], k=min(k, len(self._ids)), show_progress=False)
        pairs = zip(found[0], scores[0], strict=True)
        # The library fills up with passages that share nothing with the query, in no order.
        return [(self._ids[int(number)], float(score)) for number, score in pairs if score > 0]
