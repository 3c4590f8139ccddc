"""What HTTP costs beside the library, and what many clients, a long request and overload do to a server.

A server runs in a process of its own; this process sends requests over connections that stay open, or calls the library
in as many threads, with and without joining small calls as the server does. The ways take turns, and each number is of
the best round: other programs run too. Each query is asked once, so that no score is remembered. Hot passages are
prefilled in memory, cold ones are new, and those from disk were encoded before by another process and are read once.

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
Texts = Callable[[random.Random], list[str]]
"""Gives the passages of one request."""


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
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
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


def request_of(texts: Texts, draw: random.Random) -> dict[str, Any]:
    """A question that nobody asked before."""
    query = f"how do I sort a list of pairs, question {next(_numbers)}"
    return {"query": query, "documents": texts(draw)}


def known(texts: list[str], count: int) -> Texts:
    """Passages that come again and again."""
    return lambda draw: draw.sample(texts, min(count, len(texts)))


def new(texts: list[str], count: int) -> Texts:
    """Passages that nobody has seen."""
    return lambda draw: [f"{text} {next(_numbers)}" for text in known(texts, count)(draw)]


def in_turn(texts: list[str], count: int) -> Texts:
    """Each passage once, for all clients together; `StopIteration` at the end."""
    parts = iter([texts[start : start + count] for start in range(0, len(texts), count)])
    lock = threading.Lock()

    def following(_: random.Random) -> list[str]:
        with lock:
            return next(parts)

    return following


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
                    try:
                        status = call()
                    except StopIteration:
                        break
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


def over_http(port: int, texts: Texts) -> Make:
    """Clients of the server."""

    def make(number: int, stack: contextlib.ExitStack) -> Callable[[], int]:
        connection, draw = stack.enter_context(contextlib.closing(connect(port))), random.Random(number)
        return lambda: ask(connection, "POST", "/v2/rerank", request_of(texts, draw))[0]

    return make


def in_process(reranker: Any, texts: Texts) -> Make:
    """Callers of the library."""

    def make(number: int, _: contextlib.ExitStack) -> Callable[[], int]:
        draw = random.Random(number)

        def call() -> int:
            one = request_of(texts, draw)
            reranker.rank(one["query"], one["documents"])
            return 200

        return call

    return make


def joined(reranker: Any, texts: Texts) -> Make:
    """Callers of the library whose small calls are joined, as the server joins requests."""
    from kalm_rag.serving.joining import Joiner

    joiner = Joiner(reranker.settings.batch_size, reranker.settings.batch_tokens)

    def make(number: int, _: contextlib.ExitStack) -> Callable[[], int]:
        draw = random.Random(number)

        def call() -> int:
            one = request_of(texts, draw)
            joiner.rank(reranker, one["query"], one["documents"], 0, None, None)
            return 200

        return call

    return make


def elsewhere(action: Callable[..., object], *arguments: object) -> None:
    """Call in another thread: workers of the main one would be in the way of those that are measured."""
    thread = threading.Thread(target=action, args=arguments)
    thread.start()
    thread.join()


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
    parser.add_argument("--few", type=int, nargs="+", default=[1, 4], help="clients with cold passages, and from disk")
    parser.add_argument("--copies", type=int, default=4, help="copies of the bundled corpus to read from disk")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="few requests: checks the script")
    parser.add_argument("--output", type=Path, help="write JSON here too")
    options = parser.parse_args()
    if options.small:
        options.passages, options.clients, options.few, options.seconds, options.rounds = 3, [2], [2], 0.3, 1
        options.copies = 1
    from kalm_rag import KaLMReranker, PassageCache
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
        elsewhere(library.load().rank, "the first query prefills", texts)
        with contextlib.closing(connect(port)) as first:
            ask(first, "POST", "/v2/rerank", {"query": "the first query prefills", "documents": texts})
        hot, cold = known(texts, options.passages), new(texts, options.passages)

        def take_turns(what: str, clients: int, rounds: int, ways: dict[str, Make]) -> None:
            found: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
            for _, (name, make) in itertools.product(range(rounds), ways.items()):
                found[name].append(load(clients, options.seconds, make))
            for name, all_rounds in found.items():
                keep(f"{name}, {what}", clients, all_rounds)

        for clients in options.clients:
            ways = {
                "library": in_process(library, hot),
                "library, joined": joined(library, hot),
                "server": over_http(port, hot),
            }
            take_turns("hot", clients, options.rounds, ways)
        for clients in options.few:
            ways = {"library": in_process(library, cold), "server": over_http(port, cold)}
            take_turns("cold", clients, options.rounds, ways)
        stored = [f"{text} ({number})" for number in range(options.copies) for text in texts]
        with tempfile.TemporaryDirectory() as folder:
            with (
                PassageCache(folder) as filled,
                KaLMReranker(options.model, cache=filled, show_progress=False) as writer,
            ):
                elsewhere(writer.encode, stored)
            for clients in options.few:
                with (
                    PassageCache(folder, read_only=True) as reads,
                    KaLMReranker(options.model, cache=reads, show_progress=False) as reader,
                ):
                    reader.load()
                    way = in_process(reader, in_turn(stored, options.passages))
                    keep("library, from disk", clients, [load(clients, 60.0, way)])
                with server(options.model, folder) as (other, _):
                    way = over_http(other, in_turn(stored, options.passages))
                    keep("server, from disk", clients, [load(clients, 60.0, way)])
        # Short requests of four clients, while a fifth sends long ones, one after the other.
        stop = threading.Event()
        many = {"query": "", "documents": [f"{text} ({number})" for number in range(8) for text in texts][:1000]}

        def long_ones() -> None:
            with contextlib.closing(connect(port)) as connection:
                while not stop.is_set():
                    ask(connection, "POST", "/v2/rerank", many | {"query": f"long question {next(_numbers)}"})

        thread = threading.Thread(target=long_ones)
        thread.start()
        mixed = [load(4, options.seconds, over_http(port, hot))]
        stop.set()
        thread.join()
        keep("server, beside long requests", 4, mixed)
        before = resident(process)
        over = [load(2 * (16 + 8) if not options.small else 4, options.seconds, over_http(port, hot))]
        after = resident(process)
        keep("server, overload", 48, over, resident_before=before, resident_after=after)
    summary = {"environment": environment(), "results": results}
    print(summary["environment"])
    print_table(["", "clients", "requests/s", "p50 ms", "p95 ms", "p99 ms", "refused"], rows)
    print("memory of the server in MB, before overload and after:", *(f"{size / 1e6:.0f}" for size in (before, after)))
    if options.output:
        options.output.write_text(json.dumps(summary, indent=1))
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
