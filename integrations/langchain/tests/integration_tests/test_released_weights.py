"""The compressor with the released weights."""

from __future__ import annotations

from pathlib import Path

import pytest
from langchain_core.documents import Document
from langchain_kalm import KalmReranker

ANSWERS = {
    "What is the capital of China?": "The capital of China is Beijing.",
    "Why do things fall to the ground?": "Gravity attracts bodies toward one another.",
    "How do I sort a list in Python?": "list.sort() sorts a list in place and returns None.",
}


@pytest.mark.weights
def test_the_answer_is_first(nano: str, tmp_path: Path) -> None:
    reranker = KalmReranker(model=nano, cache=tmp_path, top_n=None)
    for query, answer in ANSWERS.items():
        given = [Document(page_content=text) for text in ANSWERS.values()]
        found = reranker.compress_documents(given, query)
        assert (found[0].page_content, len(found)) == (answer, len(ANSWERS))
