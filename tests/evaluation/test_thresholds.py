"""Thresholds of judged candidates: figures against plain loops, the choice against all choices, and bad collections."""

from __future__ import annotations

import json
import math
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evalkit import files
from sklearn.isotonic import IsotonicRegression
from thresholdkit import make_profile

from kalm_rag import KaLMReranker, ThresholdProfile, cli
from kalm_rag.demo_data import load_demo
from kalm_rag.evaluation import (
    Experiment,
    Metrics,
    System,
    ThresholdStudy,
    bm25_candidates,
    calibrate,
    evaluate,
    run_candidates,
    study_thresholds,
)
from kalm_rag.evaluation.judged_scores import JudgedScores
from kalm_rag.evaluation.outputs import claim
from kalm_rag.evaluation.reliability import monotone_fit
from kalm_rag.evaluation.threshold_report import calibrate_system, threshold_section, write_thresholds
from kalm_rag.retrieval.corpus import Corpus
from kalm_rag.thresholds import MEASURES, Aim

Rankings = dict[str, list[tuple[str, float]]]
Judgements = dict[str, dict[str, int]]
SCOPE = make_profile().scope


def made(queries: int = 40, depth: int = 12, seed: int = 0) -> tuple[Rankings, Judgements]:
    """Candidates whose margins say something about relevance; a quarter of the queries has no answer, margins tie."""
    numbers = random.Random(seed)
    rankings: Rankings = {}
    qrels: Judgements = {}
    for query in range(queries):
        relevant = {f"p{query}-{place}" for place in range(depth) if numbers.random() < 0.2} if query % 4 else set()
        if query % 4:
            relevant.add(f"p{query}-0")
        margins = [
            (name, round(numbers.gauss(2.0 if name in relevant else -1.0, 2.0), 1))
            for name in (f"p{query}-{place}" for place in range(depth))
        ]
        rankings[f"q{query}"] = sorted(margins, key=lambda item: -item[1])
        qrels[f"q{query}"] = dict.fromkeys(relevant, 1) | {f"p{query}-1": int(f"p{query}-1" in relevant)}
    return rankings, qrels


def plain(queries: list[str], rankings: Rankings, qrels: Judgements, cut: float) -> dict[str, float]:
    """The figures of a threshold by counting one passage after the other; NaN without cases."""
    kept = hits = relevant = answered = emptied = abstained = 0
    for query in queries:
        judged = [(qrels[query].get(name, 0) > 0, margin >= cut) for name, margin in rankings[query]]
        kept += sum(stays for _, stays in judged)
        hits += sum(good and stays for good, stays in judged)
        relevant += sum(good for good, _ in judged)
        has_answer, nothing = any(good for good, _ in judged), not any(stays for _, stays in judged)
        answered += has_answer
        emptied += has_answer and nothing
        abstained += not has_answer and nothing

    def over(part: float, whole: float) -> float:
        return part / whole if whole else math.nan

    values = (over(hits, kept), over(hits, relevant), over(2 * hits, kept + relevant), over(kept, len(queries)))
    found = (*values, over(emptied, answered), over(abstained, len(queries) - answered))
    return dict(zip(MEASURES, found, strict=True))


