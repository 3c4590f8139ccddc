"""One request to a server and its answer, before a deadline."""

from __future__ import annotations

import datetime
import email.utils
import json
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from time import monotonic
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

from kalm_rag.client.server import Server
from kalm_rag.errors import MissingExtraError, ServerError, ServerUnavailableError
from kalm_rag.utils import forks

if TYPE_CHECKING:
    import httpx

    from kalm_rag.latency.limit import TimeLimit

T = TypeVar("T")

_CONNECT_SECONDS = 5.0
_MOST_BYTES = 64_000_000
"""Of an answer: two thousand passages take about one million."""
_AWAY = frozenset({408, 429, 502, 503, 504})
"""Statuses after which the same request may succeed later."""


class Deadline:
    """The end of a call and all of its attempts.

    Args:
        seconds: until then.
        within: no further attempt begins after it.
        renews: whether each part of an answer that arrives starts the seconds again, for answers that report progress.

    Attributes:
        seconds: as given.
    """

    def __init__(self, seconds: float, *, within: TimeLimit | None = None, renews: bool = False) -> None:
        self.seconds = seconds
        self._within = within
        self._renews = renews
        self._end = monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds left; negative once it has passed."""
        return self._end - monotonic()

    @property
    def left_to_begin(self) -> float:
        """Seconds in which an attempt may begin."""
        return self.left if self._within is None else min(self.left, self._within.left)

    def progressed(self) -> None:
        """Note that a part of an answer arrived."""
        if self._renews:
            self._end = monotonic() + self.seconds


class Exchange:
    """Sends single requests to one server, over connections that it keeps, from any number of threads.

    Args:
        server: where it is.
    """

    def __init__(self, server: Server) -> None:
        self._server = server
        self.after_fork_in_child()
        forks.watch(self)

    def after_fork_in_child(self) -> None:
        """Drop connections: those that are open are the parent's."""
        self._lock = threading.Lock()  # of the next line
        self._http: httpx.Client | None = None

    def close(self) -> None:
        """Close the connections. The next request opens new ones."""
        with self._lock:
            http, self._http = self._http, None
        if http is not None:
            http.close()

    def request(
        self,
        path: str,
        body: Mapping[str, Any] | None,
        read: Callable[[Iterator[bytes]], T],
        deadline: Deadline,
    ) -> tuple[T, str]:
        """Send a request once, and return what is read of the answer, and the digest of the model that gave it.

        Args:
            path: of the endpoint.
            body: is posted as JSON; None gets the path instead.
            read: reads the answer; raises `ValueError` for one that it does not understand.
            deadline: when to give up. A server that sends nothing is left then; one that sends a little now and then
                may take twice the time that was left when the request began.

        Raises:
            ServerError: the server refuses the request.
            ServerUnavailableError: it is away, too slow, busy, or answers something that cannot be read.
        """
        httpx = _httpx()
        url, key = self._server.url, self._server.key
        headers = {} if key is None else {"authorization": f"Bearer {key}"}  # each time: the environment may change
        content = None if body is None else json.dumps(body).encode("ascii")  # half surrogate pairs included
        left = max(0.001, deadline.left)
        timeout = httpx.Timeout(left, connect=min(left, _CONNECT_SECONDS))
        method = "GET" if body is None else "POST"
        try:
            with self._client().stream(method, path, content=content, headers=headers, timeout=timeout) as response:
                parts = _parts(response, deadline)
                if response.status_code != 200:
                    raise self._refusal(response, b"".join(parts), key)
                digest = response.headers.get("x-kalm-digest")
                if digest is None:
                    msg = "it does not name its model in X-Kalm-Digest"
                    raise ValueError(msg)
                return read(parts), digest
        except httpx.TimeoutException as error:
            msg = (
                f"the server at {url} did not answer within {deadline.seconds:g} seconds ({type(error).__name__}); "
                "raise the timeout, or send fewer passages at once"
            )
            raise ServerUnavailableError(msg) from error
        except (httpx.HTTPError, httpx.StreamError) as error:
            msg = f"the server at {url} cannot be reached ({type(error).__name__}); check its address, and that it runs"
            raise ServerUnavailableError(msg) from error
        except (ValueError, RecursionError) as error:
            why = str(error) if type(error) is ValueError else "it is not JSON"
            msg = (
                f"the answer of the server at {url} to {path} cannot be read: {why}; check that it is `kalm-rag serve`"
            )
            raise ServerUnavailableError(msg) from None

    def _refusal(self, response: httpx.Response, content: bytes, key: str | None) -> ServerError:
        status, url = response.status_code, self._server.url
        told = _message(content)
        told = told if key is None else told.replace(key, "***")
        if status == 401:
            given = "no key was given" if key is None else "the one that was given is not accepted"
            return ServerError(
                f"the server at {url} asks for a key, and {given}; give api_key, or set KALM_RAG_API_KEY", status
            )
        msg = f"the server at {url} answered {status}{f': {told}' if told else ''}"
        if status in _AWAY:
            return ServerUnavailableError(msg, status, _retry_after(response.headers.get("retry-after")))
        return ServerError(msg, status)

    def _client(self) -> httpx.Client:
        httpx = _httpx()
        with self._lock:
            if self._http is None:
                headers = {"accept": "application/json", "content-type": "application/json"}
                self._http = httpx.Client(base_url=self._server.url, headers=headers)
                weakref.finalize(self, self._http.close)  # for whoever does not call `close`
            return self._http


def _parts(response: httpx.Response, deadline: Deadline) -> Iterator[bytes]:
    size = 0
    for part in response.iter_bytes():
        size += len(part)
        if size > _MOST_BYTES:
            msg = f"it is longer than {_MOST_BYTES} bytes"
            raise ValueError(msg)
        if deadline.left <= 0:
            msg = "the deadline passed while the answer arrived"
            raise _httpx().ReadTimeout(msg)
        deadline.progressed()
        yield part


def _httpx() -> ModuleType:
    try:
        import httpx
    except ImportError as error:
        raise MissingExtraError("httpx", "client") from error
    return httpx


def read_object(parts: Iterable[bytes]) -> dict[str, Any]:
    """Return the JSON object that an answer is.

    Raises:
        ValueError: it is not one.
    """
    return _object(b"".join(parts))


def read_lines(parts: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects of an answer that has one a line.

    Raises:
        ValueError: a line is not one.
    """
    rest = b""
    for part in parts:
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            if line.strip():
                yield _object(line)
    if rest.strip():
        yield _object(rest)


def _object(content: bytes) -> dict[str, Any]:
    found = json.loads(content)
    if not isinstance(found, dict):
        msg = f"it must be a JSON object, got {type(found).__name__}"
        raise ValueError(msg)
    return found


def _message(content: bytes) -> str:
    """Return what a server says of an error, shortened."""
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        return ""
    found = body.get("message") or body.get("detail") if isinstance(body, dict) else None
    return found[:500] if isinstance(found, str) else ""


def _retry_after(value: str | None) -> float | None:
    """Return the seconds of a header `Retry-After`: a number, or a date."""
    if value is None:
        return None
    if value.strip().isdecimal():
        return float(value.strip()[:12])
    try:
        when = email.utils.parsedate_to_datetime(value)
        if when.tzinfo is None:
            when = when.replace(tzinfo=datetime.timezone.utc)
        return max(0.0, (when - datetime.datetime.now(datetime.timezone.utc)).total_seconds())
    except (ValueError, OverflowError):
        return None
