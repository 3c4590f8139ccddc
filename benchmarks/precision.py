"""What each precision does to scores and order, against float32, on real text.

Caveats first: without --model the weights are random, in the geometry of KaLM-Reranker-V1-Nano, and scores are spread
by design; a trained model's scores move otherwise. Rank correlation is Spearman's, over the candidates of one query,
the lowest of all queries.

    python benchmarks/precision.py [--model MODEL] [--corpus FOLDER] [--tokenizer FILE] [--small] [--output FILE]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from report import environment, print_table

KINDS: dict[str, dict[str, Any]] = {
    "float32": {},
    "float32, 8-bit prefilled": {"prefill_storage": "int8"},
    "bfloat16": {"dtype": "bfloat16"},
    "bfloat16, 8-bit prefilled": {"dtype": "bfloat16", "prefill_storage": "int8"},
    "int8 weights": {"dtype": "int8"},
    "int8 weights, 8-bit prefilled": {"dtype": "int8", "prefill_storage": "int8"},
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a trained model [default: random weights]")
    parser.add_argument("--corpus", help="BEIR folder or JSON lines [default: the demo's corpus]")
    parser.add_argument("--tokenizer", help="a tokenizer.json, for lengths at true vocabulary size")
    parser.add_argument("--small", action="store_true", help="small checkpoint: checks the script in seconds")
    parser.add_argument("--output", help="also write the JSON here")
    options = parser.parse_args()
    import torch
    from scipy.stats import spearmanr

    from kalm_rag import KaLMReranker
    from kalm_rag.corpus import read_passages
    from kalm_rag.demo_data import load_demo
    from kalm_rag.testing import NANO, TINY, build_checkpoint

    demo = load_demo()
    texts = (
        [record.text for record in read_passages(options.corpus)] if options.corpus else list(demo.passages.values())
    )
    passages, queries = texts[: 8 if options.small else 40], list(demo.queries.values())[: 2 if options.small else 6]
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or build_checkpoint(
            Path(folder) / "model",
            geometry=TINY if options.small else NANO,
            tokenizer_file=options.tokenizer,
            dtype=torch.bfloat16,
        )
        exact: dict[str, list[float]] = {}
        for kind, arguments in KINDS.items():
            with KaLMReranker(model, device="cpu", cache=None, **{"dtype": "float32", **arguments}) as reranker:
                found = {query: reranker.predict([(query, text) for text in passages]) for query in queries}
            exact = exact or found
            change = [abs(a - b) for query in queries for a, b in zip(found[query], exact[query], strict=True)]
            order = [float(spearmanr(found[query], exact[query]).statistic) for query in queries]
            results[kind] = {"largest": max(change), "mean": sum(change) / len(change), "correlation": min(order)}
    print(f"{len(passages)} passages, {len(queries)} queries, model: {options.model or 'random weights'}")
    rows = [[kind, *(f"{value:.4f}" for value in result.values())] for kind, result in results.items()]
    print_table(["precision", "largest change", "mean", "lowest rank corr."], rows)
    summary = json.dumps({"environment": environment(), "model": options.model, "results": results})
    if options.output:
        Path(options.output).write_text(summary + "\n")
    print(summary)


if __name__ == "__main__":
    main()
