"""What HTTP costs beside the library, and what many clients, a long request and overload do to a server.

A server runs in a process of its own; this process sends requests over connections that stay open, or calls the library
in as many threads, with and without joining small calls as the server does. The ways take turns, and each number is of
the best round: other programs run too. Each query is asked once, so that no score is remembered.

    python benchmarks/serve.py [--model mini] [--passages 10] [--clients 1 2 4 8 16] [--seconds S] [--small]
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import itertools
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from report import environment, percentiles, print_table

_numbers = itertools.count()
Make = Callable[[int, contextlib.ExitStack], Callable[[], int]]
"""Makes what one client does, again and again; the stack closes what it opened."""


@contextlib.contextmanager
def server(model: str, cache: str, *flags: str) -> Iterator[tuple[int, int]]:
    """Run a server; gives its port and the number of its process."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = int(found.getsockname()[1])
    command = [
        sys.executable,
        "-m",
        "kalm_rag",
        "serve",
        "--model",
        model,
        "--port",
        str(port),
        "--cache",
        cache,
        *flags,
    ]
    with subprocess.Popen([*command, *flags], stderr=subprocess.DEVNULL) as process:
        try:
            while True:
                if process.poll() is not None:
                    raise RuntimeError("the server did not start")
                with contextlib.suppress(OSError), contextlib.closing(connect(port)) as connection:
                    if ask(connection, "GET", "/ready")[0] == 200:
                        break
                time.sleep(0.1)
            yield port, process.pid
        finally:
            process.terminate()


def connect(port: int) -> http.client.HTTPConnection:
    """Open a connection."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    connection.connect()
    connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def ask(connection: http.client.HTTPConnection, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
    """Send a request and read its response."""
    connection.request(method, path, None if body is None else json.dumps(body), {"content-type": "application/json"})
    response = connection.getresponse()
    return response.status, response.read()


def request_of(texts: list[str], count: int, draw: random.Random) -> dict[str, Any]:
    """A question that nobody asked before, about known passages."""
    query = f"how do I sort a list of pairs, question {next(_numbers)}"
    return {"query": query, "documents": draw.sample(texts, min(count, len(texts)))}


def load(clients: int, seconds: float, make: Make) -> dict[str, Any]:
    """Let clients call as fast as they can; returns the calls of each status a second, and milliseconds of the good."""
    statuses: list[int] = []
    took: list[float] = []
    failures: list[BaseException] = []
    end = time.monotonic() + seconds

    def run(number: int) -> None:
        try:
            with contextlib.ExitStack() as stack:
                call = make(number, stack)
                while time.monotonic() < end:
                    began = time.perf_counter()
                    status = call()
                    statuses.append(status)
                    if status == 200:
                        took.append(1000 * (time.perf_counter() - began))
        except BaseException as error:  # noqa: BLE001 - told by the main thread
            failures.append(error)

    began = time.monotonic()
    threads = [threading.Thread(target=run, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    spent = time.monotonic() - began
    refused = sum(status != 200 for status in statuses)
    return {"per_second": len(took) / spent, "refused": refused, "asked": len(statuses), "samples_ms": took}


def over_http(port: int, texts: list[str], count: int) -> Make:
    """Clients of the server."""

    def make(number: int, stack: contextlib.ExitStack) -> Callable[[], int]:
        connection, draw = stack.enter_context(contextlib.closing(connect(port))), random.Random(number)
        return lambda: ask(connection, "POST", "/v2/rerank", request_of(texts, count, draw))[0]

    return make


def in_process(reranker: Any, texts: list[str], count: int) -> Make:
    """Callers of the library."""

    def make(number: int, _: contextlib.ExitStack) -> Callable[[], int]:
        draw = random.Random(number)

        def call() -> int:
            one = request_of(texts, count, draw)
            reranker.rank(one["query"], one["documents"])
            return 200

        return call

    return make


def joined(reranker: Any, texts: list[str], count: int) -> Make:
    """Callers of the library whose small calls are joined, as the server joins requests."""
    from kalm_rag.serving.joining import Joiner

    joiner = Joiner(reranker.settings.batch_size, reranker.settings.batch_tokens)

    def make(number: int, _: contextlib.ExitStack) -> Callable[[], int]:
        draw = random.Random(number)

        def call() -> int:
            one = request_of(texts, count, draw)
            joiner.rank(reranker, one["query"], one["documents"], 0, None, None)
            return 200

        return call

    return make


def resident(process: int) -> int:
    """Bytes that a process holds; 0 where the system does not tell."""
    with contextlib.suppress(OSError):
        pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    return 0


def row(name: str, clients: int, best: dict[str, Any]) -> list[str]:
    """A line of the table."""
    p = percentiles(best["samples_ms"])
    share = best["refused"] / max(1, best["asked"])
    return [
        name,
        str(clients),
        f"{best['per_second']:.1f}",
        *(f"{p[q]:.1f}" for q in ("p50", "p95", "p99")),
        f"{share:.1%}",
    ]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--passages", type=int, default=10)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="few requests: checks the script")
    parser.add_argument("--output", type=Path, help="write JSON here too")
    options = parser.parse_args()
    if options.small:
        options.passages, options.clients, options.seconds, options.rounds = 3, [2], 0.3, 1
    from kalm_rag import KaLMReranker
    from kalm_rag.demo_data import load_demo

    texts = list(load_demo().passages.values())[: 12 if options.small else None]
    results: list[dict[str, Any]] = []
    rows: list[list[str]] = []

    def keep(name: str, clients: int, found: list[dict[str, Any]], **more: Any) -> None:
        best = max(found, key=lambda one: one["per_second"])
        results.append({"name": name, "clients": clients, **best, **more})
        rows.append(row(name, clients, best))

    with (
        tempfile.TemporaryDirectory() as cache,
        KaLMReranker(options.model, cache=None, show_progress=False) as library,
        server(options.model, cache, "--max-waiting", "8") as (port, process),
    ):
        library.load().rank("the first query prefills", texts)
        with contextlib.closing(connect(port)) as first:
            ask(first, "POST", "/v2/rerank", {"query": "the first query prefills", "documents": texts})
        ways = {
            "library": in_process(library, texts, options.passages),
            "library, joined": joined(library, texts, options.passages),
            "server": over_http(port, texts, options.passages),
        }
        for clients in options.clients:
            found: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
            for _, (name, make) in itertools.product(range(options.rounds), ways.items()):
                found[name].append(load(clients, options.seconds, make))
            for name, all_rounds in found.items():
                keep(f"{name}, hot", clients, all_rounds)
        # Short requests of four clients, while a fifth sends long ones, one after the other.
        stop = threading.Event()
        many = {"query": "", "documents": [f"{text} ({number})" for number in range(8) for text in texts][:1000]}

        def long_ones() -> None:
            with contextlib.closing(connect(port)) as connection:
                while not stop.is_set():
                    ask(connection, "POST", "/v2/rerank", many | {"query": f"long question {next(_numbers)}"})

        thread = threading.Thread(target=long_ones)
        thread.start()
        mixed = [load(4, options.seconds, ways["server"])]
        stop.set()
        thread.join()
        keep("server, beside long requests", 4, mixed)
        before = resident(process)
        over = [load(2 * (16 + 8) if not options.small else 4, options.seconds, ways["server"])]
        keep("server, overload", 48, over, resident_before=before, resident_after=resident(process))
    summary = {"environment": environment(), "results": results}
    print(summary["environment"])
    print_table(["", "clients", "requests/s", "p50 ms", "p95 ms", "p99 ms", "refused"], rows)
    if options.output:
        options.output.write_text(json.dumps(summary, indent=1))
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
