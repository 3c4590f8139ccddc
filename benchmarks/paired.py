"""Two checkouts of kalm-rag beside each other: cold and warm queries, start-up, by turns in one run.

python benchmarks/paired.py OLD NEW --model CHECKPOINT --dtype float32

OLD and NEW are folders that hold `kalm_rag`; only the public interface is used. Each has a process of its own, and they
take turns, so that what else the machine does hits both. It prints the ratio of the minima and the median of the ratios
of the pairs: below 1, NEW is faster. Without --model, random weights in a small geometry are made.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from report import environment, print_table


class Checkout:
    """A process that answers with seconds."""

    def __init__(self, folder: str, arguments: argparse.Namespace, model: str) -> None:
        command = [sys.executable, __file__, folder, folder, "--worker", "--model", model, "--dtype", arguments.dtype]
        command += ["--passages", str(arguments.passages), "--words", str(arguments.words)]
        command += ["--threads", str(arguments.threads)]
        place = str(Path(folder).resolve())
        environment = {**os.environ, "PYTHONPATH": place, "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=place
        )
        self.samples: dict[str, list[float]] = {"load": [float(self._read()["load"])]}

    def _read(self) -> dict[str, float]:
        assert self.process.stdout is not None
        answer: dict[str, float] = json.loads(self.process.stdout.readline())
        return answer

    def ask(self, kind: str) -> None:
        """Run one query and keep its seconds."""
        assert self.process.stdin is not None
        self.process.stdin.write(kind + "\n")
        self.process.stdin.flush()
        self.samples.setdefault(kind, []).append(self._read()[kind])

    def close(self) -> None:
        """End the process."""
        self.process.communicate("")


def work(arguments: argparse.Namespace) -> None:
    """Answer the questions of standard input."""
    import torch

    from kalm_rag import KaLMReranker
    from kalm_rag.demo_data import load_demo

    torch.set_num_threads(arguments.threads)
    words = " ".join(load_demo().passages.values()).split()
    step = arguments.words
    texts = [" ".join(words[(step * n) % 20_000 :][:step]) for n in range(arguments.passages)]
    began = time.perf_counter()
    reranker = KaLMReranker(arguments.model, device="cpu", dtype=arguments.dtype, cache=None).load()
    print(json.dumps({"load": time.perf_counter() - began}), flush=True)
    for number, line in enumerate(sys.stdin):
        kind = line.strip()
        known = [f"{number} {text}" for text in texts] if kind == "cold" else texts
        if kind == "warm" and number < 2:
            reranker.rank("the first query prefills", known)
        began = time.perf_counter()
        reranker.rank(f"how do I sort a list of pairs, question {number}", known)
        print(json.dumps({kind: time.perf_counter() - began}), flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old")
    parser.add_argument("new")
    parser.add_argument("--model", help="a checkpoint; default: random weights in a small geometry")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--passages", type=int, default=16)
    parser.add_argument("--words", type=int, default=200, help="words of a passage")
    parser.add_argument("--rounds", type=int, default=5, help="one cold and three warm queries each")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, help="write JSON here too")
    parser.add_argument("--small", action="store_true", help="a quick run on tiny work")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments)
        return
    if arguments.small:
        arguments.passages, arguments.words, arguments.rounds = 3, 20, 1
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model
        if model is None:
            from kalm_rag.testing import build_checkpoint

            model = str(build_checkpoint(Path(folder) / "model"))
        checkouts = {name: Checkout(getattr(arguments, name), arguments, model) for name in ("old", "new")}
        for _ in range(arguments.rounds):
            for kind in ("cold", "warm", "warm", "warm"):
                for checkout in checkouts.values():
                    checkout.ask(kind)
        for checkout in checkouts.values():
            checkout.close()
    results: dict[str, Any] = {}
    for kind in ("load", "cold", "warm"):
        old, new = (checkouts[name].samples[kind] for name in ("old", "new"))
        results[kind] = {
            "old": min(old),
            "new": min(new),
            "ratio_of_minima": min(new) / min(old),
            "median_of_pairs": statistics.median(b / a for a, b in zip(old, new, strict=True)),
        }
    rows = [
        [kind, f"{r['old']:.3f}", f"{r['new']:.3f}", f"{r['ratio_of_minima']:.3f}", f"{r['median_of_pairs']:.3f}"]
        for kind, r in results.items()
    ]
    print_table(["", "old s", "new s", "new / old", "median of pairs"], rows)
    text = json.dumps({"environment": environment(), "dtype": arguments.dtype, "results": results})
    if arguments.output:
        arguments.output.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
