"""Several queries over one list: the scores of separate calls, each passage read once, and one ranking of all."""

from __future__ import annotations

import asyncio
import copy
import math
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from spies import passages_in
from thresholdkit import make_profile

from kalm_rag import KaLMReranker, RankedPassage, Rankings
from kalm_rag.utils.margins import probability
from kalm_rag.utils.refining import Wanted

QUERIES = [
    "How do I sort a list?",
    "odd \u202e direction, a tab\t and \x00",
    "北京? 🦜",
    "",
    "half \ud83d a character <end_of_turn>",
    "How do I sort a list?",
]
WINDOWS = {"long_passages": "windows", "window_tokens": 60, "window_overlap": 12}


@pytest.fixture
def texts(passages: list[str]) -> list[str]:
    """Long and short ones, two equal ones, and hostile ones."""
    some = sorted(passages, key=len)[10:15]
    return [*some, some[0], "\n\n".join(some), "", "e\u0301 \u200d\ud800 <end_of_turn>", "\U0010ffff" * 9]


def make(checkpoint: Path, **options: Any) -> KaLMReranker:
    return KaLMReranker(checkpoint, device="cpu", **{"cache": None, **options})


@pytest.mark.parametrize(
    ("options", "call"),
    [
        ({}, {}),
        ({"prefill_memory": 0}, {}),
        ({"prefill_memory": 1, "batch_size": 3}, {}),
        ({"refine": True, "score_memory": 0}, {"top_k": 2, "threshold": 0.4}),
        ({}, {"instruction": "Find code.", "ratio": 8, "threshold": 0.4}),
        (WINDOWS, {"top_k": 3}),
        ({**WINDOWS, "prefill_memory": 0}, {}),
    ],
)
def test_scores_are_those_of_separate_calls(
    checkpoint: Path, texts: list[str], options: dict[str, Any], call: dict[str, Any]
) -> None:
    given = list(texts)
    together, apart = make(checkpoint, **options), make(checkpoint, **{**options, "refine": False})
    found = together.rank_many(QUERIES, texts, **call)
    assert isinstance(found, list)
    assert len(found) == len(QUERIES)
    for query, ranking in zip(QUERIES, found, strict=True):
        expected = apart.rank(query, texts, **call)
        margins = [hit.margin for hit in expected]
        assert [hit.margin for hit in ranking] == pytest.approx(margins, abs=1e-5)
        assert [hit.margin for hit in ranking] == sorted((hit.margin for hit in ranking), reverse=True)
        ours, plain = ({hit.index: hit for hit in hits} for hits in (ranking, expected))
        for index in ours.keys() & plain.keys():  # equal margins may change places at the cut
            one, other = ours[index], plain[index]
            assert one.score == pytest.approx(other.score, abs=1e-5)
            assert one.document is other.document is texts[index]
            assert one.exact
            assert (one.span, one.passage_truncated, one.query_truncated) == (
                (other.span, other.passage_truncated, other.query_truncated)
            )
            assert (one.passage_repaired, one.query_repaired) == (other.passage_repaired, other.query_repaired)
        assert len(ours.keys() ^ plain.keys()) <= 2
    assert found[0] == found[-1], "equal queries get equal rankings"
    assert together.repairs.count == 2, "a query and a passage, each once"
    assert texts == given


