"""Long documents: nDCG@10 of windows of several sizes beside truncation, and what each costs.

Caveats first. The order is that of `mini`, the bundled demonstration checkpoint, unless `--model` is given: it was
trained on passages of up to 256 tokens, and another model may gain from other windows. The first stage is BM25 over
the whole documents, so a document that BM25 does not find is lost to every line. Every line reads the same candidates.
Seconds are processor seconds, which other processes on the machine hardly change; candidates are encoded ahead, each
once, and a query prefills what no query before it did. "bytes" are those of the encoder states.

`--whole` joins the passages of a BEIR folder whose ids are DOCUMENT#NUMBER to whole documents, in their order, with the
title once; a document is as relevant as the most relevant of its passages.

    python benchmarks/windows.py [--whole BEIR_FOLDER] [--corpus BEIR_FOLDER] [--queries N] [--depth N]
        [--windows 256 512 1024] [--truncate 1024] [--model MODEL] [--small] [--output FILE]
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from report import environment, print_table, spent_on

from kalm_rag import KaLMReranker, PassageCache
from kalm_rag.demo_data import load_demo
from kalm_rag.evaluation import Candidates, Metrics, bm25_candidates
from kalm_rag.evaluation.metrics import difference_interval, means, p_value
from kalm_rag.retrieval.corpus import Corpus, read_beir

METRIC = "nDCG@10"


def whole_documents(folder: Path) -> Corpus:
    """The passages of a BEIR folder joined to documents by what precedes the last `#` of their ids."""
    found = read_beir(folder)
    titles: dict[str, str] = {}
    parts: dict[str, list[str]] = {}
    for line in (folder / "corpus.jsonl").read_text("utf-8").splitlines():
        record = json.loads(line)
        name = record["_id"].rpartition("#")[0]
        titles.setdefault(name, record.get("title", ""))
        parts.setdefault(name, []).append(record["text"])
    qrels: dict[str, dict[str, int]] = {}
    for query, judged in found.qrels.items():
        of_query = qrels.setdefault(query, {})
        for passage, value in judged.items():
            name = passage.rpartition("#")[0]
            of_query[name] = max(value, of_query.get(name, 0))
    documents = {name: "\n\n".join([titles[name], *texts]).strip() for name, texts in parts.items()}
    return Corpus(documents, found.queries, qrels)


def sampled(corpus: Corpus, queries: int) -> Corpus:
    """The collection with so many of its judged queries, at random: neighbours ask about one document."""
    names = [name for name in corpus.qrels if name in corpus.queries]
    chosen = random.Random(0).sample(names, min(queries, len(names)))
    return Corpus(corpus.passages, corpus.queries, {name: corpus.qrels[name] for name in chosen})


def systems(truncate: list[int], windows: list[int]) -> Iterator[tuple[str, dict[str, Any]]]:
    """What is compared: a name, and options of the reranker."""
    for tokens in truncate:
        yield f"truncate {tokens}", {"max_length": tokens}
    for tokens in windows:
        yield f"windows {tokens}", {"max_length": tokens, "long_passages": "windows"}


def measure(model: str, corpus: Corpus, candidates: Candidates, options: dict[str, Any]) -> dict[str, Any]:
    """Rerank all queries; the ranking, and what it took."""
    texts = list(dict.fromkeys(corpus.passages[name] for found in candidates.rankings.values() for name, _ in found))
    cache = PassageCache(None, memory=16_000_000_000)
    rankings = {}
    with KaLMReranker(model, device="cpu", dtype="float32", cache=cache, score_memory=0, **options) as reranker:
        reranker.load()
        encoding = spent_on(lambda: reranker.encode(texts)).cpu
        size = cache.stats().memory.size

        def rank() -> None:
            for query, ranking in candidates.rankings.items():
                hits = reranker.rank(corpus.queries[query], [corpus.passages[name] for name, _ in ranking])
                rankings[query] = [(ranking[hit.index][0], hit.margin) for hit in hits]

        ranking = spent_on(rank).cpu
        truncated = reranker.truncations.count
        tokens = sum(reranker.estimate(texts).tokens)
    return {
        "rankings": rankings,
        "documents": len(texts),
        "encoded": cache.stats().encoded,
        "tokens": tokens,
        "bytes": size.bytes,
        "encode_seconds": encoding,
        "rank_seconds": ranking / max(1, len(rankings)),
        "truncations": truncated,
    }


def compare(name: str, corpus: Corpus, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure every system on one collection; the first is what the others are compared with."""
    metrics = Metrics([METRIC])
    candidates = bm25_candidates(sampled(corpus, options.queries), options.depth)
    base = metrics.per_query(candidates.rankings, candidates.qrels)[METRIC]
    zero = dict.fromkeys(base, 0.0)
    found: list[dict[str, Any]] = [
        {"collection": name, "system": "BM25", "queries": len(base), "mean": statistics.mean(base.values())}
        | {"interval": difference_interval(base, zero)}
    ]
    first: dict[str, float] = {}
    for system, arguments in systems(options.truncate, options.windows):
        result = measure(options.model, corpus, candidates, arguments)
        values = metrics.per_query(result.pop("rankings"), candidates.qrels)
        own = values[METRIC]
        first = first or own
        result |= {"collection": name, "system": system, "queries": len(own), "mean": means(values)[METRIC]}
        result |= {
            "interval": difference_interval(own, zero),
            "gain": means(values)[METRIC] - statistics.mean(first.values()),
        }
        result |= {"gain_interval": difference_interval(own, first), "p": p_value(own, first)}
        found.append(result)
        print(json.dumps(result), flush=True)
    return found


