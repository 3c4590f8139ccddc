"""Pooling and batch planning, alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kalm_rag.batching import plan
from kalm_rag.pooling import PassageStates, mean_groups
from kalm_rag.scoring import probability


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


@pytest.mark.parametrize("margin", [-1000.0, -14.1875, -1.0, 0.0, 8.78125, 1000.0])
def test_probability_is_the_two_way_softmax(margin: float) -> None:
    expected = torch.softmax(torch.tensor([margin, 0.0], dtype=torch.float64), 0)[0].item()
    assert probability(margin) == pytest.approx(expected, rel=1e-9, abs=1e-300)
