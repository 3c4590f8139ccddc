"""The compressor with the released weights."""

from __future__ import annotations

from pathlib import Path

import pytest
from adapterkit import ANSWERS
from langchain_core.documents import Document
from langchain_kalm import KalmReranker


@pytest.mark.weights
def test_the_answer_is_first(nano: str, tmp_path: Path) -> None:
    reranker = KalmReranker(model=nano, cache=tmp_path, top_n=None)
    for query, answer in ANSWERS.items():
        given = [Document(page_content=text) for text in ANSWERS.values()]
        found = reranker.compress_documents(given, query)
        assert (found[0].page_content, len(found)) == (answer, len(ANSWERS))
