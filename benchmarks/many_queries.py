"""What one call of `rank_many` costs against a call of `rank` per query, by what is known of the passages.

Both take turns on the same weights in one process. Scores are not remembered. Without --model, random weights in the
geometry of KaLM-Reranker-V1-Nano are made, whose scores mean nothing. With one thread, processor seconds are counted,
which other processes on the machine hardly change; otherwise, or on a GPU, seconds on the clock. Below a ratio of 1,
`rank_many` takes less.

    python benchmarks/many_queries.py [--model mini] [--queries 4] [--passages 50] [--small] [--output FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from report import counted, environment, print_table, spent_on

STATES = {
    "unknown": "encoded and prefilled for the call",
    "states known": "prefilled for the call",
    "states known, no memory": "prefilled for the call, and not kept (prefill_memory=1)",
    "states known, full prompts": "never prefilled (prefill_memory=0)",
    "prefilled": "in memory",
}
"""What is known of the passages when the first query comes."""


def measure(rerankers: dict[str, Any], queries: list[str], texts: list[str], rounds: int) -> list[dict[str, Any]]:
    """Seconds of both ways for each state, round by round."""
    kind = counted(str(rerankers["prefilled"].scorer.loaded.device.type))
    found = [{"state": state, "apart": [], "together": [], "difference": 0.0} for state in STATES]
    for reranker in rerankers.values():  # what is known is encoded, and what runs once has run
        reranker.rank_many(queries, texts)
    for number in range(rounds):
        for item in found:
            reranker, margins = rerankers.get(str(item["state"]), rerankers["prefilled"]), []
            for way in ("apart", "together") if number % 2 else ("together", "apart"):
                if item["state"] == "unknown":
                    reranker.forget(texts)
                elif item["state"] != "prefilled":
                    reranker.scorer.passage_kv.cached.memory.clear()
                rankings: list[Any] = []
                if way == "apart":
                    spent = spent_on(lambda: rankings.extend(reranker.rank(query, texts) for query in queries))  # noqa: B023
                else:
                    spent = spent_on(lambda: rankings.extend(reranker.rank_many(queries, texts)))  # noqa: B023
                item[way].append(getattr(spent, kind))
                margins.append([hit.margin for hits in rankings for hit in sorted(hits, key=lambda hit: hit.index)])
            item["difference"] = max(item["difference"], *(abs(a - b) for a, b in zip(*margins, strict=True)))
    for item in found:
        item["ratio_of_minima"] = min(item["together"]) / min(item["apart"])
        ratios = [one / other for one, other in zip(item["together"], item["apart"], strict=True)]
        item["median_of_ratios"] = statistics.median(ratios)
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint; default: random weights in Nano's geometry")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--queries", type=int, default=4)
    parser.add_argument("--passages", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="a quick run on tiny work")
    parser.add_argument("--output", type=Path, help="write JSON here too")
    options = parser.parse_args()
    if options.small:
        options.queries, options.passages, options.rounds = 2, 3, 1
    from kalm_rag import KaLMReranker, PassageCache
    from kalm_rag.demo_data import load_demo
    from kalm_rag.testing import NANO, TINY, build_checkpoint

    machine, corpus = environment(), load_demo()
    print(json.dumps(machine))
    texts = list(corpus.passages.values())[: options.passages]
    queries = list(corpus.queries.values())[: options.queries]
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or build_checkpoint(folder, geometry=TINY if options.small else NANO)
        given = {"device": options.device, "dtype": options.dtype, "cache": PassageCache(None), "score_memory": 0}
        memory = {"prefilled": 8_000_000_000, "states known, no memory": 1, "states known, full prompts": 0}
        rerankers = {state: KaLMReranker(model, prefill_memory=size, **given).load() for state, size in memory.items()}
        results = measure(rerankers, queries, texts, options.rounds)
        tokens = statistics.mean(rerankers["prefilled"].estimate(texts).tokens)
    print(f"{len(queries)} queries over {len(texts)} passages of {tokens:.0f} tokens on average, {options.dtype}")
    rows = [
        [
            f"{item['state']} ({STATES[item['state']]})",
            *(f"{min(item[way]):.3f}" for way in ("apart", "together")),
            f"{item['ratio_of_minima']:.2f}",
            f"{item['median_of_ratios']:.2f}",
            f"{item['difference']:.0e}",
        ]
        for item in results
    ]
    print_table(["passages", "rank s", "rank_many s", "ratio of minima", "median of ratios", "margins differ"], rows)
    text = json.dumps({"environment": machine, "dtype": options.dtype, "tokens": tokens, "results": results})
    if options.output:
        options.output.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
