"""The compact form: near scores from few bytes, one reference for all who share a store, and a miss for all else."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cachekit import DictByteStore
from machine import needs_int8
from typer.testing import CliRunner

from kalm_rag import KaLMReranker, PassageCache
from kalm_rag import reference as reference_module
from kalm_rag.cache import ByteStoreAdapter, DiskStore, MemoryStore
from kalm_rag.cache.frame import Frame, Head
from kalm_rag.cache.heads import heads
from kalm_rag.cache.transfer import export_shards, import_shards
from kalm_rag.cli import app
from kalm_rag.model.reference_texts import REFERENCE_TEXTS, reference_texts

TEXTS = len(REFERENCE_TEXTS)
QUERIES = ["How do I sort a list?", "what is a method"]


def pairs_of(passages: list[str], count: int = 8) -> list[tuple[str, str]]:
    return [(query, text) for query in QUERIES for text in passages[:count]]


def compact(checkpoint: Path, where: Any, **options: Any) -> KaLMReranker:
    """One that keeps the compact form in a store, and nothing in memory."""
    cache = PassageCache(where, keep="compact", memory=0, **options.pop("cache", {}))
    return KaLMReranker(checkpoint, device="cpu", cache=cache, **options)


def scored(reranker: KaLMReranker, pairs: list[tuple[str, str]]) -> list[float]:
    found = reranker.predict(pairs)
    reranker.cache.flush()
    return found


def worst(left: list[float], right: list[float]) -> float:
    return float(np.abs(np.array(left) - np.array(right)).max())


def prefilled(reranker: KaLMReranker) -> Any:
    stats = reranker.prefill_stats()
    assert stats is not None
    return stats.counters


def reference_key(folder: Path) -> str:
    [key] = [key for key, head in heads(DiskStore(folder)) if head is not None and head.reference]
    return key


@pytest.fixture
def plain(checkpoint: Path, passages: list[str]) -> list[float]:
    return KaLMReranker(checkpoint, device="cpu", cache=None).predict(pairs_of(passages))


@pytest.fixture
def near(plain: list[float]) -> Callable[[list[float]], bool]:
    """Whether scores are those of the plain path but for 4 bits, which random weights feel more than `mini`."""
    return lambda found: worst(found, plain) < 0.03


class TestMini:
    @pytest.fixture(scope="class")
    def scores(self, passages: list[str], queries: list[str]) -> dict[str, np.ndarray[Any, Any]]:
        pairs = [(query, text) for query in queries[:15] for text in passages[:40]]
        return {
            storage: np.array(
                KaLMReranker("mini", cache=None, dtype="float32", prefill_storage=storage).predict(pairs)
            ).reshape(15, 40)
            for storage in ("native", "int8", "compact")
        }

    def test_probabilities_change_by_three_thousandths_at_most(self, scores: Any) -> None:
        changed = np.abs(scores["compact"] - scores["native"])
        assert 0 < changed.max() <= 0.003
        assert changed.max() < np.abs(scores["int8"] - scores["native"]).max()

    def test_the_order_stays(self, scores: Any) -> None:
        for row, native in zip(scores["compact"], scores["native"], strict=True):
            ranks = [np.argsort(np.argsort(values)) for values in (row, native)]
            assert np.corrcoef(*ranks)[0, 1] >= 0.9995
            assert np.argmax(row) == np.argmax(native)


def test_it_takes_a_fraction_of_the_bytes(checkpoint: Path, passages: list[str]) -> None:
    sizes = {}
    for storage in ("native", "int8", "compact"):
        reranker = KaLMReranker(checkpoint, device="cpu", cache=None, prefill_storage=storage)
        reranker.predict(pairs_of(passages))
        stats = reranker.prefill_stats()
        assert stats is not None
        sizes[storage] = stats.size.bytes
    assert sizes["compact"] < sizes["int8"] < sizes["native"]


def test_another_process_finds_the_same_scores_on_disk(checkpoint: Path, passages: list[str], tmp_path: Path) -> None:
    pairs = pairs_of(passages)
    first = scored(compact(checkpoint, tmp_path), pairs)
    code = """
