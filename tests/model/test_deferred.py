"""The encoder's layers are loaded when the first passage must be encoded, and change no number."""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kalm_rag import KaLMReranker, PassageCache
from kalm_rag.errors import CheckpointError
from kalm_rag.model.checkpoint import find_checkpoint
from kalm_rag.model.deferred import Deferred

QUERY = "which animal purrs?"
TEXTS = ["Cats purr.", "Dogs bark.", "A stone lies in the garden."]


def made(folder: Path | None, **arguments: Any) -> KaLMReranker:
    return KaLMReranker(**{"model": "mini", "cache": folder, "device": "cpu", "score_memory": 0, **arguments})


def is_ready(reranker: KaLMReranker) -> bool:
    return reranker.scorer.states.encoder.is_ready


def layers_on_meta(reranker: KaLMReranker) -> int:
    return sum(weight.is_meta for weight in reranker.scorer.loaded.model.get_encoder().parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_replica_whose_passages_are_encoded_never_loads_it(tmp_path: Path, dtype: str) -> None:
    with made(tmp_path, dtype=dtype) as first:
        expected = [hit.score for hit in first.rank(QUERY, TEXTS)]
        assert is_ready(first)
        assert layers_on_meta(first) == 0
    with made(tmp_path, dtype=dtype) as replica:
        assert [hit.score for hit in replica.rank(QUERY, TEXTS)] == pytest.approx(expected, abs=1e-5)
        assert not is_ready(replica)
        assert layers_on_meta(replica) > 0
        replica.rank(QUERY, [*TEXTS, "A new passage."])
        assert is_ready(replica)
        assert layers_on_meta(replica) == 0


def test_what_it_encodes_is_what_a_model_encodes_that_was_loaded_whole(tmp_path: Path) -> None:
    with made(None) as later, made(None) as whole:
        whole.load()
        assert is_ready(whole)
        later.rank(QUERY, TEXTS)
        both = [reranker.scorer.states.get(TEXTS, 4) for reranker in (later, whole)]
    for text in TEXTS:
        assert torch.allclose(both[0][text].states, both[1][text].states, atol=1e-5)


def test_load_loads_it_unless_told_otherwise(tmp_path: Path) -> None:
    with made(tmp_path) as reranker:
        reranker.load(encoder=False)
        assert not is_ready(reranker)
        assert reranker.scorer.turns.costs.knows("score")
        assert not reranker.scorer.turns.costs.knows("encode")
        reranker.load()
        assert is_ready(reranker)
        assert reranker.scorer.turns.costs.knows("encode")
    with pytest.raises(TypeError, match="encoder must be True or False"):
        made(tmp_path).load(encoder="no")  # type: ignore[arg-type]


def test_a_budget_does_not_wait_for_it_and_the_background_does(tmp_path: Path) -> None:
    with made(tmp_path) as reranker:
        reranker.load(encoder=False)
        first = reranker.rank(QUERY, TEXTS, budget_ms=5000)
        assert first.counts is not None
        assert first.counts.skipped == 3
        reranker.flush()
        assert is_ready(reranker)
        second = reranker.rank(QUERY, TEXTS, budget_ms=60_000)
        assert second.counts is not None
        assert second.counts.skipped == 0


def test_without_load_a_budget_counts_from_a_model_that_is_whole(tmp_path: Path) -> None:
    with made(tmp_path) as reranker:
        ranking = reranker.rank(QUERY, TEXTS, budget_ms=60_000)
        assert ranking.counts is not None
        assert ranking.counts.skipped == 0


def test_threads_load_it_once() -> None:
    calls: list[int] = []

    def load() -> None:
        time.sleep(0.05)
        calls.append(1)

    deferred = Deferred(load)
    threads = [threading.Thread(target=deferred.ready) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls == [1]
    assert deferred.is_ready


def test_a_load_that_failed_is_tried_again() -> None:
    failures = [OSError("busy")]

    def load() -> None:
        if failures:
            raise failures.pop()

    deferred = Deferred(load)
    with pytest.raises(OSError, match="busy"):
        deferred.ready()
    assert not deferred.is_ready
    deferred.ready()
    assert deferred.is_ready


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    return Path(shutil.copytree(find_checkpoint("mini").folder, tmp_path / "checkpoint"))


def test_a_file_that_was_overwritten_meanwhile_is_an_error_and_no_wrong_score(copied: Path, tmp_path: Path) -> None:
    with made(tmp_path / "cache", model=copied) as first:
        first.rank(QUERY, TEXTS)
    with made(tmp_path / "cache", model=copied) as reranker:
        reranker.rank(QUERY, TEXTS)
        weights = copied / "model.safetensors"
        data = bytearray(weights.read_bytes())
        data[-100_000:] = bytes(100_000)
        with weights.open("r+b") as file:
            file.write(data)
        with pytest.raises(CheckpointError, match="was overwritten"):
            reranker.rank(QUERY, ["A new passage."])


def test_a_missing_weight_of_the_encoder_is_found_at_load(copied: Path) -> None:
    weights = copied / "model.safetensors"
    tensors = load_file(weights)
    name = next(key for key in tensors if "encoder" in key and "layers" in key)
    del tensors[name]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="lacks 1 weights"):
        made(None, model=copied).load(encoder=False)


def test_the_cache_is_asked_before_it_is_loaded(tmp_path: Path) -> None:
    cache = PassageCache(tmp_path)
    with made(None, cache=cache) as first:
        assert first.encode(TEXTS).new == 3
        first.cache.flush()
    with made(None, cache=PassageCache(tmp_path)) as second:
        assert second.encode(TEXTS).known == 3
        assert not is_ready(second)