class TestFigures:
    @pytest.mark.parametrize("seed", range(3))
    def test_they_are_those_of_plain_loops(self, seed: int) -> None:
        rankings, qrels = made(seed=seed)
        queries = sorted(rankings)
        cuts = [-99.0, -3.0, 0.0, 0.1, 2.5, 4.0, 99.0]
        for cut, found in zip(cuts, JudgedScores.of(queries, rankings, qrels).figures(cuts), strict=True):
            assert (found.queries, found.unanswered) == (40, 10)
            for name, value in plain(queries, rankings, qrels, cut).items():
                figure = getattr(found, name)
                if math.isnan(value):
                    assert figure is None
                else:
                    assert figure.value == pytest.approx(value, abs=1e-12)
                    assert figure.low <= figure.value <= figure.high

    def test_intervals_are_those_of_drawing_queries(self) -> None:
        rankings, qrels = made(60, 5)
        queries = sorted(rankings)
        (found,) = JudgedScores.of(queries, rankings, qrels).figures([2.0])
        numbers = random.Random(1)
        drawn = [plain(numbers.choices(queries, k=len(queries)), rankings, qrels, 2.0) for _ in range(2000)]
        for name in MEASURES:
            low, high = np.quantile([values[name] for values in drawn], (0.025, 0.975))
            figure = getattr(found, name)
            spread = high - low
            assert spread > 0
            assert (figure.low, figure.high) == pytest.approx((low, high), abs=0.15 * spread), name

    def test_the_table_has_round_thresholds_inside_of_the_margins(self) -> None:
        rankings, qrels = made()
        table = study_thresholds(rankings, qrels).table
        margins = [margin for ranking in rankings.values() for _, margin in ranking]
        cuts = [row.margin for row in table]
        assert cuts == sorted(cuts, reverse=True)
        assert min(margins) <= cuts[-1] < cuts[0] <= max(margins)
        assert {0.05, 0.5, 0.95} <= {round(row.score, 9) for row in table}
        assert {-4.0, -2.0, 2.0} <= set(cuts)
        counts = [plain(sorted(rankings), rankings, qrels, row.margin)["kept"] for row in table]
        assert [row.figures.kept.value for row in table if row.figures.kept] == pytest.approx(counts)


@pytest.fixture(scope="module")
def given() -> tuple[Rankings, Judgements]:
    return made(80)


@pytest.fixture(scope="module")
def study(given: tuple[Rankings, Judgements]) -> ThresholdStudy:
    return study_thresholds(*given)


