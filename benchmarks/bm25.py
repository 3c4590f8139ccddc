"""How well the first stage of the demo and of evaluations finds: nDCG@10 and recall@100 of BM25, per collection.

"stop words" is the language whose stop words were left out: what `--language auto` came to, or the one given.

    python benchmarks/bm25.py [BEIR_FOLDER ...] [--language auto none de ...] [--fold-accents] [--queries N]
        [--output FILE]

Without a folder it reads the bundled corpus.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from report import environment, print_table

from kalm_rag.demo_data import load_demo
from kalm_rag.evaluation.candidates import judged_queries
from kalm_rag.evaluation.metrics import Metrics, means
from kalm_rag.retrieval.bm25 import BM25
from kalm_rag.retrieval.corpus import Corpus, read_beir

METRICS = ("nDCG@10", "R@100")


def measure(corpus: Corpus, queries: int, language: str, *, fold_accents: bool) -> dict[str, Any]:
    """The figures of one collection: its first `queries` judged queries."""
    qrels, _ = judged_queries(corpus, queries)
    index = BM25(corpus.passages, language=language, fold_accents=fold_accents)
    rankings = {query: index.search(corpus.queries[query], 100) for query in qrels}
    figures = means(Metrics(METRICS).per_query(rankings, qrels))
    return {"queries": len(qrels), "passages": len(corpus.passages), "stop_words": index.language, **figures}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="*", help="collections in BEIR layout [default: the demo's]")
    parser.add_argument("--language", nargs="+", default=["auto"], help="whose stop words [default: auto]")
    parser.add_argument("--fold-accents", action="store_true", help="read letters without their accents")
    parser.add_argument("--queries", type=int, default=1500, help="the first so many judged queries [default: 1500]")
    parser.add_argument("--small", action="store_true", help="few queries: checks the script")
    parser.add_argument("--output", type=Path, help="write JSON here too")
    options = parser.parse_args()
    queries = 5 if options.small else options.queries
    results = []
    for folder in options.folders or [None]:
        corpus = load_demo() if folder is None else read_beir(folder)
        name = "Python FAQ" if folder is None else "/".join(folder.resolve().parts[-2:])
        for language in options.language:
            found = measure(corpus, queries, language, fold_accents=options.fold_accents)
            results.append({"collection": name, "language": language, **found})
    rows = [
        [
            *(str(item[key]) for key in ("collection", "queries", "passages", "stop_words")),
            *(f"{item[metric]:.4f}" for metric in METRICS),
        ]
        for item in results
    ]
    print_table(["collection", "queries", "passages", "stop words", *METRICS], rows)
    content = {"environment": environment(), "fold_accents": options.fold_accents, "results": results}
    if options.output:
        options.output.write_text(json.dumps(content))
    print(json.dumps(content))


if __name__ == "__main__":
    main()
