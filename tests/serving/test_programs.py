"""What programs send that cannot be run here, and what they read of the answer, as their source has it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

DOCUMENTS = [
    "Gravity attracts bodies toward one another.",
    "The capital of China is Beijing.",
    "Bread is baked from flour.",
]
QUERY = "What is the capital of China?"
Post = Callable[..., Any]


@pytest.mark.parametrize("path", ["/v1/rerank", "/rerank"])
def test_dify(path: str, post: Post) -> None:
    """models/openai_api_compatible/models/rerank/rerank.py of dify-official-plugins at 7af22831, plugin 0.0.63."""
    answer = post(path, model="kalm", query=QUERY, documents=DOCUMENTS, top_n=3).json()
    found = [(item.get("index", 0), item.get("relevance_score", 0.0)) for item in answer.get("results", [])]
    assert [index for index, score in found if score >= 0.8] == [1]
    assert len(found) == 3


def test_dify_with_the_tei_provider(post: Post, server: Any) -> None:
    """models/huggingface_tei/models/helper.py of dify-official-plugins at 7af22831, plugin 0.1.10."""
    info = server.get("/info").json()
    assert [*info["model_type"]] == ["reranker"]
    assert info["max_input_length"] > 0
    results = post("/rerank", query=QUERY, texts=DOCUMENTS, return_text=True).json()
    assert results[0]["text"] == DOCUMENTS[results[0]["index"]] == DOCUMENTS[1]
    assert results[0]["score"] >= 0.8


@pytest.mark.parametrize("path", ["/v1/rerank", "/rerank"])
def test_ragflow(path: str, post: Post) -> None:
    """`OpenAI_APIRerank` in rag/llm/rerank_model.py of RAGFlow 0.27.0; older versions ask /rerank."""
    answer = post(path, model="kalm", query=QUERY, documents=DOCUMENTS, top_n=len(DOCUMENTS)).json()
    rank = [0.0] * len(DOCUMENTS)
    for found in answer.get("results", []):
        rank[found["index"]] = found["relevance_score"]
    assert max(rank) == rank[1]
    assert all(0 < score < 1 for score in rank)


def test_open_webui(post: Post) -> None:
    """open_webui/retrieval/models/external.py of Open WebUI 0.12.4, which needs a score for each document."""
    data = post("/v1/rerank", model="kalm", query=QUERY, documents=DOCUMENTS, top_n=len(DOCUMENTS)).json()
    scores = [result["relevance_score"] for result in sorted(data["results"], key=lambda result: result["index"])]
    assert len(scores) == len(DOCUMENTS)
    assert max(scores) == scores[1]
