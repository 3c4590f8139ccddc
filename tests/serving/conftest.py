"""A server in this process, with mini, whose passages and answers are plain to see."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from kalm_rag import KaLMReranker
from kalm_rag.serving.app import create_app

DOCUMENTS = [
    "Gravity attracts bodies toward one another.",
    "The capital of China is Beijing.",
    "Bread is baked from flour, water and salt.",
]
QUERY = "What is the capital of China?"


@pytest.fixture(scope="session")
def mini() -> Iterator[KaLMReranker]:
    with KaLMReranker("mini", device="cpu", cache=None, show_progress=False) as reranker:
        yield reranker.load()


@pytest.fixture(scope="session")
def server(mini: KaLMReranker) -> Iterator[TestClient]:
    with TestClient(create_app(mini), raise_server_exceptions=True) as client:
        yield client


@pytest.fixture
def post(server: TestClient) -> Callable[..., Any]:
    """Send JSON, half surrogate pairs included, and return the response."""

    def send(path: str, **body: Any) -> Any:
        return server.post(path, content=json.dumps(body))

    return send