import json, sys
from kalm_rag import KaLMReranker, PassageCache
model, folder, pairs = json.load(sys.stdin)
reranker = KaLMReranker(model, device="cpu", cache=PassageCache(folder, keep="compact", memory=0))
scores = reranker.predict([tuple(pair) for pair in pairs])
print(json.dumps([scores, reranker.cache.stats().encoded, reranker.prefill_stats().counters.stored]))
"""
    given = json.dumps([str(checkpoint), str(tmp_path), pairs])
    done = subprocess.run([sys.executable, "-c", code], input=given, capture_output=True, text=True, check=True)
    scores, encoded, stored = json.loads(done.stdout.splitlines()[-1])
    assert worst(scores, first) < 1e-5
    assert (encoded, stored) == (0, 8)


@pytest.mark.parametrize("kind", ["memory", "bytestore"])
def test_every_store_serves(kind: str, checkpoint: Path, passages: list[str], near: Any) -> None:
    store = MemoryStore(50_000_000) if kind == "memory" else ByteStoreAdapter(DictByteStore())
    first = scored(compact(checkpoint, store), pairs_of(passages))
    again = compact(checkpoint, store)
    assert worst(scored(again, pairs_of(passages)), first) < 1e-5
    assert near(first)
    assert again.cache.stats().encoded == 0


class TestReference:
    def test_sixteen_texts_make_one_for_each_instruction_and_ratio(
        self, checkpoint: Path, passages: list[str], tmp_path: Path
    ) -> None:
        reranker = compact(checkpoint, tmp_path)
        scored(reranker, pairs_of(passages))
        assert reranker.cache.stats().encoded == 8 + TEXTS
        reranker.predict(pairs_of(passages), instruction="Another task.", ratio=8)
        assert reranker.cache.stats().encoded == 8 + TEXTS  # their states serve again
        assert sum(head is not None and head.reference for _, head in heads(DiskStore(tmp_path))) == 2

    @pytest.mark.parametrize("fault", ["lost", "cut", "flipped", "of another dtype"])
    def test_a_bad_one_is_made_again(self, checkpoint: Path, passages: list[str], tmp_path: Path, fault: str) -> None:
        first = scored(compact(checkpoint, tmp_path), pairs_of(passages))
        key, store = reference_key(tmp_path), DiskStore(tmp_path)
        data = store.get_many([key])[key]
        store.delete([key])
        if fault == "cut":
            store.put_many({key: data[:-1]})
        elif fault == "flipped":
            store.put_many({key: data[:-100] + bytes([data[-100] ^ 4]) + data[-99:]})
        elif fault == "of another dtype":
            frame = Frame.from_bytes(data, key)
            numbers = frame.tensors()[0].bfloat16()
            store.put_many(
                {
                    key: Frame.from_tensors(
                        key,
                        frame.model,
                        numbers,
                        ratio=4,
                        tokens=16,
                        truncated=False,
                        prefilled=True,
                        reference=True,
                    ).to_bytes()
                }
            )
        again = compact(checkpoint, tmp_path)
        assert worst(scored(again, pairs_of(passages)), first) < 1e-5
        assert DiskStore(tmp_path).get_many([key]) == {key: data}
        assert again.cache.stats().encoded == 0

    def test_entries_of_another_one_are_misses(
        self, checkpoint: Path, passages: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, near: Any
    ) -> None:
        """Two machines made it apart, and one's entries come to the other's store."""
        pairs = pairs_of(passages)
        here, there = tmp_path / "here", tmp_path / "there"
        first = scored(compact(checkpoint, here), pairs)
        made = reference_module.reference_numbers
        with monkeypatch.context() as patch:
            patch.setattr(reference_module, "reference_numbers", lambda numbers: made(numbers) * 1.01)
            other = scored(compact(checkpoint, there), pairs)
        assert near(other)
        export_shards(DiskStore(there), tmp_path / "shards")
        own = DiskStore(here).get_many([reference_key(here)])
        before = len(list(DiskStore(here).keys()))
        import_shards(DiskStore(here), sorted((tmp_path / "shards").iterdir()))
        assert len(list(DiskStore(here).keys())) == before + 8  # what was kept against the other one
        assert DiskStore(here).get_many([reference_key(here)]) == own
        DiskStore(here).delete(
            key for key, head in heads(DiskStore(here)) if head is not None and head.prefilled and not head.reference
        )
        import_shards(DiskStore(here), sorted((tmp_path / "shards").iterdir()))
        reranker = compact(checkpoint, here)
        assert worst(scored(reranker, pairs), first) < 1e-5
        assert prefilled(reranker).stored == 0
        assert prefilled(reranker).misses == 8

    def test_it_travels_with_what_depends_on_it(self, checkpoint: Path, passages: list[str], tmp_path: Path) -> None:
        first = scored(compact(checkpoint, tmp_path / "here"), pairs_of(passages))
        export_shards(DiskStore(tmp_path / "here"), tmp_path / "shards")
        import_shards(DiskStore(tmp_path / "there"), sorted((tmp_path / "shards").iterdir()))
        reranker = compact(checkpoint, tmp_path / "there")
        assert worst(scored(reranker, pairs_of(passages)), first) < 1e-5
        assert reranker.cache.stats().encoded == 0
        assert prefilled(reranker).stored == 8

    def test_a_read_only_folder_without_one_still_scores(
        self, checkpoint: Path, passages: list[str], tmp_path: Path, near: Any
    ) -> None:
        scored(compact(checkpoint, tmp_path), pairs_of(passages))
        DiskStore(tmp_path).delete([reference_key(tmp_path)])
        reranker = compact(checkpoint, tmp_path, cache={"read_only": True})
        assert near(scored(reranker, pairs_of(passages)))
        assert not any(head is not None and head.reference for _, head in heads(DiskStore(tmp_path)))

    def test_its_texts_never_change_by_accident(self) -> None:
        texts = reference_texts()
        assert len(texts) == len(set(texts)) == TEXTS == 16
        assert max(map(len, texts)) < 2000


class TestForget:
    def test_compact_passages_go_and_the_reference_stays(
        self, checkpoint: Path, passages: list[str], tmp_path: Path
    ) -> None:
        reranker = compact(checkpoint, tmp_path)
        scored(reranker, pairs_of(passages))
        report = reranker.forget(passages[:3])
        assert (report.store.states, report.store.prefilled) == (3, 3)
        assert reference_key(tmp_path)
        report = PassageCache(tmp_path).forget(passages[3:5])  # by the records alone
        assert (report.store.states, report.store.prefilled) == (2, 2)
        assert report.unrecorded == 0
        assert reference_key(tmp_path)

    def test_the_reference_is_of_no_text_to_search_for(
        self, checkpoint: Path, passages: list[str], tmp_path: Path
    ) -> None:
        scored(compact(checkpoint, tmp_path), pairs_of(passages))
        key = reference_key(tmp_path)
        assert Head.from_bytes(DiskStore(tmp_path).get_many([key])[key], key).reference
        assert PassageCache(tmp_path).forget(["never seen"]).unrecorded == 0


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, pytest.param({"dtype": "int8"}, marks=needs_int8)])
def test_every_precision_runs(options: Any, checkpoint: Path, passages: list[str], tmp_path: Path) -> None:
    base = KaLMReranker(checkpoint, device="cpu", cache=None, **options).predict(pairs_of(passages))
    first = scored(compact(checkpoint, tmp_path, **options), pairs_of(passages))
    again = compact(checkpoint, tmp_path, **options)
    assert worst(scored(again, pairs_of(passages)), first) < 2e-3
    assert again.cache.stats().encoded == 0
    # Of random weights, rounding alone moves single scores by a hundredth.
    assert worst(first, base) < 0.04
    assert float(np.abs(np.array(first) - np.array(base)).mean()) < 0.01


@pytest.mark.parametrize("memory", [0, 10])
def test_a_budget_below_one_passage_computes_again(
    memory: int, checkpoint: Path, passages: list[str], plain: list[float], near: Any
) -> None:
    options: dict[str, Any] = {"prefill_storage": "compact", "prefill_memory": memory, "score_memory": 0}
    reranker = KaLMReranker(checkpoint, device="cpu", cache=None, **options)
    for _ in range(2):
        assert near(reranker.predict(pairs_of(passages)))
    stats = reranker.prefill_stats()
    if memory:
        assert stats is not None
        assert stats.size.entries == 0


def test_a_budget_of_0_reads_compact_passages_from_disk(checkpoint: Path, passages: list[str], tmp_path: Path) -> None:
    first = scored(compact(checkpoint, tmp_path), pairs_of(passages))
    reranker = compact(checkpoint, tmp_path, prefill_memory=0, score_memory=0)
    for _ in range(2):
        assert worst(scored(reranker, pairs_of(passages)), first) < 1e-5
    assert prefilled(reranker).stored == 16


def test_states_that_went_are_encoded_again(checkpoint: Path, passages: list[str], tmp_path: Path) -> None:
    first = scored(compact(checkpoint, tmp_path), pairs_of(passages))
    store = DiskStore(tmp_path)
    store.delete([key for key, head in heads(store) if head is not None and not head.prefilled][:200])
    reranker = compact(checkpoint, tmp_path)
    assert worst(scored(reranker, pairs_of(passages)), first) < 1e-5
    assert reranker.cache.stats().encoded == 8


def test_a_passage_of_another_length_than_its_states_is_a_miss(
    checkpoint: Path, passages: list[str], tmp_path: Path
) -> None:
    """Its bytes verify, because somebody forged them."""
    first = scored(compact(checkpoint, tmp_path), pairs_of(passages))
    store = DiskStore(tmp_path)
    for key, head in list(heads(store)):
        if head is not None and head.prefilled and not head.reference:
            frame = Frame.from_bytes(store.get_many([key])[key], key)
            numbers, scales = frame.tensors()
            forged = Frame.from_tensors(
                key, frame.model, numbers, scales, ratio=4, tokens=frame.tokens + 40, truncated=False, prefilled=True
            )
            store.put_many({key: forged.to_bytes()})
    assert worst(scored(compact(checkpoint, tmp_path), pairs_of(passages)), first) < 1e-5


def test_encode_keeps_the_compact_form_and_fits_its_estimate(
    checkpoint: Path, passages: list[str], tmp_path: Path
) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number, text in enumerate(passages[:8]):
        (corpus / f"{number}.txt").write_text(text, "utf-8")
    line = ["encode", str(corpus), "--model", str(checkpoint), "--cache", str(tmp_path / "cache"), "--keep", "compact"]
    assert "With --keep compact: " in CliRunner().invoke(app, [*line, "--dry-run"]).output
    assert "8 of 8 passages held" in CliRunner().invoke(app, line).output
    reranker = compact(checkpoint, tmp_path / "cache")
    reranker.predict(pairs_of(passages))
    assert prefilled(reranker).stored == 8
    assert reranker.cache.stats().encoded == 0
    store = DiskStore(tmp_path / "cache")
    each = reranker.estimate(passages[:8])
    kept = [key for key, head in heads(store) if head is not None and head.prefilled and not head.reference]
    assert each.prefilled_bytes == sum(map(len, store.get_many(kept).values()))


def test_the_default_dtype_decides_nothing(checkpoint: Path, passages: list[str]) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        found = KaLMReranker(checkpoint, device="cpu", cache=None, prefill_storage="compact").predict(
            pairs_of(passages)
        )
    finally:
        torch.set_default_dtype(torch.float32)
    assert worst(found, KaLMReranker(checkpoint, device="cpu", cache=None).predict(pairs_of(passages))) < 0.03
