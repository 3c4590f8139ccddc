"""What tuning gains: nDCG@10 before and after, by how many judged queries train, in BEIR folders.

python benchmarks/tuning.py COLLECTION ... --train 50,200,800 --test 200 --by queries,passages

With `--by passages`, no test query shares a relevant passage with one that trains. `--other COLLECTION` measures every
result on a collection that it was not tuned for. `--full` trains all decoder weights too, beside the adapter, with the
same loop and the same lists. Without collections it runs on the bundled one, to try it out.

Peak memory is that of the process during one tuning, encoding and measuring included (Linux only).
"""

from __future__ import annotations

import argparse
import json
import math
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from full_training import tune_fully
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
    parser.add_argument("--full", action="store_true", help="train all decoder weights too")
    parser.add_argument("--full-rate", type=float, default=5.0e-4, help="highest learning rate of that")
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
    kinds = [Kind("adapter", recipe, tune, lambda system, out: replace(system, lora=str(out)))]
    if arguments.full:
        whole = replace(recipe, rate=arguments.full_rate)
        kinds.append(Kind("full", whole, tune_fully, lambda system, out: replace(system, model=str(out))))
    rows, facts = [], []
    with tempfile.TemporaryDirectory() as folder:
        cache = arguments.cache or str(Path(folder) / "cache")
        others = [(Path(other).name, read_beir(other)) for other in arguments.other]
        for name, corpus in _collections(arguments.collections):
            for by in arguments.by.split(","):
                for size, kind in ((size, kind) for size in sizes for kind in kinds):
                    out = Path(folder) / f"{name}-{by}-{size}-{kind.name}"
                    _forget_peak()
                    began = time.perf_counter()
                    found = _tuned(corpus, size, arguments.test, by, kind, arguments.model, out, cache)
                    fact: dict[str, Any] = {"collection": name, "by": by, "train": size, "trained": kind.name}
                    fact["seconds_in_all"], fact["peak_bytes"] = time.perf_counter() - began, _peak()
                    fact["epoch_seconds"] = _epoch_seconds(found, kind.recipe)
                    fact["other"] = {}
                    rows += [_row(fact, size, one, found) for one in found.comparisons]
                    for other, other_corpus in others if found.folder else []:
                        compared = _compared(other_corpus, arguments.test, arguments.model, kind, out, cache)
                        fact["other"][other] = [one.as_json() for one in compared]
                        on_other = {**fact, "collection": other, "by": f"tuned for {name}"}
                        rows += [_row(on_other, size, one, found) for one in compared]
                    facts.append({**fact, **found.as_json()})
    heading = ["collection", "held out by", "train", "trained", "ratio", "BM25", "before", "after", "change"]
    heading += ["95 % interval", "p", "verdict", "training s", "epoch s", "steps", "peak MB"]
    print_table(heading, rows)
    result = {"environment": environment(), "recipes": {one.name: asdict(one.recipe) for one in kinds}, "runs": facts}
    print(json.dumps(result))
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(result, indent=1) + "\n", "utf-8")


@dataclass(frozen=True)
class Kind:
    """What is trained.

    Attributes:
        name: for the table.
        recipe: how.
        tune: trains it.
        after: makes the system to measure from that before and the folder of the result.
    """

    name: str
    recipe: Recipe
    tune: Callable[..., Tuned]
    after: Callable[[System, Path], System]


def _collections(folders: list[str]) -> list[tuple[str, Corpus]]:
    if not folders:
        return [("demo", load_demo())]
    return [(Path(folder).name, read_beir(folder)) for folder in folders]


def _tuned(corpus: Corpus, size: int, test: int, by: str, kind: Kind, model: str, out: Path, cache: str) -> Tuned:
    """Tune on some queries, and measure on others that are the same for every size."""
    recipe = kind.recipe
    judged = {query: values for query, values in corpus.qrels.items() if any(value > 0 for value in values.values())}
    whole = replace(recipe, test=min(0.9, test / len(judged)))
    parts = split_queries(judged, whole, by_passages=by == "passages")
    rest = [*parts.train, *parts.validation]
    random.Random(recipe.seed).shuffle(rest)
    chosen = {query: judged[query] for query in (*parts.test, *rest[:size])}
    return kind.tune(
        Corpus(corpus.passages, corpus.queries, chosen),
        out,
        model=model,
        cache=cache,
        recipe=recipe,
        by_passages=by == "passages",
        held_out=parts.test,
    )


def _compared(corpus: Corpus, most: int, model: str, kind: Kind, out: Path, cache: str) -> list[Comparison]:
    """Measure a result on a collection that it was not tuned for."""
    candidates, system = bm25_candidates(corpus, kind.recipe.depth, most), System(model, 4)
    experiment = Experiment(corpus, candidates, [system], Metrics([METRIC]), cache=cache, lengths=0)
    return compare(experiment, [kind.after(system, out)])


def _epoch_seconds(found: Tuned, recipe: Recipe) -> float | None:
    """Seconds that one pass over the training queries took, measurements included."""
    steps = math.ceil(found.queries[0] / recipe.lists_per_step)
    return found.seconds / found.steps * steps if found.steps else None


def _forget_peak() -> None:
    """Let the peak of this process's memory begin at what it has now."""
    path = Path("/proc/self/clear_refs")
    if path.exists():
        path.write_text("5")


def _peak() -> int | None:
    """Peak of this process's memory in bytes; None where the system does not tell."""
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), None)


def _row(fact: dict[str, Any], size: int, one: Comparison, found: Tuned) -> list[str]:
    numbers = [f"{one.first:.3f}", f"{one.before:.3f}", f"{one.after:.3f}", f"{one.difference:+.3f}"]
    interval = f"{one.low:+.3f} to {one.high:+.3f}"
    epoch, peak = fact["epoch_seconds"], fact["peak_bytes"]
    ends = [f"{one.p:.3f}", one.verdict, f"{found.seconds:.0f}", "" if epoch is None else f"{epoch:.0f}"]
    ends += [str(found.steps), "" if peak is None else f"{peak / 1e6:.0f}"]
    return [fact["collection"], fact["by"], str(size), fact["trained"], str(one.ratio), *numbers, interval, *ends]


if __name__ == "__main__":
    main()
