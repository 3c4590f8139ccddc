"""Encoding a corpus with workers on Ray against the plain command, on one machine with the same threads in all.

Caveats first. The model is `mini`, which makes overhead look large, and the machine may be shared: read shares, not
passages per second. Each run is a process of its own with an empty cache. "start" is the time until every worker has
encoded one passage, model and engine included; the rest is about the corpus after that, so that it holds for a corpus
of any size. The plain command and one worker compute with all threads of the machine, two workers with half of them
each. "against plain" is the time of a passage: 1.00 costs nothing. "CPU" is the processor time of all processes, Ray's
own included, which other programs on the machine disturb least. Runs alternate, and the fastest of each counts.

    python benchmarks/distributed.py [--passages N] [--repeats N] [--workers 1,2] [--small] [--output FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from report import environment, print_table

from kalm_rag.demo_data import load_demo

MODEL = "mini"


def texts(count: int) -> list[str]:
    """Distinct passages with the lengths of the bundled corpus."""
    own = list(load_demo().passages.values())
    return [f"{number}. {own[number % len(own)]}" for number in range(count)]


def batches(count: int, size: int) -> Iterator[dict[str, list[Any]]]:
    """The corpus as `PassageEncoder` takes it."""
    corpus = texts(count)
    for start in range(0, count, size):
        part = corpus[start : start + size]
        yield {"id": list(range(start, start + len(part))), "text": part}


def cpu_seconds() -> float:
    """Processor time of this process and everything that it started, Ray's own processes included."""
    import psutil

    me = psutil.Process()
    spent = [process.cpu_times() for process in [me, *me.children(recursive=True)]]
    return float(sum(times.user + times.system for times in spent))


def run(workers: int, count: int, size: int, cache: Path) -> dict[str, float]:
    """Encode the corpus in this process (0 workers) or with workers, and return what it took."""
    begun = time.perf_counter()
    if workers == 0:
        from kalm_rag import KaLMReranker, PassageCache

        with KaLMReranker(MODEL, device="cpu", cache=PassageCache(cache, memory=0)) as reranker:
            reranker.encode(["to start with"])
            started, spent = time.perf_counter(), cpu_seconds()
            new = 0
            for batch in batches(count, size):
                found = reranker.encode(batch["text"])  # what the command calls for each group of passages
                new += found.new - len(reranker.unknown(batch["text"]))  # and how it checks that they are kept
            ended, spent = time.perf_counter(), cpu_seconds() - spent
    else:
        from kalm_rag.distributed import PassageEncoder
        from kalm_rag.distributed.ray_workers import RayWorkers, connect, plan_workers, resources

        ray = connect("local")
        encoder = PassageEncoder(MODEL, device="cpu", cache=cache)
        pool = RayWorkers(ray, encoder, plan_workers(resources(ray), workers))
        list(pool.encode({"id": [0], "text": [f"to start with {number}"]} for number in range(workers)))
        started, spent = time.perf_counter(), cpu_seconds()
        new = sum(result["status"].count("encoded") for result in pool.encode(batches(count, size)))
        ended, spent = time.perf_counter(), cpu_seconds() - spent
        ray.shutdown()
    if new != count:
        msg = f"{workers} workers encoded {new} of {count} passages"
        raise RuntimeError(msg)
    return {"start": started - begun, "seconds": ended - started, "cpu": spent}


def measure(workers: int, count: int, size: int) -> dict[str, float]:
    """Run in a process of its own, with an empty cache."""
    with tempfile.TemporaryDirectory() as folder:
        given = ["--one", str(workers), "--passages", str(count), "--batch", str(size), "--cache", folder]
        done = subprocess.run([sys.executable, __file__, *given], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Measure each number of workers, by turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int)
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--workers", default="1,2", help="numbers of workers on Ray, separated by commas")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--small", action="store_true", help="a few passages and one worker, to test this script")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--cache", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    count = given.passages or (32 if given.small else 8000)
    size = given.batch or (8 if given.small else 256)
    if given.one is not None:
        print(json.dumps(run(given.one, count, size, given.cache)))
        return
    chosen = [0, *([1] if given.small else map(int, given.workers.split(",")))]
    repeats = given.repeats or (1 if given.small else 3)
    taken: dict[int, list[dict[str, float]]] = {workers: [] for workers in chosen}
    for _ in range(repeats):
        for workers in chosen:
            taken[workers].append(measure(workers, count, size))
    results = []
    for workers, runs in taken.items():
        rate = count / min(one["seconds"] for one in runs)
        cpu = min(one["cpu"] for one in runs) / count
        start = min(one["start"] for one in runs)
        results.append({"workers": workers, "start": start, "per_second": rate, "cpu": cpu, "runs": runs})
    for item in results:
        item["against_plain"] = results[0]["per_second"] / item["per_second"]
        item["cpu_against_plain"] = item["cpu"] / results[0]["cpu"]
    print(f"{count} passages in batches of {size}, {os.cpu_count()} cores, the fastest of {repeats}")
    rows = [
        [
            "plain command" if not item["workers"] else f"Ray, workers: {item['workers']}",
            f"{item['start']:.1f} s",
            f"{item['per_second']:.1f}",
            f"{item['against_plain']:.2f}",
            f"{1000 * item['cpu']:.1f} ms",
            f"{item['cpu_against_plain']:.2f}",
        ]
        for item in results
    ]
    print_table(("", "start", "passages/s", "against plain", "CPU a passage", "against plain"), rows)
    found = {"environment": environment(), "passages": count, "batch": size, "results": results}
    if given.output:
        given.output.write_text(json.dumps(found, indent=1))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