class TestChoice:
    @pytest.mark.parametrize("aim", ["recall=0.95", "recall=1", "recall=0.01", "precision=0.6", "precision=0.2", "f1"])
    def test_no_other_threshold_serves_the_aim_better(
        self, given: tuple[Rankings, Judgements], study: ThresholdStudy, aim: str
    ) -> None:
        profile = study.choose(aim, SCOPE)
        half, names = study.choosing, ("precision", "recall", "f1")
        cuts = sorted(set(half.margins))
        rows = zip(cuts, half.figures(cuts), strict=True)
        values = {cut: {name: getattr(row, name).value for name in names} for cut, row in rows}
        chosen = {name: getattr(profile.chosen, name).value for name in names}
        measure, value = Aim.parse(aim)
        if value is None:
            assert chosen["f1"] == pytest.approx(max(row["f1"] for row in values.values()))
        elif measure == "recall":
            assert chosen["recall"] >= value - 1e-9
            lowest = min(cut for cut in cuts if cut > profile.margin)
            assert all(row["recall"] < value for cut, row in values.items() if cut > lowest)
        else:
            assert chosen["precision"] >= value - 1e-9
            better = [row["recall"] for row in values.values() if row["precision"] >= value]
            assert chosen["recall"] == pytest.approx(max(better))
        assert not np.isclose(half.margins, profile.margin, atol=1e-4).any(), "no passage lies on the threshold"
        assert (profile.scope, profile.aim) == (SCOPE, str(Aim.parse(aim)))
        assert ThresholdProfile.from_json(profile.to_json()) == profile

    def test_the_halves_share_no_query_and_are_alike(
        self, given: tuple[Rankings, Judgements], study: ThresholdStudy
    ) -> None:
        rankings, qrels = given
        profile = study.choose("f1", SCOPE)
        assert (profile.chosen.queries, profile.checked.queries) == (40, 40)
        assert (profile.chosen.unanswered, profile.checked.unanswered) == (10, 10)
        assert sorted([*study.choosing.margins, *study.checking.margins]) == sorted(
            margin for ranking in rankings.values() for _, margin in ranking
        )
        other = study_thresholds(dict(reversed(rankings.items())), qrels).choose("f1", SCOPE)
        assert (other.margin, other.chosen, other.fit) == (profile.margin, profile.chosen, profile.fit)
        assert study_thresholds(rankings, qrels, seed=1).choose("f1", SCOPE).chosen != profile.chosen

    def test_the_check_knows_nothing_of_the_choice(self, given: tuple[Rankings, Judgements]) -> None:
        """Judgements of the other half change neither the threshold nor the fit."""
        rankings, qrels = given
        first = calibrate(rankings, qrels, SCOPE, "f1")
        changed = {query: dict(judged) for query, judged in qrels.items()}
        names = sorted(query for query in qrels if any(qrels[query].values()))
        random.Random(0).shuffle(names)
        for query in names[1::2]:
            name = rankings[query][-1][0]
            changed[query] = {**dict.fromkeys(changed[query], 0), name: 1}
        second = calibrate(rankings, changed, SCOPE, "f1")
        assert (second.margin, second.fit, second.chosen) == (first.margin, first.fit, first.chosen)
        assert second.checked != first.checked

    def test_the_fit_is_isotonic_regression(self, study: ThresholdStudy) -> None:
        half = study.choosing
        whole = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(half.margins, half.relevant)
        profile = study.choose("f1", SCOPE)
        margins = np.linspace(-12, 12, 500)
        found = [profile.calibrated(margin) for margin in margins]
        assert found == pytest.approx(list(whole.predict(margins)), abs=1e-9)
        assert found == sorted(found)
        assert monotone_fit(half) == profile.fit

    def test_reliability_counts_the_other_half(self, study: ThresholdStudy) -> None:
        for curve in (study.raw, study.calibrated):
            assert sum(item.count for item in curve.bins) == len(study.checking.margins)
            mean = sum(item.count * item.relevant.value for item in curve.bins) / len(study.checking.margins)
            assert mean == pytest.approx(study.checking.relevant.mean())
            assert [item.score for item in curve.bins] == sorted(item.score for item in curve.bins)
        assert study.calibrated.error < study.raw.error

    def test_an_aim_out_of_reach_says_what_can_be_reached(self, given: tuple[Rankings, Judgements]) -> None:
        rankings, qrels = given
        worst = {query: [(name, -margin) for name, margin in ranking] for query, ranking in rankings.items()}
        study = study_thresholds(worst, qrels)
        message = (
            r"aim precision=0.999 cannot be reached on the 40 .* the highest precision is 0\.\d+, with a recall of"
        )
        with pytest.raises(ValueError, match=message) as error:
            study.choose("precision=0.999", SCOPE)
        reachable = str(error.value).split("aim at ")[1].split(" or less")[0]
        assert study.choose(reachable, SCOPE).aim == reachable


