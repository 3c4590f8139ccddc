"""Whether budgets of time hold, what they cost in quality, and what a small call waits beside large ones.

A stream of queries, drawn by a Zipf law, asks for what BM25 finds in a collection, with a pause between queries in
which passages that a query left out are encoded in the background. "cold" begins with nothing encoded, "half" with
every other passage. Each budget begins with a cache of its own, in memory. Scores are not remembered. Under "within" a
query counts that ended within its budget, under "+ step" one that ended within it plus the longest step that cannot be
divided: one passage in one pass of the model. nDCG@10 is of the whole list, unscored passages in the first stage's
order behind the scored ones; "scored" is the share of candidates that have a score.

The second table ranks a few known passages alone, and again while two threads encode a corpus, without and with a
budget, which makes the call go first and is large enough to score everything.

Times are those of the clock; the machine may be shared.

    python benchmarks/latency.py [--corpus BEIR_FOLDER] [--model MODEL] [--queries N] [--budgets 50 100 200 500]
        [--pause MS] [--small] [--output FILE]
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from report import environment, percentiles, print_table

from kalm_rag import KaLMReranker
from kalm_rag.demo_data import load_demo
from kalm_rag.evaluation import Metrics
from kalm_rag.retrieval.bm25 import BM25
from kalm_rag.retrieval.corpus import Corpus, read_beir


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", default=None, help="a BEIR folder; by default the bundled one")
    parser.add_argument("--model", default="mini")
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--queries", type=int, default=300)
    parser.add_argument("--depth", type=int, default=50)
    parser.add_argument("--zipf", type=float, default=0.8)
    parser.add_argument("--budgets", type=float, nargs="*", default=[50, 100, 200, 500], help="milliseconds")
    parser.add_argument("--pause", type=float, default=100.0, help="milliseconds between queries")
    parser.add_argument("--small-calls", type=int, default=100, help="calls of the second table")
    parser.add_argument("--small", action="store_true", help="try it out")
    parser.add_argument("--output", default=None, help="write everything to this file as JSON")
    options = parser.parse_args()
    if options.small:
        options.queries, options.depth, options.budgets, options.pause, options.small_calls = 4, 6, [100.0], 1.0, 3
    corpus = load_demo() if options.corpus is None else read_beir(Path(options.corpus))
    asked = stream(corpus, options.queries, options.depth, options.zipf)
    runs = [
        replay(corpus, asked, budget, start, options)
        for start in ("cold", "half")
        for budget in (None, *options.budgets)
    ]
    print_table(
        ["budget ms", "start", "p50 ms", "p95", "p99", "max", "within", "+ step", "step ms", "nDCG@10", "scored"],
        [row(one) for one in runs],
    )
    beside = small_calls(corpus, asked, options)
    print_table(
        ["small call of 8 known passages", "p50 ms", "p95", "p99", "max"],
        [[name, *(f"{found[key]:.1f}" for key in ("p50", "p95", "p99", "max"))] for name, found in beside.items()],
    )
    chosen = {name: getattr(options, name) for name in ("corpus", "model", "queries", "depth", "zipf", "pause")}
    result = {"environment": environment(), "options": chosen, "results": runs, "small_calls": beside}
    print(json.dumps(result))
    if options.output:
        Path(options.output).write_text(json.dumps(result, indent=1) + "\n", "utf-8")


def stream(corpus: Corpus, count: int, depth: int, zipf: float) -> list[tuple[str, list[str]]]:
    """Draw queries, and return each one's id and the ids of its candidates, best first."""
    import numpy as np

    generator = np.random.default_rng(0)
    judged = [query for query in corpus.qrels if query in corpus.queries]
    ids = [judged[place] for place in generator.permutation(len(judged))]
    weights = np.arange(1, len(ids) + 1) ** -zipf
    index = BM25(corpus.passages)
    drawn = [ids[place] for place in generator.choice(len(ids), size=count, p=weights / weights.sum())]
    found = {query: [name for name, _ in index.search(corpus.queries[query], depth)] for query in dict.fromkeys(drawn)}
    return [(query, found[query]) for query in drawn if found[query]]  # a query may share no word with any passage


