"""Everything that a GPU changes, on one card within 8 minutes: scores against the CPU's, then times.

Caveats first: weights are random, in the geometry of KaLM-Reranker-V1-Nano with its 262,144 output rows; the corpus is
the demo's. Parts run in a process of their own. One that takes longer than its share is ended, the next starts in a new
process, and what did not run is named.

    python benchmarks/gpu.py [--device cuda] [--seconds 480] [--small] [--output FILE]
"""

from __future__ import annotations

import argparse
import json
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from compact import costs
from joint import PEERS, measure_peer
from replay import Cell, Journal, Replay, budget, make_stream
from report import environment, percentiles, print_table
from warm import Bench, seconds

SHARES = {"prepare": 60, "correctness": 70, "cold": 40, "warm": 50, "compact": 70, "replay": 100, "peers": 70}
"""Seconds of each part, of 480 in all; the rest is for starting processes."""

_TOTAL = 480
_GRACE = 5.0
"""Seconds after its share in which a part may finish the case that it is at."""

_LINE = "part: "
_FLOAT32_CLOSE = 1e-3
"""How far probabilities in float32 may be from the CPU's: sums are taken in another order, with random weights."""

FORMS = ("native", "int8", "compact")


class Context:
    """What parts share.

    Args:
        work: folder of the checkpoint and of what is encoded.
        device: of torch.
        small: a small checkpoint, few passages, and float32 only.
        shares: seconds of each part.
    """

    def __init__(self, work: Path, device: str, small: bool, shares: dict[str, float]) -> None:
        self.work = work
        self.device = device
        self.small = small
        self.dtypes = ("float32",) if small else ("float32", "bfloat16")
        self.skipped: list[str] = []
        self._shares = shares
        self._end = 0.0
        self._bench: Bench | None = None

    @property
    def bench(self) -> Bench:
        """The checkpoint; the first use writes it."""
        from kalm_rag.demo_data import load_demo

        if self._bench is None:
            self._bench = Bench(self.work, list(load_demo().passages.values()), self.small, None, self.device)
        return self._bench

    def begin(self, part: str) -> None:
        """Start the clock of a part."""
        self._end = time.monotonic() + self._shares[part]
        self.skipped = []

    def cases(self, cases: Iterable[Any]) -> Iterator[Any]:
        """Yield cases while there is time; the others are noted as skipped."""
        for case in cases:
            if time.monotonic() < self._end:
                yield case
            else:
                self.skipped.append(str(getattr(case, "name", case)))

    def passages(self, count: int) -> list[str]:
        """Different passages of about 300 tokens, fewer and shorter ones of a small run."""
        return self.bench.passages(4 if self.small else count, 60 if self.small else 300)

    def queries(self, reranker: Any, count: int) -> list[str]:
        """Different queries of equal length."""
        return self.bench.queries(reranker.scorer, count, 40 if self.small else 15)


def prepare(context: Context) -> dict[str, Any]:
    """Write the checkpoint."""
    return {"model": Path(context.bench.model).name}


def correctness(context: Context) -> dict[str, Any]:
    """How far scores are from the CPU's in float32, by precision and form, with and without prefilled passages."""
    from kalm_rag import KaLMReranker

    passages = context.passages(16)
    pairs = [(query, text) for query in ("what is a generator", "how do I copy a file") for text in passages]
    base = {"cache": None, "max_length": 1024, "ratio": 4, "prefill_storage": "native", "score_memory": 0}
    reranker = KaLMReranker(context.bench.model, device="cpu", dtype="float32", prefill_memory=0, **base)
    expected = reranker.predict(pairs)
    reranker.close()
    found = []
    for dtype, form in context.cases((dtype, form) for dtype in context.dtypes for form in ("full prompt", *FORMS)):
        memory = 0 if form == "full prompt" else 8_000_000_000
        options = {**base, "prefill_storage": "native" if form == "full prompt" else form, "prefill_memory": memory}
        reranker = context.bench.reranker(dtype, **options)
        scores = [reranker.predict(pairs) for _ in range(2)]  # the second is warm
        reranker.close()
        changes = [abs(a - b) for run in scores for a, b in zip(run, expected, strict=True)]
        found.append({"dtype": dtype, "form": form, "largest": max(changes), "mean": sum(changes) / len(changes)})
    exact = [
        item["largest"] for item in found if item["dtype"] == "float32" and item["form"] in ("full prompt", "native")
    ]
    return {"pairs": len(pairs), "differences": found, "ok": bool(exact) and max(exact) <= _FLOAT32_CLOSE}


