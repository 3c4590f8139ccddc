"""What an evaluation gives for a decision: intervals, corrected p-values, budgets, fusions, other runs, queries."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from evalkit import CORPUS, run_file

from kalm_rag import KaLMReranker
from kalm_rag.evaluation import (
    Candidates,
    Experiment,
    Metrics,
    System,
    SystemResult,
    bm25_candidates,
    evaluate,
    read_compared,
)
from kalm_rag.evaluation import examples as page_parts
from kalm_rag.evaluation.compared import parse_compared
from kalm_rag.evaluation.metrics import RESAMPLES, holm, mean_intervals, means, median_interval
from kalm_rag.evaluation.plots import LIGHT, draw_all, frontier
from kalm_rag.evaluation.report import write_numbers, write_page
from kalm_rag.evaluation.summary import Summary, summarise
from kalm_rag.retrieval.corpus import Corpus, read_qrels
from kalm_rag.utils.fusion import FirstStage


def test_holm_is_that_of_the_textbook() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.6]) == [1.0, 1.0]
    assert holm([]) == []


def test_intervals_of_many_means_are_those_of_the_plain_bootstrap() -> None:
    rng = np.random.default_rng(7)
    columns = rng.random((3, 40))
    found = mean_intervals(columns.tolist())
    drawn = np.random.default_rng(0).integers(40, size=(RESAMPLES, 40))
    for column, ends in zip(columns, found, strict=True):
        plain = np.quantile(column[drawn].mean(axis=1), (0.025, 0.975))
        assert ends == pytest.approx(plain, abs=1e-12)
        assert ends[0] < column.mean() < ends[1]
    assert mean_intervals([[0.25], [1.0]]) == [(0.25, 0.25), (1.0, 1.0)]
    assert mean_intervals([]) == []
    assert median_interval([]) is None
    assert median_interval([3.0]) == (3.0, 3.0)


def test_a_token_budget_ends_at_the_first_passage_that_does_not_fit() -> None:
    tokens = {"a": 1000, "b": 900, "c": 200, "d": 100}
    rankings = {"q": [(name, 0.0) for name in "abcd"], "r": [("d", 0.0)]}
    qrels = {"q": {"a": 1, "c": 1, "d": 2, "b": 0}, "r": {"d": 1}}
    found = Metrics(["r@2000t", "R@2100t", "R@99t"])
    assert found.needs_tokens
    values = found.per_query(rankings, qrels, tokens)
    assert values["r@2000t"] == {"q": pytest.approx(1 / 3), "r": 1.0}
    assert values["R@2100t"] == {"q": pytest.approx(2 / 3), "r": 1.0}
    assert values["R@99t"] == {"q": 0.0, "r": 0.0}
    assert found.deepest()[1] == 0
    with pytest.raises(ValueError, match=r"the tokens of passage 'a' must be given"):
        found.per_query(rankings, qrels)
    with pytest.raises(ValueError, match=r"must be at least 1, got 'R@0t'"):
        Metrics(["R@0t"])


def test_only_what_nothing_beats_is_on_the_frontier() -> None:
    assert frontier([(3, 0.5), (1, 0.2), (2, 0.6), (2, 0.1), (4, 0.7)]) == [(1, 0.2), (2, 0.6), (4, 0.7)]


def made(per_query: dict[str, list[str]], corpus: Corpus = CORPUS, ratio: int = 4) -> SystemResult:
    """A result without a model: the order of each query's passages, with falling margins."""
    rankings = {
        query: [(name, float(-place)) for place, name in enumerate(order)] for query, order in per_query.items()
    }
    values = Metrics(["nDCG@10", "MAP"]).per_query(rankings, corpus.qrels)
    return SystemResult(System("mini", ratio), rankings, values, means(values), 0.5, [3.0, 4.0, 5.0], 0, 0, 4096.0)


