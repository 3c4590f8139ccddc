"""How well thresholds hold: chosen on one half of the queries, checked on the other half and on other collections.

python benchmarks/thresholds.py COLLECTION ... --queries 200 --depth 20 --aims recall=0.95,precision=0.5,f1

COLLECTION is a BEIR folder. Of a share of the queries (`--unanswerable`) the relevant passages are taken out of the
corpus, so that nothing answers them. Without collections it runs on the bundled one, to try it out.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from pathlib import Path
from typing import Any

from report import environment, print_table

from kalm_rag.demo_data import load_demo
from kalm_rag.evaluation import Experiment, Metrics, System, bm25_candidates, evaluate
from kalm_rag.evaluation.threshold_report import Calibrated, calibrate_system, figure_text
from kalm_rag.retrieval.corpus import Corpus, read_beir
from kalm_rag.thresholds import Aim, Figures


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("collections", nargs="*", help="BEIR folders")
    parser.add_argument("--model", default="mini")
    parser.add_argument("--ratio", type=int, default=4)
    parser.add_argument("--queries", type=int, default=200, help="judged queries of each collection")
    parser.add_argument("--depth", type=int, default=20, help="candidates of each query")
    parser.add_argument("--unanswerable", type=float, default=0.2, help="share of queries whose answers are removed")
    parser.add_argument("--aims", default="recall=0.95,precision=0.5,f1")
    parser.add_argument("--work", default=None, help="folder that keeps finished queries, to resume")
    parser.add_argument("--small", action="store_true", help="try it out in half a minute")
    parser.add_argument("--output", default=None, help="write everything to this file as JSON")
    arguments = parser.parse_args()
    if arguments.small:
        arguments.queries, arguments.depth = 12, 5
    aims = [Aim.parse(aim) for aim in arguments.aims.split(",")]
    found: dict[str, dict[Aim, Calibrated]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, corpus in _collections(arguments.collections):
            work = Path(arguments.work or folder) / name
            found[name] = _calibrated(_without_answers(corpus, arguments), work, aims, arguments)
    heading = ["collection", "aim", "P(yes)", "margin", "half", "precision", "recall", "kept", "answerable empty"]
    rows = [row for name, by_aim in found.items() for aim, one in by_aim.items() for row in _rows(name, aim, one)]
    print_table([*heading, "unanswerable empty"], rows)
    copied = _copied(found)
    print_table(
        ["threshold of", "aim", "used on", "precision", "recall", "recall of its own"],
        [[*row[:3], *(figure_text(figure) for figure in row[3:])] for row in copied],
    )
    studies = {name: next(iter(by_aim.values())).study for name, by_aim in found.items()}
    print_table(
        ["distance of scores from the share relevant", "P(yes)", "calibrated"],
        [[name, f"{study.raw.error:.3f}", f"{study.calibrated.error:.3f}"] for name, study in studies.items()],
    )
    result = {
        "environment": environment(),
        "options": {name: getattr(arguments, name) for name in ("model", "ratio", "queries", "depth", "unanswerable")},
        "collections": {name: _as_json(by_aim) for name, by_aim in found.items()},
        "copied": [list(row) for row in copied],
    }
    print(json.dumps(result))
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(result, indent=1) + "\n", "utf-8")


def _collections(folders: list[str]) -> list[tuple[str, Corpus]]:
    if not folders:
        return [("demo", load_demo())]
    return [(Path(folder).name, read_beir(folder)) for folder in folders]


def _without_answers(corpus: Corpus, arguments: argparse.Namespace) -> Corpus:
    """Draw queries, and take the relevant passages of a share of them out of the corpus."""
    judged = sorted(query for query, values in corpus.qrels.items() if query in corpus.queries and any(values.values()))
    random.Random(0).shuffle(judged)
    drawn = judged[: arguments.queries]
    unanswerable = drawn[: round(arguments.unanswerable * len(drawn))]
    removed = {name for query in unanswerable for name, value in corpus.qrels[query].items() if value > 0}
    passages = {name: text for name, text in corpus.passages.items() if name not in removed}
    return Corpus(passages, corpus.queries, {query: corpus.qrels[query] for query in drawn})


def _calibrated(corpus: Corpus, work: Path, aims: list[Aim], arguments: argparse.Namespace) -> dict[Aim, Calibrated]:
    candidates = bm25_candidates(corpus, arguments.depth, unanswered=True)
    systems = [System(arguments.model, arguments.ratio)]
    experiment = Experiment(
        corpus, candidates, systems, Metrics(["nDCG@10"]), out=work, cache=work / "cache", lengths=0
    )
    (result,), (encoding,) = evaluate(experiment)
    return {aim: calibrate_system(experiment, result, encoding.digest, aim) for aim in aims}


def _rows(name: str, aim: Aim, one: Calibrated) -> list[list[str]]:
    if one.profile is None:
        return [[name, str(aim), one.failure.split(": the ")[1].split("; aim")[0], *[""] * 7]]
    halves: list[tuple[str, Figures]] = [("chosen", one.profile.chosen), ("checked", one.profile.checked)]
    return [
        [
            name,
            str(aim),
            f"{one.profile.score:.4g}",
            f"{one.profile.margin:.2f}",
            f"{half}, {figures.queries} ({figures.unanswered})",
            *(
                figure_text(figure)
                for figure in (figures.precision, figures.recall, figures.kept, figures.emptied, figures.abstained)
            ),
        ]
        for half, figures in halves
    ]


def _as_json(by_aim: dict[Aim, Calibrated]) -> dict[str, Any]:
    """Return plain values; what aims share is there once."""
    study = next(iter(by_aim.values())).study.as_json()
    parts = {str(aim): one.as_json() for aim, one in by_aim.items()}
    return {**study, "aims": {aim: {name: one[name] for name in ("profile", "failure")} for aim, one in parts.items()}}


def _copied(found: dict[str, dict[Aim, Calibrated]]) -> list[tuple[Any, ...]]:
    """Use each collection's threshold on the checking half of every other."""
    rows = []
    for name, by_aim in found.items():
        for aim, one in by_aim.items():
            if one.profile is None:
                continue
            for other, others in found.items():
                if other != name and (own := others[aim].profile) is not None:
                    (figures,) = others[aim].study.checking.figures([one.profile.margin])
                    rows.append((name, str(aim), other, figures.precision, figures.recall, own.checked.recall))
    return rows


if __name__ == "__main__":
    main()
