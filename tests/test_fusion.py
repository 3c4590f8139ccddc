"""Margins joined with the first stage's scores."""

from __future__ import annotations

import asyncio

import pytest
from evalkit import CORPUS

from kalm_rag import FirstStage, KaLMReranker


class TestFirstStage:
    def test_fused_scores_are_those_of_the_formulas(self) -> None:
        margins = [4.0, 0.0, 2.0]
        assert FirstStage([1, 3, 2]).fused(margins) == pytest.approx([0.5, 0.5, 0.5])
        assert FirstStage([1, 3, 2], weight=1.0).fused(margins) == pytest.approx([1.0, 0.0, 0.5])
        assert FirstStage([1, 3, 2], weight=0.0).fused(margins) == pytest.approx([0.0, 1.0, 0.5])
        found = FirstStage([5, 5, 1], "rrf").fused(margins)
        assert found == pytest.approx([1 / 61 + 1 / 61, 1 / 63 + 1 / 61, 1 / 62 + 1 / 63])

    def test_equal_and_extreme_scores(self) -> None:
        assert FirstStage([2, 2]).fused([1.0, 3.0]) == [0.0, 0.5]
        assert FirstStage([1.7e308, -1.7e308], weight=0.0).fused([0.0, 0.0]) == [1.0, 0.0]
        assert FirstStage([]).fused([]) == []

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"scores": [1.0, float("nan")]}, ValueError, r"scores\[1\] must be a finite number, got nan"),
            ({"scores": [10**400]}, ValueError, r"scores\[0\] must be a finite number"),
            ({"scores": ["1"]}, TypeError, r"scores\[0\] must be a number, got '1'"),
            ({"scores": [1.0], "fusion": "sum"}, ValueError, r"fusion must be one of \('weighted', 'rrf'\), got 'sum'"),
            ({"scores": [1.0], "weight": 2}, ValueError, "weight must be a number between 0 and 1, got 2"),
        ],
    )
    def test_bad_values(self, arguments: dict[str, object], error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            FirstStage(**arguments)  # type: ignore[arg-type]

    def test_rank_orders_by_the_fused_score(self, reranker: KaLMReranker) -> None:
        passages, scores = list(CORPUS.passages.values()), [0.0, 9.0, 3.0, 1.0]
        plain = reranker.rank("green pears", passages)
        margins = [hit.margin for hit in sorted(plain, key=lambda hit: hit.index)]
        for fusion in ("weighted", "rrf"):
            first = FirstStage(scores, fusion, 0.3)  # type: ignore[arg-type]
            found = reranker.rank("green pears", passages, first_stage=first)
            fused = first.fused(margins)
            assert [hit.index for hit in found] == sorted(range(4), key=lambda place: -fused[place])
            assert [hit.fused for hit in found] == pytest.approx(sorted(fused, reverse=True), abs=1e-5)
            assert [hit.margin for hit in found] == pytest.approx([margins[hit.index] for hit in found], abs=1e-5)
            assert reranker.rank("green pears", passages, 2, first_stage=first) == found[:2]
            assert asyncio.run(reranker.arank("green pears", passages, first_stage=first)) == found
            limit = sorted(hit.score for hit in plain)[2]
            kept = reranker.rank("green pears", passages, threshold=limit, first_stage=first)
            assert [hit.index for hit in kept] == [hit.index for hit in found if hit.score >= limit]
        assert all(hit.fused is None for hit in plain)
        with pytest.raises(ValueError, match="one score per passage, got 4 scores for 1 passages"):
            reranker.rank("q", passages[:1], first_stage=FirstStage(scores))