@pytest.fixture
def summary(tmp_path: Path) -> Summary:
    """A system that helps q1 and hurts q3, beside another reranker's run, without any model."""
    hostile = Corpus(
        {**CORPUS.passages, "p1": "apples <script>alert(1)</script> grow\u202e"},
        {**CORPUS.queries, "q1": "where do <script>alert(2)</script> apples grow"},
        CORPUS.qrels,
    )
    rankings = {
        "q1": [("p2", 3.0), ("p3", 2.0), ("p1", 1.0)],
        "q2": [("p4", 2.0), ("p1", 1.0)],
        "q3": [("p2", 2.0), ("p1", 1.5)],
    }
    candidates = Candidates("first", rankings, CORPUS.qrels, ())
    experiment = Experiment(hostile, candidates, [System("mini", 4)], Metrics(["nDCG@10", "MAP"]), lengths=0)
    result = made({"q1": ["p1", "p3", "p2"], "q2": ["p4", "p1"], "q3": ["p1", "p2"]})
    run = run_file(tmp_path / "other.trec", "q1 Q0 p1 1 3 t\nq2 Q0 p4 1 3 t\nq3 Q0 p2 1 3 t\nq9 Q0 p1 1 3 t\n")
    return summarise(experiment, [result], [], read_compared([f"<b>other</b>={run},7.5"], candidates))


def test_every_row_has_intervals_and_a_corrected_p(summary: Summary) -> None:
    assert [entry.kind for entry in summary.entries] == ["system", "fusion", "fusion", "compared"]
    assert summary.entries[3].milliseconds == 7.5
    corrected = holm([entry.p for entry in summary.entries])
    assert [entry.p_holm for entry in summary.entries] == corrected
    for entry in summary.entries:
        for metric, (low, high) in entry.intervals.items():
            assert low <= entry.means[metric] <= high
        assert entry.gain == pytest.approx(entry.means["nDCG@10"] - summary.first["nDCG@10"])
        assert entry.gain_interval[0] <= entry.gain <= entry.gain_interval[1]
    assert summary.first_intervals.keys() == {"nDCG@10", "MAP"}


def test_results_and_page_show_the_queries_that_changed_most_and_no_markup(summary: Summary, tmp_path: Path) -> None:
    write_numbers(summary, tmp_path / "out")
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    row, *_, other = found["rows"]
    assert [query for query, _ in row["gained_most"]] == ["q1"]
    assert [query for query, _ in row["lost_most"]] == ["q3"]
    assert other["name"] == "<b>other</b>"
    assert other["per_query"]["nDCG@10"].keys() == CORPUS.queries.keys()
    assert len(found["data"]["run of <b>other</b>"]) == 64
    assert "1 queries of <b>other</b> are not among the judged queries and are left out" in found["warnings"]
    assert len(list((tmp_path / "out" / "runs").iterdir())) == 5
    write_page(summary, tmp_path / "out", "<i>title</i>")
    text = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert not re.search(r"<(?:script|b|i)\b", text)
    assert "&lt;script&gt;alert(1)" in text
    assert "&lt;script&gt;alert(2)" in text
    assert "\u202e" not in text
    assert "Queries that gained most with mini, ratio 4" in text
    assert "Queries that lost most with mini, ratio 4" in text


