"""The evaluation: its scores are the reranker's, it goes on after an interruption, and what it writes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from evalkit import CORPUS, files, run_file

from kalm_rag import KaLMReranker
from kalm_rag.evaluation import (
    Experiment,
    Metrics,
    System,
    bm25_candidates,
    evaluate,
)
from kalm_rag.evaluation.experiment import data_digests
from kalm_rag.evaluation.summary import summarise
from kalm_rag.model.checkpoint import find_checkpoint
from kalm_rag.model.identity import identify
from kalm_rag.retrieval.corpus import Corpus


@pytest.fixture
def experiment(checkpoint: Path, tmp_path: Path) -> Experiment:
    systems = [System(str(checkpoint), ratio) for ratio in (2, 4)]
    metrics = Metrics(["nDCG@10", "MAP"])
    return Experiment(CORPUS, bm25_candidates(CORPUS, 3), systems, metrics, tmp_path / "out", None, lengths=0)


def test_scores_are_the_rerankers_and_every_passage_is_encoded_once(experiment: Experiment, checkpoint: Path) -> None:
    task = "Find the sentence."
    experiment.systems = [*experiment.systems, System(str(checkpoint), 4, instruction=task)]
    results, (encoding,) = evaluate(experiment)
    assert encoding.new == encoding.passages == len({n for r in experiment.candidates.rankings.values() for n, _ in r})
    for result in results:
        reranker = KaLMReranker(checkpoint, cache=None)
        for query, ranking in experiment.candidates.rankings.items():
            names = [name for name, _ in ranking]
            hits = reranker.rank(
                CORPUS.queries[query],
                [CORPUS.passages[name] for name in names],
                ratio=result.system.ratio,
                instruction=result.system.instruction,
            )
            assert [name for name, _ in result.rankings[query]] == [names[hit.index] for hit in hits]
            assert [s for _, s in result.rankings[query]] == pytest.approx([hit.margin for hit in hits], abs=1e-4)
    assert results[1].rankings != results[2].rankings


def test_an_interrupted_run_goes_on_and_ends_alike(experiment: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = evaluate(replace(experiment, out=None))
    rank = KaLMReranker.rank
    asked: list[str] = []

    def interrupted(self: KaLMReranker, query: str, *args: Any, **options: Any) -> Any:
        asked.append(query)
        if len(asked) == 5:
            raise KeyboardInterrupt
        return rank(self, query, *args, **options)

    monkeypatch.setattr(KaLMReranker, "rank", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(experiment)
    assert experiment.out is not None
    journals = sorted((experiment.out / "systems").glob("*.jsonl"))
    assert len(journals) == 2
    # The process ended in the middle of a line.
    with max(journals, key=lambda path: path.stat().st_mtime_ns).open("a") as file:
        file.write('{"query": "q2", "rank')
    asked[:] = ["five so far"] * 5
    resumed, _ = evaluate(experiment)
    assert len(asked) - 5 == 2 * 3 - 4
    for one, other in zip(resumed, whole, strict=True):
        assert one.rankings.keys() == other.rankings.keys()
        assert one.means == other.means


def test_a_folder_of_another_evaluation_is_refused_before_anything_is_loaded(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate(experiment)
    monkeypatch.setattr(KaLMReranker, "load", lambda self: pytest.fail("loaded"))
    other = Corpus({**CORPUS.passages, "p1": "changed"}, CORPUS.queries, CORPUS.qrels)
    with pytest.raises(ValueError, match=r"holds an evaluation of other queries or candidates .*give another folder"):
        evaluate(replace(experiment, corpus=other))
    with pytest.raises(ValueError, match=r"results of another evaluation \(it differs in max_length\); give another"):
        evaluate(replace(experiment, max_length=64))
    assert experiment.out is not None
    journal = next((experiment.out / "systems").glob("*-r2-*.jsonl"))
    journal.write_text(journal.read_text().replace('"ranking"', '"order"', 1))
    with pytest.raises(ValueError, match=r"cannot read .*-r2-.*jsonl \(KeyError.*delete it to start this system again"):
        evaluate(experiment)


def test_two_processes_do_not_share_a_folder(experiment: Experiment) -> None:
    from filelock import FileLock

    assert experiment.out is not None
    experiment.out.mkdir()
    with FileLock(experiment.out / ".lock"), pytest.raises(ValueError, match="another process is evaluating into"):
        evaluate(experiment)


def test_an_empty_instruction_is_not_the_default_one(experiment: Experiment, checkpoint: Path) -> None:
    experiment.systems = [System(str(checkpoint), 4), System(str(checkpoint), 4, instruction="")]
    one, other = evaluate(experiment)[0]
    assert one.system.slug != other.system.slug
    assert one.rankings != other.rankings


def test_labels_tell_systems_apart(experiment: Experiment, checkpoint: Path, tmp_path: Path) -> None:
    twin = tmp_path / "other" / checkpoint.name
    twin.parent.mkdir()
    twin.symlink_to(checkpoint)
    long = "Find the passage that answers the question in the"
    experiment.systems = [
        System(str(checkpoint)),
        System(str(twin)),
        *(System(str(checkpoint), instruction=f"{long} {end}") for end in ("north", "south")),
    ]
    summary = summarise(experiment, *evaluate(experiment))
    assert len(set(summary.labels().values())) == 4
    assert len({row[0] for row in summary.columns()[1]}) == 3 * 4 + 2  # each with two fusions


def test_cut_queries_and_shallow_candidates_are_told(experiment: Experiment) -> None:
    experiment.corpus.queries["q2"] = "cars " * 600
    try:
        experiment.metrics = Metrics(["nDCG@10", "R@100"])
        warnings = summarise(experiment, *evaluate(experiment)).warnings
    finally:
        experiment.corpus.queries["q2"] = "what do cars need"
    assert any("1 queries are longer than the model reads" in warning for warning in warnings)
    assert any("R@100 looks deeper than the" in warning for warning in warnings)


def test_summary_holds_first_stage_best_order_and_movements(experiment: Experiment) -> None:
    summary = summarise(experiment, *evaluate(experiment))
    assert summary.best["nDCG@10"] >= max(summary.first["nDCG@10"], *(r.means["nDCG@10"] for r in summary.results))
    assert json.loads(json.dumps(summary.as_json()))["systems"][0]["ratio"] == 2
    heading, rows = summary.columns()
    assert {len(row) for row in rows} == {len(heading)}


def test_results_say_when_where_and_with_what_they_were_made(
    experiment: Experiment, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The precision is the one that computes: a CPU without bfloat16 instructions multiplies in float32."""
    monkeypatch.setattr("kalm_rag.model.cpu_kernels.has_fast_bfloat16", lambda: False)
    experiment.systems = [System(str(checkpoint), 4, "bfloat16")]
    summary = summarise(experiment, *evaluate(experiment))
    found = json.loads(json.dumps(summary.as_json()))
    (encoding,) = found["encoding"]
    assert (encoding["dtype"], encoding["precision"]) == ("bfloat16", "bfloat16 weights, float32 products")
    assert encoding["device"] in ("cpu", "cuda", "mps")
    assert encoding["digest"].startswith(identify(find_checkpoint(checkpoint)).short)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", found["date"])
    assert {"cpu", "features", "threads", "torch_cpu"} <= found["machine"].keys()
    assert {"python", "torch", "transformers"} <= found["versions"].keys()
    shown = dict(summary.provenance())
    assert found["date"][:10] in shown["date"]
    assert found["data"]["passages"] == shown["passages, SHA-256"]
    assert f"torch {found['versions']['torch']}" in shown["versions"]


