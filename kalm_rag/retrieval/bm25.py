"""A first stage for the demo and for evaluation: BM25 by the library `bm25s`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kalm_rag.errors import MissingExtraError


class BM25:
    """An index over passages.

    Args:
        passages: id to text.

    Raises:
        MissingExtraError: `bm25s` is not installed.
        ValueError: there are no passages, or no words in them.
    """

    def __init__(self, passages: Mapping[str, str]) -> None:
        try:
            import bm25s
        except ImportError as error:
            raise MissingExtraError("bm25s", "demo") from error
        if not passages:
            msg = "BM25 needs at least one passage, got none"
            raise ValueError(msg)
        self._library: Any = bm25s
        self._ids = list(passages)
        self._index = bm25s.BM25()
        tokens = self._tokenize(list(passages.values()))
        if not tokens.vocab:
            msg = f"BM25 needs words, but none of the {len(passages)} passages holds one besides stop words"
            raise ValueError(msg)
        self._index.index(tokens, show_progress=False)

    def _tokenize(self, texts: list[str]) -> Any:
        return self._library.tokenize(texts, stopwords="en", show_progress=False)

    def search(self, query: str, k: int) -> list[tuple[str, float]]:
        """The `k` best passages as `(id, score)`, best first; fewer if fewer share a word with the query."""
        found, scores = self._index.retrieve(self._tokenize([query]), k=min(k, len(self._ids)), show_progress=False)
        pairs = zip(found[0], scores[0], strict=True)
        # The library fills up with passages that share nothing with the query, in no order.
        return [(self._ids[int(number)], float(score)) for number, score in pairs if score > 0]
