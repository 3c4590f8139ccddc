"""A TCP proxy in front of a real server that spoils what passes through it, and can be told otherwise while it runs."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
import threading
from typing import Any, Literal, get_args

Mode = Literal["pass", "refuse", "reset", "black hole", "half-open", "truncated", "wrong bytes", "drip"]
"""What happens to connections:

pass: bytes go through, replies `latency` seconds later.
refuse: nobody listens; connections that are open are reset.
reset: connections are reset, those that are open at once and new ones at their first bytes.
black hole: requests are accepted and never answered.
half-open: connections that are open at the switch become black holes, as of a server that was replaced; new ones pass.
truncated: the connection ends in the middle of a reply.
wrong bytes: one bit in about every 2,000 bytes of a reply is flipped, and in every second one that is shorter.
drip: a byte of the reply comes every 20 ms, so that no single read takes long.
"""
MODES: tuple[Mode, ...] = get_args(Mode)
FAULTS = MODES[1:]

_CHUNK = 65_536
_BYTES_A_FLIP = 2_000


class Proxy:
    """Forwards connections to a server on this machine, in a thread of its own; use it in a `with` block.

    Args:
        port: of the server.
        latency: seconds by which each reply, and the first request on a new connection, comes later.
        seed: of what is spoiled.

    Attributes:
        port: where to connect instead.
        sent: bytes that clients sent.
        received: bytes of replies that reached clients.
        connections: made so far.
        spoiled: connections on which the mode did something.
    """

    def __init__(self, port: int, *, latency: float = 0.0, seed: int = 0) -> None:
        self._server = port
        self.latency = latency
        self._mode: Mode = "pass"
        self._chooser = random.Random(seed)
        self.sent = self.received = self.connections = self.spoiled = 0
        self.port = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._open: set[_Connection] = set()
        self._listener: asyncio.Server | None = None

    @property
    def mode(self) -> Mode:
        """What happens to connections now."""
        return self._mode

    def become(self, mode: Mode, *, latency: float | None = None) -> None:
        """Change what happens to connections; returns when the change is made."""
        asyncio.run_coroutine_threadsafe(self._become(mode, latency), self._loop).result(10)

    async def _become(self, mode: Mode, latency: float | None) -> None:
        assert mode in MODES, mode
        if latency is not None:
            self.latency = latency
        self._mode = mode
        if mode == "refuse":
            await self._unlisten()
        elif self._listener is None:
            await self._listen()
        for connection in list(self._open):
            if mode in ("refuse", "reset"):
                connection.reset()
            elif mode == "half-open":
                connection.is_deaf = True
                self.spoiled += 1
            elif connection.is_deaf:  # a hole stays one: what it swallowed does not come back
                connection.reset()

    async def _listen(self) -> None:
        self._listener = await asyncio.start_server(self._accept, "127.0.0.1", self.port, limit=_CHUNK)
        self.port = self._listener.sockets[0].getsockname()[1]

    async def _unlisten(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        connection = _Connection(self, reader, writer)
        self._open.add(connection)
        try:
            await connection.run(self._server)
        except (OSError, asyncio.CancelledError):
            connection.reset()
        finally:
            self._open.discard(connection)
            connection.close()

    def flipped(self, data: bytes) -> bytes:
        """The bytes with some bits flipped."""
        damaged = bytearray(data)
        for _ in range(int(max(0.5, len(data) / _BYTES_A_FLIP) + self._chooser.random())):
            damaged[self._chooser.randrange(len(data))] ^= 1 << self._chooser.randrange(8)
        return bytes(damaged)

    def __enter__(self) -> Proxy:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(10)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _end(self) -> None:
        await self._unlisten()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _Connection:
    """One client, and its own connection to the server."""

    def __init__(self, proxy: Proxy, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.proxy, self.reader, self.writer = proxy, reader, writer
        self.is_deaf = False
        self.upstream: asyncio.StreamWriter | None = None

    async def run(self, port: int) -> None:
        if self.proxy.latency:
            await asyncio.sleep(self.proxy.latency)  # the handshake takes a round trip too
        answers, self.upstream = await asyncio.open_connection("127.0.0.1", port, limit=_CHUNK)
        ways = [asyncio.create_task(self._requests()), asyncio.create_task(self._replies(answers))]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            for found in await asyncio.gather(*ways, return_exceptions=True):
                if isinstance(found, OSError):
                    self.reset()

    async def _requests(self) -> None:
        assert self.upstream is not None
        while data := await self.reader.read(_CHUNK):
            self.proxy.sent += len(data)
            mode = self.proxy.mode
            if mode in ("reset", "refuse"):
                self.proxy.spoiled += 1
                self.reset()
                return
            if mode == "black hole" and not self.is_deaf:
                self.is_deaf = True
                self.proxy.spoiled += 1
            if not self.is_deaf:
                self.upstream.write(data)
                await self.upstream.drain()

    async def _replies(self, answers: asyncio.StreamReader) -> None:
        """Read replies at once and hand them on when their time has come: latency does not narrow the line."""
        waiting: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(256)
        clock = asyncio.get_running_loop().time

        async def read() -> None:
            while data := await answers.read(_CHUNK):
                await waiting.put((clock() + self.proxy.latency, data))
            await waiting.put((clock(), b""))

        reading = asyncio.create_task(read())
        try:
            while True:
                due, data = await waiting.get()
                await asyncio.sleep(max(0.0, due - clock()))
                if self.is_deaf:
                    await asyncio.Event().wait()
                if not data or not await self._hand_on(data):
                    return
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    async def _hand_on(self, data: bytes) -> bool:
        """Give the client a part of a reply, or what the mode makes of it; returns whether more may follow."""
        mode = self.proxy.mode
        if mode == "black hole":
            self.is_deaf = True
            self.proxy.spoiled += 1
            await asyncio.Event().wait()
        self.proxy.spoiled += mode in ("truncated", "wrong bytes", "drip")
        if mode == "drip":
            for place in range(len(data)):
                await self._write(data[place : place + 1])
                await asyncio.sleep(0.02)
                if self.proxy.mode != "drip":
                    await self._write(data[place + 1 :])
                    break
            return True
        if mode == "truncated":
            await self._write(data[: len(data) // 2])
            return False
        await self._write(self.proxy.flipped(data) if mode == "wrong bytes" else data)
        return True

    async def _write(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()
        self.proxy.received += len(data)

    def reset(self) -> None:
        """End it with a reset instead of an orderly end."""
        sock: Any = self.writer.get_extra_info("socket")
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()

    def close(self) -> None:
        for writer in (self.writer, self.upstream):
            if writer is not None:
                writer.close()
