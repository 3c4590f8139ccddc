"""Where each passage of a response came from."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from kalm_rag import KaLMReranker
from kalm_rag.cache import PassageCache
from kalm_rag.serving.app import create_app

DOCUMENTS = ["Gravity attracts bodies toward one another.", "The capital of China is Beijing."]
NEW = "Bread is baked from flour, water and salt."
SECRET = b"s" * 32
Ask = Callable[..., dict[int, str | None]]


@contextlib.contextmanager
def serving(cache: PassageCache | None, **options: Any) -> Iterator[Ask]:
    """A server of its own; asking gives the source of each passage by its place."""
    with (
        contextlib.nullcontext() if cache is None else cache,
        KaLMReranker("mini", device="cpu", cache=cache, show_progress=False, **options) as reranker,
        TestClient(create_app(reranker)) as client,
    ):

        def ask(query: str, documents: list[str], **body: Any) -> dict[int, str | None]:
            body = {"query": query, "documents": documents, "return_source": True, **body}
            answer = client.post("/v2/rerank", content=json.dumps(body)).json()
            return {result["index"]: result.get("source") for result in answer["results"]}

        yield ask


@pytest.mark.parametrize("keep", ["states", "compact"])
def test_every_level(keep: Any, tmp_path: Path) -> None:
    (tmp_path / "tier").mkdir()
    tier = {"remote": (tmp_path / "tier").as_uri(), "secret": SECRET, "keep": keep}
    with serving(PassageCache(tmp_path / "first", **tier)) as ask:
        assert ask("a", DOCUMENTS) == {0: "encoded", 1: "encoded"}
        assert ask("b", [*DOCUMENTS, NEW]) == {0: "memory", 1: "memory", 2: "encoded"}
        assert ask("b", [NEW, "Another one."]) == {0: "remembered", 1: "encoded"}
    with serving(PassageCache(tmp_path / "first", **tier)) as ask:
        assert ask("a", [*DOCUMENTS, "A third one."]) == {0: "store", 1: "store", 2: "encoded"}
        assert ask("b", DOCUMENTS) == {0: "memory", 1: "memory"}
    with serving(PassageCache(tmp_path / "second", **tier)) as ask:
        assert ask("a", DOCUMENTS) == {0: "remote", 1: "remote"}


def test_without_prefilled_passages_and_scores(tmp_path: Path) -> None:
    with serving(PassageCache(tmp_path), prefill_memory=0, score_memory=0) as ask:
        assert ask("a", DOCUMENTS) == {0: "encoded", 1: "encoded"}
        assert ask("a", DOCUMENTS) == {0: "memory", 1: "memory"}


def test_under_a_budget() -> None:
    with serving(None) as ask:
        assert ask("a", DOCUMENTS, budget_ms=60_000) == {0: "encoded", 1: "encoded"}
        assert ask("b", [*DOCUMENTS, NEW], budget_ms=60_000) == {0: "memory", 1: "memory", 2: "encoded"}
        assert ask("b", [NEW], budget_ms=60_000) == {0: "remembered"}


def test_texts_that_are_read_otherwise() -> None:
    """Control tokens are broken, half characters repaired, long passages cut, or split into windows."""
    odd = ["a <end_of_turn> b", "half \ud83d a character", "Bread is baked. " * 400]
    with serving(None) as ask:
        assert set(ask("a", odd).values()) == {"encoded"}
        assert set(ask("b", odd).values()) == {"memory"}
        assert set(ask("a", odd, long_passages="windows").values()) <= {"encoded", "remembered"}
        assert set(ask("c", odd, long_passages="windows").values()) == {"memory"}
        assert ask("d", odd, max_tokens_per_doc=30) == {0: "memory", 1: "memory", 2: "encoded"}


def test_only_if_asked() -> None:
    with serving(None) as ask:
        assert ask("a", DOCUMENTS, return_source=None) == ask("a", DOCUMENTS, return_source=False) == {0: None, 1: None}
