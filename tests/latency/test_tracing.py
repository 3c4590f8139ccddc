"""Spans of OpenTelemetry: what they say, what they never say, and that they change nothing."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from kalm_rag import KaLMReranker
from kalm_rag.latency.records import RankCounts, Timings
from kalm_rag.latency.tracing import trace_attributes
from kalm_rag.results import Ranking

NAMES = {f"kalm_rag.counts.{part.name}" for part in fields(RankCounts)} | {
    f"kalm_rag.timings.{part.name}" for part in fields(Timings)
}


@dataclass
class Span:
    """What was said of one span."""

    tracer: str
    name: str
    parent: Span | None
    attributes: dict[str, Any] = field(default_factory=dict)
    status: object = None
    is_ended: bool = False

    def set_attribute(self, name: str, value: object) -> None:
        self.attributes[name] = value

    def set_attributes(self, attributes: Mapping[str, object]) -> None:
        self.attributes.update(attributes)

    def set_status(self, status: object) -> None:
        self.status = status


class StubTrace(ModuleType):
    """Stands in for `opentelemetry.trace`, which need not be installed here."""

    class StatusCode:
        ERROR = "error"

    def __init__(self) -> None:
        super().__init__("opentelemetry.trace")
        self.spans: list[Span] = []
        self.current: contextvars.ContextVar[Span | None] = contextvars.ContextVar("span", default=None)

    def get_tracer(self, name: str) -> Any:
        trace = self

        class Tracer:
            @contextlib.contextmanager
            def start_as_current_span(
                self, span_name: str, *, record_exception: bool = True, set_status_on_exception: bool = True
            ) -> Iterator[Span]:
                assert not record_exception, "a message may hold a query"
                assert not set_status_on_exception
                span = Span(name, span_name, trace.current.get())
                trace.spans.append(span)
                token = trace.current.set(span)
                try:
                    yield span
                finally:
                    trace.current.reset(token)
                    span.is_ended = True

        return Tracer()


@pytest.fixture
def trace(monkeypatch: pytest.MonkeyPatch) -> StubTrace:
    stub = StubTrace()
    monkeypatch.setitem(sys.modules, "opentelemetry.trace", stub)
    return stub


def make(checkpoint: Path) -> KaLMReranker:
    return KaLMReranker(checkpoint, cache=None, device="cpu", encode_in_background=False)


def test_a_span_says_what_the_call_took(checkpoint: Path, passages: list[str], trace: StubTrace) -> None:
    reranker = make(checkpoint)
    reranker.encode(passages[:2])
    ranking = reranker.rank("query", passages[:5], on_unknown="skip")
    [span] = trace.spans
    assert (span.tracer, span.name, span.is_ended, span.status) == ("kalm_rag", "kalm_rag.rank", True, None)
    assert span.attributes == trace_attributes(ranking)
    assert span.attributes.keys() == NAMES
    assert (span.attributes["kalm_rag.counts.scored"], span.attributes["kalm_rag.counts.skipped"]) == (2, 3)
    assert span.attributes["kalm_rag.timings.total"] > 0
    assert {type(value) for value in span.attributes.values()} == {int, float}, "no text"


def test_an_asynchronous_call_is_a_child_of_the_callers_span(
    checkpoint: Path, passages: list[str], trace: StubTrace
) -> None:
    async def main() -> None:
        with trace.get_tracer("mine").start_as_current_span(
            "request", record_exception=False, set_status_on_exception=False
        ):
            await make(checkpoint).arank("query", passages[:2])

    asyncio.run(main())
    outer, inner = trace.spans
    assert inner.parent is outer
    assert outer.attributes == {}


def test_a_call_that_fails_leaves_no_text(checkpoint: Path, trace: StubTrace) -> None:
    with pytest.raises(TypeError, match="secret words"):
        make(checkpoint).rank(["secret words"], ["one"])  # type: ignore[call-overload]
    [span] = trace.spans
    assert (span.attributes, span.status, span.is_ended) == ({"error.type": "TypeError"}, "error", True)


def test_scores_are_the_same_and_nothing_is_imported_without_it(
    checkpoint: Path, passages: list[str], trace: StubTrace, monkeypatch: pytest.MonkeyPatch
) -> None:
    traced = make(checkpoint).rank("query", passages[:4])
    for name in [name for name in sys.modules if name.split(".")[0] == "opentelemetry"]:
        monkeypatch.delitem(sys.modules, name)
    plain = make(checkpoint).rank("query", passages[:4])
    assert [hit.index for hit in plain] == [hit.index for hit in traced]
    assert [hit.margin for hit in plain] == pytest.approx([hit.margin for hit in traced], abs=1e-5)
    assert plain.counts is not None, "it is told without a tracer too"
    assert not any(name.split(".")[0] == "opentelemetry" for name in sys.modules)


def test_the_installed_interface_takes_it(checkpoint: Path, passages: list[str]) -> None:
    api = pytest.importorskip("opentelemetry.trace")
    found = make(checkpoint).rank("query", passages[:2])
    assert len(found) == 2
    with pytest.raises(TypeError):
        make(checkpoint).rank(7, passages[:2])  # type: ignore[call-overload]
    span = api.get_tracer("kalm_rag").start_span("name")
    span.set_status(api.StatusCode.ERROR)
    span.set_attributes(trace_attributes(found))


def test_a_list_that_rank_did_not_make_has_no_attributes() -> None:
    assert trace_attributes(Ranking()) == {}
