"""Servers for tests of clients: `kalm-rag serve` in a process of its own, and one that answers what a test says."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

DIGEST = "0123456789abcdef01234567"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextlib.contextmanager
def served(cache: Path, *arguments: str, key: str | None = None, port: int | None = None) -> Iterator[str]:
    """Run `kalm-rag serve` with mini, and yield its address."""
    port = port or free_port()
    command = [sys.executable, "-m", "kalm_rag", "serve", "--model", "mini", "--port", str(port)]
    environment = {name: value for name, value in os.environ.items() if name != "KALM_RAG_API_KEY"}
    if key is not None:
        environment["KALM_RAG_API_KEY"] = key
    with subprocess.Popen(
        [*command, "--cache", str(cache), "--device", "cpu", *arguments], stderr=subprocess.DEVNULL, env=environment
    ) as process:
        try:
            url = f"http://127.0.0.1:{port}"
            deadline = time.monotonic() + 120
            while not _is_up(url):
                assert process.poll() is None, "the server ended"
                assert time.monotonic() < deadline, "the server did not start within two minutes"
                time.sleep(0.1)
            yield url
        finally:
            process.terminate()
            try:
                process.wait(60)
            finally:
                process.kill()


def _is_up(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/ready", timeout=5) as response:
            return bool(response.status == 200)
    except OSError:  # a status is one too
        return False


def answer_of(body: dict[str, Any]) -> dict[str, Any]:
    """What a server says of passages: the longest one is the best."""
    order = sorted(range(len(body["documents"])), key=lambda place: -len(body["documents"][place]))
    flags = ("passage_truncated", "query_truncated", "passage_repaired", "query_repaired")
    results = [
        {"index": place, "margin": float(len(body["documents"][place])), "exact": True, **dict.fromkeys(flags, False)}
        for place in order[: body.get("top_n")]
    ]
    return {"results": results, "calls": [{"counts": {"passages": len(order)}, "timings": {"score": 0.5}}]}


class Scripted:
    """A server whose answers a test chooses.

    Attributes:
        info: what it says of itself.
        answers: what it does with the next requests of passages; then it answers as it should. A status with headers
            and a body, or a function that gets the handler.
        requests: method, path, headers and content of each request.
    """

    def __init__(self) -> None:
        self.info: dict[str, Any] = {
            "model": "mini",
            "digest": DIGEST,
            "lora": None,
            "ratio": 4,
            "instruction": "Find.",
            "system_prompt": "Judge.",
            "limits": {"documents": 100, "body_bytes": 100_000},
        }
        self.answers: list[tuple[int, dict[str, str], bytes] | Callable[[BaseHTTPRequestHandler], None]] = []
        self.requests: list[tuple[str, str, dict[str, str], Any]] = []

    def paths(self) -> list[str]:
        return [path for _, path, _, _ in self.requests]

    @contextlib.contextmanager
    def running(self, port: int = 0) -> Iterator[str]:
        owner = self
        connections: list[socket.socket] = []

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                super().setup()
                connections.append(self.connection)

            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                owner.requests.append(("GET", self.path, dict(self.headers), None))
                self.reply(200, {}, json.dumps(owner.info).encode())

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                owner.requests.append(("POST", self.path, dict(self.headers), body))
                if not owner.answers:
                    self.reply(200, {}, json.dumps(answer_of(body)).encode())
                elif callable(chosen := owner.answers.pop(0)):
                    chosen(self)
                else:
                    self.reply(*chosen)

            def reply(self, status: int, headers: dict[str, str], body: bytes) -> None:
                self.send_response(status)
                given = {"content-length": str(len(body)), "x-kalm-digest": owner.info.get("digest", "-"), **headers}
                for name, value in given.items():
                    self.send_header(name, value)
                self.end_headers()
                with contextlib.suppress(OSError):
                    self.wfile.write(body)

        server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            server.server_close()
            for connection in connections:  # those that are kept alive too
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            thread.join(10)
