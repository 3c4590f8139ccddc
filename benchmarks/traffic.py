"""What `kalm-rag warm` promises against what comes: hit ratio expected from the first half of a log, and of the second.

Queries are drawn from a collection by Zipf's law, independently, so that traffic is steady: a log whose topics change
keeps less of what is expected. Each query asks for what BM25 finds best for it. Bytes are those of encoder states of
`--model`, from the tokens of each passage. "in sample" is the share of the first half's requests whose passage is among
those chosen by that same half, which promises too much: a passage asked for once answers its own request.

    python benchmarks/traffic.py [--corpus BEIR_FOLDER] [--queries N] [--candidates N] [--zipf 0.8 1.0 1.2]
        [--model mini] [--output FILE]
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from dataclasses import asdict
from itertools import chain
from pathlib import Path

from replay import make_stream
from report import environment, print_table

from kalm_rag import KaLMReranker
from kalm_rag.retrieval.traffic import plan_warming


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", help="a BEIR folder [default: the demo's corpus]")
    parser.add_argument("--queries", type=int, default=5000, help="how many are drawn [default: 5000]")
    parser.add_argument("--candidates", type=int, default=32, help="passages of a query [default: 32]")
    parser.add_argument("--zipf", type=float, nargs="+", default=[1.0], help="exponents [default: 1]")
    parser.add_argument("--seed", type=int, default=0, help="of the log [default: 0]")
    parser.add_argument("--model", default="mini", help="whose bytes are counted [default: mini]")
    parser.add_argument("--small", action="store_true", help="few queries: checks the script")
    parser.add_argument("--output", type=Path, help="write JSON here too")
    options = parser.parse_args()
    if options.small:
        options.queries, options.candidates = 100, 4
    rows, results = [], []
    sizes: dict[str, int] = {}
    with KaLMReranker(options.model, device="cpu", cache=None) as reranker:
        for exponent in options.zipf:
            stream = make_stream(
                options.corpus, options.queries, depth=options.candidates, zipf=exponent, seed=options.seed
            )
            for text in stream.passages:
                if text not in sizes:
                    sizes[text] = reranker.estimate([text]).states_bytes
            plan = plan_warming(stream.candidates, sizes, sum(sizes.values()))
            facts = {"asked_bytes": plan.asked_bytes, "stream": stream.facts()}
            first = Counter(chain.from_iterable(stream.candidates[: (len(stream.candidates) + 1) // 2]))
            chosen = sorted(first, key=lambda text: (-first[text], sizes[text]))
            for row in plan.table:
                sample = sum(first[text] for text in chosen[: row.passages]) / first.total()
                results.append({"zipf": exponent, "in_sample": sample, **facts, **asdict(row)})
                shares = (sample, row.expected, row.replayed or 0.0)
                rows.append(
                    [
                        f"{exponent:g}",
                        f"{row.bytes / 1e6:.1f}",
                        f"{100 * row.bytes / plan.asked_bytes:.0f} %",
                        str(row.passages),
                        *(f"{100 * share:.1f} %" for share in shares),
                    ]
                )
    print_table(["zipf", "MB", "of what is asked for", "passages", "in sample", "expected", "replayed"], rows)
    content = {"environment": environment(), "results": results}
    if options.output:
        options.output.write_text(json.dumps(content))
    print(json.dumps(content))


if __name__ == "__main__":
    main()
