"""What Ray Serve costs a request, and what it would bring to send each passage to a replica of its own.

The cost: one server and one replica on Ray Serve, both with one thread and a warm cache, get the same requests over
connections that stay open, by turns; each number is of the best round. Each query is asked once, so that no score is
remembered. "CPU" is the processor time of all processes of a way, Ray's own included, which other programs on the
machine disturb least.

The routes: two replicas, in this process, get a stream of queries of which some are asked more often (Zipf), with the
passages that BM25 finds for each. `any` sends a query to either one, as Ray Serve does by itself; `query` sends the
same query to the same one, as Ray Serve does with `sessions` and a header made of the query; `passage` sends each
passage to the one that its hash names, so that both work on every query. Each may keep a share of the prefilled
passages in memory, and both have one folder. What is counted is the second half of the stream: where passages came
from, processor time per query of both replicas together, and of the slower one. The network and Ray are not in it.

    python benchmarks/ray_serve.py [--model mini] [--passages 10] [--clients 1 4] [--seconds S] [--rounds N]
        [--corpus BEIR_FOLDER] [--queries N] [--candidates N] [--shares 0.25 0.5 1] [--forms states compact]
        [--no-cost] [--no-routes] [--small] [--output FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import socket
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from replay import Stream, make_stream
from report import environment, percentiles, print_table
from serve import ask, connect, known, load, over_http, server

from kalm_rag import KaLMReranker, PassageCache
from kalm_rag.demo_data import load_demo

REPLICAS = 2
FORMS = {"states": {}, "compact": {"prefill_storage": "compact"}}
"""What the folder keeps, and what that means for memory."""
SOURCES = ("remembered", "prefilled", "stored", "states", "encoded")


@contextlib.contextmanager
def ray_serve(model: str, cache: str) -> Iterator[int]:
    """Run one replica on a Ray of its own; gives the port."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # the same as for the server
    import ray
    from ray import serve

    from kalm_rag.serving.arguments import ReplicaArguments
    from kalm_rag.serving.ray import build

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = int(found.getsockname()[1])
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=200_000_000,
        logging_level="ERROR",
        log_to_driver=False,
    )
    try:
        serve.start(http_options={"port": port}, logging_config={"log_level": "ERROR"})
        serve.run(build(ReplicaArguments(model=model, cache=cache, max_replicas=1)), name="kalm-rag")
        yield port
    finally:
        serve.shutdown()
        ray.shutdown()


def cpu_seconds(servers: list[Any]) -> float:
    """Processor time of processes and all that they started."""
    import psutil

    spent = 0.0
    for process in [*servers, *(child for one in servers for child in one.children(recursive=True))]:
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            spent += times.user + times.system
    return spent


