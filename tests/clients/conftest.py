"""Servers as their users start them, in processes of their own."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tried import CLIENTS

ROOT = Path(__file__).parents[2]
KEY = "k" * 32
MOST_DOCUMENTS = 20
_START_SECONDS = 120.0
_LONG = "Bread is baked from flour, water and salt, and from patience. " * 80

# No client asks anything but the server, and none reports what it does.
os.environ |= {
    "HAYSTACK_TELEMETRY_ENABLED": "False",
    "LANGSMITH_TRACING": "false",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "NO_PROXY": "127.0.0.1",
    "OMP_NUM_THREADS": "1",  # of the server: a full one shall stay full for a while
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--environment", required=True, help="the environment whose clients are tried: see tried.py")
    parser.addoption("--kalm-rag", default=str(ROOT / ".venv/bin/kalm-rag"), help="the command that starts the server")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    name = metafunc.config.getoption("--environment")
    clients = [client for client in CLIENTS if name in client.environments]
    assert clients, f"--environment must be one of tried.py's, got {name!r}"
    if "tries_again" in metafunc.function.__name__:
        clients = [client for client in clients if client.tries > 1]
    metafunc.parametrize("client", clients, ids=[client.name for client in clients])


class Server:
    """`kalm-rag serve --model mini` on a free port, in a `with` block."""

    def __init__(self, command: str, *options: str) -> None:
        self._command, self._options = command, options
        self._folder = tempfile.TemporaryDirectory(prefix="kalm-rag-clients-")
        self._log = Path(self._folder.name) / "log"
        self._told = 0
        self._process: subprocess.Popen[bytes] | None = None
        self.url = ""

    def __enter__(self) -> Server:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        place = ["--port", str(port), "--cache", str(Path(self._folder.name) / "cache")]
        command = [self._command, "serve", "--model", "mini", *place, *self._options]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(command, stderr=log, env={**os.environ, "KALM_RAG_API_KEY": KEY})
        deadline = time.monotonic() + _START_SECONDS
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{self.url}/ready", timeout=5).close()
                return self
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.__exit__()
                pytest.fail(f"the server does not start: {self._log.read_text()[-2000:]}")
            time.sleep(0.1)

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._folder.cleanup()

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """Ask it without any client."""
        request = urllib.request.Request(f"{self.url}{path}", None if body is None else json.dumps(body).encode())
        request.add_header("Authorization", f"Bearer {KEY}")
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)

    def requests(self) -> list[tuple[str, int]]:
        """Path and status of each ranking that ended since the last call, as the log has them."""
        self.ask("/health")  # what ended before this is in the log when this is
        wait_for(lambda: '"/health"' in self._log.read_text()[self._told :])
        new = self._log.read_text()[self._told :]
        self._told += len(new)
        lines = [json.loads(line) for line in new.splitlines() if line.startswith("{")]
        return [
            (line.get("path"), line["status"])
            for line in lines
            if line["message"] == "request" and line["method"] == "POST"
        ]


@contextlib.contextmanager
def full(server: Server) -> Iterator[None]:
    """Fill the queue of a server that works on one request and lets one wait, for minutes or until the block ends."""
    address = server.url.removeprefix("http://")
    held: list[http.client.HTTPConnection] = []

    def queue() -> dict[str, int]:
        return server.ask("/v1/stats")["queue"]

    try:
        for count in (1, 2):
            documents = [f"{time.time()} {number} {_LONG}" for number in range(2000)]
            connection = http.client.HTTPConnection(address, timeout=600)
            body = json.dumps({"query": "What is bread made of?", "documents": documents})
            connection.request("POST", "/v2/rerank", body, {"Authorization": f"Bearer {KEY}"})
            held.append(connection)
            wait_for(lambda: sum(queue().values()) == count)  # noqa: B023 - it is called before the next turn
        yield
    finally:
        for connection in held:
            connection.close()
        wait_for(lambda: not any(queue().values()))


def wait_for(done: Callable[[], bool], seconds: float = 60.0) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.05)


@pytest.fixture(scope="session")
def server(pytestconfig: pytest.Config) -> Iterator[Server]:
    with Server(pytestconfig.getoption("--kalm-rag"), "--max-documents", str(MOST_DOCUMENTS)) as one:
        yield one


@pytest.fixture(scope="session")
def narrow_server(pytestconfig: pytest.Config) -> Iterator[Server]:
    """A server whose queue is filled by two requests."""
    with Server(pytestconfig.getoption("--kalm-rag"), "--max-running", "1", "--max-waiting", "1") as one:
        yield one


@pytest.fixture(scope="class")
def full_server(narrow_server: Server) -> Iterator[Server]:
    with full(narrow_server):
        yield narrow_server
