"""The endpoints that are not a dialect of others: encoding ahead, forgetting, what the server is and how it is."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from pydantic import Field
from starlette.responses import Response, StreamingResponse

from kalm_rag._version import __version__
from kalm_rag.cache.disk import DiskStore
from kalm_rag.cache.preflight import check_writable
from kalm_rag.serving.dialects.base import Extensions, Given, document_text
from kalm_rag.serving.endpoints import AsciiJSON, read_json, read_model, serving_error, while_connected
from kalm_rag.serving.limits import Limits
from kalm_rag.serving.metrics import Metrics
from kalm_rag.serving.openapi import inline_schema
from kalm_rag.serving.work import Work

if TYPE_CHECKING:
    from kalm_rag.reranker import KaLMReranker
    from kalm_rag.serving.endpoints import Endpoints

_AT_ONCE = 32
"""Passages of a line of progress."""
_PROBE_SECONDS = 5.0
"""How long the answer of a probe of the cache holds."""


class DocumentsBody(Extensions):
    """Passages."""

    documents: list[Given] = Field(description="Strings, or objects with the text under `text`.")


class OwnEndpoints:
    """What this server adds.

    Args:
        work: what the endpoints ask of the model.
        metrics: that Prometheus reads.
        limits: what is accepted.
        strict_model: whether another model's name is an error.

    Attributes:
        model: the real name of the model.
        endpoints: those of the dialects, which tell errors the same way.
    """

    endpoints: Endpoints

    def __init__(self, work: Work, metrics: Metrics, limits: Limits, *, strict_model: bool) -> None:
        self._work = work
        self._metrics = metrics
        self._limits = limits
        self._strict = strict_model
        self._started = int(time.time())
        self._probe: tuple[float, str | None] = (float("-inf"), None)
        self.model = model_name(work.reranker)

    def add_to(self, app: FastAPI) -> None:
        """Add the routes."""
        schema = {"required": True, "content": {"application/json": {"schema": inline_schema(DocumentsBody)}}}
        body: dict[str, Any] = {"openapi_extra": {"requestBody": schema}, "response_class": Response}
        app.post("/v1/encode", name="encode", summary="Encode passages ahead; progress as NDJSON.", **body)(self.encode)
        app.post("/v1/forget", name="forget", summary="Delete what is kept of passages.", **body)(self.forget)
        plain: dict[str, Any] = {"response_class": Response}
        app.get("/v1/stats", name="stats", summary="What calls took, and what is cached.", **plain)(self.stats)
        app.get("/v1/models", name="models", summary="The model, as OpenAI lists models.", **plain)(self.models)
        app.get("/info", name="info", summary="Model, settings, limits and version.", **plain)(self.info)
        app.get("/health", name="health", summary="Whether the process answers.", **plain)(self.health)
        app.get("/ready", name="ready", summary="Whether the model and the cache can be used.", **plain)(self.ready)
        app.get("/metrics", name="metrics", summary="Metrics for Prometheus.", **plain)(self.metrics)

    async def encode(self, request: Request) -> Response:
        """Encode passages; one line of JSON for each part that is done, the last with `"finished": true`."""
        try:
            body, texts = await self._documents(request)
            self._work.queue.check()
            reranker = await self._work.ask(lambda: self._work.rereading(body.long_passages))
        except Exception as error:  # noqa: BLE001 - an unexpected one is logged
            return self.endpoints.failed(request, error)
        return StreamingResponse(self._encode(reranker, texts, request), media_type="application/x-ndjson")

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
            self.endpoints.failed(request, error)
            told = serving_error(error)
            message = "the server failed; its log has this request's id" if told is None else told.message
            yield json.dumps(done | {"finished": False, "error": message}) + "\n"
            return
        yield json.dumps(done | {"finished": True}) + "\n"

    async def forget(self, request: Request) -> Response:
        """Delete what is kept of passages, in memory and in the store."""
        try:
            _, texts = await self._documents(request)
            report = await while_connected(request, self._work.run(self._work.reranker.forget, texts))
        except Exception as error:  # noqa: BLE001 - an unexpected one is logged
            return self.endpoints.failed(request, error)
        return AsciiJSON(asdict(report))

    async def _documents(self, request: Request) -> tuple[DocumentsBody, list[str]]:
        body = read_model(DocumentsBody, await read_json(request))
        self.endpoints.check_model(body.model)
        self._limits.check_documents(len(body.documents))
        texts = [document_text(document, place) for place, document in enumerate(body.documents)]
        for place, text in enumerate(texts):
            self._limits.check_text(f"documents[{place}]", text)
        request.scope["state"]["facts"] = {"passages": len(texts), "characters": sum(map(len, texts))}
        return body, texts

    async def stats(self) -> Response:
        """Return what calls took, and what is cached."""
        reranker = self._work.reranker

        def read() -> dict[str, Any]:
            return {
                "reranker": asdict(reranker.stats()),
                "cache": asdict(reranker.cache.stats()),
                "prefilled": _dict(reranker.prefill_stats()),
                "scores": _dict(reranker.score_stats()),
                "truncations": reranker.truncations.count,
                "repairs": reranker.repairs.count,
                "unknown_texts": reranker.unknown_texts,
                "queue": {"running": self._work.queue.running, "waiting": self._work.queue.waiting},
            }

        return AsciiJSON(await self._work.ask(read))

    async def models(self) -> Response:
        """Return the one model, as OpenAI's clients read it."""
        one = {"id": self.model, "object": "model", "created": self._started, "owned_by": "kalm-rag"}
        return AsciiJSON({"object": "list", "data": [one]})

    async def info(self) -> Response:
        """Return what identifies model and settings: two servers that agree in `digest` give the same scores."""
        return AsciiJSON(await self._work.ask(self._info))

    def _info(self) -> dict[str, Any]:
        reranker = self._work.reranker
        scorer, settings = reranker.scorer, reranker.settings
        lora = reranker.checkpoint().lora
        loaded = scorer.loaded
        dtype = str(loaded.dtype).removeprefix("torch.")
        dtype = "int8-all" if loaded.int8_encoder else "int8" if loaded.int8 else dtype
        return {
            "model": self.model,
            "digest": scorer.identity.mark,
            "lora": None if lora is None else lora.digest,
            "ratio": settings.ratio,
            "instruction": settings.instruction,
            "system_prompt": settings.system_prompt,
            "dtype": dtype,
            "device": str(loaded.device),
            "max_length": settings.max_length,
            "query_max_length": settings.query_max_length,
            "long_passages": settings.long_passages,
            "refine": settings.refine,
            "strict_model": self._strict,
            "limits": asdict(self._limits),
            "version": __version__,
            # What clients of Text Embeddings Inference read.
            "model_id": self.model,
            "model_dtype": dtype,
            "model_type": {"reranker": {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}},
            "max_input_length": settings.max_length,
            "max_client_batch_size": self._limits.documents,
            "max_concurrent_requests": self._limits.running + self._limits.waiting,
        }

    async def health(self) -> Response:
        """Answer that the process is alive."""
        return AsciiJSON({"status": "ok"})

    async def ready(self) -> Response:
        """Answer whether the model is loaded and the cache keeps what is written to it; a probe holds for seconds."""
        asked, fault = self._probe
        if time.monotonic() - asked > _PROBE_SECONDS:
            fault = await self._work.ask(self._fault)
            self._probe = (time.monotonic(), fault)
        if fault is not None:
            return AsciiJSON({"status": "not ready", "detail": fault}, 503, {"retry-after": "5"})
        return AsciiJSON({"status": "ready"})

    def _fault(self) -> str | None:
        reranker = self._work.reranker
        if reranker.prefill_stats() is None:
            return "the model is not loaded"
        store = reranker.cache.store
        if store is None or (isinstance(store, DiskStore) and store.read_only):
            return None
        try:
            check_writable(store)
        except Exception as error:  # noqa: BLE001 - a store may be anybody's code
            return f"the cache does not keep what is written to it ({type(error).__name__})"
        return None

    async def metrics(self) -> Response:
        """Return metrics in Prometheus's text format."""
        text = await self._work.ask(self._metrics.text)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


def model_name(reranker: KaLMReranker) -> str:
    """Return the name of the model for clients: of a folder its last part only."""
    name = str(reranker.model)
    return Path(name).name if Path(name).is_dir() else name


def _dict(record: Any) -> dict[str, Any] | None:
    return None if record is None else asdict(record)
