"""What the endpoints do: read a request, run it while its client is there, and answer in its dialect."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from kalm_rag.errors import CheckpointError, KaLMError
from kalm_rag.serving.asked import Asked, Outcome
from kalm_rag.serving.dialects import Dialect, dialect_of
from kalm_rag.serving.gate import GONE, error_response
from kalm_rag.serving.limits import BusyError, ServingError
from kalm_rag.serving.logs import log_failure
from kalm_rag.serving.metrics import Metrics
from kalm_rag.serving.work import Work
from kalm_rag.utils.turns import StoppedError

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)

_LARGE = 100_000
"""Bytes of JSON from which it is parsed in a thread, so that other requests do not wait for it."""


class AsciiJSON(JSONResponse):
    """JSON in ASCII, which holds half surrogate pairs as they were given."""

    def render(self, content: Any) -> bytes:
        """Return the bytes."""
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


class ClientGoneError(Exception):
    """The client closed the connection."""


async def read_json(request: Request) -> Any:
    """Return the content of a request's body.

    Raises:
        ServingError: it is not JSON.
    """
    raw = await request.body()
    try:
        return await asyncio.to_thread(json.loads, raw) if len(raw) > _LARGE else json.loads(raw)
    except (ValueError, RecursionError):
        msg = f"the body must be JSON, got {len(raw)} bytes that are not"
        raise ServingError(400, msg) from None


def read_model(kind: type[M], content: Any) -> M:
    """Return the checked fields of a request.

    Raises:
        ServingError: a field is wrong; the message names it and the rule, not its value.
    """
    if not isinstance(content, dict):
        raise ServingError(422, f"the body must be a JSON object, got {type(content).__name__}")
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        faults = error.errors(include_url=False, include_input=False, include_context=False)
        told = [_fault(fault["loc"], fault["msg"]) for fault in faults[:3]]
        more = f" (and {len(faults) - 3} more)" if len(faults) > 3 else ""
        raise ServingError(422, "; ".join(told) + more) from None
    except RecursionError:
        raise ServingError(422, "the body is nested too deeply") from None


def _fault(place: tuple[int | str, ...], message: str) -> str:
    return f"{'.'.join(map(str, place))[:80] or 'body'}: {message.removeprefix('Value error, ')}"


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Run work until it is done or its client goes away, which ends it at its next batch.

    Raises:
        ClientGoneError: the client went away.
    """

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.create_task(work), asyncio.create_task(gone())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGoneError
    finally:
        for one in (task, watch):
            one.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


def serving_error(error: Exception, busy: int = 503) -> ServingError | None:
    """Return what a client is told of an exception of the library; None for an unexpected one.

    Args:
        error: the exception.
        busy: the status of a full queue.
    """
    if isinstance(error, BusyError):
        told = ServingError(busy, error.message)
        told.retry_after = error.retry_after
        return told
    if isinstance(error, ServingError):
        return error
    if isinstance(error, CheckpointError):
        return ServingError(503, "the model's files cannot be used now; the server's log says why", 30)
    if isinstance(error, KaLMError):
        return ServingError(500, str(error))
    if isinstance(error, (ValueError, TypeError, OverflowError)):
        return ServingError(422, str(error))
    if isinstance(error, MemoryError):
        return ServingError(503, "the server has no memory for this request now: send fewer passages, or try again", 5)
    return None


class Endpoints:
    """Answers requests of all dialects.

    Args:
        work: what they ask of the model.
        metrics: that count what requests took.
        model: the real name of the model.
        strict_model: whether another name is an error.
    """

    def __init__(self, work: Work, metrics: Metrics, model: str, *, strict_model: bool) -> None:
        self._work = work
        self._metrics = metrics
        self._model = model
        self._strict = strict_model

    async def rank(self, request: Request) -> Response:
        """Answer a request of the path's dialect."""
        content: Any = None
        state = request.scope["state"]
        dialect = dialect_of(request.url.path)
        try:
            content = await read_json(request)
            dialect = dialect_of(request.url.path, content)
            if dialect is None:
                raise ServingError(404, "there is no such endpoint")
            state["dialect"] = dialect.name
            asked, outcome = await while_connected(request, self._run(dialect, content, state))
        except Exception as error:  # noqa: BLE001 - an unexpected one is logged
            return self.failed(request, error, content, 503 if dialect is None else dialect.busy)
        headers = self._work.identity
        for name, count in (("truncated", outcome.truncated), ("unscored", outcome.unscored)):
            if count:
                headers[f"x-kalm-{name}"] = str(count)
        return AsciiJSON(dialect.answer(asked, outcome), headers=headers)

    async def _run(self, dialect: Dialect, content: Any, state: dict[str, Any]) -> tuple[Asked, Outcome]:
        asked = dialect.asked(read_model(dialect.request, content))
        self.check_model(asked.model)
        state["facts"] = {
            "passages": asked.passages,
            "characters": sum(len(text) for ask in asked.asks for text in ask.texts),
            "query_characters": sum(len(ask.query) for ask in asked.asks),
        }
        outcome = await self._work.rank(asked, state["request_id"], self._model, state["began"])
        self._metrics.ranked(outcome)
        state["facts"] |= {"tokens": outcome.tokens, "truncated": outcome.truncated, "unscored": outcome.unscored}
        return asked, outcome

    def check_model(self, name: str | None) -> None:
        """Refuse the name of another model, if the server is strict.

        Raises:
            ServingError: it is another one.
        """
        if self._strict and name is not None and name != self._model:
            raise ServingError(404, f"this server has the model {self._model!r} only; name it, or leave model out")

    def failed(self, request: Request, error: Exception, content: Any = None, busy: int = 503) -> Response:
        """Return the response of a request that failed."""
        state = request.scope["state"]
        if isinstance(error, (ClientGoneError, StoppedError)):
            state["status"] = GONE
            return Response(status_code=GONE)
        told = serving_error(error, busy)
        if told is None or (told.status >= 500 and not isinstance(error, ServingError)):
            log_failure(state["request_id"], error)
        told = told or ServingError(500, "the server failed; its log has this request's id")
        body, headers = error_response(dialect_of(request.url.path, content), told)
        response = Response(body, told.status)
        response.raw_headers = [*headers]
        return response
