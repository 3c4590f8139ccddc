"""What a repeated list costs, and what remembering scores adds to a list that is new.

Two rerankers take turns, one that remembers scores and one with `score_memory=0`, on passages that are prefilled. The
cost of remembering is also timed by itself: key, look-up and storing of pairs whose score was not known.

    python benchmarks/repeats.py [--model mini] [--passages 8 32] [--rounds N] [--small] [--output FILE]
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from report import environment, percentiles, print_table


def milliseconds(call: Any) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - start)


def measure(pair: dict[str, Any], texts: list[str], rounds: int) -> dict[str, Any]:
    """Milliseconds of a list that is new, with and without remembering, and of one that is repeated."""
    samples: dict[str, list[float]] = {"new, not remembered": [], "new, remembered": [], "repeated": [], "overhead": []}
    cache = pair["on"].scorer.score_cache
    for reranker in pair.values():
        reranker.rank("the first query prefills", texts)
    for number in range(rounds):
        query = f"how do I sort a list of pairs, question {number} of {len(texts)}"
        order = ("off", "on") if number % 2 else ("on", "off")
        took = {name: milliseconds(lambda: pair[name].rank(query, texts)) for name in order}  # noqa: B023
        samples["new, not remembered"].append(took["off"])
        samples["new, remembered"].append(took["on"])
        samples["repeated"].append(milliseconds(lambda: pair["on"].rank(query, texts)))  # noqa: B023
        ids = [[*pair["on"].scorer.prompts.prompt(query).ids, -1]] * len(texts)  # a prompt that nobody asked

        def remember() -> None:
            keys = cache.keys(ids, texts, 4)  # noqa: B023
            assert not any(cache.get_many(keys))
            cache.put_many(dict.fromkeys(keys, (0.5, False)))

        samples["overhead"].append(milliseconds(remember))
    size = cache.stats().size
    return {"passages": len(texts), "bytes_per_pair": size.bytes / size.entries, "samples_ms": samples}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--passages", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--small", action="store_true", help="few rounds: checks the script")
    parser.add_argument("--output", type=Path, help="write JSON here too")
    options = parser.parse_args()
    if options.small:
        options.passages, options.rounds = [3], 2
    from kalm_rag import KaLMReranker
    from kalm_rag.demo_data import load_demo

    texts = list(load_demo().passages.values())
    results = []
    for count in options.passages:
        pair = {
            name: KaLMReranker(options.model, device="cpu", cache=None, **memory).load()
            for name, memory in (("on", {}), ("off", {"score_memory": 0}))
        }
        results.append(measure(pair, texts[:count], options.rounds))
    rows = []
    for result in results:
        for name, samples in result["samples_ms"].items():
            p = percentiles(samples)
            each = 1000 * p["p50"] / result["passages"]
            rows.append([str(result["passages"]), name, f"{p['p50']:.3f}", f"{min(samples):.3f}", f"{each:.1f}"])
    found = {"environment": environment(), "results": results}
    print(found["environment"])
    print_table(["passages", "list", "p50 ms", "min ms", "p50 us a pair"], rows)
    for result in results:
        print(f"{result['bytes_per_pair']:.0f} bytes a pair in lists of {result['passages']}")
    if options.output:
        options.output.write_text(json.dumps(found))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