def test_the_page_says_how_many_queries_it_leaves_out(summary: Summary, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = page_parts.per_query(summary)
    assert (len(whole["rows"]), whole["left_out"]) == (3, 0)
    assert whole["heading"][:3] == ["query", "first", "mini r4"]
    monkeypatch.setattr(page_parts, "ROWS", 1)
    assert page_parts.per_query(summary)["left_out"] == 2


def test_the_pareto_plot_is_drawn_where_times_are_known(summary: Summary) -> None:
    assert draw_all(summary, LIGHT)["pareto"].startswith(b"\x89PNG")
    alone = replace(summary, entries=[entry for entry in summary.entries if entry.milliseconds is None])
    assert "pareto" not in draw_all(alone, LIGHT)


def test_the_weight_of_a_fusion_is_chosen_on_the_other_half() -> None:
    """The reranker is always right on one half and always wrong on the other, so each half gets the wrong weight."""
    queries = {f"q{number}": "text" for number in range(8)}
    rankings = {query: [("p1", 2.0), ("p2", 1.0)] for query in queries}
    odd = {query: int(query[1:]) % 2 == 1 for query in queries}
    # The first stage puts p1 first, the reranker p2: it is right for the odd queries only.
    corpus = Corpus(CORPUS.passages, queries, {query: {"p2" if odd[query] else "p1": 1} for query in queries})
    candidates = Candidates("first", rankings, corpus.qrels, ())
    experiment = Experiment(corpus, candidates, [System("mini")], Metrics(["nDCG@10", "MAP"]), lengths=0)
    summary = summarise(experiment, [made({query: ["p2", "p1"] for query in queries}, corpus)], [])
    system, weighted, rrf = summary.entries
    assert [weight >= 0.5 for weight in weighted.weights] == [True, False]
    assert weighted.means["nDCG@10"] < min(system.means["nDCG@10"], rrf.means["nDCG@10"])


def test_one_query_is_fused_with_the_default_weight_and_has_no_evidence() -> None:
    corpus = Corpus(CORPUS.passages, {"q1": "text"}, {"q1": {"p1": 1}})
    candidates = Candidates("first", {"q1": [("p1", 1.0), ("p2", 0.5)]}, corpus.qrels, ())
    experiment = Experiment(corpus, candidates, [System("mini")], Metrics(["nDCG@10", "MAP"]), lengths=0)
    system, weighted, _ = summarise(experiment, [made({"q1": ["p1", "p2"]}, corpus)], []).entries
    assert weighted.weights == (FirstStage(()).weight,)
    assert (system.p_holm, system.gain, system.gain_interval) == (1.0, 0.0, (0.0, 0.0))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("file.trec", r"--compare takes NAME=FILE, or NAME=FILE,MS .*got 'file.trec'"),
        ("=file.trec", r"--compare takes NAME=FILE"),
        ("name=", r"--compare takes NAME=FILE"),
        ("name=file.trec,0", r"must be a number above 0, got '0'"),
        ("name=file.trec,nan", r"must be a number above 0, got 'nan'"),
    ],
)
def test_bad_arguments_of_compare(given: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_compared(given)


def test_a_comma_may_be_part_of_a_file_name(tmp_path: Path) -> None:
    (tmp_path / "a,5").write_text("")
    assert parse_compared(f"x={tmp_path}/a,5") == ("x", tmp_path / "a,5", None)
    assert parse_compared("x=a,5,2.5") == ("x", Path("a,5"), 2.5)
    assert parse_compared("x=a,b.trec") == ("x", Path("a,b.trec"), None)


def test_bad_runs_of_other_rerankers(tmp_path: Path) -> None:
    candidates = bm25_candidates(CORPUS, 3)
    foreign = run_file(tmp_path / "f.trec", "x Q0 y 1 1 t\n")
    with pytest.raises(ValueError, match=r"ranks none of the candidates of BM25 \(1 queries, for example 'x'\)"):
        read_compared([f"a={foreign}"], candidates)
    with pytest.raises(ValueError, match=r"--compare names 'BM25' twice or as the first stage"):
        read_compared([f"BM25={foreign}"], candidates)
    broken = run_file(tmp_path / "b.trec", "q1 Q0 p1 1 3 t\nq1 Q0 p2 second\n")
    with pytest.raises(ValueError, match=r"b\.trec, line 2: expected the six columns"):
        read_compared([f"a={broken}"], candidates)
    with pytest.raises(FileNotFoundError, match="no file of candidates"):
        read_compared([f"a={tmp_path}/missing"], candidates)
    part = run_file(tmp_path / "p.trec", "q1 Q0 p1 1 3 t\nq1 Q0 p4 2 2 t\n")
    [run] = read_compared([f"a={part}"], candidates)
    assert run.rankings["q1"] == [("p1", 3.0)]
    assert any("queries are not in the run of a; they count as 0 for it" in warning for warning in run.warnings)
    assert any("1 passages of a are not among the candidates" in warning for warning in run.warnings)


def test_ids_with_spaces_are_found_in_a_run(tmp_path: Path) -> None:
    corpus = Corpus({"a b": "apples", "c": "pears"}, {"q 1": "apples"}, {"q 1": {"a b": 1}})
    candidates = Candidates("first", {"q 1": [("c", 2.0), ("a b", 1.0)]}, corpus.qrels, ())
    [run] = read_compared([f"x={run_file(tmp_path / 'r', 'q%201 Q0 a%20b 1 3 t')}"], candidates)
    assert run.rankings == {"q 1": [("a b", 3.0)]}


def test_depth_and_form_are_measured(checkpoint: Path) -> None:
    """Below its depth a system leaves the first stage's order; above it the margins are the reranker's."""
    candidates = bm25_candidates(CORPUS, 3)
    systems = [System(str(checkpoint), 4, depth=1), System(str(checkpoint), 4, storage="int8")]
    metrics = Metrics(["nDCG@10", "R@2000t"])
    experiment = Experiment(CORPUS, candidates, systems, metrics, cache=None, lengths=0)
    results, encodings = evaluate(experiment)
    shallow, stored = results
    assert {query: [name for name, _ in found] for query, found in shallow.rankings.items()} == {
        query: [name for name, _ in found] for query, found in candidates.rankings.items()
    }
    assert {encoding.storage for encoding in encodings} == {"native", "int8"}
    assert stored.passage_bytes < shallow.passage_bytes
    assert stored.prefilled_bytes > 0
    assert shallow.system.slug != System(str(checkpoint), 4).slug
    assert experiment.tokens.keys() == {name for found in candidates.rankings.values() for name, _ in found}
    summary = summarise(experiment, results, encodings)
    labels = [entry.name.removeprefix(checkpoint.name) for entry in summary.entries]
    assert labels == [
        " / first 1",
        " / stored int8",
        *(f" / stored int8 + BM25 ({kind})" for kind in ("weighted", "RRF")),
    ]
    with pytest.raises(ValueError, match="storage must be one of"):
        replace(experiment, systems=[System("mini", storage="int4")])  # type: ignore[arg-type]


def test_windows_are_measured_beside_truncation(checkpoint: Path) -> None:
    """A query's word stands beyond what is read of the long passage: its windows find it."""
    tail = " ".join(f"filler{number}" for number in range(60))
    corpus = Corpus({"long": f"{tail} zebra", "short": "zebra crossing"}, {"q": "zebra"}, {"q": {"long": 1}})
    systems = [System(str(checkpoint), window_tokens=tokens) for tokens in (None, 24)]
    experiment = Experiment(
        corpus, bm25_candidates(corpus, 2), systems, Metrics(["nDCG@10"]), cache=None, lengths=0, max_length=32
    )
    results, encodings = evaluate(experiment)
    assert [(one.window_tokens, one.truncated, one.passages < one.new) for one in encodings] == [
        (None, 1, False),
        (24, 0, True),
    ]
    hits = KaLMReranker(checkpoint, cache=None, max_length=32, long_passages="windows", window_tokens=24).rank(
        "zebra", list(corpus.passages.values())
    )
    assert [margin for _, margin in results[1].rankings["q"]] == pytest.approx([hit.margin for hit in hits], abs=1e-5)
    labels = [entry.name.removeprefix(checkpoint.name) for entry in summarise(experiment, results, encodings).entries]
    assert [label for label in labels if "BM25" not in label] == ["", " / windows of 24"]


class TestFilledInJudgements:
    def test_empty_rows_are_left_out_and_counted(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        rows = [("a", 1), ("b", None), ("c", "2"), ("d", ""), ("e", 0)]
        path = tmp_path / "judged.jsonl"
        lines = (json.dumps({"query_id": "q", "passage_id": name, "relevance": value}) for name, value in rows)
        path.write_text("\n".join(lines))
        with caplog.at_level(logging.WARNING):
            assert read_qrels(path) == {"q": {"a": 1, "c": 2, "e": 0}}
        assert f"2 of 5 pairs in {path} are not judged yet and are left out" in caplog.text

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ('{"query_id": "q", "passage_id": "p", "relevance": null}', "none of the 1 pairs in .* is judged"),
            ('{"query_id": "q", "passage_id": "p", "relevance": true}', "line 1: expected a JSON object"),
            ('{"query_id": "q", "passage_id": "p", "relevance": 1.5}', "line 1: expected a JSON object"),
            ('{"query_id": "q", "passage_id": "p", "relevance": "yes"}', "line 1: expected a JSON object"),
            ('{"query_id": "q", "passage_id": "p", "relevance": 4294967296}', "line 1: expected a JSON object"),
            ('{"query_id": 1, "passage_id": "p", "relevance": 1}', "line 1: expected a JSON object"),
            ('{"query_id": "q", "relevance": 1}', "line 1: expected a JSON object"),
            ('{"query_id": "q"', "line 1: expected a JSON object"),
        ],
    )
    def test_bad_rows(self, line: str, message: str, tmp_path: Path) -> None:
        (tmp_path / "judged.jsonl").write_text(line)
        with pytest.raises(ValueError, match=message):
            read_qrels(tmp_path / "judged.jsonl")
