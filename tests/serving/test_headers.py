"""Connections whose headers come too slowly, or are too many, end; others do not."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from kalm_rag.serving.headers import bounding_headers
from kalm_rag.serving.limits import Limits

HEAD = b"POST / HTTP/1.1\r\nhost: here\r\ncontent-length: 4\r\n\r\n"


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Answers with the body of a request."""
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message["body"], message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"4")]})
    await send({"type": "http.response.body", "body": body})


def classes() -> list[Any]:
    found = [pytest.param(H11Protocol, id="h11")]
    with contextlib.suppress(ImportError):  # uvicorn's choice where httptools is installed
        from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

        found.append(pytest.param(HttpToolsProtocol, id="httptools"))
    return found


@pytest.fixture(params=classes())
def port(request: pytest.FixtureRequest) -> Iterator[int]:
    limits = Limits(header_seconds=1, header_bytes=2_000)
    http = bounding_headers(limits, request.param)
    server = uvicorn.Server(uvicorn.Config(app, port=0, http=http, ws="none", lifespan="off", log_config=None))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join()


def until_closed(connection: socket.socket) -> bytes:
    with contextlib.suppress(ConnectionError):
        return b"".join(iter(lambda: connection.recv(65_536), b""))
    return b""


def dribble(connection: socket.socket) -> bytes:
    """Send a header a byte at a time, never its end; returns what came until the server closed the connection."""
    connection.settimeout(0.1)
    for byte in HEAD[:-2] + b"x" * 1_000:
        try:
            connection.sendall(bytes([byte]))
            answer = connection.recv(65_536)
        except TimeoutError:
            continue
        connection.settimeout(20)
        return answer + until_closed(connection)
    raise AssertionError("the server went on waiting")


def test_slow_and_large_headers_end_a_connection_and_slow_bodies_do_not(port: int) -> None:
    def connect() -> socket.socket:
        return socket.create_connection(("127.0.0.1", port), timeout=20)

    def slow() -> None:
        with connect() as connection:
            answer = dribble(connection)
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert answer.endswith(b"the headers must arrive within 1 seconds")

    def silent() -> None:
        with connect() as connection:
            assert until_closed(connection) == b""

    def slow_after_a_good_one() -> None:
        with connect() as connection:
            connection.sendall(HEAD + b"good")
            answer = b""
            while not answer.endswith(b"good"):
                answer += connection.recv(65_536)
            assert answer.startswith(b"HTTP/1.1 200 ")
            assert dribble(connection).startswith(b"HTTP/1.1 408 ")

    def large() -> None:
        with connect() as connection:
            connection.sendall(HEAD[:-2] + b"x: " + b"y" * 3_000)
            assert until_closed(connection).startswith(b"HTTP/1.1 431 ")

    def slow_body() -> None:
        with connect() as connection:
            connection.sendall(HEAD)
            for byte in b"body":
                time.sleep(0.5)
                connection.sendall(bytes([byte]))
            answer = b""
            while not answer.endswith(b"body"):
                answer += connection.recv(65_536)
            assert answer.startswith(b"HTTP/1.1 200 ")

    with ThreadPoolExecutor(5) as pool:
        for done in [pool.submit(case) for case in (slow, silent, slow_after_a_good_one, large, slow_body)]:
            done.result()