def test_digests_change_with_what_they_are_of(experiment: Experiment) -> None:
    before = data_digests(experiment)
    assert data_digests(experiment) == before
    corpus = Corpus({**CORPUS.passages, "p9": "more"}, CORPUS.queries, CORPUS.qrels)
    after = data_digests(replace(experiment, corpus=corpus))
    assert {name for name in before if before[name] != after[name]} == {"passages"}
    qrels = {**CORPUS.qrels, "q1": {"p1": 1}}
    after = data_digests(replace(experiment, corpus=Corpus(CORPUS.passages, CORPUS.queries, qrels)))
    assert {name for name in before if before[name] != after[name]} == {"judgements"}


def test_rankings_of_an_earlier_start_are_counted(experiment: Experiment) -> None:
    first = summarise(experiment, *evaluate(experiment))
    assert [result.kept for result in first.results] == [0, 0]
    second = summarise(experiment, *evaluate(experiment))
    assert [result.kept for result in second.results] == [3, 3]
    assert any(warning.startswith("6 of 6 rankings were kept from an earlier start") for warning in second.warnings)
    assert not any("earlier start" in warning for warning in first.warnings)


def _eval(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "kalm_rag", "eval", *arguments], capture_output=True, text=True)


def test_the_command_writes_table_runs_plots_and_a_page_of_its_own(checkpoint: Path, tmp_path: Path) -> None:
    folder = files(
        tmp_path / "set[b]<i>",
        "".join(json.dumps({"_id": k, "text": v}) + "\n" for k, v in CORPUS.passages.items()),
        '{"_id": "q1", "text": "where do apples grow for $5 or $6_{"}\n{"_id": "q2", "text": "trees"}\n',
        "query-id\tcorpus-id\tscore\nq1\tp1\t1\nq2\tp3\t1\n",
    )
    run = run_file(tmp_path / "a$x_{$b.trec", "q1 Q0 p2 1 3 t\nq1 Q0 p1 2 2 t\nq2 Q0 p4 1 3 t\nq2 Q0 p3 2 1 t\n")
    out = tmp_path / "out[/b]"
    options = ["--model", str(checkpoint), "--ratio", "2,4", "--run", str(run), "--out", str(out)]
    done = _eval(str(folder), *options)
    assert done.returncode == 0, done.stderr
    results = json.loads((out / "results.json").read_text())
    shown = [line for line in done.stdout.splitlines() if not line.startswith("Report")]
    assert max(map(len, shown)) <= 80
    for system in results["systems"]:
        for value in system["means"].values():
            assert f"{value:.4f}" in done.stdout
    assert "set[b]<i>: 2 queries, candidates of a$x_{$b" in done.stdout
    page = (out / "report.html").read_text()
    assert "set[b]&lt;i&gt;" in page
    assert "<i>" not in page
    assert not re.findall(r"(?:src|href|srcset)=[\"'](?!data:)", page)
    for text in (results["machine"]["cpu"], results["versions"]["torch"], *results["data"].values()):
        assert text in page
    assert results["encoding"][0]["precision"] in page
    images = re.findall(r"data:image/png;base64,[A-Za-z0-9+/=]+", page)
    assert len(images) == len(set(images)) >= 6
    assert {path.name for path in (out / "plots").iterdir()} >= {
        "bytes-dark.png",
        "latency-light.png",
        "ratio-dark.png",
    }
    assert [system["ratio"] for system in results["systems"]] == [2, 4]
    # A tool that knows nothing of this package finds the same figure in the run it wrote.
    import ir_measures

    written = ir_measures.read_trec_run(str(next(iter((out / "runs").glob("*-r4-*.trec")))))
    qrels = [ir_measures.Qrel("q1", "p1", 1), ir_measures.Qrel("q2", "p3", 1)]
    value = ir_measures.calc_aggregate([ir_measures.nDCG @ 10], qrels, written)[ir_measures.nDCG @ 10]
    assert value == pytest.approx(results["systems"][1]["means"]["nDCG@10"])
    # Again with one ratio less: nothing is encoded or ranked, and what belongs to the other ratio goes.
    options[3] = "2"
    again = json.loads(_eval(str(folder), *options, "--json").stdout)
    assert again["encoding"][0]["new"] == 0
    assert again["systems"][0]["milliseconds_median"] == results["systems"][0]["milliseconds_median"]
    assert not list((out / "runs").glob("*-r4-*"))
    assert not (out / "plots" / "ratio-dark.png").exists()


