"""Pooling and batch planning, alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kalm_rag import KaLMReranker, PassageCache
from kalm_rag.model.batching import plan, plan_pairs
from kalm_rag.model.pooling import PassageStates, mean_groups
from kalm_rag.utils.checks import warn_untrained
from kalm_rag.utils.margins import probability


def plain_means(hidden: torch.Tensor, ratio: int) -> torch.Tensor:
    return torch.stack([hidden[start : start + ratio].mean(dim=0) for start in range(0, len(hidden), ratio)])


@given(st.integers(1, 90), st.sampled_from([1, 2, 3, 4, 8, 32, 128]), st.integers(0, 9))
def test_mean_groups_equals_means_and_ignores_padding(tokens: int, ratio: int, padding: int) -> None:
    hidden = torch.randn(tokens, 5, generator=torch.Generator().manual_seed(tokens))
    padded = torch.cat([hidden, torch.full((padding, 5), 1e9)])
    weights = torch.cat([torch.ones(tokens), torch.zeros(padding)])
    found = mean_groups(padded[None], weights[None], ratio)[0, : -(-tokens // ratio)]
    torch.testing.assert_close(found, plain_means(hidden, ratio), atol=1e-6, rtol=1e-6)


@given(st.integers(1, 300), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 3, 4, 8, 16, 32]))
def test_a_coarser_ratio_is_derived_exactly(tokens: int, base: int, factor: int) -> None:
    hidden = torch.randn(tokens, 5, generator=torch.Generator().manual_seed(tokens))
    stored = PassageStates(plain_means(hidden, base), tokens, base, truncated=False)
    derived = stored.at(base * factor)
    torch.testing.assert_close(derived.states, plain_means(hidden, base * factor), atol=1e-6, rtol=1e-6)
    assert (derived.tokens, derived.ratio) == (tokens, base * factor)


def test_a_ratio_that_is_no_multiple_is_refused() -> None:
    with pytest.raises(ValueError, match="kept at ratio 4 give its multiples, not ratio 6"):
        PassageStates(torch.zeros(3, 2), 12, 4, truncated=False).at(6)


@pytest.mark.parametrize("ratio", [300, 10**12])
def test_a_ratio_above_the_tokens_is_one_group_and_takes_no_memory(ratio: int) -> None:
    hidden = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(mean_groups(hidden, torch.ones(7), ratio), hidden.mean(0, keepdim=True))
    merged = PassageStates(hidden, 7, 1, truncated=False).at(ratio)
    torch.testing.assert_close(merged.states, hidden.mean(0, keepdim=True))
    assert merged.states.shape == (1, 5)


@given(st.integers(1, 40), st.sampled_from([2, 4, 32, 128]))
def test_the_numbers_of_a_passage_do_not_depend_on_its_batch(tokens: int, ratio: int) -> None:
    hidden = torch.randn(tokens, 5, generator=torch.Generator().manual_seed(tokens))
    padded = torch.cat([hidden, torch.ones(200 - tokens, 5)])[None]
    weights = (torch.arange(200) < tokens).float()[None]
    together = mean_groups(padded, weights, ratio)[0, : -(-tokens // ratio)]
    assert torch.equal(mean_groups(hidden, torch.ones(tokens), ratio), together)


@pytest.mark.parametrize("base_ratio", [4, 10**10])
def test_any_ratio_scores_and_keeps(checkpoint: Path, tmp_path: Path, base_ratio: int) -> None:
    texts = ["a short passage", "a passage that is a little longer than the other one"]
    expected = KaLMReranker(checkpoint, cache=None, device="cpu").rank("query", texts, ratio=1024)
    for _ in range(2):
        cache = PassageCache(tmp_path, base_ratio=base_ratio)
        reranker = KaLMReranker(checkpoint, cache=cache, device="cpu", prefill_memory=0)
        for ratio in (1024, 10**9, 10**9 + 1, 10**30) if base_ratio == 4 else (10**9, 10**30):
            found = reranker.rank("query", texts, ratio=ratio)
            assert [hit.margin for hit in found] == pytest.approx([hit.margin for hit in expected], abs=1e-5)
        cache.flush()
        stats = cache.stats()
        assert (stats.memory.counters.corrupt, stats.store.counters.corrupt, stats.store.counters.write_failed) == (
            0,
        ) * 3
        reranker.close()
        cache.close()
    assert stats.encoded == 0


def test_a_ratio_the_models_are_not_trained_for_is_said_once(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    warn_untrained.cache_clear()
    reranker = KaLMReranker(checkpoint, cache=None, device="cpu")
    for ratio in (1, 4, 32, 64, 64, 64):
        reranker.rank("query", ["passage"], ratio=ratio)
    lines = [record.message for record in caplog.records if "are trained for the ratios" in record.message]
    assert len(lines) == 1
    assert "1, 2, 4, 8, 16, 32; at ratio 64" in lines[0]


@given(st.lists(st.integers(1, 700), max_size=60), st.integers(1, 9), st.integers(1, 900), st.integers(0, 500))
def test_plan_covers_everything_once_within_its_budgets(
    lengths: list[int], size: int, tokens: int, padding: int
) -> None:
    batches = list(plan(lengths, batch_size=size, batch_tokens=tokens, padding_tokens=padding))
    assert sorted(position for batch in batches for position in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) <= size
        longest = max(lengths[position] for position in batch)
        assert len(batch) == 1 or len(batch) * longest <= tokens
        assert sum(longest - lengths[position] for position in batch) <= padding


def test_plan_keeps_padding_small_and_batches_few() -> None:
    options = {"batch_size": 32, "batch_tokens": 16384}
    assert list(map(len, plan([10, 500] * 16, padding_tokens=128, **options))) == [16, 16]
    assert list(map(len, plan([10, 500] * 16, padding_tokens=1 << 20, **options))) == [32]


@given(
    st.lists(st.tuples(st.integers(1, 60), st.integers(0, 300)), max_size=60), st.integers(1, 9), st.integers(0, 500)
)
def test_pairs_are_covered_once_and_short_queries_are_not_padded(
    pairs: list[tuple[int, int]], size: int, padding: int
) -> None:
    queries, passages = [query for query, _ in pairs], [passage for _, passage in pairs]
    options = {"batch_size": size, "batch_tokens": 900, "padding_tokens": 1 << 20}
    batches = list(plan_pairs(queries, passages, query_padding=padding, **options))
    assert sorted(place for batch in batches for place in batch) == list(range(len(pairs)))
    for batch in batches:
        assert len(batch) <= size
        assert sum(max(queries[place] for place in batch) - queries[place] for place in batch) <= padding
        assert len(batch) == 1 or len(batch) * max(queries[place] + passages[place] for place in batch) <= 900
    one_length = list(plan_pairs([7] * len(pairs), passages, query_padding=0, **options))
    assert one_length == list(plan([7 + passage for passage in passages], **options))


def test_few_short_queries_share_the_pass_of_longer_ones() -> None:
    options = {"batch_size": 32, "batch_tokens": 16384, "query_padding": 128, "padding_tokens": 2560}
    assert list(map(len, plan_pairs([20, 12] * 8, [100] * 16, **options))) == [16]
    assert list(map(len, plan_pairs([20, 12] * 32, [100] * 64, **options))) == [32, 32]
    found = [sorted(batch) for batch in plan_pairs([20, 12] * 24, [100] * 48, **options)]
    assert found == [list(range(0, 48, 2)), list(range(1, 48, 2))]


@pytest.mark.parametrize("margin", [-1000.0, -14.1875, -1.0, 0.0, 8.78125, 1000.0])
def test_probability_is_the_two_way_softmax(margin: float) -> None:
    expected = torch.softmax(torch.tensor([margin, 0.0], dtype=torch.float64), 0)[0].item()
    assert probability(margin) == pytest.approx(expected, rel=1e-9, abs=1e-300)
