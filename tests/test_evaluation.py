"""The evaluation: what it measures, what it refuses, that it goes on after an interruption, and what it writes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kalm_rag import KaLMReranker
from kalm_rag.corpus import Corpus, read_beir, read_qrels
from kalm_rag.evaluation import (
    Experiment,
    Metrics,
    System,
    bm25_candidates,
    evaluate,
    read_run,
    run_candidates,
    write_run,
)
from kalm_rag.evaluation.metrics import best_order, means, p_value
from kalm_rag.evaluation.summary import summarise

CORPUS = Corpus(
    {"p1": "apples grow on trees", "p2": "pears are green", "p3": "trees lose leaves", "p4": "cars need fuel"},
    {"q1": "where do apples grow", "q2": "what do cars need", "q3": "green pears"},
    {"q1": {"p1": 2, "p3": 1}, "q2": {"p4": 1}, "q3": {"p2": 1}},
)


@pytest.fixture
def experiment(checkpoint: Path, tmp_path: Path) -> Experiment:
    systems = [System(str(checkpoint), ratio) for ratio in (2, 4)]
    metrics = Metrics(["nDCG@10", "MAP"])
    return Experiment(CORPUS, bm25_candidates(CORPUS, 3), systems, metrics, tmp_path / "out", None, lengths=0)


def test_metrics_are_those_of_the_textbook() -> None:
    qrels = {"a": {"x": 3, "y": 1}, "b": {"z": 1}}
    rankings = {"a": [("y", 0.9), ("w", 0.9), ("x", 0.1)], "b": []}
    found = Metrics(["nDCG@10", "mrr@10", "R@2", "MAP"]).per_query(rankings, qrels)
    ideal = 3 + 1 / 1.584962500721156
    assert found["nDCG@10"]["a"] == pytest.approx((1 + 3 / 2) / ideal)
    assert (found["mrr@10"]["a"], found["R@2"]["a"], found["MAP"]["a"]) == (1.0, 0.5, pytest.approx((1 + 2 / 3) / 2))
    assert all(values["b"] == 0.0 for values in found.values())
    assert Metrics(["nDCG@10"]).per_query(best_order(rankings, qrels), qrels)["nDCG@10"]["a"] == 1.0


def test_randomisation_test_knows_noise_from_a_difference() -> None:
    old = {str(number): (number * 37 % 101) / 101 for number in range(60)}
    assert p_value(old, old) == 1.0
    assert p_value({query: value + 0.1 for query, value in old.items()}, old) < 0.001
    shaken = {query: value + (0.1 if int(query) % 2 else -0.1) for query, value in old.items()}
    assert p_value(shaken, old) > 0.5


def test_one_query_is_no_evidence() -> None:
    assert p_value({"a": 1.0}, {"a": 0.0}) == 1.0


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["MRR@10", "RR@10"], "'MRR@10' and 'RR@10' are the same"),
        (["nDCG@0"], "must be at least 1, got 'nDCG@0'"),
        ([], "at least one metric"),
    ],
)
def test_metrics_that_cannot_be(names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Metrics(names)


def test_bm25_names_only_what_shares_a_word() -> None:
    corpus = Corpus(CORPUS.passages, {**CORPUS.queries, "q2": "zebra"}, CORPUS.qrels)
    found = bm25_candidates(corpus, 50)
    assert found.rankings["q2"] == []
    assert "1 queries have no candidates; they count as 0" in found.warnings
    with pytest.raises(ValueError, match="none of the 1 passages holds one besides stop words"):
        bm25_candidates(Corpus({"a": "the of"}, {"q": "x"}, {"q": {"a": 1}}), 5)


@pytest.mark.parametrize("name", ["", "nDCG@x", "quality", "nDCG("])
def test_unknown_metric(name: str) -> None:
    with pytest.raises(ValueError, match="unknown metric .*use for example nDCG@10"):
        Metrics([name])


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
    with pytest.raises(ValueError, match=r"cannot read .*-r2-.*jsonl \(KeyError.*delete it to start this system anew"):
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
    assert len({row[0] for row in summary.columns()[1]}) == 4 + 2


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


def _corpus(qrels: dict[str, dict[str, int]], queries: dict[str, str] | None = None) -> Corpus:
    return Corpus(CORPUS.passages, queries or CORPUS.queries, qrels)


@pytest.mark.parametrize(
    ("corpus", "message"),
    [
        (_corpus({"q9": {"p1": 1}}), "no query has a relevant passage: of 1 judged queries 1 are not among"),
        (_corpus({"q1": {"p1": 0}}), "1 have no judgement above 0"),
        (_corpus({}), "of 0 judged queries"),
        (_corpus({"q1": {"x": 1}}), "none of the 1 relevant passages is in the corpus .*another corpus"),
    ],
)
def test_judgements_that_fit_nothing(corpus: Corpus, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bm25_candidates(corpus, 3)


def test_judgements_that_fit_in_part_are_counted(tmp_path: Path) -> None:
    qrels = {**CORPUS.qrels, "q8": {"p1": 1}, "q2": {"p4": 0}, "q3": {"p2": 1, "gone": 1}}
    found = bm25_candidates(_corpus(qrels), 3)
    assert list(found.qrels) == ["q1", "q3"]
    assert [re.sub(r" .*", "", warning) for warning in found.warnings] == ["1", "1", "1"]
    assert "not among the queries" in found.warnings[0]
    assert "no relevant passage and are left out" in found.warnings[1]
    assert "count as not found" in found.warnings[2]


def _run_file(path: Path, lines: str) -> Path:
    path.write_text(lines)
    return path


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("q1 Q0 p1 1 high t\n", "line 1: expected the six columns"),
        ("q1 Q0 p1 1 nan t\n", "line 1: expected the six columns"),
        ("q1 p1 1\n", "line 1: expected the six columns"),
        ("q1 Q0 p1 1 2.0 t\nq1 Q0 p1 2 1.0 t\n", "line 2: the passage 'p1' occurs twice"),
        ("\n", "holds no candidates"),
        ("z1 Q0 p1 1 2.0 t\n", "candidates for none of the 3 judged queries .*another collection"),
        ("q1 Q0 z1 1 2.0 t\n", "none of the passages .* is in the corpus: it is a run of another corpus"),
    ],
)
def test_bad_runs(tmp_path: Path, lines: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_candidates(CORPUS, _run_file(tmp_path / "a.trec", lines), 10)


def test_a_run_that_fits_in_part_is_counted(tmp_path: Path) -> None:
    lines = "q1 Q0 p2 1 1.5 t\nq1 Q0 p1 2 2.5 t\nq1 Q0 z 3 9 t\nq2 Q0 p1 1 1 t\n"
    found = run_candidates(CORPUS, _run_file(tmp_path / "first.trec", lines), 10)
    assert found.name == "first"
    assert found.rankings == {"q1": [("p1", 2.5), ("p2", 1.5)], "q2": [("p1", 1.0)], "q3": []}
    assert found.warnings == (
        "1 passages of the run are not in the corpus and are left out",
        "1 queries have no candidates; they count as 0",
        "1 queries have no relevant passage among their candidates; no reranker can help them",
    )
    shallow = run_candidates(CORPUS, tmp_path / "first.trec", 1, most_queries=1)
    assert shallow.rankings == {"q1": [("p1", 2.5)]}


def test_runs_keep_the_order_of_equal_scores(tmp_path: Path) -> None:
    import ir_measures

    names = ["a", "b", "d", "c", "f", "my file.txt", "z"]
    for scores in ([0.5, 0.5, 0.5, 0.0, 0.0, 0.0, -1.0], [9e6] * 7, [0.0] * 7):
        write_run(tmp_path / "r.trec", {"q": list(zip(names, scores, strict=True))}, "t")
        found = read_run(tmp_path / "r.trec")["q"]
        assert [name for name, _ in found] == [*names[:5], "my%20file.txt", "z"]
        # trec_eval orders by score in single precision, and equal ones by name.
        for place, name in enumerate(names[:5], start=1):
            measures = [ir_measures.RR]
            run = ir_measures.read_trec_run(str(tmp_path / "r.trec"))
            value = ir_measures.calc_aggregate(measures, [ir_measures.Qrel("q", name, 1)], run)[ir_measures.RR]
            assert value == pytest.approx(1 / place)


def test_ids_with_spaces_come_back_from_a_run(tmp_path: Path) -> None:
    corpus = Corpus({"a b.txt": "apples", "c%20d": "pears"}, {"q": "apples"}, {"q": {"a b.txt": 1}})
    write_run(tmp_path / "r.trec", {"q": [("a b.txt", 2.0), ("c%20d", 1.0)]}, "t")
    assert [name for name, _ in run_candidates(corpus, tmp_path / "r.trec", 5).rankings["q"]] == ["a b.txt", "c%20d"]


def _files(folder: Path, corpus: str, queries: str, qrels: str) -> Path:
    folder.mkdir()
    for name, text in (("corpus.jsonl", corpus), ("queries.jsonl", queries), ("qrels.tsv", qrels)):
        (folder / name).write_text(text)
    return folder


GOOD = ('{"_id": "1", "text": "a"}\n', '{"_id": "q", "text": "a"}\n', "query-id\tcorpus-id\tscore\nq\t1\t1\n")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c, q, r: (c * 2, q, r), "the id '1' of passage 2 occurs before; ids must be unique"),
        (lambda c, q, r: ("\n", q, r), "holds no passage; there is nothing to evaluate"),
        (lambda c, q, r: (c, "\n", r), "holds no query"),
        (lambda c, q, r: (c, q * 2, r), "the id 'q' of query 2 occurs before"),
        (lambda c, q, r: ('{"text": "a"}\n', q, r), "passage 1 has no id; each needs one under _id"),
        (lambda c, q, r: (c, q, r + "q\t1\t0\n"), "'q' and '1' are judged before, and differently"),
        (lambda c, q, r: (c, q, "q\t1\t4294967296\n"), "integer score within 1000 of 0"),
        (lambda c, q, r: (c, q, "\n"), "qrels.tsv holds no judgement"),
        (lambda c, q, r: (c.replace('"1"', '"1\\t2"'), q, r), "begins or ends with a space or holds a tab"),
    ],
)
def test_bad_collections(tmp_path: Path, change: Callable[..., tuple[str, str, str]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_beir(_files(tmp_path / "set", *change(*GOOD)))


def test_missing_files_are_named(tmp_path: Path) -> None:
    folder = _files(tmp_path / "set", *GOOD)
    (folder / "qrels.tsv").unlink()
    with pytest.raises(FileNotFoundError, match=r"no judgements: looked for .*test\.tsv, .*qrels\.tsv; name a file"):
        read_beir(folder)
    (folder / "queries.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match="no file of queries"):
        read_beir(folder)


def test_trec_judgements_tab_separated_queries_and_a_split(tmp_path: Path) -> None:
    folder = _files(tmp_path / "set", *GOOD)
    (folder / "qrels").mkdir()
    (folder / "qrels" / "dev.tsv").write_text("q\t1\t3\n")
    assert read_beir(folder, split="dev").qrels == {"q": {"1": 3}}
    (tmp_path / "q.tsv").write_text("q\twhat is a\n\nr\tb\n")
    (tmp_path / "t.qrels").write_text("q 0 1 2\nr 0 1 0\n")
    found = read_beir(folder, tmp_path / "q.tsv", tmp_path / "t.qrels")
    assert found.queries == {"q": "what is a", "r": "b"}
    assert found.qrels == read_qrels(tmp_path / "t.qrels") == {"q": {"1": 2}, "r": {"1": 0}}


def _eval(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "kalm_rag", "eval", *arguments], capture_output=True, text=True)


def test_the_command_writes_table_runs_plots_and_a_page_of_its_own(checkpoint: Path, tmp_path: Path) -> None:
    folder = _files(
        tmp_path / "set[b]<i>",
        "".join(json.dumps({"_id": k, "text": v}) + "\n" for k, v in CORPUS.passages.items()),
        '{"_id": "q1", "text": "where do apples grow for $5 or $6_{"}\n{"_id": "q2", "text": "trees"}\n',
        "query-id\tcorpus-id\tscore\nq1\tp1\t1\nq2\tp3\t1\n",
    )
    run = _run_file(tmp_path / "a$x_{$b.trec", "q1 Q0 p2 1 3 t\nq1 Q0 p1 2 2 t\nq2 Q0 p4 1 3 t\nq2 Q0 p3 2 1 t\n")
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


def test_means() -> None:
    assert means({"a": {"x": 1.0, "y": 0.5}}) == {"a": 0.75}
