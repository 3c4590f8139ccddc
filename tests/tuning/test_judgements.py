"""From judgements to lists: what is read, what is drawn, and what is said about bad input."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kalm_rag.evaluation.candidates import Candidates, bm25_candidates
from kalm_rag.retrieval.corpus import Corpus
from kalm_rag.tuning import Recipe, read_judgements
from kalm_rag.tuning import judgements as judgements_module
from kalm_rag.tuning.judgements import make_examples, notes_on, split_queries

RECIPE = Recipe(list_size=4, negatives=5, depth=5)


def lines(path: Path, *values: Any) -> Path:
    path.write_text("".join(f"{value if isinstance(value, str) else json.dumps(value)}\n" for value in values))
    return path


def corpus_of(count: int, qrels: dict[str, dict[str, int]]) -> Corpus:
    passages = {f"p{number}": f"common words and number{number}" for number in range(count)}
    return Corpus(passages, {query: f"common {query}" for query in qrels}, qrels)


def test_json_lines(tmp_path: Path) -> None:
    path = lines(
        tmp_path / "judged.jsonl",
        {"query": "one?", "positive": "a", "negatives": ["b", "c"]},
        "",
        {"query": "two?", "positive": ["b", "d"], "negatives": "a"},
        {"query": "one?", "positive": "c\ud83d", "negatives": []},
        {"query": "three?", "positive": "a"},
    )
    corpus = read_judgements(path)
    texts = {
        corpus.queries[query]: {corpus.passages[name]: value for name, value in judged.items()}
        for query, judged in corpus.qrels.items()
    }
    assert texts == {
        "one?": {"a": 1, "b": 0, "c": 0, "c\ufffd": 1},
        "two?": {"b": 1, "d": 1, "a": 0},
        "three?": {"a": 1},
    }
    assert len(corpus.passages) == 5, "a text is one passage wherever it stands"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: not JSON"),
        ([1], "line 1: expected an object with query, positive and negatives, got list"),
        ({"positive": "a"}, "line 1: query must be a text, got None"),
        ({"query": " ", "positive": "a"}, "line 1: query must be a text, got ' '"),
        ({"query": "q", "negatives": ["a"]}, "line 1: positive must be a text or a list of texts, got none"),
        ({"query": "q", "positive": []}, "line 1: positive must be a text or a list of texts, got none"),
        ({"query": "q", "positive": 7}, "line 1: positive must be a text or a list of texts, got 7"),
        (
            {"query": "q", "positive": ""},
            "line 1: positive must not hold an empty text, got ''; leave out what is empty",
        ),
        ({"query": "q", "positive": ["a", " "]}, r"line 1: positive must not hold an empty text, got \['a', ' '\]"),
        ({"query": "q", "positive": "a", "negatives": ""}, "line 1: negatives must not hold an empty text, got ''"),
        ({"query": "q", "positive": "a", "negatives": [None]}, "line 1: negatives must be a text or a list of texts"),
        ({"query": "q", "positive": "a", "negatives": ["a"]}, "line 1: 'a' is both positive and negative"),
        ("", "holds no judgement; each line is an object with query, positive and negatives"),
    ],
)
def test_lines_that_are_no_judgements(tmp_path: Path, line: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_judgements(lines(tmp_path / "judged.jsonl", line))


def test_a_beir_folder(tmp_path: Path) -> None:
    lines(tmp_path / "corpus.jsonl", {"_id": "a", "text": "one"}, {"_id": "b", "text": "two"})
    lines(tmp_path / "queries.jsonl", {"_id": "q", "text": "one?"})
    with pytest.raises(FileNotFoundError, match="no judgements: looked for .*train.tsv"):
        read_judgements(tmp_path)
    (tmp_path / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\n")
    with pytest.raises(ValueError, match="holds no judgement"):
        read_judgements(tmp_path)
    (tmp_path / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\nq\ta\t1\n")
    assert read_judgements(tmp_path).qrels == {"q": {"a": 1}}


def test_parts_of_a_split_are_apart_and_the_same_again() -> None:
    qrels = {f"q{number}": {f"p{number // 3}": 1} for number in range(60)}
    first = split_queries(qrels, RECIPE)
    assert first == split_queries(qrels, RECIPE)
    assert first != split_queries(qrels, replace(RECIPE, seed=1))
    parts = [first.train, first.validation, first.test]
    assert sorted(query for part in parts for query in part) == sorted(qrels)
    assert [len(part) for part in parts] == [38, 7, 15]
    by_passages = split_queries(qrels, RECIPE, by_passages=True)
    passages = [
        {name for query in part for name in qrels[query]}
        for part in (by_passages.train, by_passages.validation, by_passages.test)
    ]
    assert not (passages[0] & passages[1])
    assert not (passages[0] & passages[2])
    assert not (passages[1] & passages[2])
    shared = [{name for query in part for name in qrels[query]} for part in parts]
    assert shared[0] & shared[2], "a split by queries shares passages, so the other one says something"


def test_queries_that_share_passages_in_a_chain_stay_together() -> None:
    qrels = {f"q{number}": {f"p{number}": 1, f"p{number + 1}": 1} for number in range(30)}
    message = "measure: 30 of them, such as 'q0' and 'q29', are connected by relevant passages .*without by_passages"
    with pytest.raises(ValueError, match=f"30 judged queries cannot be divided .*{message}"):
        split_queries(qrels, RECIPE, by_passages=True)


def test_queries_that_are_held_out_by_name() -> None:
    qrels = {f"q{number}": {f"p{number // 3}": 1} for number in range(60)}
    found = split_queries(qrels, RECIPE, held_out=["q7", "q1"])
    assert (found.test, found.dropped) == (("q1", "q7"), ())
    assert len(found.train) + len(found.validation) == 58
    by_passages = split_queries(qrels, RECIPE, by_passages=True, held_out=["q7", "q1"])
    assert by_passages.test == ("q1", "q7")
    assert sorted(by_passages.dropped) == ["q0", "q2", "q6", "q8"]
    assert len(by_passages.train) + len(by_passages.validation) == 54
    corpus = corpus_of(60, qrels)
    said = notes_on(corpus, bm25_candidates(corpus, 5), by_passages)
    assert "4 queries share relevant passages with held-out queries, also by way of others, and are left out of " in (
        " ".join(said)
    )


@pytest.mark.parametrize(
    ("held_out", "error", "message"),
    [
        ("q12", TypeError, "held_out must be a collection of query ids, got the single text 'q12'; put it into a list"),
        (["q1", "q99"], ValueError, "names 1 queries without judgements, such as 'q99'; judged are 60, such as 'q0'"),
        ([1], ValueError, "names 1 queries without judgements, such as 1; judged are 60, such as 'q0': correct the"),
        ([f"q{number}" for number in range(59)], ValueError, "held_out names 59, so 1 are left; hold out fewer"),
    ],
)
def test_queries_that_cannot_be_held_out(held_out: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        split_queries({f"q{number}": {f"p{number}": 1} for number in range(60)}, RECIPE, held_out=held_out)


def test_the_reason_names_those_that_are_left_out() -> None:
    qrels = {f"q{number}": {f"p{number}": 1, f"p{number + 1}": 1} for number in range(30)}
    with pytest.raises(ValueError, match="and stay together, and 29 are left out because they share some with those"):
        split_queries(qrels, RECIPE, by_passages=True, held_out=["q3"])


def test_a_long_chain_is_followed_once() -> None:
    parents = {str(number): str(min(number + 1, 5000)) for number in range(5001)}
    assert judgements_module._root(parents, "0") == "5000"
    assert set(parents.values()) == {"5000"}


@pytest.mark.parametrize("count", [1, 2])
def test_too_few_queries_for_three_parts(count: int) -> None:
    with pytest.raises(ValueError, match=f"{count} judged queries cannot be divided .* judge at least 20"):
        split_queries({f"q{number}": {"p": 1} for number in range(count)}, RECIPE)


def test_lists_hold_a_positive_and_other_passages() -> None:
    corpus = corpus_of(30, {"number1": {"p1": 2, "p2": 1, "p3": 0, "p4": 0, "gone": 1}})
    candidates = bm25_candidates(corpus, 5)
    [example], warnings = make_examples(corpus, candidates, ["number1"], RECIPE)
    assert warnings == []
    assert set(example.positives) == {corpus.passages["p1"], corpus.passages["p2"]}
    assert set(example.judged) == {corpus.passages["p3"], corpus.passages["p4"]}
    drawn = [example.draw(4, random.Random(seed)) for seed in range(20)]
    assert {one[0] for one in drawn} == set(example.positives)
    for positive, *others in drawn:
        assert len({positive, *others}) == 4
        assert set(example.judged) <= set(others), "what was judged irrelevant comes first"
        assert not set(others) & set(example.positives)


def test_what_the_first_stage_lacks_is_filled_with_other_passages() -> None:
    corpus = corpus_of(30, {"q": {"p1": 1}})
    candidates = Candidates("none", {"q": []}, corpus.qrels, ())
    [example], _ = make_examples(corpus, candidates, ["q"], RECIPE)
    assert len(example.draw(4, random.Random(0))) == 4
    assert corpus.passages["p1"] not in example.found


def test_copies_of_the_relevant_passage_are_no_negatives() -> None:
    corpus = Corpus({"a": "same text", "b": "same text", "c": "other text"}, {"q": "text"}, {"q": {"a": 1, "b": 0}})
    [example], _ = make_examples(corpus, bm25_candidates(corpus, 5), ["q"], RECIPE)
    assert (example.positives, example.judged, example.found) == (("same text",), (), ("other text",))


def test_queries_without_a_negative_are_left_out_and_counted() -> None:
    equal = Corpus({"a": "same text", "b": "same text"}, {"q": "text", "r": "text"}, {"q": {"a": 1}, "r": {"b": 1}})
    with pytest.raises(ValueError, match="none of 2 queries can be trained on: 0 have no relevant .*, 2 have no neg"):
        make_examples(equal, bm25_candidates(equal, 5), ["q", "r"], RECIPE)
    mixed = corpus_of(4, {"q": {"p1": 1}, "r": {f"p{number}": 1 for number in range(4)}, "s": {"gone": 1, "p1": 0}})
    found, warnings = make_examples(mixed, bm25_candidates(mixed, 5), ["q", "r", "s"], RECIPE)
    assert [one.query for one in found] == ["common q"]
    assert warnings == [
        "1 queries have no relevant passage in the corpus and are left out",
        "1 queries have no negative that differs from their relevant passages and are left out",
    ]


def test_ids_that_are_not_in_the_corpus() -> None:
    qrels = {f"q{number}": {f"p{number}": 1} for number in range(30)} | {"lost": {"gone": 1}}
    assert any("1 relevant passages are not in the corpus" in text for text in notes(corpus_of(30, qrels)))
    with pytest.raises(ValueError, match="none of the 2 relevant passages is in the corpus .*: the judgements are of"):
        bm25_candidates(corpus_of(3, {"q": {"gone": 1}, "r": {"away": 1}}), 5)


def notes(corpus: Corpus) -> list[str]:
    candidates = bm25_candidates(corpus, 5)
    return notes_on(corpus, candidates, split_queries(candidates.qrels, RECIPE))


def test_few_queries_and_only_positives_are_said_beforehand() -> None:
    few = {f"q{number}": {f"p{number}": 1} for number in range(19)}
    assert any(text.startswith("only 19 judged queries: 12 train and 5 measure") for text in notes(corpus_of(40, few)))
    assert not any("no negatives are given" in text for text in notes(corpus_of(40, few))), "the corpus has others"
    assert any("no negatives are given" in text for text in notes(corpus_of(19, few)))
    enough = {f"number{number}": {f"p{number}": 1} for number in range(20)}
    assert notes(corpus_of(40, enough)) == []


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("ratios", (), "ratios must name at least one"),
        ("ratios", (0,), "ratios must be at least 1, got 0"),
        ("list_size", 1, "list_size must be at least 2"),
        ("epochs", 0, "epochs must be at least 1, got 0"),
        ("rate", 0.0, "rate must be a number above 0 and below 1, got 0.0"),
        ("rate", float("nan"), "rate must be a number above 0 and below 1, got nan"),
        ("test", 1.0, "test must be a number above 0 and below 1, got 1.0"),
        ("seed", 1.5, "seed must be an integer, got 1.5"),
    ],
)
def test_a_recipe_that_cannot_be_followed(field: str, value: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        Recipe(**{field: value})


def test_numbers_of_numpy_become_those_of_python() -> None:
    given = {"ratios": (np.int64(4),), "epochs": np.int32(3), "rate": np.float32(0.5), "seed": np.int64(7)}
    found = Recipe(**given)  # type: ignore[arg-type]
    assert found == Recipe(ratios=(4,), epochs=3, rate=0.5, seed=7)
    assert json.loads(json.dumps(asdict(found)))["epochs"] == 3
    assert {type(value) for value in asdict(found).values()} == {tuple, int, float}