def cost(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure both ways, by turns."""
    import psutil

    os.environ["OMP_NUM_THREADS"] = "1"
    texts = list(load_demo().passages.values())[: 12 if options.small else None]
    results = []
    with (
        tempfile.TemporaryDirectory() as cache,
        server(options.model, cache) as (plain, process),
        ray_serve(options.model, cache) as scaled,
    ):
        ways = {"kalm-rag serve": (plain, [psutil.Process(process)]), "Ray Serve": (scaled, [])}
        ways["Ray Serve"][1].extend(one for one in psutil.Process().children() if one.pid != process)
        for port, _ in ways.values():
            with contextlib.closing(connect(port)) as first:
                ask(first, "POST", "/v2/rerank", {"query": "the first query prefills", "documents": texts})
        for clients in options.clients:
            found: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
            for _, (name, (port, processes)) in itertools.product(range(options.rounds), ways.items()):
                spent = cpu_seconds(processes)
                one = load(clients, options.seconds, over_http(port, known(texts, options.passages)))
                found[name].append(one | {"cpu_ms": 1000 * (cpu_seconds(processes) - spent) / one["asked"]})
            for name, rounds in found.items():
                if any(one["refused"] for one in rounds):
                    raise RuntimeError(f"{name} refused requests")
                best = min(rounds, key=lambda one: percentiles(one["samples_ms"])["p50"])
                p = percentiles(best["samples_ms"])
                per_second = max(one["per_second"] for one in rounds)
                cpu = min(one["cpu_ms"] for one in rounds)
                results.append({"way": name, "clients": clients, "per_second": per_second, "cpu_ms": cpu, **p})
    return results


def route(name: str, draw: random.Random, query: str, texts: list[str]) -> list[tuple[int, list[str]]]:
    """Return which replica gets which passages of a query."""
    if name == "passage":
        parts = [[text for text in texts if _hash(text) % REPLICAS == own] for own in range(REPLICAS)]
        return [(own, part) for own, part in enumerate(parts) if part]
    return [(_hash(query) % REPLICAS if name == "query" else draw.randrange(REPLICAS), texts)]


def _hash(text: str) -> int:
    return zlib.crc32(text.encode())


def measure_route(
    name: str, form: str, memory: int, stream: Stream, folder: Path, model: str, clock: Callable[[], float]
) -> dict[str, Any]:
    """Let two replicas work through the stream."""
    draw = random.Random(1)
    with contextlib.ExitStack() as stack:
        replicas = []
        for _ in range(REPLICAS):
            cache = stack.enter_context(PassageCache(folder, keep="states" if form == "states" else "compact"))
            arguments = {"cache": cache, "prefill_memory": memory, "device": "cpu", "show_progress": False}
            replicas.append(stack.enter_context(KaLMReranker(model, **arguments, **FORMS[form])))
        counts, spent, slowest, measured = dict.fromkeys(SOURCES, 0), 0.0, 0.0, 0
        for number, (query, texts) in enumerate(zip(stream.queries, stream.candidates, strict=True)):
            seconds = []
            for own, part in route(name, draw, query, texts):
                began = clock()
                ranking = replicas[own].rank(query, part)
                seconds.append(clock() - began)
                if number >= len(stream.queries) // 2 and ranking.counts is not None:
                    for source, count in asdict(ranking.counts).items():
                        if source in counts:
                            counts[source] += count
            if number >= len(stream.queries) // 2:
                spent, slowest, measured = spent + sum(seconds), slowest + max(seconds), measured + 1
    total = sum(counts.values())
    return {
        "route": name,
        "form": form,
        "passages": total,
        **{source: count / total for source, count in counts.items()},
        "cpu_ms": 1000 * spent / measured,
        "slowest_ms": 1000 * slowest / measured,
    }


def routes(options: argparse.Namespace) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Measure every route with every memory."""
    import torch

    torch.set_num_threads(1)
    stream = make_stream(options.corpus, options.queries, depth=options.candidates, zipf=1.0, seed=0)
    results = []
    for form in options.forms:
        arguments = FORMS[form]
        with tempfile.TemporaryDirectory() as name:
            folder, keep = Path(name), "states" if form == "states" else "compact"
            with (
                PassageCache(folder, keep=keep) as cache,
                KaLMReranker(options.model, cache=cache, device="cpu", show_progress=False, **arguments) as first,
            ):
                first.rank("the first query prefills", stream.passages)
                stats = first.prefill_stats()
                assert stats is not None
                everything = stats.size.bytes
            for share in options.shares:
                for one in ("any", "query", "passage"):
                    memory = int(share * everything)
                    found = measure_route(one, form, memory, stream, folder, options.model, time.process_time)
                    results.append({"share": share, "memory_bytes": memory, **found})
    return stream.facts(), results


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--passages", type=int, default=10)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--corpus", help="a BEIR folder [default: the demo's corpus]")
    parser.add_argument("--queries", type=int, default=400)
    parser.add_argument("--candidates", type=int, default=20)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--shares", type=float, nargs="+", default=[0.25, 0.5, 1.0])
    parser.add_argument("--no-cost", action="store_true", help="the routes only, without starting Ray")
    parser.add_argument("--no-routes", action="store_true", help="the cost only")
    parser.add_argument("--small", action="store_true", help="few requests: checks the script")
    parser.add_argument("--output", type=Path, help="write JSON here too")
    options = parser.parse_args()
    if options.small:
        options.passages, options.clients, options.seconds, options.rounds = 3, [2], 0.3, 1
        options.queries, options.candidates, options.shares = 24, 4, [0.5]
    facts, found = ({}, []) if options.no_routes else routes(options)
    summary = {"environment": environment(), "stream": facts, "routes": found, "cost": []}
    if not options.no_cost:
        summary["cost"] = cost(options)
    print(summary["environment"])
    if summary["cost"]:
        shown = ("p50", "p95", "cpu_ms")
        rows = [
            [one["way"], str(one["clients"]), f"{one['per_second']:.1f}", *(f"{one[q]:.1f}" for q in shown)]
            for one in summary["cost"]
        ]
        print_table(["", "clients", "requests/s", "p50 ms", "p95 ms", "CPU ms a request"], rows)
    if found:
        print({name: round(value, 3) for name, value in facts.items()})
    header = ["folder keeps", "memory for", "route", *SOURCES, "CPU ms", "slower one"]
    lines = [
        [one["form"], f"{one['share']:.0%}", one["route"]]
        + [f"{one[source]:.1%}" for source in SOURCES]
        + [f"{one['cpu_ms']:.1f}", f"{one['slowest_ms']:.1f}"]
        for one in found
    ]
    if lines:
        print_table(header, lines)
    if options.output:
        options.output.write_text(json.dumps(summary, indent=1))
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