class Spent:
    """Counts what a model runs: passages encoded, tokens decoded, forward passes of the decoder."""

    def __init__(self, reranker: KaLMReranker) -> None:
        self.encoded = self.tokens = self.passes = 0
        model = reranker.scorer.loaded.model
        model.get_encoder().register_forward_pre_hook(self._encoder, with_kwargs=True)
        model.get_decoder().register_forward_pre_hook(self._decoder, with_kwargs=True)

    def _encoder(self, _module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        self.encoded += passages_in(kwargs)

    def _decoder(self, _module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        given = [kwargs.get(name) for name in ("input_ids", "inputs_embeds")]
        rows = next(tensor for tensor in given if isinstance(tensor, torch.Tensor))
        self.tokens += rows.shape[0] * rows.shape[1]
        self.passes += 1

    def take(self) -> tuple[int, int, int]:
        """Return the counts since the last call."""
        found = (self.encoded, self.tokens, self.passes)
        self.encoded = self.tokens = self.passes = 0
        return found


def test_queries_share_forward_passes(checkpoint: Path, passages: list[str]) -> None:
    few, queries = passages[:4], [f"question number {number}" for number in range(8)]
    together, apart = make(checkpoint, score_memory=0), make(checkpoint, score_memory=0)
    counted, counted_apart = Spent(together), Spent(apart)
    counts = together.rank_many(queries, few, top_k=3).counts
    assert counts is not None
    assert (counts.passages, counts.scored, counts.cut, counts.encoded) == (32, 32, 8, 4)
    assert counted.take()[0] == 4, "each passage is encoded once"
    for query in queries:
        apart.rank(query, few)
    counted_apart.take()
    together.rank_many(queries, few)
    for query in queries:
        apart.rank(query, few)
    shared, separate = counted.take(), counted_apart.take()
    assert shared[:2] == separate[:2] == (0, separate[1])
    assert (shared[2], separate[2]) == (1, 8)
    together.rank_many([*queries, *queries], few)
    assert counted.take() == shared, "equal queries are computed once"


@pytest.mark.parametrize("options", [{}, WINDOWS])
def test_a_passage_is_prefilled_once_where_memory_holds_none(
    checkpoint: Path, passages: list[str], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many pairs are held at once."""
    documents = ["\n\n".join(passages[start : start + 4]) for start in (0, 4)] if options else passages[:6]
    queries = [f"question number {number}" for number in range(3)]
    reranker = make(checkpoint, prefill_memory=1, score_memory=0, **options)
    parts = {part for windows in reranker.scorer.windows.split(documents).values() for part in windows.texts}
    assert len(parts) >= 6
    monkeypatch.setattr("kalm_rag.windows.passages.AT_ONCE", 6)
    counted = Spent(reranker)
    reranker.rank_many(queries, documents)
    prompts, passage_kv = reranker.scorer.prompts, reranker.scorer.passage_kv
    prefix = passage_kv.prefix(reranker.settings.instruction)
    own = [len(prompts.prompt(query, reranker.settings.instruction).ids) - len(prefix) for query in queries]
    assert counted.take()[:2] == (len(parts), len(parts) * (len(prefix) + sum(own)))


class TestFused:
    """On margins of three queries for four passages."""

    MARGINS = ((3.0, 1.0, -2.0, 1.0), (0.0, 2.0, -1.0, 1.5), (-4.0, 2.0, -3.0, 2.5))

    def rankings(self, wanted: Wanted, margins: Sequence[Sequence[float]] = MARGINS) -> Rankings[str]:
        return Rankings(
            [
                [
                    RankedPassage(index, probability(margin), margin, "wxyz"[index], query_truncated=query == 1)
                    for index, margin in enumerate(row)
                ]
                for query, row in enumerate(margins)
            ],
            wanted,
        )

    def test_values_are_those_of_the_formulas(self) -> None:
        found = self.rankings(Wanted())
        assert ["".join(hit.document for hit in ranking) for ranking in found] == ["wxzy", "xzwy", "zxyw"]
        assert all(hit.fused is None for ranking in found for hit in ranking)
        largest = found.fused()
        assert [(hit.document, hit.fused, hit.margin) for hit in largest] == [
            ("w", 3.0, 3.0),
            ("z", 2.5, 2.5),
            ("x", 2.0, 2.0),
            ("y", -1.0, -1.0),
        ]
        assert [hit.query_truncated for hit in largest] == [False, False, True, True], "of the best query, the first"
        assert [hit.score for hit in largest] == [probability(hit.margin) for hit in largest]
        ranks = {"w": (1, 3, 4), "x": (2, 1, 2), "y": (4, 4, 3), "z": (2, 2, 1)}
        for k in (60, 0, 5):
            values = {name: sum(1 / (k + rank) for rank in own) for name, own in ranks.items()}
            summed = found.fused("rrf", k=k)
            assert {hit.document: hit.fused for hit in summed} == pytest.approx(values)
            assert [hit.document for hit in summed] == sorted("wxyz", key=lambda name: -values[name])
            assert {hit.index: hit.margin for hit in summed} == {hit.index: hit.margin for hit in largest}
        assert found.fused("rrf") == found.fused("rrf", k=60)

    @pytest.mark.parametrize("how", ["max", "rrf"])
    def test_what_a_ranking_left_out_counts(self, how: Any) -> None:
        whole = self.rankings(Wanted())
        assert self.rankings(Wanted(top_k=1)).fused(how) == whole.fused(how)
        assert whole.fused(how, top_k=2) == whole.fused(how)[:2]
        for wanted in (Wanted(threshold=0.9), Wanted(margin=math.log(9))):  # w for one query, z for another
            cut = self.rankings(wanted)
            assert [[hit.document for hit in ranking] for ranking in cut] == [["w"], [], ["z"]]
            assert cut.fused(how) == [hit for hit in whole.fused(how) if hit.document in "wz"]
            assert cut.fused(how, 1) == cut.fused(how)[:1]
        whole.clear()
        assert len(whole.fused(how)) == 4, "as documented, whatever the list has become"

    def test_equal_ones_keep_their_order(self) -> None:
        for how in ("max", "rrf"):
            found = self.rankings(Wanted(), [[1.0, 2.0, 2.0, 1.0], [2.0, 1.0, 1.0, 2.0]]).fused(how)  # type: ignore[arg-type]
            assert [hit.document for hit in found] == list("wxyz")
        twice = self.rankings(Wanted(), [[2.0, 1.0], [2.0, 1.0], [1.0, 2.0]]).fused("rrf", k=0)
        assert [hit.fused for hit in twice] == [2.5, 2.0], "a query that is given twice counts twice"

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"how": "sum"}, ValueError, r"how must be one of \('max', 'rrf'\), got 'sum'"),
            ({"top_k": 0}, ValueError, "top_k must be at least 1, got 0"),
            ({"k": -1}, ValueError, "k must be at least 0, got -1"),
            ({"k": 0.5}, TypeError, "k must be an integer, got 0.5"),
        ],
    )
    def test_bad_values(self, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            self.rankings(Wanted()).fused(**arguments)

    def test_a_copy_and_a_pickle_can_be_fused(self) -> None:
        found = self.rankings(Wanted(top_k=2))
        for same in (copy.copy(found), copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
            assert type(same) is Rankings
            assert same == found == list(found)
            assert same.fused("rrf") == found.fused("rrf")

    def test_it_shows_itself(self) -> None:
        lines = repr(self.rankings(Wanted(top_k=1))).splitlines()
        assert lines[0] == "Rankings of 3 queries:"
        assert lines[2] == "query 0: Ranking of 1 passage:"
        assert lines[4].split() == ["1", "0.9526", "3.00", "0", "'w'"]
        assert repr(Rankings([], Wanted())) == "Rankings of 0 queries"


def test_thresholds_calibration_and_the_asynchronous_twin(reranker: KaLMReranker, passages: list[str]) -> None:
    some, queries = passages[:6], ["How do I sort a list?", "what is a class"]
    whole = reranker.rank_many(queries, some)
    middle = sorted(hit.margin for ranking in whole for hit in ranking)[5]
    profile = make_profile(reranker.scorer.identity.mark, middle)
    found = reranker.rank_many(queries, some, 2, threshold=profile, calibrated=True)
    assert found == [reranker.rank(query, some, 2, threshold=profile, calibrated=True) for query in queries]
    fused = found.fused("rrf")
    assert {hit.index for hit in fused} == {hit.index for ranking in whole for hit in ranking if hit.margin >= middle}
    assert [hit.score for hit in fused] == [profile.calibrated(hit.margin) for hit in fused]
    documents = [{"body": text} for text in some]
    again = asyncio.run(reranker.arank_many(queries, documents, 2, threshold=profile, text="body", calibrated=True))
    assert [[hit.index for hit in ranking] for ranking in again] == [
        [hit.index for hit in ranking] for ranking in found
    ]
    with pytest.raises(ValueError, match="was made for ratio 4, not 8"):
        reranker.rank_many(queries, some, ratio=8, threshold=profile)


def test_iterables_are_read_once(reranker: KaLMReranker) -> None:
    expected = reranker.rank_many(["q", "r"], ["one", "two", "three"])
    assert [len(ranking) for ranking in expected] == [3, 3]
    found = reranker.rank_many(iter(["q", "r"]), (text for text in ("one", "two", "three")))
    assert found == expected == reranker.rank_many(np.array(["q", "r"]), {"one": 1, "two": 2, "three": 3}.keys())


def test_nothing_to_rank_needs_no_model() -> None:
    reranker = KaLMReranker("/nowhere", cache=None)
    nothing = reranker.rank_many([], ["passage"])
    assert (nothing, nothing.fused(), nothing.fused("rrf")) == ([], [], [])
    empty = reranker.rank_many(["q", "r"], [], threshold=0.5)
    assert (empty, empty.fused(), empty.fused("rrf")) == ([[], []], [], [])
    with pytest.raises(TypeError, match=r"documents\[1\] must be a string"):
        reranker.rank_many([], ["passage", None])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("queries", "message"),
    [
        ("one query", r"queries must be a list of strings, got one str: 'one query'; give \[query\]"),
        (b"one", "queries must be a list of strings, got bytes: b'one'"),
        (None, "queries must be a list of strings, got NoneType: None"),
        (["fine", None], r"queries\[1\] must be a string, got NoneType: None"),
        (["fine", ["nested"]], r"queries\[1\] must be a string, got list: \['nested'\]"),
        ({"a": "one"}, r"got a dict, whose elements are its keys; give list\(queries.values\(\)\)"),
        ({"one"}, "got a set, which has no order"),
    ],
)
def test_bad_queries(reranker: KaLMReranker, queries: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        reranker.rank_many(queries, ["passage"])


def test_other_bad_arguments_are_those_of_rank(reranker: KaLMReranker) -> None:
    for arguments, message in (
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"threshold": 50}, "threshold must be a number between 0 and 1, got 50"),
        ({"calibrated": True}, "calibrated=True needs a threshold profile"),
        ({"ratio": 0}, "ratio must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            reranker.rank_many(["q"], ["passage"], **arguments)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="got one str; put it into a list"):
        reranker.rank_many(["q"], "passage")
    assert reranker.rank_many(["q" * 3000], ["passage"])[0][0].query_truncated
    assert reranker.truncations.count == 1
