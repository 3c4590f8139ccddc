"""What tuning gains: nDCG@10 before and after, by how many judged queries train, in BEIR folders.

python benchmarks/tuning.py COLLECTION ... --train 50,200,800 --test 200 --by queries,passages

With `--by passages`, no test query shares a relevant passage with one that trains. `--other COLLECTION` measures every
adapter on a collection that it was not tuned for. Without collections it runs on the bundled one, to try it out.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

from report import environment, print_table

from kalm_rag.demo_data import load_demo
from kalm_rag.evaluation import Experiment, Metrics, System, bm25_candidates
from kalm_rag.retrieval.corpus import Corpus, read_beir
from kalm_rag.tuning import Recipe, Tuned, tune
from kalm_rag.tuning.judgements import split_queries
from kalm_rag.tuning.report import METRIC, Comparison, compare


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("collections", nargs="*", help="BEIR folders")
    parser.add_argument("--model", default="mini")
    parser.add_argument("--train", default="50,200,800", help="queries to train on, the validation queries included")
    parser.add_argument("--test", type=int, default=200, help="queries to measure")
    parser.add_argument("--by", default="queries", help="how they are held out: queries, passages")
    parser.add_argument("--other", action="append", default=[], help="a collection that must not lose")
    parser.add_argument("--epochs", type=int, default=Recipe().epochs)
    parser.add_argument("--rate", type=float, default=Recipe().rate)
    parser.add_argument("--rank", type=int, default=Recipe().rank)
    parser.add_argument("--list-size", type=int, default=Recipe().list_size)
    parser.add_argument("--cache", default=None, help="folder of encoded passages, to run again faster")
    parser.add_argument("--small", action="store_true", help="try it out in half a minute")
    parser.add_argument("--output", default=None, help="write everything to this file as JSON")
    arguments = parser.parse_args()
    if arguments.small:
        arguments.train, arguments.test, arguments.epochs = "12", 4, 1
    recipe = Recipe(
        epochs=arguments.epochs,
        rate=arguments.rate,
        rank=arguments.rank,
        alpha=2 * arguments.rank,
        list_size=arguments.list_size,
    )
    sizes = [int(size) for size in arguments.train.split(",")]
    rows, facts = [], []
    with tempfile.TemporaryDirectory() as folder:
        cache = arguments.cache or str(Path(folder) / "cache")
        for name, corpus in _collections(arguments.collections):
            for by in arguments.by.split(","):
                for size in sizes:
                    out = Path(folder) / f"{name}-{by}-{size}"
                    began = time.perf_counter()
                    found = _tuned(corpus, size, arguments.test, by, recipe, arguments.model, out, cache)
                    seconds = time.perf_counter() - began
                    rows += [_row(name, by, size, one, found) for one in found.comparisons]
                    others = (
                        _others(arguments.other, arguments.test, arguments.model, out, cache) if found.folder else {}
                    )
                    rows += [
                        _row(other, f"tuned for {name}", size, one, found)
                        for other, compared in others.items()
                        for one in compared
                    ]
                    fact = {"collection": name, "by": by, "train": size, "seconds_in_all": seconds, **found.as_json()}
                    fact["other"] = {other: [one.as_json() for one in compared] for other, compared in others.items()}
                    facts.append(fact)
    heading = ["collection", "held out by", "train", "ratio", "BM25", "before", "after", "change", "95 % interval"]
    print_table([*heading, "p", "verdict", "training s", "steps"], rows)
    result = {"environment": environment(), "recipe": asdict(recipe), "runs": facts}
    print(json.dumps(result))
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(result, indent=1) + "\n", "utf-8")


def _collections(folders: list[str]) -> list[tuple[str, Corpus]]:
    if not folders:
        return [("demo", load_demo())]
    return [(Path(folder).name, read_beir(folder)) for folder in folders]


def _tuned(corpus: Corpus, size: int, test: int, by: str, recipe: Recipe, model: str, out: Path, cache: str) -> Tuned:
    """Tune on some queries, and measure on others that are the same for every size."""
    judged = {query: values for query, values in corpus.qrels.items() if any(value > 0 for value in values.values())}
    whole = replace(recipe, test=min(0.9, test / len(judged)))
    parts = split_queries(judged, whole, by_passages=by == "passages")
    rest = [*parts.train, *parts.validation]
    random.Random(recipe.seed).shuffle(rest)
    chosen = {query: judged[query] for query in (*parts.test, *rest[:size])}
    return tune(
        Corpus(corpus.passages, corpus.queries, chosen),
        out,
        model=model,
        cache=cache,
        recipe=recipe,
        by_passages=by == "passages",
        held_out=parts.test,
    )


def _others(folders: list[str], most: int, model: str, lora: Path, cache: str) -> dict[str, list[Comparison]]:
    found = {}
    for folder in folders:
        corpus = read_beir(folder)
        candidates = bm25_candidates(corpus, Recipe().depth, most)
        experiment = Experiment(corpus, candidates, [System(model, 4)], Metrics([METRIC]), cache=cache, lengths=0)
        found[Path(folder).name] = compare(experiment, lora)
    return found


def _row(name: str, by: str, size: int, one: Comparison, found: Tuned) -> list[str]:
    numbers = [f"{one.first:.3f}", f"{one.before:.3f}", f"{one.after:.3f}", f"{one.difference:+.3f}"]
    interval = f"{one.low:+.3f} to {one.high:+.3f}"
    ends = [f"{one.p:.3f}", one.verdict, f"{found.seconds:.0f}", str(found.steps)]
    return [name, by, str(size), str(one.ratio), *numbers, interval, *ends]


if __name__ == "__main__":
    main()
