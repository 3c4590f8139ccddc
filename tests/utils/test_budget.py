"""What `prefill_memory` comes to: numbers, shares of what is free, and where little is."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from kalm_rag import KaLMReranker, Options
from kalm_rag.settings import Settings
from kalm_rag.utils import budget, machine
from kalm_rag.utils.budget import LEAST, MOST, MOST_ON_CUDA, UNKNOWN, memory_budget

CPU = torch.device("cpu")


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets how many bytes of memory are free."""

    def set_free(count: int | None) -> None:
        monkeypatch.setattr(machine, "available_memory", lambda: count)

    return set_free


def test_a_number_is_taken_as_it_is(free: Any) -> None:
    free(1)
    found = memory_budget(123, CPU)
    assert (found.bytes, found.source) == (123, "a number that was given")


@pytest.mark.parametrize(
    ("count", "taken", "source"),
    [
        (8_000_000_000, 2_000_000_000, "auto: a quarter of 8.0 GB of free memory"),
        (64_000_000_000, MOST, "auto: at most 4.0 GB, of 64.0 GB of free memory"),
        (4 * LEAST, LEAST, "auto: a quarter of 64.0 MB of free memory"),
        (4 * LEAST - 4, 0, "auto: a quarter of 64.0 MB of free memory is less than 16.0 MB, too little to help"),
        (0, 0, "auto: a quarter of 0 B of free memory is less than 16.0 MB, too little to help"),
        (None, UNKNOWN, "auto: this system does not tell how much memory is free"),
    ],
)
def test_a_share_of_what_is_free(free: Any, count: int | None, taken: int, source: str) -> None:
    free(count)
    found = memory_budget("auto", CPU)
    assert (found.bytes, found.source) == (taken, source)


@pytest.mark.parametrize(
    ("unused", "taken", "source"),
    [
        (4_000_000_000, 1_500_000_000, "auto: a quarter of 6.0 GB of free GPU memory"),
        (78_000_000_000, MOST_ON_CUDA, "auto: at most 16.0 GB, of 80.0 GB of free GPU memory"),
    ],
)
def test_on_cuda_blocks_that_torch_holds_unused_are_free(
    free: Any, monkeypatch: pytest.MonkeyPatch, unused: int, taken: int, source: str
) -> None:
    free(1)
    asked = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (asked.append(device), (unused, 80_000_000_000))[1])
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 5_000_000_000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 3_000_000_000)
    found = memory_budget("auto", torch.device("cuda:1"))
    assert (found.bytes, found.source) == (taken, source)
    assert asked == [torch.device("cuda:1")]


@pytest.mark.parametrize(
    ("host", "taken"), [(20_000_000_000, 2_500_000_000), (4_000_000_000, 10**9), (None, 25 * 10**8)]
)
def test_on_mps_the_hosts_memory_and_the_gpus_own_limit_count(
    free: Any, monkeypatch: pytest.MonkeyPatch, host: int | None, taken: int
) -> None:
    free(host)
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 12_000_000_000)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 2_000_000_000)
    assert memory_budget("auto", torch.device("mps")).bytes == taken


@pytest.mark.parametrize("wrong", ["Auto", "1 GB", "", -1, math.nan, 1e9, True, None, [1]])
def test_a_wrong_value_is_told_with_the_rule_and_the_way_out(wrong: Any) -> None:
    for make in (Settings, KaLMReranker, Options):
        with pytest.raises(ValueError, match="prefill_memory must be a number of bytes, 0 to keep nothing") as error:
            make(prefill_memory=wrong)
        assert '"auto" for a share of the free memory' in str(error.value)
        assert str(error.value).endswith(f"got {wrong!r}")


def test_it_is_resolved_when_the_model_is_loaded_for_each_model(checkpoint: Path, free: Any) -> None:
    sizes = {}
    for count in (8_000_000_000, 4_000_000_000):
        free(1)
        reranker = KaLMReranker(checkpoint, device="cpu", cache=None)
        assert reranker.prefill_stats() is None
        free(count)
        reranker.load()
        free(1)
        stats = reranker.prefill_stats()
        assert stats is not None
        sizes[count] = stats.size.limit
        assert stats.limit_source == f"auto: a quarter of {count / 1e9:.1f} GB of free memory"
        assert "limit_source=auto: a quarter" in repr(stats)
        assert reranker.settings.prefill_memory == "auto", "a copy resolves it again"
    assert sizes == {8_000_000_000: 2_000_000_000, 4_000_000_000: 1_000_000_000}


def test_a_container_without_room_keeps_nothing_says_so_once_and_scores_the_same(
    checkpoint: Path, passages: list[str], free: Any, caplog: pytest.LogCaptureFixture
) -> None:
    pairs = [("query", text) for text in passages[:4]]
    expected = KaLMReranker(checkpoint, device="cpu", cache=None, prefill_memory=0).predict(pairs)
    free(40_000_000)
    with caplog.at_level(logging.WARNING):
        reranker = KaLMReranker(checkpoint, device="cpu", cache=None)
        assert reranker.predict(pairs) == pytest.approx(expected, abs=1e-5)
        reranker.predict(pairs)
    told = [
        record.message for record in caplog.records if "prefilled passages are not kept in memory" in record.message
    ]
    assert len(told) == 1
    assert "a quarter of 40.0 MB of free memory" in told[0]
    assert "pass prefill_memory as a number of bytes" in told[0]
    stats = reranker.prefill_stats()
    assert stats is not None
    assert (stats.size.limit, stats.size.entries, stats.counters.misses) == (0, 0, 0)


def test_a_small_share_bounds_what_is_laid_out_at_once(
    checkpoint: Path, passages: list[str], free: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = [("query", text) for text in passages[:12]]
    whole = KaLMReranker(checkpoint, device="cpu", cache=None)
    expected = whole.predict(pairs)
    stats = whole.prefill_stats()
    assert stats is not None
    assert stats.size.bytes is not None
    share = stats.size.bytes // 3
    monkeypatch.setattr(budget, "LEAST", 1)
    monkeypatch.setattr("kalm_rag.passage_kv.LEAST", 1)
    free(4 * share)
    reranker = KaLMReranker(checkpoint, device="cpu", cache=None).load()
    source = reranker.scorer.passage_kv
    groups = []
    in_groups = source.in_groups

    def counted(*given: Any) -> Any:
        for group in in_groups(*given):
            groups.append(sum(passage.nbytes for passage in group.values()))
            yield group

    monkeypatch.setattr(source, "in_groups", counted)
    assert reranker.predict(pairs) == pytest.approx(expected, abs=1e-5)
    assert len(groups) >= 3
    assert max(groups) <= share


def test_all_of_the_memory_is_not_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on macOS, where nothing tells how much is free."""
    monkeypatch.setattr(machine, "_meminfo", lambda name, root: None)
    monkeypatch.setattr(machine, "memory_limit", lambda: None)
    assert memory_budget("auto", CPU).bytes == UNKNOWN
