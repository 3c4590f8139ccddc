"""The application: which path does what."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import HTMLResponse, Response

from kalm_rag._version import __version__
from kalm_rag.serving.about import AboutEndpoints, model_name
from kalm_rag.serving.dialects import DIALECTS, Dialect, dialect_of
from kalm_rag.serving.endpoints import Endpoints
from kalm_rag.serving.gate import Gate, error_response
from kalm_rag.serving.keys import Keys
from kalm_rag.serving.limits import Limits, ServingError
from kalm_rag.serving.memory import giving_back
from kalm_rag.serving.metrics import Metrics
from kalm_rag.serving.openapi import docs_page, inline_schema
from kalm_rag.serving.own import Forget, PassageEndpoints
from kalm_rag.serving.page import add_page
from kalm_rag.serving.work import Work

if TYPE_CHECKING:
    from kalm_rag.reranker import KaLMReranker
    from kalm_rag.thresholds import ThresholdLike


def create_app(
    reranker: KaLMReranker,
    *,
    limits: Limits | None = None,
    keys: Keys | None = None,
    threshold: ThresholdLike | None = None,
    strict_model: bool = False,
    cors_origins: Sequence[str] = (),
    joins: bool = True,
    forget: Forget | None = None,
) -> FastAPI:
    """Return an ASGI application that serves a reranker, in the dialects of other rerankers.

    The model is loaded when the application starts. When it stops, passages that wait in the background get some time,
    and the cache is written out; closing the reranker is left to who made it.

    Args:
        reranker: the model and its cache.
        limits: what is accepted. Default: those of `Limits`.
        keys: that clients need. Default: none is needed.
        threshold: of requests that name none, as in `KaLMReranker.rank`.
        strict_model: whether a request that names another model is refused.
        cors_origins: pages of other origins that may call it from a browser.
        joins: whether small requests that wait at the same time share calls of the model; their scores stay the same.
        forget: what `/v1/forget` does with the texts, and returns. Default: the reranker forgets them.

    Attributes of its `state`:
        work: what endpoints ask of the model.
        metrics: that Prometheus reads.
    """
    limits, keys = limits or Limits(), keys or Keys()
    work = Work(reranker, limits, threshold, joins=joins)
    metrics = Metrics(work)
    model = model_name(reranker)
    endpoints = Endpoints(work, metrics, model, strict_model=strict_model)

    @contextlib.asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        await asyncio.to_thread(reranker.load)
        turns = reranker.scorer.turns
        turns.watchers = (*turns.watchers, metrics.stepped)
        try:
            async with giving_back():
                with _on_hangup(keys, work):
                    yield
        finally:
            turns.watchers = tuple(watch for watch in turns.watchers if watch != metrics.stepped)
        await asyncio.to_thread(reranker.flush, limits.drain_seconds)

    app = FastAPI(
        title="kalm-rag",
        version=__version__,
        description="Rerankers' dialects in front of one model, whose passages are encoded once.",
        docs_url=None,
        redoc_url=None,
        lifespan=life,
    )
    app.state.work, app.state.metrics = work, metrics
    for path in sorted({path for dialect in DIALECTS for path in dialect.paths}):
        _add_dialects(app, path, [dialect for dialect in DIALECTS if path in dialect.paths], endpoints)
    PassageEndpoints(work, limits, endpoints, forget).add_to(app)
    AboutEndpoints(work, metrics, limits, model, strict_model=strict_model).add_to(app)

    add_page(app)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return HTMLResponse(docs_page(app.openapi()))

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        text = {404: "there is no such endpoint; GET /docs lists them", 405: "this endpoint takes another method"}
        told = ServingError(error.status_code, text.get(error.status_code, error.detail))
        body, headers = error_response(dialect_of(request.url.path), told)
        response = Response(body, error.status_code, headers=dict(error.headers or {}))
        response.raw_headers = [*headers, *(pair for pair in response.raw_headers if pair[0] == b"allow")]
        return response

    # The last one added is the first one passed.
    if cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type", "x-request-id"],
            expose_headers=["x-request-id", "x-kalm-digest", "x-kalm-truncated", "x-kalm-unscored", "retry-after"],
        )
    names = {route.path: route.name for route in app.routes if hasattr(route, "path") and hasattr(route, "name")}
    app.add_middleware(Gate, limits=limits, keys=keys, metrics=metrics, check_queue=work.queue.check, names=names)
    return app


def _add_dialects(app: FastAPI, path: str, dialects: Sequence[Dialect], endpoints: Endpoints) -> None:
    schemas = [inline_schema(dialect.request) for dialect in dialects]
    body: dict[str, Any] = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
    app.add_api_route(
        path,
        endpoints.rank,
        methods=["POST"],
        name="-".join(dialect.name for dialect in dialects),
        summary=" Or: ".join(dialect.summary for dialect in dialects),
        operation_id="post" + path.replace("/", "_"),
        response_class=Response,
        openapi_extra={"requestBody": {"required": True, "content": {"application/json": {"schema": body}}}},
        responses=RESPONSES
        | {dialects[0].busy: {"description": "The queue is full; Retry-After says when to try again."}},
    )


RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"description": "The ranking.", "content": {"application/json": {}}},
    400: {"description": "The body is not JSON."},
    401: {"description": "A key is needed."},
    404: {"description": "Another model is named."},
    408: {"description": "The body came too slowly."},
    413: {"description": "A limit is exceeded; the message names it."},
    422: {"description": "A field is wrong; the message names it."},
}


@contextlib.contextmanager
def _on_hangup(keys: Keys, work: Work) -> Any:
    """On SIGHUP, read the keys again and write the cache out, where this runs in the main thread."""
    loop, name = asyncio.get_running_loop(), getattr(signal, "SIGHUP", None)
    running: set[asyncio.Task[Any]] = set()

    def reload() -> None:
        keys.of_file()
        task = loop.create_task(work.ask(work.reranker.cache.flush))
        running.add(task)
        task.add_done_callback(running.discard)

    is_set = False
    with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
        if name is not None:
            loop.add_signal_handler(name, reload)
            is_set = True
    try:
        yield
    finally:
        if is_set and name is not None:
            loop.remove_signal_handler(name)
