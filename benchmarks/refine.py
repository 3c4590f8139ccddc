"""What two passes (`refine=True`) save where only encoder states are cached, and whether the best stay the same.

Caveats first: order and shares are those of `mini`, the bundled demonstration checkpoint, on what BM25 finds for real
questions; another model may need the exact pass for more. The seconds of the second table are those of random weights
in the geometry of KaLM-Reranker-V1-Nano, where scores mean nothing: its columns add the measured first pass to the
measured exact pass over a share of the candidates. All passages are encoded beforehand, and no query finds a prefilled
one. Seconds are processor seconds, which other processes on the machine hardly change.

    python benchmarks/refine.py [--corpus BEIR_FOLDER ...] [--only quality|time] [--small] [--output FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from precision import candidate_lists
from report import environment, print_table

TOP = (5, 10)
SHARES = (0.1, 0.25, 0.4)
"""Of the candidates, that take the exact pass."""
PREFIX, NEW = 53, 15
"""Tokens of the default instruction's prefix under the tokenizer of KaLM-Reranker-V1-Nano, and of a short query."""


def seconds(action: Callable[[], object]) -> float:
    """Processor seconds of one call, all threads together: other processes do not count."""
    start = time.process_time()
    action()
    return time.process_time() - start


def quality(name: str, lists: dict[str, list[str]], top: tuple[int, ...]) -> list[dict[str, Any]]:
    """Compare two passes with one for each `top_k`, query by query in turns."""
    from kalm_rag import KaLMReranker, PassageCache

    options: dict[str, Any] = {"cache": PassageCache(None), "device": "cpu", "dtype": "float32", "score_memory": 0}
    plain = KaLMReranker("mini", **options)
    refining = {count: KaLMReranker("mini", refine=True, **options) for count in top}
    plain.encode(text for texts in lists.values() for text in texts)
    for reranker in refining.values():  # the reference is made once per instruction and store
        reranker.scorer.passage_kv.references.get(reranker.scorer.passage_kv.prefix(reranker.settings.instruction), 4)
    found = {count: {"collection": name, "top_k": count, "queries": 0, "changed": 0} for count in top}
    for result in found.values():
        result |= {"largest_difference": 0.0, "inexact": 0, "plain": 0.0, "two_passes": 0.0, "ratios": []}
    for query, texts in lists.items():
        rankings: list[Any] = []
        plain.scorer.passage_kv.cached.memory.clear()
        once = seconds(lambda: rankings.append(plain.rank(query, texts)))  # noqa: B023
        for count, reranker in refining.items():
            reranker.scorer.passage_kv.cached.memory.clear()
            both = seconds(lambda: rankings.append(reranker.rank(query, texts, top_k=count)))  # noqa: B023
            expected, ours = rankings[0][:count], rankings[-1]
            result = found[count]
            result["queries"] += 1
            result["changed"] += [hit.index for hit in expected] != [hit.index for hit in ours]
            result["inexact"] += sum(not hit.exact for hit in ours)
            differences = [abs(a.margin - b.margin) for a, b in zip(expected, ours, strict=True)]
            result["largest_difference"] = max(result["largest_difference"], *differences)
            result["plain"] += once
            result["two_passes"] += both
            result["ratios"].append(both / once)
    for count, reranker in refining.items():
        stats, result = reranker.prefill_stats(), found[count]
        assert stats is not None
        counters = stats.counters
        result["exact"] = 1 - counters.skipped / max(1, counters.approximated)
        result["sampled"], result["bound_failures"] = counters.sampled, counters.bound_failures
        result["bound"] = stats.error_bound
        result["saved"] = 1 - statistics.median(result["ratios"])
    return list(found.values())


