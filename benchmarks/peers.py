"""Against joint models on passages of three lengths: where each wins, and from which query on.

Caveats first: all weights are random, so only time is compared, not quality; joint models read at most 512 tokens and
are not charged for tokenising; each runs in the fastest of the runtimes that are installed. A joint model reads every
passage again for every query; kalm-rag reads it once ("cold" includes that) and then runs "warm". "from query" is the
number of queries over the same candidates at which kalm-rag's total becomes the smaller one.

    python benchmarks/peers.py [--small] [--output FILE]
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path

from joint import PEERS, measure_peer, missing, runtime_versions
from report import environment, print_table
from warm import Bench, seconds

_QUERY = 12
"""Tokens of a query, as joint models read it."""

_ONE_OF_EACH = ("TinyBERT-L2 4M", "Ettin 17M", "Qwen3-Reranker 0.6B")
"""A peer of each family, to check the script."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="few short passages: checks the script")
    parser.add_argument("--output", help="also write the JSON here")
    options = parser.parse_args()
    from kalm_rag.demo_data import load_demo

    machine = {**environment(), **runtime_versions()}
    print(json.dumps(machine))
    lengths, count, repeats = ((64,), 4, 2) if options.small else ((150, 304, 500), 32, 3)
    peers = [peer for peer in PEERS if peer.name in _ONE_OF_EACH] if options.small else PEERS
    rows, results, measured = [], [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bench = Bench(folder, list(load_demo().passages.values()), options.small, None)
        for tokens in lengths:
            ours = {}
            for dtype in ("float32", "bfloat16"):
                passages = bench.passages(count, tokens)
                reranker = bench.reranker(dtype)
                queries = bench.queries(reranker.scorer, repeats + 1, 40 if options.small else 15)
                cold = seconds(lambda: reranker.rank(queries[0], passages))  # noqa: B023
                warm = min(seconds(lambda query=query: reranker.rank(query, passages)) for query in queries[1:])  # noqa: B023
                reranker.close()
                ours[dtype] = (cold, warm)
            for peer in peers:
                asked = [(_QUERY, [tokens] * count)] * repeats
                found = measure_peer(peer, asked, folder / peer.name, small=options.small)
                measured.append(found)
                for dtype, (cold, warm) in ours.items():
                    spent = min(sample["wall"] for sample in found["samples"])
                    crossing = math.inf if warm >= spent else max(1, math.ceil((cold - warm) / (spent - warm)))
                    result = {
                        "dtype": dtype,
                        "tokens": tokens,
                        "peer": peer.name,
                        "peer_seconds": spent,
                        "fastest": found["fastest"],
                        "runtimes": found["runtimes"],
                        "cold": cold,
                        "warm": warm,
                    }
                    results.append({**result, "from_query": None if crossing == math.inf else crossing})
                    rows.append(
                        [
                            f"{peer.name}, {found['fastest']} / {dtype}",
                            str(tokens),
                            f"{spent:.3f}",
                            f"{cold:.2f}",
                            f"{warm:.3f}",
                            f"{spent / warm:.1f}x",
                            "never" if crossing == math.inf else str(crossing),
                        ]
                    )
                    print(" ".join(rows[-1]), flush=True)
    print(f"\n{count} passages; seconds per query")
    print_table(["peer / kalm-rag", "tokens", "peer", "cold", "warm", "peer/warm", "from query"], rows)
    for line in missing(measured):
        print(f"did not run: {line}")
    summary = json.dumps({"environment": machine, "results": results})
    if options.output:
        Path(options.output).write_text(summary + "\n")
    print(summary)


if __name__ == "__main__":
    main()
