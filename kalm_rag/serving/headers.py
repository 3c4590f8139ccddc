"""Bounds how slowly, and how many, bytes of a request's headers may come: uvicorn has a setting for neither."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

from kalm_rag.serving.limits import Limits

logger = logging.getLogger(__name__)

_SLOW = "408 Request Timeout"
_LARGE = "431 Request Header Fields Too Large"


def bounding_headers(limits: Limits, base: Any = AutoHTTPProtocol) -> type[asyncio.Protocol]:
    """Return a class of connections for uvicorn's `http=` that ends those whose headers take too long.

    The time counts from the opening of the connection, and later from the first byte of each further request; while a
    connection is idle between requests, uvicorn's own `timeout_keep_alive` counts.

    Args:
        limits: `header_seconds` and `header_bytes` of them.
        base: uvicorn's class. Default: the one that uvicorn chooses by itself.
    """

    class Connection(base):  # type: ignore[misc]
        _timer: asyncio.TimerHandle | None = None
        _read = 0  # bytes of the headers that are awaited

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            self._await_headers()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            before = self.cycle
            super().data_received(data)
            if self.cycle is not before:  # uvicorn makes one for each request whose headers are complete
                self._stop()
                return
            # Of a request whose response still runs these bytes are the body, which has its own limits.
            if self._timer is None and (before is None or before.response_complete) and not self.transport.is_closing():
                self._await_headers()
            if self._timer is not None:
                self._read += len(data)
                if self._read > limits.header_bytes:
                    self._refuse(_LARGE, f"the headers must have at most {limits.header_bytes} bytes")

        def _await_headers(self) -> None:
            self._read = 0
            message = f"the headers must arrive within {limits.header_seconds} seconds"
            self._timer = self.loop.call_later(limits.header_seconds, self._refuse, _SLOW, message)

        def _stop(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _refuse(self, status: str, message: str) -> None:
            self._stop()
            logger.info("a connection was closed: %s", message)
            if self._read:  # one that never sent a byte awaits no answer
                head = f"HTTP/1.1 {status}\r\ncontent-type: text/plain; charset=utf-8\r\nconnection: close\r\n"
                self.transport.write(f"{head}content-length: {len(message)}\r\n\r\n{message}".encode())
            self.transport.close()

    return Connection
