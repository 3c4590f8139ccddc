"""Which sentence of a passage carried its score: how often the best sentence by itself is the one with the answer.

Caveats first. The collection is one of sentences, whose judgements name the sentence that answers a question; so many
neighbours make a passage, and a choice by chance is right one time in so many. Neighbours are of one text, and each
answers another question. BM25 weighs words by the whole collection, and is given the same sentences. The order is that
of `mini`, the bundled demonstration checkpoint, unless `--model` is given. Without `--corpus`, the bundled
collection stands in, whose "sentences" are whole answers of a FAQ: that only checks the script.

    python benchmarks/highlight.py [--corpus BEIR_FOLDER] [--qrels FILE] [--queries N] [--sentences N] [--model MODEL]
        [--small] [--output FILE]
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from report import environment, print_table, spent_on

from kalm_rag import KaLMReranker
from kalm_rag.demo_data import load_demo
from kalm_rag.evaluation.metrics import difference_interval, p_value
from kalm_rag.retrieval.bm25 import BM25
from kalm_rag.retrieval.corpus import Corpus, read_beir


def choices(corpus: Corpus, queries: int, sentences: int) -> dict[str, tuple[str, list[str]]]:
    """A query's answering sentence and the passage that holds it, as ids in their order, by the query's id."""
    names = list(corpus.passages)
    places = {name: place for place, name in enumerate(names)}
    judged = {
        query: [name for name, value in found.items() if value > 0 and name in places]
        for query, found in corpus.qrels.items()
        if query in corpus.queries
    }
    single = {query: found[0] for query, found in judged.items() if len(found) == 1}
    chosen = random.Random(0).sample(list(single), min(queries, len(single)))
    passages = {}
    for query in chosen:
        start = places[single[query]] // sentences * sentences
        passages[query] = single[query], names[start : start + sentences]
    return passages


def right(corpus: Corpus, passages: Mapping[str, tuple[str, list[str]]], model: str) -> tuple[dict[str, Any], float]:
    """Whether each way chose the answering sentence, by way and query; and processor seconds of the model's choices."""
    index = BM25(corpus.passages)
    found: dict[str, dict[str, float]] = {"BM25": {}, "model": {}, "both": {}}
    with KaLMReranker(model, device="cpu", dtype="float32", cache=None, show_progress=False) as reranker:
        reranker.load()

        def choose() -> None:
            for query, (answer, names) in passages.items():
                text = corpus.queries[query]
                order = [name for name, _ in index.search(text, len(corpus.passages)) if name in names]
                order += [name for name in names if name not in order]
                ranked = [names[hit.index] for hit in reranker.rank(text, [corpus.passages[name] for name in names])]
                both = min(names, key=lambda name: (order.index(name) + ranked.index(name), ranked.index(name)))
                picks = {"BM25": order[0], "model": ranked[0], "both": both}
                for way, name in picks.items():
                    found[way][query] = float(name == answer)

        seconds = spent_on(choose).cpu
    return found, seconds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", help="a BEIR folder of sentences in the order of their texts")
    parser.add_argument("--qrels", help="its judgements, default the folder's")
    parser.add_argument("--queries", type=int, default=500, help="judged queries, at random")
    parser.add_argument("--sentences", type=int, default=5, help="sentences of a passage")
    parser.add_argument("--model", default="mini")
    parser.add_argument("--small", action="store_true", help="few queries: checks the script")
    parser.add_argument("--output", help="also write the JSON here")
    options = parser.parse_args()
    corpus = read_beir(Path(options.corpus), qrels=options.qrels) if options.corpus else load_demo()
    passages = choices(corpus, 4 if options.small else options.queries, options.sentences)
    found, seconds = right(corpus, passages, options.model)
    base = found["BM25"]
    zero = dict.fromkeys(base, 0.0)
    results = []
    for way, own in found.items():
        result = {"choice": way, "queries": len(own), "right": sum(own.values()) / len(own)}
        result |= {"interval": difference_interval(own, zero), "gain_interval": difference_interval(own, base)}
        results.append(result | {"p": p_value(own, base)})
    rows = [
        [
            str(item["choice"]),
            f"{item['right']:.3f}",
            "{:.3f}-{:.3f}".format(*item["interval"]),
            "{:+.3f} to {:+.3f}".format(*item["gain_interval"]),
            f"{item['p']:.4f}",
        ]
        for item in results
    ]
    print_table(["choice of a sentence", "right", "95 %", "against BM25", "p"], rows)
    summary = json.dumps(
        {"environment": environment(), "model": options.model, "sentences": options.sentences}
        | {"seconds": seconds, "results": results}
    )
    if options.output:
        Path(options.output).write_text(summary + "\n", "utf-8")
    print(summary)


if __name__ == "__main__":
    main()
