"""What each precision does to scores and order, against float32, on real text.

Caveats first: of the two models the bundled one, `mini`, is trained; the other has random weights in the geometry of
KaLM-Reranker-V1-Nano, and scores that are spread by design. A candidate list is what BM25 finds for a real question.
Rank correlation is Spearman's over one list; the lowest of all lists is a list of nearly equal scores.

    python benchmarks/precision.py [--model MODEL] [--corpus FOLDER] [--tokenizer FILE] [--small] [--output FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from report import can_run, environment, print_table

KINDS: dict[str, dict[str, Any]] = {
    "float32": {},
    "float32, 8-bit prefilled": {"prefill_storage": "int8"},
    "bfloat16": {"dtype": "bfloat16"},
    "bfloat16, 8-bit prefilled": {"dtype": "bfloat16", "prefill_storage": "int8"},
    "int8 weights": {"dtype": "int8"},
    "int8 weights, 8-bit prefilled": {"dtype": "int8", "prefill_storage": "int8"},
}


RANDOM = "random weights"


def candidate_lists(corpus: str | None, queries: int, depth: int) -> dict[str, list[str]]:
    """Passages that BM25 finds, by question."""
    from kalm_rag.demo_data import load_demo
    from kalm_rag.retrieval.bm25 import BM25
    from kalm_rag.retrieval.corpus import read_beir

    data = read_beir(corpus) if corpus else load_demo()
    index = BM25(data.passages)
    chosen = list(data.queries.values())[:queries]
    found = {query: [data.passages[name] for name, _ in index.search(query, depth)] for query in chosen}
    return {query: texts for query, texts in found.items() if len(texts) > 2}


def measure(model: Any, lists: dict[str, list[str]]) -> dict[str, dict[str, float]]:
    """Changes of the probability and of the order, by precision."""
    from scipy.stats import spearmanr

    from kalm_rag import KaLMReranker

    results: dict[str, dict[str, float]] = {}
    exact: dict[str, list[float]] = {}
    kinds = {kind: options for kind, options in KINDS.items() if can_run(options.get("dtype", "float32"))}
    for kind, arguments in kinds.items():
        with KaLMReranker(
            model, device="cpu", cache=None, **{"dtype": "float32", "score_memory": 0, **arguments}
        ) as reranker:
            found = {query: reranker.predict([(query, text) for text in texts]) for query, texts in lists.items()}
        exact = exact or found
        change = [abs(a - b) for query in lists for a, b in zip(found[query], exact[query], strict=True)]
        order = [float(spearmanr(found[query], exact[query]).statistic) for query in lists]
        results[kind] = {
            "largest": max(change),
            "mean": statistics.mean(change),
            "lowest_correlation": min(order),
            "mean_correlation": statistics.mean(order),
        }
    return results


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a trained model alone [default: mini, and random weights]")
    parser.add_argument("--corpus", help="BEIR folder [default: the demo's corpus]")
    parser.add_argument(
        "--tokenizer", help="a tokenizer.json for the random model, for lengths at true vocabulary size"
    )
    parser.add_argument("--small", action="store_true", help="small checkpoint: checks the script in seconds")
    parser.add_argument("--output", help="also write the JSON here")
    options = parser.parse_args()
    import torch

    from kalm_rag.testing import NANO, TINY, build_checkpoint

    lists = candidate_lists(options.corpus, *((2, 6) if options.small else (20, 20)))
    results: dict[str, dict[str, dict[str, float]]] = {}
    counts: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in [options.model] if options.model else ["mini", RANDOM]:
            model = name
            if name == RANDOM:
                model = build_checkpoint(
                    Path(folder) / "model",
                    geometry=TINY if options.small else NANO,
                    tokenizer_file=options.tokenizer,
                    dtype=torch.bfloat16,
                )
            # A model of that size needs ten times as long for a passage.
            some = dict(list(lists.items())[:4]) if name == RANDOM else lists
            counts[name] = f"{len(some)} questions, {sum(map(len, some.values()))} passages"
            results[name] = measure(model, some)
    for name, found in results.items():
        print(f"\n{name}: {counts[name]}; change of the probability")
        rows = [[kind, *(f"{value:.4f}" for value in result.values())] for kind, result in found.items()]
        print_table(["precision", "largest", "mean", "lowest rank corr.", "mean"], rows)
    summary = json.dumps(
        {
            "environment": environment(),
            "corpus": Path(options.corpus).name if options.corpus else "demo",
            "lists": counts,
            "results": results,
        }
    )
    if options.output:
        Path(options.output).write_text(summary + "\n")
    print(summary)


if __name__ == "__main__":
    main()
