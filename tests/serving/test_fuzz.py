"""Whatever is sent, the server answers, and none of its answers is its own failure."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import pytest
import schemathesis
from starlette.testclient import TestClient

from kalm_rag import KaLMReranker
from kalm_rag.serving.app import create_app
from kalm_rag.serving.dialects import DIALECTS
from kalm_rag.serving.limits import Limits

PATHS = sorted({path for dialect in DIALECTS for path in dialect.paths} | {"/v1/encode", "/v1/forget"})
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**63, 10**400, 1.5, float("nan"), float("inf"), -0.0, "", "a", "\x00", "\ud800",
    "NONE", "Left", "windows", "skip", "<end_of_turn>", "x" * 3000, [], [[]], {}, {"text": None}, {"text": "a"}, ["a"],
    ["a", None], [{"text": "a"}], [{"text": ["a"]}], [1], {"a": {"b": []}},
)  # fmt: skip


@pytest.fixture(scope="module")
def fuzzed(mini: KaLMReranker) -> Iterator[TestClient]:
    with TestClient(create_app(mini, limits=Limits(body_bytes=50_000, documents=20, characters=2_000))) as client:
        yield client


def fields() -> list[str]:
    found = {name for dialect in DIALECTS for name in dialect.request.model_fields}
    return sorted(found | {"documents", "unknown"})


def bodies(draw: random.Random, names: list[str]) -> Iterator[bytes]:
    """Objects of known fields with values that do not fit, and such objects with some bytes changed."""
    while True:
        body = {"query": "a", "documents": ["a", "b"]} if draw.random() < 0.5 else {}
        for name in draw.sample(names, draw.randint(0, 4)):
            body[name] = draw.choice(VALUES)
        raw = bytearray(json.dumps(body).encode())
        if draw.random() < 0.4:
            for _ in range(draw.randint(1, 4)):
                place = draw.randrange(len(raw) + 1)
                raw[place : place + draw.randint(0, 2)] = bytes(draw.randrange(256) for _ in range(draw.randint(0, 2)))
        yield bytes(raw)


def test_malformed_bodies(
    fuzzed: TestClient, request: pytest.FixtureRequest, tally: Callable[[str, int, int], None]
) -> None:
    """`--bodies 10000` sends as many as a release is tried with."""
    draw = random.Random(7)
    count = int(request.config.getoption("--bodies"))
    failed = []
    some = bodies(draw, fields())
    for _ in range(count):
        path, raw = draw.choice(PATHS), next(some)
        response = fuzzed.post(path, content=raw)
        status = response.status_code
        if status not in (200, 400, 413, 422) or (status != 200 and "message" not in response.json()):
            failed.append((path, raw, status))
    assert failed == []
    tally("malformed bodies answered otherwise than by 200, 400, 413 or 422", len(failed), count)
    work = fuzzed.app.state.work  # type: ignore[attr-defined]
    assert (work.queue.running, work.queue.waiting) == (0, 0)


def test_the_openapi_document(mini: KaLMReranker) -> None:
    """Requests that schemathesis derives from the schemas, right and wrong ones, of every endpoint."""
    app = create_app(mini, limits=Limits(body_bytes=50_000, documents=20, characters=2_000))
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    tried = set()
    for result in schema.get_all_operations():
        operation = result.ok()
        tried.add(operation.path)

        @hypothesis.given(case=operation.as_strategy())
        @hypothesis.settings(
            max_examples=8, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck)
        )
        def run(case: schemathesis.Case) -> None:
            response = case.call()
            assert response.status_code < 500, case.body

        run()
    assert set(PATHS) <= tried
    assert {"/health", "/ready", "/info", "/v1/models", "/v1/stats", "/metrics"} <= tried
