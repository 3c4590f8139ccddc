"""The endpoints for passages that are not a dialect of others: encoding ahead, and forgetting."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from pydantic import Field
from starlette.responses import Response, StreamingResponse

from kalm_rag.serving.dialects.base import Extensions, Given, document_text
from kalm_rag.serving.endpoints import AsciiJSON, read_json, read_model, serving_error, while_connected
from kalm_rag.serving.limits import Limits
from kalm_rag.serving.openapi import inline_schema
from kalm_rag.serving.work import Work

if TYPE_CHECKING:
    from kalm_rag.reranker import KaLMReranker
    from kalm_rag.serving.endpoints import Endpoints

_AT_ONCE = 32
"""Passages of a line of progress."""

Forget = Callable[[list[str]], Coroutine[Any, Any, dict[str, Any]]]
"""Deletes what is kept of texts, and returns what `/v1/forget` answers."""


class DocumentsBody(Extensions):
    """Passages."""

    documents: list[Given] = Field(description="Strings, or objects with the text under `text`.")


class PassageEndpoints:
    """What this server adds for passages.

    Args:
        work: what the endpoints ask of the model.
        limits: what is accepted.
        endpoints: those of the dialects, which tell errors in the same way.
        forget: how passages are forgotten. Default: by the reranker of this process.
    """

    def __init__(self, work: Work, limits: Limits, endpoints: Endpoints, forget: Forget | None = None) -> None:
        self._work = work
        self._limits = limits
        self._endpoints = endpoints
        self._forget = forget or self._forget_here

    def add_to(self, app: FastAPI) -> None:
        """Add the routes."""
        schema = {"required": True, "content": {"application/json": {"schema": inline_schema(DocumentsBody)}}}
        body: dict[str, Any] = {"openapi_extra": {"requestBody": schema}, "response_class": Response}
        app.post("/v1/encode", name="encode", summary="Encode passages ahead; progress as NDJSON.", **body)(self.encode)
        app.post("/v1/forget", name="forget", summary="Delete what is kept of passages.", **body)(self.forget)

    async def encode(self, request: Request) -> Response:
        """Encode passages; one line of JSON for each part that is done, the last with `"finished": true`."""
        try:
            body, texts = await self._documents(request)
            self._work.queue.check()
            reranker = await self._work.ask(lambda: self._work.rereading(body.long_passages))
        except Exception as error:  # noqa: BLE001 - an unexpected one is logged
            return self._endpoints.failed(request, error)
        lines = self._encode(reranker, texts, request)
        return StreamingResponse(lines, headers=self._work.identity, media_type="application/x-ndjson")

    async def _encode(self, reranker: KaLMReranker, texts: list[str], request: Request) -> AsyncIterator[str]:
        done = {"total": len(texts), "done": 0, "new": 0, "known": 0, "truncated": 0, "repaired": 0}
        try:
            for start in range(0, len(texts), _AT_ONCE):
                some = texts[start : start + _AT_ONCE]
                report = await self._work.run(reranker.encode, some, False, refused=False)
                done["done"] += len(some)
                for name in ("new", "known", "truncated", "repaired"):
                    done[name] += getattr(report, name)
                yield json.dumps(done | {"finished": False}) + "\n"
        except Exception as error:  # noqa: BLE001 - the response has begun: the error is its last line
            self._endpoints.failed(request, error)
            told = serving_error(error)
            message = "the server failed; its log has this request's id" if told is None else told.message
            yield json.dumps(done | {"finished": False, "error": message}) + "\n"
            return
        yield json.dumps(done | {"finished": True}) + "\n"

    async def forget(self, request: Request) -> Response:
        """Delete what is kept of passages, in memory and in the store."""
        try:
            _, texts = await self._documents(request)
            report = await while_connected(request, self._forget(texts))
        except Exception as error:  # noqa: BLE001 - an unexpected one is logged
            return self._endpoints.failed(request, error)
        return AsciiJSON(report, headers=self._work.identity)

    async def _forget_here(self, texts: list[str]) -> dict[str, Any]:
        return asdict(await self._work.run(self._work.reranker.forget, texts))

    async def _documents(self, request: Request) -> tuple[DocumentsBody, list[str]]:
        body = read_model(DocumentsBody, await read_json(request))
        self._endpoints.check_model(body.model)
        self._limits.check_documents(len(body.documents))
        texts = [document_text(document, place) for place, document in enumerate(body.documents)]
        for place, text in enumerate(texts):
            self._limits.check_text(f"documents[{place}]", text)
        request.scope["state"]["facts"] = {"passages": len(texts), "characters": sum(map(len, texts))}
        return body, texts