def test_a_relevant_passage_from_far_below_stays_inside_its_plot(experiment: Experiment) -> None:
    from kalm_rag.evaluation.plots import LIGHT, draw_all

    passages = {f"p{number}": f"trees number {number}" for number in range(80)}
    corpus = Corpus(passages, {"q": "trees"}, {"q": {"p70": 1}})
    experiment.corpus, experiment.candidates = corpus, bm25_candidates(corpus, 80)
    summary = summarise(experiment, *evaluate(experiment))
    assert all(image.startswith(b"\x89PNG") for image in draw_all(summary, LIGHT).values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ratio", "2,x"], "--ratio takes whole numbers separated by commas, for example 1,4,32; got '2,x'"),
        (["--depth", "2,x"], "--depth takes whole numbers separated by commas"),
        (["--compare", "run.trec"], "--compare takes NAME=FILE, or NAME=FILE,MS"),
        (["--storage", "int4"], "--storage must be one of"),
        (["--ratio", "0"], "ratio must be at least 1, got 0"),
        (["--metrics", "best"], "unknown metric 'best'"),
        (["--qrels", "x"], "--queries and --qrels belong to a corpus"),
        (["/no/such/folder"], "no file or folder '/no/such/folder'"),
        (["-m", "mini", "-m", "mini"], "systems must differ, but one is named twice"),
    ],
)
def test_wrong_arguments_are_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = _eval(*arguments, "--out", str(tmp_path / "out"))
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()
