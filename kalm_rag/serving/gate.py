"""What every request passes first: request id, key, size and time of the body; and every response last."""

from __future__ import annotations

import asyncio
import json
import re
import time
import uuid
from asyncio import sleep
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from kalm_rag.serving.dialects import Dialect, dialect_of, dialect_of_bytes
from kalm_rag.serving.dialects.base import any_error
from kalm_rag.serving.keys import Keys
from kalm_rag.serving.limits import BusyError, Limits, ServingError
from kalm_rag.serving.logs import log_failure, log_request
from kalm_rag.serving.metrics import Metrics

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

PUBLIC = frozenset({"/", "/health", "/ready", "/docs", "/openapi.json", "/favicon.ico"})
"""Paths that need no key; neither does what is below `/assets/`."""
ASSETS = "/assets/"
GONE = 499
"""The status that logs and metrics show of a request whose client went away."""
_PAUSE_SECONDS = 0.1
_MOST_PAUSED = 1_000
_ID = re.compile(r"[\w.-]{1,64}", re.ASCII)
_ALWAYS = ((b"x-content-type-options", b"nosniff"), (b"cache-control", b"no-store"))
_PAGE = (
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
)


class Gate:
    """ASGI middleware around the whole application.

    Args:
        app: what it hands requests on to, with their bodies read.
        limits: of bodies.
        keys: that open it.
        metrics: that count requests.
        check_queue: raises `BusyError` if no further request is let in.
        names: the endpoints' paths, and what metrics and logs call those that are no dialect's.
    """

    def __init__(
        self,
        app: App,
        limits: Limits,
        keys: Keys,
        metrics: Metrics,
        check_queue: Callable[[], None],
        names: dict[str, str],
    ) -> None:
        self._app = app
        self._limits = limits
        self._keys = keys
        self._metrics = metrics
        self._check_queue = check_queue
        self._names = names
        self._held = self._paused = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(scope, send, self._limits.send_seconds)
        reserved = [0]
        try:
            self._check_key(scope)
            body = await self._body(scope, receive, reserved)
            await self._check_room(exchange, body)
            await self._app(scope, _replay(body, receive), exchange.send)
        except ServingError as error:
            await exchange.refuse(error)
        except (ConnectionError, _SlowError):
            exchange.status = GONE
        except Exception as error:  # noqa: BLE001 - whatever it is, the client gets an answer and the log its place
            log_failure(exchange.request_id, error)
            await exchange.refuse(ServingError(500, "the server failed; its log has this request's id"))
        finally:
            self._held -= reserved[0]
            self._tell(exchange)

    def _tell(self, exchange: _Exchange) -> None:
        state, path = exchange.scope["state"], exchange.scope["path"]
        dialect = state.get("dialect") or getattr(exchange.dialect, "name", None)
        name = dialect or self._names.get(path) or ("assets" if path.startswith(ASSETS) else "other")
        status, seconds = state.get("status", exchange.status), time.monotonic() - exchange.began
        self._metrics.ended(name, status, seconds)
        method = exchange.scope["method"] if exchange.scope["method"] in _METHODS else "other"
        known = path if path in self._names else None
        log_request(exchange.request_id, name, known, method, status, seconds, state.get("facts", {}))

    def _check_key(self, scope: Scope) -> None:
        path = scope["path"]
        if not self._keys.required or path in PUBLIC or path.startswith(ASSETS) or scope["method"] == "OPTIONS":
            return
        given = header(scope, b"authorization")
        if not self._keys.admits(given):
            if given is None or not given.lower().startswith("bearer "):
                msg = "an API key is needed, in the header `Authorization: Bearer KEY`"
            else:
                msg = "the server does not know the API key that was sent: use one that it was started with"
            raise ServingError(401, msg)

    async def _check_room(self, exchange: _Exchange, body: bytes) -> None:
        """Refuse a request that would find the queue full, before work is done for it.

        The refusal waits a little, so that clients that come back at once leave the cores to those that were let in.

        Raises:
            ServingError: the queue is full.
        """
        if exchange.dialect is None or exchange.scope["method"] != "POST":
            return
        try:
            self._check_queue()
        except BusyError as error:
            exchange.dialect = dialect_of_bytes(exchange.scope["path"], body) or exchange.dialect
            error.status = exchange.dialect.busy
            if self._paused < _MOST_PAUSED:
                self._paused += 1
                try:
                    await sleep(_PAUSE_SECONDS)
                finally:
                    self._paused -= 1
            raise

    async def _body(self, scope: Scope, receive: Receive, reserved: list[int]) -> bytes:
        """Read the whole body, within its limits.

        Raises:
            ServingError: it is too large, too slow, or there is no room for it now.
            ConnectionError: the client went away.
        """
        most = self._limits.body_bytes
        length = header(scope, b"content-length")
        if length is not None and length.isdecimal() and int(length[:20]) > most:
            raise _too_large(most)
        parts: list[bytes] = []
        size, deadline = 0, time.monotonic() + self._limits.body_seconds
        while True:
            try:
                message = await asyncio.wait_for(receive(), deadline - time.monotonic())
            except asyncio.TimeoutError:
                msg = f"the body must arrive within {self._limits.body_seconds} seconds: send a smaller one"
                raise ServingError(408, msg) from None
            if message["type"] == "http.disconnect":
                raise ConnectionError
            part = message.get("body", b"")
            size += len(part)
            if size > most:
                raise _too_large(most)
            if self._held + len(part) > self._limits.held_bytes:
                dialect = dialect_of(scope["path"])
                msg = f"requests hold {self._limits.held_bytes} bytes, which is the limit: try again in 1 s"
                raise ServingError(503 if dialect is None else dialect.busy, msg, 1.0)
            self._held += len(part)
            reserved[0] += len(part)
            parts.append(part)
            if not message.get("more_body", False):
                return b"".join(parts)