def cold(context: Context) -> dict[str, Any]:
    """Seconds of a query over passages that nothing is known of."""
    from kalm_rag import PassageCache

    passages, found = context.passages(32), []
    for dtype in context.cases(context.dtypes):
        reranker = context.bench.reranker(dtype, cache=PassageCache(None, memory=0), prefill_storage="native")
        samples = []
        for _ in context.cases(range(4)):
            reranker.scorer.passage_kv.cached.memory.clear()
            samples.append(seconds(lambda: reranker.rank("how do I copy a file", passages)))  # noqa: B023
        reranker.close()
        found.append({"dtype": dtype, "passages": len(passages), "seconds": min(samples), "samples": samples})
    return {"cases": found}


def warm(context: Context) -> dict[str, Any]:
    """Seconds of a query over prefilled passages in memory."""
    found = []
    for dtype in context.cases(context.dtypes):
        reranker = context.bench.reranker(dtype, prefill_storage="native")
        queries = context.queries(reranker, 4 if context.small else 21)
        for count in context.cases((10, 32, 100)):
            passages = context.passages(count)
            reranker.rank(queries[0], passages)
            samples = [seconds(lambda query=query: reranker.rank(query, passages)) for query in queries[1:]]  # noqa: B023
            found.append({"dtype": dtype, "passages": len(passages), **percentiles(samples)})
        reranker.close()
    return {"cases": found}


def compact(context: Context) -> dict[str, Any]:
    """Bytes and seconds of each form of prefilled passages, from memory and from disk."""
    passages, found = context.passages(32), []
    for dtype in context.cases(context.dtypes):
        with tempfile.TemporaryDirectory(dir=context.work) as folder:
            found += costs(context.bench, Path(folder), dtype, passages, 1 if context.small else 5)
    return {"cases": found}


def replay(context: Context) -> dict[str, Any]:
    """A short replay in bfloat16; see `replay.py`."""
    stream = make_stream(None, 4 if context.small else 60, depth=4 if context.small else 32, zipf=1.0, seed=0)
    with tempfile.TemporaryDirectory(dir=context.work) as folder:
        runner = Replay(context.bench, stream, Path(folder), Journal(Path(folder) / "journal.jsonl", {}))
        encoded, cells = [], []
        for form in context.cases(("states", "compact") if context.small else ("states", "compact", "int8", "native")):
            encoded.append(runner.encode("bfloat16", form))
            cell = Cell("bfloat16", form, "10%")
            found = runner.run(cell, budget(cell.memory, encoded[0]["prefilled_bytes"]))
            cells.append({**found, **percentiles(found["samples"])})
            del cells[-1]["scores"]
    return {"stream": stream.facts(), "encoded": encoded, "cells": cells}


def peers(context: Context) -> dict[str, Any]:
    """Seconds of joint models on 32 passages of 300 tokens."""
    found = []
    for peer in context.cases(PEERS[:1] if context.small else PEERS):
        asked = [(12, [60] * 4 if context.small else [300] * 32)] * 5
        found.append(
            measure_peer(peer, asked, context.work / peer.name, device=context.device, small=context.small, budget=5)
        )
    return {"cases": found}


PARTS: dict[str, Callable[[Context], dict[str, Any]]] = {
    part.__name__: part for part in (prepare, correctness, cold, warm, compact, replay, peers)
}


def work_through(context: Context, parts: Sequence[str]) -> None:
    """Run parts in this process, and write a line of JSON after each."""
    for part in parts:
        context.begin(part)
        start = time.monotonic()
        try:
            found: dict[str, Any] = {"result": PARTS[part](context), "skipped": context.skipped}
        except Exception as error:  # noqa: BLE001 - the other parts run, and the failure is reported
            found = {"failed": f"{type(error).__name__}: {error}"[:500], "skipped": context.skipped}
        found["seconds"] = round(time.monotonic() - start, 2)
        print(_LINE + json.dumps({"part": part, **found}), flush=True)


