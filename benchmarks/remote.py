"""A tier that machines share: what a fresh machine's first query takes from it, and what its faults cost.

Redis and moto's S3 run on this machine, so their network is as fast as memory. Latency is added by a proxy, to each
reply and to each new connection; without added latency there is no proxy. Moto ends every connection after one answer,
so each of its objects costs two round trips; S3 itself costs one, and once per connection those of TLS. The servers,
the proxy and the model share the same cores. Weights are random, in the geometry of KaLM-Reranker-V1-Nano.

    python benchmarks/remote.py [--corpus FOLDER] [--tokenizer tokenizer.json] [--operations 5000] [--small]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from report import environment, percentiles, print_table
from warm import Bench

from kalm_rag.cache import DiskStore

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from proxykit import Proxy
from serverkit import RedisServer, S3Server, Server
from tierkit import SECRET, Site, environment_for, run_fault, run_queries, set_environment

CANDIDATES, TOKENS, RATIO = 32, 300, 4
LATENCIES = (0.0, 0.02, 0.1)
PATIENT_MS = 20_000.0
"""So that every read of the first parts is waited for."""
DEADLINE_MS = 100.0
"""Of a query under a fault."""
SMALL_FAULTS = ("wrong bytes", "memory full", "bucket gone")
KINDS: tuple[type[Server], ...] = (RedisServer, S3Server)
NAMES = {RedisServer: "Redis", S3Server: "S3 (moto)"}


@contextlib.contextmanager
def served(kind: type[Server]) -> Iterator[tuple[Server, Proxy]]:
    """A server, and a proxy in front of it to which the environment leads."""
    with kind() as server, Proxy(server.port) as proxy, set_environment(environment_for(server, proxy)):
        if isinstance(server, S3Server):
            server.make_bucket("bucket")
        yield server, proxy


class Tier:
    """A tier on a server of this machine, directly or with added latency."""

    def __init__(self, server: Server, proxy: Proxy) -> None:
        self.server, self.proxy = server, proxy

    def cache(self, folder: Path | None, latency: float = 0.0) -> Any:
        """A cache with this tier whose reads are all waited for; its connection is open."""
        from kalm_rag import PassageCache

        self.proxy.become("pass", latency=latency)
        port, url = self.proxy.port if latency else self.server.port, "s3://bucket/tier"
        if isinstance(self.server, RedisServer):
            url = f"redis://127.0.0.1:{port}/0"
        there = self.server.environment(f"http://127.0.0.1:{port}") if isinstance(self.server, S3Server) else {}
        with set_environment(there):
            cache = PassageCache(folder, memory=0, remote=url, secret=SECRET, remote_timeout_ms=PATIENT_MS)
            assert cache.remote is not None
            cache.remote.link.check()  # loading a model does so in the background
        return cache


def timed(action: Callable[[], object]) -> float:
    """Milliseconds of one call."""
    start = time.perf_counter()
    action()
    return 1000 * (time.perf_counter() - start)


class Replicas:
    """Fresh machines: each has a loaded model, a cache of its own, and one query to answer."""

    def __init__(self, bench: Bench, folder: Path, passages: list[str], dtype: str) -> None:
        self.bench, self.folder, self.passages, self.dtype = bench, folder, passages, dtype
        self._made = 0

    def first_query(self, cache: Any, query: str) -> float:
        """Milliseconds of the first query after the model was loaded, its encoder included."""
        reranker = self.bench.reranker(self.dtype, cache=cache, prefill_memory=0)
        try:
            self._made += 1
            reranker.rank(query, [f"Passage {self._made} is in no tier, so that the encoder is loaded and warm."])
            took = timed(lambda: reranker.rank(query, self.passages))
            cache.flush(30)
        finally:
            reranker.close()
            cache.close()
        return took

    def new_folder(self) -> Path:
        """A folder that does not exist yet."""
        self._made += 1
        return self.folder / f"machine-{self._made}"


def places(tiers: dict[str, Tier]) -> list[tuple[str, Tier, float]]:
    """Every tier with every latency, by name."""
    return [
        (f"{name}, {1000 * latency:.0f} ms added" if latency else name, tier, latency)
        for name, tier in tiers.items()
        for latency in LATENCIES
    ]


def fill(replicas: Replicas, tiers: dict[str, Tier], disk: Path) -> list[str]:
    """Encode the passages once, into a folder and every tier; returns their keys."""
    from kalm_rag import PassageCache

    cache = PassageCache(disk, memory=0, secret=SECRET)
    with replicas.bench.reranker(replicas.dtype, cache=cache) as reranker:
        reranker.encode(replicas.passages)
    keys = list(DiskStore(disk).keys())
    for tier in tiers.values():
        with tier.cache(disk) as cache:
            assert cache.share("states", keys) == 0
    return keys


def first_queries(
    replicas: Replicas, tiers: dict[str, Tier], disk: Path, query: str, rounds: int
) -> dict[str, list[float]]:
    """The first query of a fresh machine from each place, in turns."""
    from kalm_rag import PassageCache

    found: dict[str, list[float]] = {}
    for number in range(rounds):
        own = PassageCache(replicas.new_folder(), memory=0, secret=SECRET)
        found.setdefault("own encoding", []).append(replicas.first_query(own, query))
        local = PassageCache(disk, memory=0, secret=SECRET)
        found.setdefault("local disk", []).append(replicas.first_query(local, query))
        assert local.stats().encoded <= 1
        for name, tier, latency in places(tiers):
            cache = tier.cache(replicas.new_folder(), latency)
            found.setdefault(name, []).append(replicas.first_query(cache, query))
            assert cache.stats().encoded <= 1, f"{name}: not everything came from the tier"
            print(f"round {number + 1}: {name}", file=sys.stderr, flush=True)
    return found


def reads(tiers: dict[str, Tier], disk: Path, keys: Sequence[str], rounds: int, dtype: Any) -> dict[str, list[float]]:
    """Reading, verifying and making tensors of all passages, in turns; connections are open."""
    from kalm_rag import PassageCache
    from kalm_rag.cache.frame import Frame
    from kalm_rag.states import from_frame

    def decode(frame: Frame) -> Any:
        return from_frame(frame, dtype).at(RATIO)

    caches = {"local disk": (PassageCache(disk, memory=0, secret=SECRET), None, 0.0)}
    caches |= {name: (tier.cache(None, latency), tier.proxy, latency) for name, tier, latency in places(tiers)}
    found: dict[str, list[float]] = {name: [] for name in caches}
    for turn in range(rounds + 1):
        for name, (cache, proxy, latency) in caches.items():
            if proxy is not None:
                proxy.become("pass", latency=latency)
            got: dict[str, Any] = {}
            took = timed(lambda cache=cache, got=got: got.update(cache.get_many("states", keys, decode)))
            assert len(got) == len(keys), f"{name}: {len(got)} of {len(keys)} passages"
            if turn:  # the first one opens files and connections
                found[name].append(took)
    for cache, _, _ in caches.values():
        cache.close()
    return found


def batching(tiers: dict[str, Tier], keys: Sequence[str], rounds: int) -> list[dict[str, Any]]:
    """The same passages, asked for in requests of one, of eight, and of all."""
    found = []
    for name, tier in tiers.items():
        for latency in (0.0, 0.02):
            cache = tier.cache(None, latency)
            get_many = cache.remote.link.store.get_many
            get_many(keys)

            def ask(size: int, get_many: Callable[[Sequence[str]], object] = get_many) -> None:
                for start in range(0, len(keys), size):
                    get_many(keys[start : start + size])

            for size in sorted({1, min(8, len(keys)), len(keys)}):
                samples = [timed(lambda size=size, ask=ask: ask(size)) for _ in range(rounds)]
                found.append({"tier": name, "latency_ms": 1000 * latency, "keys": size, "samples_ms": samples})
            cache.close()
    return found


def faults(checkpoint: Path, operations: int, names: Sequence[str] | None) -> list[dict[str, Any]]:
    """Queries of three passages under every fault of every server."""
    import random

    rows: list[dict[str, Any]] = []
    kinds = [kind for kind in KINDS if not kind.missing()]
    for kind in kinds:
        with served(kind) as (server, proxy):
            site = Site(server, proxy, checkpoint, timeout_ms=DEADLINE_MS)
            chosen = {name: fault for name, fault in site.faults().items() if names is None or name in names}
            each = max(4, -(-operations // (len(chosen) * len(kinds))))
            queries = min(10, each)
            alone = site.alone()
            local: list[float] = []
            with site.reranker() as reranker:
                for name, fault in chosen.items():
                    outcome = run_fault(site, reranker, fault, -(-each // queries), queries=queries, seed=len(rows))
                    # Beside each fault, since other processes of this machine change what local work takes.
                    here = run_queries(alone, site.expected, min(30, each), random.Random(len(rows))).seconds
                    local += here
                    p = percentiles([1000 * second for second in outcome.seconds])
                    limit = DEADLINE_MS + percentiles([1000 * second for second in here])["p99"]
                    row = {
                        "server": NAMES[kind],
                        "fault": name,
                        "operations": outcome.operations,
                        "passages": outcome.asked,
                        "from_tier": outcome.hits,
                        "misses": outcome.encoded,
                        "wrong": outcome.wrong,
                        "raised": outcome.raised,
                        "errors": outcome.errors[:3],
                        "p50_ms": p["p50"],
                        "p99_ms": p["p99"],
                        "limit_ms": limit,
                        "within": p["p99"] <= limit,
                    }
                    rows.append(row)
                    print(json.dumps(row), file=sys.stderr, flush=True)
            alone.close()
    return rows


def print_places(title: str, found: dict[str, list[float]], megabytes: float) -> None:
    """A table of the median by place, against the local disk."""
    local = statistics.median(found["local disk"])
    rows = []
    for name, samples in found.items():
        p = percentiles(samples)
        rate = "" if name == "own encoding" else f"{megabytes / (p['p50'] / 1000):.0f}"
        rows.append(
            [name, f"{p['p50']:.1f}", f"{min(samples):.1f}", f"{p['max']:.1f}", f"{p['p50'] / local:.2f}", rate]
        )
    print(title)
    print_table(["from", "p50 ms", "min", "max", "of local disk", "MB/s"], rows)
    print()


@contextlib.contextmanager
def without_warnings() -> Iterator[None]:
    """Print no line for each fault."""
    logger = logging.getLogger("kalm_rag")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", help="BEIR folder or JSON lines [default: the demo's corpus]")
    parser.add_argument("--tokenizer", help="a tokenizer.json, for lengths at true vocabulary size")
    parser.add_argument("--rounds", type=int, default=5, help="first queries from each place")
    parser.add_argument("--operations", type=int, default=5000, help="queries under faults, of all kinds together")
    parser.add_argument("--only", choices=["first", "faults"], help="one part only")
    parser.add_argument("--faults", nargs="+", metavar="NAME", help="these faults only")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--small", action="store_true", help="small checkpoint: checks the script in seconds")
    parser.add_argument("--output", help="also write the JSON here")
    options = parser.parse_args()
    import torch

    from kalm_rag.demo_data import load_demo
    from kalm_rag.retrieval.corpus import read_passages
    from kalm_rag.testing import build_checkpoint

    rounds = 1 if options.small else options.rounds
    count, tokens = (6, 40) if options.small else (CANDIDATES, TOKENS)
    texts = [record.text for record in read_passages(options.corpus)] if options.corpus else None
    texts = (texts or list(load_demo().passages.values()))[:200]
    summary: dict[str, Any] = {"environment": environment(), "missing": [kind.missing() for kind in KINDS]}
    for reason in filter(None, summary["missing"]):
        print(f"not measured: {reason}")
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        stack.enter_context(without_warnings())
        folder = Path(name)
        if options.only != "faults":
            bench = Bench(folder, texts, options.small, options.tokenizer)
            tiers = {NAMES[kind]: Tier(*stack.enter_context(served(kind))) for kind in KINDS if not kind.missing()}
            replicas = Replicas(bench, folder, bench.passages(count, tokens), options.dtype)
            disk = folder / "first-machine"
            keys = fill(replicas, tiers, disk)
            queries = first_queries(replicas, tiers, disk, "Which of these is about it?", rounds)
            store = DiskStore(disk)
            megabytes = sum(map(len, store.get_many(keys).values())) / 1e6
            store.close()
            each = 1000 * megabytes / len(keys)
            dtype = getattr(torch, options.dtype)
            read = reads(tiers, disk, keys, 2 if options.small else 20, dtype)
            batches = batching(tiers, keys, 2 if options.small else 10)
            about = f"{len(keys)} passages of {tokens} tokens, {each:.0f} KB each in {options.dtype}"
            print_places(
                f"First query of a fresh machine over {about}; model and encoder are loaded", queries, megabytes
            )
            print_places(f"Reading, verifying and making tensors of {about}; connections are open", read, megabytes)
            print("The same passages in requests of so many keys; milliseconds of all requests together, median")
            rows = [
                [item["tier"], f"{item['latency_ms']:.0f}", str(item["keys"]), f"{p50:.1f}", f"{rate:.0f}"]
                for item in batches
                for p50 in [statistics.median(item["samples_ms"])]
                for rate in [megabytes / (p50 / 1000)]
            ]
            print_table(["from", "ms added", "keys a request", "ms", "MB/s"], rows)
            print()
            summary |= {"first_query_ms": queries, "read_ms": read, "batching": batches}
            summary |= {"passages": len(keys), "bytes": megabytes * 1e6}
        if options.only != "first":
            tiny = build_checkpoint(folder / "tiny")
            chosen = options.faults or (SMALL_FAULTS if options.small else None)
            table = faults(tiny, 2 if options.small else options.operations, chosen)
            print(f"Queries of 3 passages under faults; all reads of a query may take {DEADLINE_MS:.0f} ms together")
            rows = [
                [
                    *(row["server"], row["fault"]),
                    *(f"{row[name]:,}" for name in ("operations", "from_tier", "misses", "wrong", "raised")),
                    *(f"{row[name]:.0f}" for name in ("p50_ms", "p99_ms", "limit_ms")),
                    "yes" if row["within"] else "no",
                ]
                for row in table
            ]
            head = [
                "server",
                "fault",
                "queries",
                "from tier",
                "misses",
                "wrong",
                "raised",
                "p50",
                "p99",
                "limit",
                "within",
            ]
            print_table(head, rows)
            total = {name: sum(row[name] for row in table) for name in ("operations", "wrong", "raised")}
            print(f"{total['operations']:,} queries: {total['wrong']} wrong scores, {total['raised']} raised")
            print(
                "limit: the deadline, and the p99 of queries that encode all, measured beside each fault without a tier"
            )
            summary |= {"faults": table, "deadline_ms": DEADLINE_MS}
    line = json.dumps(summary)
    if options.output:
        Path(options.output).write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