class TestCollections:
    def test_one_query(self) -> None:
        with pytest.raises(ValueError, match=r"takes at least 2 queries with a relevant candidate, got 1 of 1; judge"):
            calibrate({"q": [("a", 1.0), ("b", 0.0)]}, {"q": {"a": 1}}, SCOPE)

    def test_no_negatives(self) -> None:
        rankings = {f"q{number}": [("a", 1.0), ("b", 0.5)] for number in range(4)}
        with pytest.raises(ValueError, match=r"all 4 candidates of the 2 queries .* are judged relevant, so there is"):
            calibrate(rankings, {query: {"a": 1, "b": 2} for query in rankings}, SCOPE)

    def test_no_answer_at_all(self) -> None:
        rankings = {f"q{number}": [("a", 1.0)] for number in range(4)}
        with pytest.raises(ValueError, match="with a relevant candidate, got 0 of 4"):
            calibrate(rankings, {query: {"a": 0} for query in rankings}, SCOPE)

    def test_all_answers_in_one_passage(self) -> None:
        rankings = {f"q{number}": [("all", 1.0 + number), ("b", 0.5)] for number in range(6)}
        profile = calibrate(rankings, {query: {"all": 1, "b": 0} for query in rankings}, SCOPE, "recall=1")
        assert any(note.startswith("all answers are in one passage ('all')") for note in profile.notes)
        assert not any("not judged" in note for note in profile.notes)

    def test_what_limits_the_figures_is_told(self) -> None:
        rankings, qrels = made(16)
        rankings |= {"empty": [], "unjudged": [("p", 9.0)]}
        notes = " ".join(calibrate(rankings, {**qrels, "empty": {"p": 1}}, SCOPE, "precision=0.9").notes)
        assert "2 queries without candidates or without judgements are left out" in notes
        assert "only 12 queries have a relevant candidate" in notes
        assert "of 192 candidates are not judged and count as irrelevant" in notes
        assert "passages reach the threshold where it was chosen" in notes
        assert "every query has a relevant candidate" not in notes
        answered = {query: ranking for query, ranking in rankings.items() if any(qrels.get(query, {}).values())}
        assert "every query has a relevant candidate" in " ".join(calibrate(answered, qrels, SCOPE).notes)

    def test_margins_that_are_not_finite(self) -> None:
        rankings, qrels = made(8)
        rankings["q3"][2] = ("p3-2", math.nan)
        with pytest.raises(ValueError, match="margins must be finite, got nan for query 'q3' and passage 'p3-2'"):
            calibrate(rankings, qrels, SCOPE)

    def test_few_different_margins(self) -> None:
        rankings = {f"q{number}": [("a", 0.0), ("b", 0.0)] for number in range(4)}
        profile = calibrate(rankings, {query: {"a": 1} for query in rankings}, SCOPE, "f1")
        assert profile.chosen.precision is not None
        assert profile.chosen.precision.value == 0.5
        assert profile.margin < 0
        assert len(study_thresholds(rankings, {query: {"a": 1} for query in rankings}).table) >= 1


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    """The bundled questions, some with their answers removed from the corpus, and some that nothing answers."""
    demo = load_demo()
    asked = list(demo.qrels)[:14]
    removed = {name for query in asked[2:5] for name in demo.qrels[query]}
    passages = {name: text for name, text in demo.passages.items() if name not in removed}
    judged = {query: demo.qrels[query] for query in asked[:10]}
    judged |= {query: dict.fromkeys(list(passages)[:2], 0) for query in asked[10:]}
    return Corpus(passages, {query: demo.queries[query] for query in asked}, judged)


class TestExperiment:
    def test_queries_without_an_answer_change_no_metric(self, corpus: Corpus, checkpoint: Path) -> None:
        found = {}
        for unanswered in (False, True):
            candidates = bm25_candidates(corpus, 4, unanswered=unanswered)
            assert len(candidates.unanswered) == (4 if unanswered else 0)
            assert len(candidates.rankings) == 10
            experiment = Experiment(
                corpus, candidates, [System(str(checkpoint))], Metrics(["nDCG@10"]), cache=None, lengths=0
            )
            (found[unanswered],), _ = evaluate(experiment)
        assert found[True].means == found[False].means
        assert found[True].p == found[False].p
        assert len(found[True].milliseconds) == len(found[False].milliseconds) == 10
        assert set(found[True].unanswered) == set(list(corpus.queries)[10:])
        assert found[False].unanswered == {}
        reranker = KaLMReranker(checkpoint, cache=None)
        for query, ranking in found[True].unanswered.items():
            hits = reranker.rank(corpus.queries[query], [corpus.passages[name] for name, _ in ranking])
            assert [margin for _, margin in ranking] == pytest.approx([hit.margin for hit in hits], abs=1e-4)

    def test_candidates_of_a_run(self, corpus: Corpus, tmp_path: Path) -> None:
        file = tmp_path / "first.trec"
        lines = (f"{query} Q0 {name} 1 1 t\n" for query in corpus.queries for name in list(corpus.passages)[:1])
        file.write_text("".join(lines))
        assert len(run_candidates(corpus, file, 4, unanswered=True).unanswered) == 4
        assert len(run_candidates(corpus, file, 4, 3, unanswered=True).unanswered) == 3
        assert run_candidates(corpus, file, 4).unanswered == {}

    def test_the_section_is_safe_and_an_older_profile_goes(
        self, corpus: Corpus, checkpoint: Path, tmp_path: Path
    ) -> None:
        """An id is the user's text; a profile of a failed choice must not look like its result."""
        name = "<script>"
        texts = {name: "apples", "b": "pears apples", "c": "apples trees"}
        small = Corpus(texts, {"1": "apples", "2": "apples trees"}, {"1": {name: 1}, "2": {name: 1}})
        experiment = Experiment(
            small, bm25_candidates(small, 3), [System(str(checkpoint))], Metrics(["MAP"]), cache=None, lengths=0
        )
        (result,), (encoding,) = evaluate(experiment)
        found = calibrate_system(experiment, result, encoding.digest, Aim("recall", 1.0))
        page = threshold_section(found)
        assert "all answers are in one passage (&#39;&lt;script&gt;&#39;)" in page
        assert "<script" not in page
        claim(tmp_path)
        names = {path.name for path in write_thresholds(found, tmp_path)}
        assert names == {"thresholds.json", "threshold-profile.json"}
        result.rankings = {query: [(name, -1.0), ("b", 1.0)] for query in result.rankings}
        failed = calibrate_system(experiment, result, encoding.digest, Aim("precision", 0.9))
        assert failed.profile is None
        assert "the highest precision is 0.500" in threshold_section(failed)
        assert [path.name for path in write_thresholds(failed, tmp_path)] == ["thresholds.json"]
        assert not (tmp_path / "threshold-profile.json").exists()