_METHODS = frozenset({"GET", "HEAD", "POST", "OPTIONS", "PUT", "DELETE", "PATCH"})


class _SlowError(Exception):
    """The client does not accept the response in time."""


class _Exchange:
    """One request and its response."""

    def __init__(self, scope: Scope, send: Send, send_seconds: float) -> None:
        self.began = time.monotonic()
        self.scope = scope
        self.dialect = dialect_of(scope["path"])
        self.status = GONE
        self._send = send
        self._seconds = send_seconds
        self._started = False
        given = header(scope, b"x-request-id") or ""
        self.request_id = given if _ID.fullmatch(given) else uuid.uuid4().hex
        scope["state"] = {**scope.get("state", {}), "request_id": self.request_id, "began": self.began}

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._started, self.status = True, message["status"]
            headers = [*message.get("headers", ()), *_ALWAYS, (b"x-request-id", self.request_id.encode())]
            kind = next((value for name, value in headers if name.lower() == b"content-type"), b"")
            message = {**message, "headers": [*headers, *(_PAGE if kind.startswith(b"text/html") else ())]}
        try:
            await asyncio.wait_for(self._send(message), self._seconds)
        except asyncio.TimeoutError:
            raise _SlowError from None

    async def refuse(self, error: ServingError) -> None:
        """Answer with an error, unless a response has begun."""
        if self._started:
            return
        body, headers = error_response(self.dialect, error)
        await self.send({"type": "http.response.start", "status": error.status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body})


def error_response(dialect: Dialect | None, error: ServingError) -> tuple[bytes, list[tuple[bytes, bytes]]]:
    """Return the body and the headers of an error, in the shape of a dialect; without one, in a shape for all."""
    shape = any_error if dialect is None else dialect.error
    body = json.dumps(shape(error.status, error.message)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if error.retry_after is not None:
        headers.append((b"retry-after", str(error.retry_after).encode()))
    if error.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if error.status in (408, 413):
        headers.append((b"connection", b"close"))  # the rest of the body is not read
    return body, headers


def header(scope: Scope, name: bytes) -> str | None:
    """Return a header of a request, the first of its name."""
    for own, value in scope["headers"]:
        if own == name:
            return bytes(value).decode("latin-1")
    return None


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives the body that was read, and then what comes: that the client went away."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def _too_large(most: int) -> ServingError:
    return ServingError(413, f"the body must have at most {most} bytes: send fewer or shorter passages")