def show(results: list[dict[str, Any]]) -> None:
    """Print one table of all collections."""
    header = ["collection", "system", METRIC, "95 %", "gain", "95 %", "p", "encoded", "MB", "encode s", "ms a query"]
    rows = []
    for item in results:
        row = [item["collection"], item["system"], f"{item['mean']:.3f}", "{:.3f}-{:.3f}".format(*item["interval"])]
        if "gain" in item:
            row += [f"{item['gain']:+.3f}", "{:+.3f} to {:+.3f}".format(*item["gain_interval"]), f"{item['p']:.3f}"]
            row += [str(item["encoded"]), f"{item['bytes'] / 1e6:.1f}", f"{item['encode_seconds']:.1f}"]
            row += [f"{1000 * item['rank_seconds']:.0f}"]
        rows.append(row + [""] * (len(header) - len(row)))
    print_table(header, rows)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--whole", action="append", default=[], help="a BEIR folder to join; may be given several times"
    )
    parser.add_argument(
        "--corpus", action="append", default=[], help="a BEIR folder as it is; may be given several times"
    )
    parser.add_argument("--queries", type=int, default=100, help="judged queries of each collection, at random")
    parser.add_argument("--depth", type=int, default=20, help="documents that BM25 finds for a query")
    parser.add_argument("--windows", type=int, nargs="*", default=[256, 512, 1024], help="tokens of a window")
    parser.add_argument("--truncate", type=int, nargs="+", default=[1024], help="tokens of a truncated document")
    parser.add_argument("--model", default="mini")
    parser.add_argument("--small", action="store_true", help="few queries and short windows: checks the script")
    parser.add_argument("--output", help="also write the JSON here")
    options = parser.parse_args()
    collections = {f"{Path(name).name}, whole": whole_documents(Path(name)) for name in options.whole}
    collections |= {Path(name).name: read_beir(Path(name)) for name in options.corpus}
    if not collections:
        collections = {"python_faq": load_demo()}
    if options.small:
        options.queries, options.depth, options.windows, options.truncate = 3, 4, [48], [48]
    machine = environment()
    print(json.dumps(machine))
    results = [item for name, corpus in collections.items() for item in compare(name, corpus, options)]
    show(results)
    summary = json.dumps({"environment": machine, "model": options.model, "depth": options.depth, "results": results})
    if options.output:
        Path(options.output).write_text(summary + "\n", "utf-8")
    print(summary)


if __name__ == "__main__":
    main()