def times(folder: Path, dtype: str, count: int, repeats: int, *, small: bool) -> dict[str, Any]:
    """Seconds of each part from states of 300 tokens at ratio 4, in turns; the least of several.

    No time depends on what the states are, so they are random and the encoder does not run.
    """
    import torch

    from kalm_rag import KaLMReranker
    from kalm_rag.model.compact import DIRECTIONS, Reference
    from kalm_rag.model.first_pass import AssumedKV
    from kalm_rag.model.pooling import PassageStates
    from kalm_rag.model.prefill import PrefilledPair
    from kalm_rag.model.prefiller import PromptPrefix
    from kalm_rag.model.prompts import Prompt
    from kalm_rag.passage_kv import BehindPrefix

    reranker = KaLMReranker(folder, device="cpu", dtype=dtype, cache=None, refine=True, prefill_memory=8_000_000_000)
    scorer, source = reranker.scorer, reranker.scorer.passage_kv
    prefix, (layers, heads, width) = PromptPrefix(tuple(range(300, 300 + PREFIX))), source.decoder.shape
    request = BehindPrefix(prefix, 4)
    numbers = torch.randn(1 + DIRECTIONS, 2, layers, heads, len(prefix), width).to(scorer.loaded.prefill_dtype)
    reference = Reference(numbers, "")
    size = scorer.loaded.model.config.decoder.hidden_size
    states = {
        f"passage {number}": PassageStates(torch.randn(75, size).to(scorer.loaded.dtype), 300, 4, False)
        for number in range(count)
    }
    prompt = Prompt([*prefix.ids, *range(400, 400 + NEW)], truncated=False)

    def exact(texts: list[str]) -> None:
        for passages in source.in_groups(texts, request, states):
            source.decoder.margins(prefix, [PrefilledPair(prompt, passages[text]) for text in passages])

    def first() -> None:
        pairs = [PrefilledPair(prompt, AssumedKV(passage, len(prefix))) for passage in states.values()]
        source.decoder.margins(prefix, pairs, reference)

    def cold(share: float) -> float:
        source.cached.memory.clear()
        return seconds(lambda: exact(list(states)[: max(1, round(share * count))]))

    result: dict[str, Any] = {"dtype": dtype, "passages": count, "prefix": PREFIX, "new": NEW}
    for _ in range(repeats):
        found = {"plain": cold(1.0), "hot": seconds(lambda: exact(list(states))), "first": seconds(first)}
        for share in () if small else SHARES:
            found[f"{share:.0%}"] = found["first"] + cold(share)
        for name, took in found.items():
            result[name] = min(took, result.get(name, took))
    return result


def show(title: str, results: list[dict[str, Any]], columns: dict[str, tuple[str, str]]) -> None:
    """Print results as a table; a column has a heading and a format."""
    print(f"\n{title}")
    rows = [[format(item[name], kind) for name, (_, kind) in columns.items()] for item in results]
    print_table([heading for heading, _ in columns.values()], rows)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", action="append", default=[], help="a BEIR folder; may be given several times")
    parser.add_argument("--only", choices=["quality", "time"], help="one of the two tables")
    parser.add_argument("--small", action="store_true", help="few queries and a small checkpoint: checks the script")
    parser.add_argument("--output", help="also write the JSON here")
    options = parser.parse_args()
    machine = environment()
    print(json.dumps(machine))
    queries, depth = (2, 50) if options.small else (24, 50)
    kept: list[dict[str, Any]] = []
    prices: list[dict[str, Any]] = []
    if options.only != "time":
        for folder in (None, *options.corpus):
            name = "demo" if folder is None else Path(folder).name
            kept += quality(name, candidate_lists(folder, queries, depth), (5,) if options.small else TOP)
            print(f"{name}: {sum(item['changed'] for item in kept)} changed orders so far", flush=True)
        columns = {"collection": ("set", ""), "top_k": ("k", ""), "changed": ("changed", "")}
        columns |= {"largest_difference": ("differ", ".0e"), "exact": ("exact", ".0%"), "sampled": ("sample", "")}
        columns |= {"bound_failures": ("failed", ""), "bound": ("bound", ".2f"), "plain": ("plain", ".1f")}
        columns |= {"two_passes": ("two", ".1f"), "saved": ("saved", ".0%")}
        show("mini: order, and processor seconds of all queries", kept, columns)
    if options.only != "quality":
        import torch

        from kalm_rag.testing import NANO, TINY, build_checkpoint

        with tempfile.TemporaryDirectory() as name:
            folder = build_checkpoint(name, geometry=TINY if options.small else NANO, dtype=torch.bfloat16)
            for dtype in ["float32"] if options.small else ["float32", "bfloat16"]:
                prices.append(
                    times(folder, dtype, 6 if options.small else 50, 1 if options.small else 3, small=options.small)
                )
                print(json.dumps(prices[-1]), flush=True)
        shares = [] if options.small else [f"{share:.0%}" for share in SHARES]
        columns = {"dtype": ("dtype", ""), "passages": ("passages", "")}
        columns |= {name: (name, ".2f") for name in ("hot", "plain", "first", *shares)}
        title = "random weights: processor seconds of one query; of two passes, by the share that takes the exact one"
        show(title, prices, columns)
    summary = json.dumps({"environment": machine, "quality": kept, "times": prices})
    if options.output:
        Path(options.output).write_text(summary + "\n")
    print(summary)


if __name__ == "__main__":
    main()
