"""`kalm-rag compare`: two rankings without judgements."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from evalkit import CORPUS, files, run_file
from scipy import stats

from kalm_rag import KaLMReranker, cli
from kalm_rag.evaluation import compare_runs, worth_judging
from kalm_rag.evaluation.agreement import rank_biased_overlap
from kalm_rag.retrieval.corpus import read_beir

A = "q1 Q0 p1 1 3 t\nq1 Q0 p2 2 2 t\nq2 Q0 p4 1 3 t\nq2 Q0 p3 2 2 t\n"
B = "q1 Q0 p3 1 3 t\nq1 Q0 p2 2 2 t\nq1 Q0 p1 3 1 t\nq2 Q0 p4 1 3 t\nq2 Q0 p3 2 2 t\n"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a collection without judgements, and two runs."""
    files(
        tmp_path / "set",
        "".join(json.dumps({"_id": name, "text": text}) + "\n" for name, text in CORPUS.passages.items()),
        "".join(json.dumps({"_id": name, "text": text}) + "\n" for name, text in CORPUS.queries.items()),
        "",
    )
    (tmp_path / "set" / "qrels.tsv").unlink()
    run_file(tmp_path / "a.trec", A)
    run_file(tmp_path / "b.trec", B)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def compare(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run the command in this process."""
    monkeypatch.setattr(sys, "argv", ["kalm-rag", "compare", *arguments])
    with pytest.raises(SystemExit) as done:
        cli.main()
    return int(done.value.code or 0)


def test_measures_are_those_of_the_textbook() -> None:
    one, other = {"q": [(name, 0.0) for name in "abcd"]}, {"q": [(name, 0.0) for name in "badx"]}
    found = compare_runs(one, other, 3)
    [query] = found.queries
    assert query.overlap == pytest.approx(2 / 3)
    assert query.tau == pytest.approx(stats.kendalltau([1, 2, 3], [2, 1, 3]).statistic)
    assert not query.same_first
    # Common passages at the depths 1 to 4: 0, 2, 2, 3.
    parts = [0 / 1, 2 / 2, 2 / 3, 3 / 4]
    expected = sum(part * 0.9 ** (depth + 1) for depth, part in enumerate(parts)) / 9 + 3 / 4 * 0.9**4
    assert query.rbo == pytest.approx(expected)
    assert found.intervals["overlap"] == pytest.approx((2 / 3, 2 / 3))
    assert rank_biased_overlap("abc", "abc") == pytest.approx(1.0)
    assert rank_biased_overlap("abc", "xyz") == 0.0


def test_equal_runs_agree_wholly_and_need_no_judgement() -> None:
    run = {"q": [("a", 2.0), ("b", 1.0)]}
    found = compare_runs(run, run)
    assert {name: pytest.approx(1.0) for name in ("overlap", "rbo", "tau", "same_first")} == found.means
    assert worth_judging(run, run) == []


def test_the_pair_worth_most_is_first_in_one_run_and_missing_in_the_other() -> None:
    one = {"q": [("a", 3.0), ("b", 2.0), ("c", 1.0)], "r": [("a", 1.0)]}
    other = {"q": [("b", 3.0), ("c", 2.0), ("d", 1.0)], "r": [("a", 1.0)]}
    found = worth_judging(one, other, 3)
    assert [(pair.query, pair.passage) for pair in found] == [("q", "a"), ("q", "d"), ("q", "b"), ("q", "c")]
    assert found[0].weight == 1.0
    assert found[1].weight == pytest.approx(0.5)
    assert worth_judging(one, other, 3, most=1) == found[:1]


def test_two_runs_their_pairs_and_what_eval_reads_of_them(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare(monkeypatch, "a.trec", "b.trec", "--source", "set", "--out", "judge.jsonl") == 0
    shown = capsys.readouterr().out
    assert "2 queries in both." in shown
    assert "overlap of the first 10" in shown
    assert "The query that differs:" in shown
    assert "q1: where do apples grow" in shown
    assert max(map(len, shown.splitlines())) <= 80
    rows = [json.loads(line) for line in (place / "judge.jsonl").read_text("utf-8").splitlines()]
    assert [(row["query_id"], row["passage_id"], row["relevance"]) for row in rows] == [
        ("q1", "p1", None),
        ("q1", "p3", None),
    ]
    assert rows[0]["passage"] == CORPUS.passages["p1"]
    assert "3 t" not in (place / "judge.jsonl").read_text("utf-8")
    assert compare(monkeypatch, "a.trec", "b.trec", "--source", "set", "--out", "judge.jsonl") == 2
    assert "exists and may hold judgements" in capsys.readouterr().err
    rows[0]["relevance"] = 1
    (place / "judge.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    assert read_beir(place / "set", qrels=place / "judge.jsonl").qrels == {"q1": {"p1": 1}}


def test_hidden_characters_of_a_passage_are_written_out(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hostile = {"p1": "apples\u202e\x1b[2J\nline", "p2": "b", "p3": "c", "p4": "d"}
    (place / "set" / "corpus.jsonl").write_text(
        "".join(json.dumps({"_id": name, "text": text}) + "\n" for name, text in hostile.items())
    )
    assert compare(monkeypatch, "a.trec", "b.trec", "--source", "set", "--out", "judge.jsonl") == 0
    text = (place / "judge.jsonl").read_text("utf-8")
    assert not {"\u202e", "\x1b"} & set(text)
    assert json.loads(text.splitlines()[0])["passage"] == hostile["p1"]


def test_runs_without_a_collection_as_json(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_file(place / "c.trec", A + "q3 Q0 p1 1 1 t\n")
    assert compare(monkeypatch, "a.trec", "c.trec", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["means"]["rbo"] == pytest.approx(1.0)
    assert found["only_one"] == 1
    assert found["pairs"] == []


def test_settings_rank_as_the_reranker_does(
    place: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--source", "set", "--model", str(checkpoint), "--cache", "cache", "--run", "first.trec", "--json"]
    run_file(place / "first.trec", "".join(f"q1 Q0 p{n} {n} {9 - n} t\n" for n in range(1, 5)) + "x Q0 p1 1 1 t\n")
    assert compare(monkeypatch, "ratio=4", "a.trec", *options) == 0
    caught = capsys.readouterr()
    assert "1 queries of first.trec are not among the queries and are left out" in caught.err
    found = json.loads(caught.out)
    ranked = KaLMReranker(checkpoint, cache=None).rank(CORPUS.queries["q1"], list(CORPUS.passages.values()), ratio=4)
    names = [list(CORPUS.passages)[hit.index] for hit in ranked]
    expected = compare_runs({"q1": [(name, 0.0) for name in names]}, {"q1": [("p1", 3.0), ("p2", 2.0)]})
    assert found["means"] == pytest.approx(expected.means)


def test_the_first_stage_reads_words_as_it_is_told(
    place: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [{"_id": "p1", "text": "Le café est fermé."}, {"_id": "p2", "text": "Un livre."}]
    (place / "set" / "corpus.jsonl").write_text("\n".join(map(json.dumps, texts)))
    (place / "set" / "queries.jsonl").write_text(json.dumps({"_id": "q1", "text": "cafe ferme"}))
    options = ["ratio=4", "ratio=8", "--source", "set", "--model", str(checkpoint), "--cache", "cache"]
    assert compare(monkeypatch, *options) == 2
    assert "BM25 finds no candidate for any of 1 queries" in capsys.readouterr().err
    assert compare(monkeypatch, *options, "--fold-accents", "--language", "fr") == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["missing.trec", "b.trec"],
            "no file 'missing.trec'; name a TREC run, or a setting such as model=nano,dtype=int8",
        ),
        (["ratio=4", "b.trec"], "settings, --queries and --out need the texts: name the collection with --source"),
        (["a.trec", "b.trec", "--out", "x"], "settings, --queries and --out need the texts"),
        (["size=4", "b.trec", "--source", "set"], "a setting is NAME=VALUE with each of model, ratio"),
        (["ratio=x", "b.trec", "--source", "set"], "must be a whole number, got 'x' in 'ratio=x'"),
        (["storage=int4", "b.trec", "--source", "set"], "storage must be one of"),
        (["a.trec", "empty.trec"], "empty.trec holds no candidates"),
        (["a.trec", "broken.trec"], "broken.trec, line 2: expected the six columns"),
        (["a.trec", "foreign.trec"], "no query is in both runs: one has 2 queries and the other 1"),
        (["a.trec", "foreign.trec", "--source", "set"], "it is a run of another collection"),
        (["a.trec", "b.trec", "--k", "0"], "must be at least 1, got 0"),
        (["a.trec", "b.trec", "--source", "set", "--queries", "none"], "no file of queries"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str],
    message: str,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_file(place / "empty.trec", "\n")
    run_file(place / "broken.trec", "q1 Q0 p1 1 3 t\nq1 Q0 p2\n")
    run_file(place / "foreign.trec", "x Q0 y 1 3 t\n")
    assert compare(monkeypatch, *arguments) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (place / "x").exists()
