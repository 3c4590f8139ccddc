"""Each client ranks through the server, and shows its user what the server says of an error."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from conftest import KEY, MOST_DOCUMENTS, Server, full, wait_for
from tried import Client

QUERY = "What is the capital of China?"
DOCUMENTS = [
    "Gravity attracts bodies toward one another.",
    "The capital of China is Beijing.",
    "Bread is baked from flour, water and salt.",
]
WRONG_KEY = "w" * 32


def test_it_ranks(client: Client, server: Server) -> None:
    asked = {"query": QUERY, "documents": DOCUMENTS, "return_margin": True}
    number = "margin" if client.margins else "relevance_score"
    expected = [(hit["index"], hit[number]) for hit in server.ask("/v2/rerank", asked)["results"]]
    assert expected[0][0] == 1
    server.requests()
    found = client.rank(server.url, KEY, QUERY, DOCUMENTS, 2)
    assert [place for place, _ in found] == [place for place, _ in expected[:2]]
    assert [score for _, score in found] == pytest.approx([score for _, score in expected[:2]], abs=1e-5)
    assert server.requests() == [(client.path, 200)]


def test_it_shows_that_the_key_is_wrong(client: Client, server: Server, caplog: pytest.LogCaptureFixture) -> None:
    shown = shown_by(client, server, WRONG_KEY, DOCUMENTS, caplog)
    assert client.shows.get("key", "does not know the API key") in shown
    assert WRONG_KEY not in shown


def test_it_shows_that_there_are_too_many_documents(
    client: Client, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    shown = shown_by(client, server, KEY, DOCUMENTS * MOST_DOCUMENTS, caplog)
    assert client.shows.get("many", f"documents must be at most {MOST_DOCUMENTS}") in shown
    assert {status for _, status in server.requests()} == {413}


class TestFull:
    def test_it_shows_that_the_server_is_full(
        self, client: Client, full_server: Server, caplog: pytest.LogCaptureFixture
    ) -> None:
        shown = shown_by(client, full_server, KEY, DOCUMENTS, caplog)
        assert client.shows.get("busy", "the server is full") in shown
        status = 429 if client.path in ("/rerank", "/infinity/rerank") else 503
        assert full_server.requests() == [(client.path, status)] * client.tries


def test_it_tries_again_and_then_ranks(client: Client, narrow_server: Server) -> None:
    found: list[Any] = []
    narrow_server.requests()
    with full(narrow_server):
        asked = (narrow_server.url, KEY, QUERY, DOCUMENTS, 2)
        asking = threading.Thread(target=lambda: found.extend(client.rank(*asked)))
        asking.start()
        wait_for(lambda: narrow_server.requests() == [(client.path, 503)])
    asking.join(120)
    assert [place for place, _ in found] == [1, 2]


def shown_by(client: Client, server: Server, key: str, documents: list[str], caplog: pytest.LogCaptureFixture) -> str:
    """What a user sees of an error: the exception, and what the client logs."""
    server.requests()
    with pytest.raises(Exception) as raised:
        client.rank(server.url, key, QUERY, documents, 2)
    return f"{raised.type.__name__}: {raised.value}\n{caplog.text}"