def supervise(
    command: Callable[[list[str]], list[str]], shares: dict[str, float], total: float, grace: float = _GRACE
) -> dict[str, dict[str, Any]]:
    """Run all parts in other processes, and end what takes too long.

    Args:
        command: what starts a process that works through the parts it is given.
        shares: seconds of each part, in order.
        total: seconds of all.
        grace: seconds that a part may take beyond its share.

    Returns:
        For each part its line, or why it was skipped.
    """
    end = time.monotonic() + total
    found: dict[str, dict[str, Any]] = {}
    left = list(shares)
    while left and time.monotonic() < end:
        with subprocess.Popen(command(left), stdout=subprocess.PIPE, text=True) as worker:
            lines: queue.Queue[str | None] = queue.Queue()
            reader = threading.Thread(target=_read, args=(worker, lines), daemon=True)
            reader.start()
            starting = total - sum(shares.values())
            while left:
                # A process needs time to start, which is that of no part.
                allowed = min(end - time.monotonic(), shares[left[0]] + grace + max(0.0, starting))
                starting = 0.0
                started = time.monotonic()
                line = _next(lines, allowed)
                if line is None:
                    took = time.monotonic() - started
                    ended = worker.poll() is not None
                    why = f"its process ended with {worker.returncode}" if ended else f"took more than {took:.0f} s"
                    found[left.pop(0)] = {"skipped_because": why}
                    break
                entry = json.loads(line)
                left.remove(entry["part"])
                found[entry.pop("part")] = entry
            worker.kill()
            worker.wait()
            reader.join()
    return found | {part: {"skipped_because": f"no time was left of {total:.0f} s"} for part in left}


def _read(worker: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
    for line in worker.stdout or ():
        if line.startswith(_LINE):
            lines.put(line[len(_LINE) :])
        else:
            print(line, end="", file=sys.stderr)
    worker.wait()
    lines.put(None)


def _next(lines: queue.Queue[str | None], limit: float) -> str | None:
    try:
        return lines.get(timeout=max(0.0, limit))
    except queue.Empty:
        return None


def show(found: dict[str, dict[str, Any]]) -> None:
    """Print what each part found."""
    for part, entry in found.items():
        if "skipped_because" in entry:
            print(f"\n{part}: skipped, {entry['skipped_because']}")
            continue
        skipped = f"; skipped for want of time: {', '.join(entry['skipped'])}" if entry["skipped"] else ""
        failed = f"; failed: {entry['failed']}" if "failed" in entry else ""
        print(f"\n{part}: {entry['seconds']:.1f} s{skipped}{failed}")
        result = entry.get("result", {})
        for cases in (result.get("differences"), result.get("cases"), result.get("cells")):
            if cases:
                names = [name for name in cases[0] if not isinstance(cases[0][name], (list, dict))]
                print_table(names, [[_cell(case.get(name)) for name in names] for case in cases])


def _cell(value: object) -> str:
    return f"{value:.5g}" if isinstance(value, float) else "" if value is None else str(value)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="of torch [default: cuda]")
    parser.add_argument("--seconds", type=float, default=_TOTAL, help=f"for everything [default: {_TOTAL}]")
    parser.add_argument("--small", action="store_true", help="a small checkpoint: checks the script, on a CPU too")
    parser.add_argument("--output", help="also write the JSON here")
    parser.add_argument("--worker", nargs="+", metavar="PART", help=argparse.SUPPRESS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args()
    shares = {part: share * options.seconds / _TOTAL for part, share in SHARES.items()}
    if options.worker:
        work_through(Context(Path(options.work), options.device, options.small, shares), options.worker)
        return
    import torch

    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit("no CUDA device is available to torch; --device cpu --small checks the script on a CPU")
    machine = environment()
    print(json.dumps(machine), flush=True)
    with tempfile.TemporaryDirectory() as work:

        def command(parts: list[str]) -> list[str]:
            given = ["--device", options.device, "--seconds", str(options.seconds), "--work", work]
            return [sys.executable, __file__, *given, *(["--small"] if options.small else []), "--worker", *parts]

        found = supervise(command, shares, options.seconds)
    show(found)
    summary = json.dumps({"environment": machine, "parts": found})
    if options.output:
        Path(options.output).write_text(summary + "\n")
    print(summary)
    if any("failed" in entry for entry in found.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
