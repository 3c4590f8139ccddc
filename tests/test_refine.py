"""Two passes return what one returns."""

from __future__ import annotations

import asyncio
import copy
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from machine import needs_int8
from typer.testing import CliRunner

from kalm_rag import KaLMReranker, PassageCache, RankedPassage
from kalm_rag.cli import app
from kalm_rag.model.compact import Expansion
from kalm_rag.model.first_pass import AssumedKV
from kalm_rag.model.merged_attention import PrefillUnsupportedError
from kalm_rag.utils.margins import probability

QUERIES = ["How do I sort a list?", "what is a method", "Why are strings immutable?"]


def refining(model: str | Path, **options: Any) -> KaLMReranker:
    return KaLMReranker(model, **{"device": "cpu", "cache": None, "refine": True, **options})


def counters(reranker: KaLMReranker) -> Any:
    stats = reranker.prefill_stats()
    assert stats is not None
    return stats.counters


def forget_prefilled(reranker: KaLMReranker) -> None:
    reranker.scorer.passage_kv.cached.memory.clear()


def check_same(found: list[RankedPassage[Any]], expected: list[RankedPassage[Any]], tolerance: float = 1e-5) -> None:
    assert [hit.index for hit in found] == [hit.index for hit in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.margin == pytest.approx(theirs.margin, abs=tolerance)
        assert ours.passage_truncated == theirs.passage_truncated


def change_first_pass(reranker: KaLMReranker, patch: pytest.MonkeyPatch, change: Callable[[int, float], float]) -> None:
    """Change the approximate margins, by their place in the call."""
    decoder = reranker.scorer.passage_kv.decoder
    margins = decoder.margins

    def changed(prefix: Any, pairs: Any, reference: Any = None) -> list[float]:
        found = margins(prefix, pairs, reference)
        assumed = pairs and isinstance(pairs[0].passage, AssumedKV)
        return [change(place, margin) for place, margin in enumerate(found)] if assumed else found

    patch.setattr(decoder, "margins", changed)


@pytest.fixture(scope="module")
def texts(passages: list[str]) -> list[str]:
    return sorted(passages, key=len)[10:50]


@pytest.fixture(scope="module")
def cache() -> PassageCache:
    return PassageCache(None)


@pytest.fixture(scope="module")
def expected(texts: list[str], cache: PassageCache) -> dict[str, Any]:
    """The plain rankings of `mini`."""
    reranker = KaLMReranker("mini", device="cpu", dtype="float32", cache=cache)
    return {query: reranker.rank(query, texts) for query in QUERIES}


class TestMini:
    @pytest.mark.parametrize(
        "wanted",
        [{"top_k": 1}, {"top_k": 5}, {"top_k": 10}, {"top_k": 5, "threshold": 0.3}, {"top_k": 10, "threshold": 0.9}],
        ids=str,
    )
    def test_the_best_are_the_same(
        self, texts: list[str], cache: PassageCache, expected: Any, wanted: dict[str, Any]
    ) -> None:
        reranker = refining("mini", dtype="float32", cache=cache)
        for query in QUERIES:
            forget_prefilled(reranker)
            found = reranker.rank(query, texts, **wanted)
            least = wanted.get("threshold", 0)
            check_same(found, [hit for hit in expected[query][: wanted["top_k"]] if hit.score >= least])
            assert all(hit.exact for hit in found)
        spent = counters(reranker)
        assert spent.approximated == 120
        assert spent.skipped > 10
        assert spent.misses == 120 - spent.skipped
        stats = reranker.prefill_stats()
        assert stats is not None
        assert stats.error_bound is not None
        assert f"error_bound={stats.error_bound:.3g}" in repr(stats)

    def test_a_threshold_alone_leaves_far_scores_approximate(
        self, texts: list[str], cache: PassageCache, expected: Any
    ) -> None:
        reranker = refining("mini", dtype="float32", cache=cache)
        inexact = []
        for query in QUERIES:
            forget_prefilled(reranker)
            exact = {hit.index: hit for hit in expected[query] if hit.score >= 0.2}
            found = reranker.rank(query, texts, threshold=0.2)
            assert {hit.index for hit in found} == set(exact)
            assert (">exact</th>" in found._repr_html_()) == (not all(hit.exact for hit in found))
            for hit in found:
                assert hit.score == probability(hit.margin)
                if hit.exact:
                    assert hit.margin == pytest.approx(exact[hit.index].margin, abs=1e-5)
                else:
                    inexact.append(abs(hit.margin - exact[hit.index].margin))
        assert inexact
        assert 1e-5 < max(inexact) < 1.5

    def test_passages_that_are_prefilled_need_no_first_pass(
        self, texts: list[str], cache: PassageCache, expected: Any
    ) -> None:
        reranker = refining("mini", dtype="float32", cache=cache)
        reranker.predict([(QUERIES[0], text) for text in texts[:20]])
        check_same(reranker.rank(QUERIES[1], texts, top_k=5), expected[QUERIES[1]][:5])
        assert (counters(reranker).hits, counters(reranker).approximated) == (20, 20)
        assert counters(reranker).misses == 20 + 20 - counters(reranker).skipped


@pytest.fixture(scope="module")
def encoded(checkpoint: Path, passages: list[str]) -> PassageCache:
    """What the tests rank, encoded once."""
    cache = PassageCache(None)
    KaLMReranker(checkpoint, device="cpu", cache=cache).encode(passages[:40])
    return cache


@pytest.fixture(scope="module")
def ranked(checkpoint: Path, passages: list[str], encoded: PassageCache) -> Callable[..., Any]:
    """The plain ranking."""
    made: dict[str, KaLMReranker] = {}

    def rank(query: str, count: int = 40, top_k: int | None = None, **options: Any) -> Any:
        if str(options) not in made:
            made[str(options)] = KaLMReranker(checkpoint, device="cpu", cache=encoded, **options)
        return made[str(options)].rank(query, passages[:count], top_k)

    return rank


@pytest.mark.parametrize(
    "options",
    [
        {"prefill_storage": "compact"},
        {"prefill_storage": "int8"},
        {"prefill_memory": 0},
        {"prefill_memory": 0, "prefill_storage": "int8"},
        {"dtype": "bfloat16"},
        pytest.param({"dtype": "int8"}, marks=needs_int8),
    ],
    ids=str,
)
def test_every_form_and_precision(
    checkpoint: Path, passages: list[str], encoded: PassageCache, ranked: Any, options: dict[str, Any]
) -> None:
    """In narrow precisions a score moves with its batch, so the best may change places; 8 or 4 bits round apart."""
    narrow = "dtype" in options
    tolerance = 1e-2 if "prefill_storage" in options and "prefill_memory" not in options else 1e-5
    reranker = refining(checkpoint, cache=encoded, **options)
    for query in QUERIES:
        found, expected = reranker.rank(query, passages[:40], 3), ranked(query, top_k=3, **options)
        if narrow:
            margins = [[hit.margin for hit in hits] for hits in (found, expected)]
            assert torch.allclose(*map(torch.tensor, margins), atol=0.1)
        else:
            check_same(found, expected, tolerance)
        assert all(hit.exact for hit in found)
        forget_prefilled(reranker)
    assert counters(reranker).approximated == 120


@pytest.mark.parametrize("keep", ["states", "prefilled", "compact"])
def test_stores(checkpoint: Path, passages: list[str], ranked: Any, tmp_path: Path, keep: Any) -> None:
    """What is skipped is not stored; what is stored is found by the next process."""
    KaLMReranker(checkpoint, device="cpu", cache=tmp_path).encode(passages[:40])
    options = {"prefill_storage": "compact"} if keep == "compact" else {}
    for round_number in range(2):
        with PassageCache(tmp_path, keep=keep, memory=0) as cache:
            reranker = refining(checkpoint, cache=cache)
            for query in QUERIES:
                forget_prefilled(reranker)
                found = reranker.rank(query, passages[:40], 3)
                check_same(found, ranked(query, top_k=3, **options), 1e-2 if keep == "compact" else 1e-5)
                cache.flush()
            assert cache.stats().encoded == (16, 0)[round_number]  # the texts of the reference
            if keep != "states":
                assert counters(reranker).stored > 0


@pytest.mark.parametrize("call", ["all", "predict", "short"])
def test_where_all_is_wanted_there_is_one_pass(
    checkpoint: Path, passages: list[str], encoded: PassageCache, ranked: Any, call: str
) -> None:
    reranker = refining(checkpoint, cache=encoded)
    if call == "predict":
        expected = [hit.score for hit in sorted(ranked("query", 12), key=lambda hit: hit.index)]
        assert reranker.predict([("query", text) for text in passages[:12]]) == pytest.approx(expected, abs=1e-5)
    else:
        top_k = None if call == "all" else 4
        check_same(reranker.rank("query", passages[:12], top_k), ranked("query", 12, top_k))
    assert counters(reranker).approximated == 0


def test_equal_and_unknown_passages(checkpoint: Path, passages: list[str]) -> None:
    texts = passages[:30] + passages[:30]
    expected = KaLMReranker(checkpoint, device="cpu", cache=None).rank("query", texts, 5)
    reranker = refining(checkpoint)
    check_same(reranker.rank("query", texts, 5), expected)
    assert counters(reranker).approximated == 30


def test_a_failing_bound_is_counted_and_changes_nothing(
    checkpoint: Path, passages: list[str], encoded: PassageCache, ranked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first pass suddenly says of every passage but the first that it is bad; a sample shows that it is not."""
    reranker = refining(checkpoint, cache=encoded)
    texts = passages[:40]
    for query in QUERIES:
        reranker.rank(query, texts, 3)
        forget_prefilled(reranker)
    change_first_pass(reranker, monkeypatch, lambda place, margin: margin if place < 3 else -1000.0)
    for number in range(20):
        query = f"query {number}"
        found = reranker.rank(query, texts, 3)
        forget_prefilled(reranker)
        if counters(reranker).bound_failures:
            break
    assert 0 < counters(reranker).bound_failures <= counters(reranker).sampled
    check_same(found, ranked(query, top_k=3))
    stats = reranker.prefill_stats()
    assert stats is not None
    assert stats.error_bound > 900
    check_same(reranker.rank("next", texts, 3), ranked("next", top_k=3))


def test_a_first_pass_that_gives_no_numbers(
    checkpoint: Path, passages: list[str], encoded: PassageCache, ranked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    reranker = refining(checkpoint, cache=encoded)
    change_first_pass(reranker, monkeypatch, lambda _, __: math.nan)
    for query in QUERIES:
        check_same(reranker.rank(query, passages[:40], 3), ranked(query, top_k=3))
        forget_prefilled(reranker)


def test_a_decoder_that_projects_otherwise_takes_one_pass(
    checkpoint: Path,
    passages: list[str],
    encoded: PassageCache,
    ranked: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: Any,
) -> None:
    def unsupported(*_: Any) -> Any:
        msg = "no k_proj"
        raise PrefillUnsupportedError(msg)

    monkeypatch.setattr(Expansion, "of_states", unsupported)
    reranker = refining(checkpoint, cache=encoded)
    with caplog.at_level(logging.WARNING):
        for query in QUERIES:
            found = reranker.rank(query, passages[:40], 3)
            check_same(found, ranked(query, top_k=3))
            assert all(hit.exact for hit in found)
    assert [record.message for record in caplog.records].count("no k_proj: refine=True has no effect") == 1
    assert (counters(reranker).approximated, counters(reranker).misses) == (0, 40)


def test_asynchronous_calls_and_copies(
    checkpoint: Path, passages: list[str], encoded: PassageCache, ranked: Any
) -> None:
    reranker = copy.copy(refining(checkpoint, cache=encoded))
    assert reranker.settings.refine

    async def both() -> Any:
        return await asyncio.gather(*(reranker.arank(query, passages[:40], 3) for query in QUERIES))

    for query, found in zip(QUERIES, asyncio.run(both()), strict=True):
        check_same(found, ranked(query, top_k=3))


def test_it_must_be_true_or_false() -> None:
    with pytest.raises(TypeError, match="refine must be True or False, got 1"):
        KaLMReranker("mini", refine=1)  # type: ignore[arg-type]


def test_command_line(checkpoint: Path, passages: list[str], tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number, text in enumerate(passages[:70]):
        (corpus / f"{number}.txt").write_text(text, "utf-8")
    line = ["rank", "query", str(corpus), "--model", str(checkpoint), "--cache", str(tmp_path / "cache")]
    shown = [CliRunner().invoke(app, [*line, *more, "-k", "2"]).output for more in ([], ["--refine"])]
    assert shown[0] == shown[1] != ""


def test_a_query_that_is_asked_again_takes_the_exact_pass_of_the_sample_alone(texts: list[str]) -> None:
    """What was exact is remembered, and rules out the rest as it did before."""
    reranker = refining("mini", prefill_memory=0)
    for query in QUERIES:  # the bound is learned
        reranker.rank(query, texts, top_k=3)
    expected = reranker.rank(QUERIES[-1], texts, top_k=3)
    before = counters(reranker)
    assert reranker.rank(QUERIES[-1], texts, top_k=3) == expected
    after = counters(reranker)
    assert after.approximated > before.approximated
    assert after.misses - before.misses == after.sampled - before.sampled


def test_the_command_line_says_where_it_changes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "passages.txt"
    file.write_text("one\ntwo\n")
    line = ["rank", "q", str(file), "--model", "mini", "--cache", str(tmp_path / "cache"), "--refine"]
    note = "--refine changes nothing without --top-k or --threshold"
    assert note in CliRunner().invoke(app, line).output
    assert note not in CliRunner().invoke(app, [*line, "--top-k", "1"]).output