def replay(
    corpus: Corpus, asked: Sequence[tuple[str, list[str]]], budget: float | None, start: str, options: Any
) -> dict[str, Any]:
    """Ask every query within a budget."""
    names = list(dict.fromkeys(name for _, candidates in asked for name in candidates))
    seconds, rankings, qrels, scored = [], {}, {}, []
    with KaLMReranker(options.model, dtype=options.dtype, cache=None, score_memory=0, show_progress=False) as reranker:
        reranker.load()
        if start == "half":
            reranker.encode([corpus.passages[name] for name in names[::2]])
        longest = max(reranker.estimate([corpus.passages[name] for name in names]).tokens)
        for place, (query, candidates) in enumerate(asked):
            texts = [corpus.passages[name] for name in candidates]
            began = time.perf_counter()
            hits = reranker.rank(corpus.queries[query], texts, budget_ms=budget, show_progress=False)
            seconds.append(time.perf_counter() - began)
            scored.append(sum(hit.scored for hit in hits) / len(hits))
            key = f"{query} {place}"
            rankings[key] = [(candidates[hit.index], float(-rank)) for rank, hit in enumerate(hits)]
            qrels[key] = corpus.qrels[query]
            time.sleep(options.pause / 1000)
        costs, prefix = (
            reranker.scorer.turns.costs,
            len(reranker.scorer.passage_kv.prefix(reranker.settings.instruction)),
        )
        groups = -(-longest // reranker.settings.ratio)
        step = 1000 * max(costs.predict({"encode": longest}), costs.predict({"prefill": prefix + groups}))
        stats = reranker.stats().background
    metric = Metrics(["nDCG@10"]).per_query(rankings, qrels)
    values = list(metric["nDCG@10"].values())
    limit = math.inf if budget is None else budget
    times = [1000 * value for value in seconds]
    return {
        "budget_ms": budget,
        "start": start,
        **percentiles(times),
        "within": sum(value <= limit for value in times) / len(times),
        "within_step": sum(value <= limit + step for value in times) / len(times),
        "step_ms": step,
        "ndcg": sum(values) / len(values),
        "scored": sum(scored) / len(scored),
        "background": {"encoded": stats.encoded, "dropped": stats.dropped, "abandoned": stats.abandoned},
    }


def small_calls(corpus: Corpus, asked: Sequence[tuple[str, list[str]]], options: Any) -> dict[str, dict[str, float]]:
    """Time a small call alone, and beside two threads that encode."""
    query, candidates = asked[0]
    texts = [corpus.passages[name] for name in candidates[:8]]
    found: dict[str, dict[str, float]] = {}
    with KaLMReranker(options.model, dtype=options.dtype, cache=None, score_memory=0, show_progress=False) as reranker:
        reranker.load()

        def timed(**limits: Any) -> dict[str, float]:
            times = []
            for _ in range(options.small_calls):
                began = time.perf_counter()
                hits = reranker.rank(corpus.queries[query], texts, show_progress=False, **limits)
                times.append(1000 * (time.perf_counter() - began))
                if not all(hit.scored for hit in hits):
                    msg = "a small call was not scored whole: its budget was too small for this machine"
                    raise SystemExit(msg)
            return percentiles(times)

        reranker.rank(corpus.queries[query], texts)
        found["alone"] = timed()
        stop = threading.Event()

        def bulk(number: int) -> None:
            for turn in itertools.count():
                passages = [f"{number} {turn} {text}" for text in corpus.passages.values()]
                for start in range(0, len(passages), 64):
                    if stop.is_set():
                        return
                    reranker.encode(passages[start : start + 64])

        threads = [threading.Thread(target=bulk, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        found["beside two bulk calls"] = timed()
        found["the same, with a budget"] = timed(budget_ms=60_000)
        stop.set()
        for thread in threads:
            thread.join()
    return found


def row(one: dict[str, Any]) -> list[str]:
    """One line of the first table."""
    budget = "none" if one["budget_ms"] is None else f"{one['budget_ms']:.0f}"
    times = [f"{one[key]:.0f}" for key in ("p50", "p95", "p99", "max")]
    shares = ["" if one["budget_ms"] is None else f"{one[key]:.1%}" for key in ("within", "within_step")]
    return [
        budget,
        one["start"],
        *times,
        *shares,
        f"{one['step_ms']:.0f}",
        f"{one['ndcg']:.4f}",
        f"{one['scored']:.1%}",
    ]


if __name__ == "__main__":
    main()
