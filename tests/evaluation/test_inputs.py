"""What the evaluation takes and refuses: metrics, judgements, runs and collections."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from evalkit import CORPUS, GOOD, files, run_file

from kalm_rag.evaluation import (
    Metrics,
    bm25_candidates,
    read_run,
    run_candidates,
    write_run,
)
from kalm_rag.evaluation.metrics import best_order, means, p_value
from kalm_rag.retrieval.corpus import Corpus, read_beir, read_qrels


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
    assert "1 of 3 queries have no candidates of BM25; they count as 0" in found.warnings
    with pytest.raises(ValueError, match="none of the 1 passages holds one besides stop words"):
        bm25_candidates(Corpus({"a": "the of"}, {"q": "x"}, {"q": {"a": 1}}), 5)


def test_bm25_takes_language_and_accents() -> None:
    corpus = Corpus({"a": "Der Kaffee ist aus", "b": "un café noir"}, {"q": "cafe der"}, {"q": {"b": 1}})
    found = {
        options: [
            name for name, _ in bm25_candidates(corpus, 5, language=options[0], fold_accents=options[1]).rankings["q"]
        ]
        for options in (("auto", False), ("auto", True), ("de", True))
    }
    assert found[("auto", False)] == ["a"]
    assert sorted(found[("auto", True)]) == ["a", "b"]
    assert found[("de", True)] == ["b"]
    with pytest.raises(ValueError, match="language must be one of auto, none, de, .*got 'klingon'"):
        bm25_candidates(corpus, 5, language="klingon")


@pytest.mark.parametrize("name", ["", "nDCG@x", "quality", "nDCG("])
def test_unknown_metric(name: str) -> None:
    with pytest.raises(ValueError, match="unknown metric .*use for example nDCG@10"):
        Metrics([name])


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
        run_candidates(CORPUS, run_file(tmp_path / "a.trec", lines), 10)


def test_a_run_that_fits_in_part_is_counted(tmp_path: Path) -> None:
    lines = "q1 Q0 p2 1 1.5 t\nq1 Q0 p1 2 2.5 t\nq1 Q0 z 3 9 t\nq2 Q0 p1 1 1 t\n"
    found = run_candidates(CORPUS, run_file(tmp_path / "first.trec", lines), 10)
    assert found.name == "first"
    assert found.rankings == {"q1": [("p1", 2.5), ("p2", 1.5)], "q2": [("p1", 1.0)], "q3": []}
    assert found.warnings == (
        "1 passages of the run are not in the corpus and are left out",
        "1 of 3 queries have no candidates of first; they count as 0",
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c, q, r: (c * 2, q, r), "the id '1' of passage 2 occurs before; ids must be unique"),
        (lambda c, q, r: ("\n", q, r), "holds no passage; there is nothing to evaluate"),
        (lambda c, q, r: (c, "\n", r), "holds no query"),
        (lambda c, q, r: (c, q * 2, r), "the id 'q' of query 2 occurs before"),
        (lambda c, q, r: ('{"text": "a"}\n', q, r), "passage 1 has no id; each needs one under _id"),
        (lambda c, q, r: (c, q, r + "q\t1\t0\n"), "'q' and '1' were judged before, with another score"),
        (lambda c, q, r: (c, q, "q\t1\t4294967296\n"), "integer score within 1000 of 0"),
        (lambda c, q, r: (c, q, "\n"), "qrels.tsv holds no judgement"),
        (lambda c, q, r: (c.replace('"1"', '"1\\t2"'), q, r), "begins or ends with a space or holds a tab"),
    ],
)
def test_bad_collections(tmp_path: Path, change: Callable[..., tuple[str, str, str]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_beir(files(tmp_path / "set", *change(*GOOD)))


def test_missing_files_are_named(tmp_path: Path) -> None:
    folder = files(tmp_path / "set", *GOOD)
    (folder / "qrels.tsv").unlink()
    with pytest.raises(FileNotFoundError, match=r"no judgements: looked for .*test\.tsv, .*qrels\.tsv; name a file"):
        read_beir(folder)
    (folder / "queries.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match="no file of queries"):
        read_beir(folder)


def test_trec_judgements_tab_separated_queries_and_a_split(tmp_path: Path) -> None:
    folder = files(tmp_path / "set", *GOOD)
    (folder / "qrels").mkdir()
    (folder / "qrels" / "dev.tsv").write_text("q\t1\t3\n")
    assert read_beir(folder, split="dev").qrels == {"q": {"1": 3}}
    (tmp_path / "q.tsv").write_text("q\twhat is a\n\nr\tb\n")
    (tmp_path / "t.qrels").write_text("q 0 1 2\nr 0 1 0\n")
    found = read_beir(folder, tmp_path / "q.tsv", tmp_path / "t.qrels")
    assert found.queries == {"q": "what is a", "r": "b"}
    assert found.qrels == read_qrels(tmp_path / "t.qrels") == {"q": {"1": 2}, "r": {"1": 0}}


def test_means() -> None:
    assert means({"a": {"x": 1.0, "y": 0.5}}) == {"a": 0.75}