def test_the_command_writes_a_profile_that_rank_takes(
    corpus: Corpus,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = files(
        tmp_path / "set",
        "".join(json.dumps({"_id": name, "text": text}) + "\n" for name, text in corpus.passages.items()),
        "".join(json.dumps({"_id": name, "text": text}) + "\n" for name, text in corpus.queries.items()),
        "query-id\tcorpus-id\tscore\n"
        + "".join(f"{query}\t{name}\t{value}\n" for query, row in corpus.qrels.items() for name, value in row.items()),
    )
    out, model = tmp_path / "out", str(checkpoint)

    def evaluated(*options: str) -> tuple[Any, str, str]:
        given = ["eval", str(folder), "-m", model, "--ratio", "4", "--depth", "3", "--out", str(out), "--calibrate"]
        monkeypatch.setattr(sys, "argv", ["kalm-rag", *given, *options])
        with pytest.raises(SystemExit) as done:
            cli.main()
        return done.value.code, *capsys.readouterr()

    code, shown, _ = evaluated("--aim", "recall=0.9")
    assert not code
    file = out / "threshold-profile.json"
    profile = ThresholdProfile.load(file)
    assert (profile.model_name, profile.scope.ratio, profile.aim) == (checkpoint.name, 4, "recall=0.9")
    # Four queries that nothing answers, and three whose answers are not in the corpus.
    assert profile.chosen.unanswered + profile.checked.unanswered >= 7
    assert f"Threshold for recall=0.9: P(yes) {profile.score:.4g}" in shown
    page = (out / "report.html").read_text()
    assert "Is the score a probability?" in page
    assert f"margin {profile.margin:.2f}" in page
    reranker = KaLMReranker(checkpoint, cache=out / "cache")
    query, texts = next(iter(corpus.queries.values())), list(corpus.passages.values())[:8]
    whole = reranker.rank(query, texts)
    found = reranker.rank(query, texts, threshold=file)
    assert [hit.index for hit in found] == [hit.index for hit in whole if hit.margin >= profile.margin]
    # For an aim that random weights cannot reach: nothing is encoded again, the page is there, and no profile is.
    code, shown, error = evaluated("--aim", "precision=1", "--json")
    assert code == 2
    assert "error: aim precision=1 cannot be reached" in error
    assert json.loads(shown)["thresholds"]["failure"] in error
    assert json.loads(shown)["thresholds"]["profile"] is None
    assert json.loads(shown)["encoding"][0]["new"] == 0
    assert "No threshold was chosen: aim precision=1 cannot be reached" in (out / "report.html").read_text()
    assert not file.exists()
