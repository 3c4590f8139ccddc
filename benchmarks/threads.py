"""Which thread computes: what a hot query takes in the main thread, and in other ones.

OpenMP's workers sleep between two products where more threads compute than one, so each way runs in a process of its
own; the ways take turns, and the best of the rounds counts.

    python benchmarks/threads.py [--model mini] [--passages 10] [--queries 200] [--rounds 3] [--small]
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

from report import environment, percentiles, print_table

WAYS = {
    "main thread": "in the main thread",
    "other thread": "in another thread",
    "by itself": "in another thread that computes by itself, after loading in the main one",
}


def measure(way: str, model: str, passages: int, queries: int) -> list[float]:
    """Return the milliseconds of each query."""
    from kalm_rag import KaLMReranker
    from kalm_rag.demo_data import load_demo
    from kalm_rag.utils import forks

    texts = list(load_demo().passages.values())
    draw, took = random.Random(0), []
    with (
        # Where torch has one thread, as in a forked child, each thread computes by itself.
        patch.object(forks, "computes_alone", return_value=True) if way == "by itself" else nullcontext(),
        KaLMReranker(model, device="cpu", cache=None, show_progress=False) as reranker,
        ThreadPoolExecutor(1) as pool,
    ):
        reranker.load()

        def rank(query: str, some: list[str]) -> None:
            if way == "main thread":
                reranker.rank(query, some)
            else:
                pool.submit(reranker.rank, query, some).result()

        rank("the first query prefills", texts)
        for number in range(queries):
            some = draw.sample(texts, min(passages, len(texts)))
            began = time.perf_counter()
            rank(f"how do I sort a list of pairs, question {number}", some)
            took.append(1000 * (time.perf_counter() - began))
    return took


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--passages", type=int, default=10)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="few queries: checks the script")
    parser.add_argument("--way", choices=list(WAYS), help="measure this one here, and print its milliseconds")
    parser.add_argument("--output", type=Path, help="write JSON here too")
    options = parser.parse_args()
    if options.small:
        options.queries, options.rounds = 3, 1
    if options.way is not None:
        print(json.dumps(measure(options.way, options.model, options.passages, options.queries)))
        return
    found: dict[str, dict[str, Any]] = {}
    for _ in range(options.rounds):
        for way in WAYS:
            command = [sys.executable, __file__, "--way", way, "--model", options.model]
            command += ["--passages", str(options.passages), "--queries", str(options.queries)]
            ran = subprocess.run(command, check=True, capture_output=True, text=True)
            times = percentiles(json.loads(ran.stdout.splitlines()[-1]))
            if way not in found or times["p50"] < found[way]["p50"]:
                found[way] = times
    summary = {"environment": environment(), "ways": found}
    print(summary["environment"])
    print_table(
        ["a query", "p50 ms", "p95 ms"],
        [[WAYS[way], f"{times['p50']:.1f}", f"{times['p95']:.1f}"] for way, times in found.items()],
    )
    if options.output:
        options.output.write_text(json.dumps(summary, indent=1))
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
