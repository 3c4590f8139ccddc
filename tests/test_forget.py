"""A reranker forgets passages at every level, whether it is loaded or not, and whoever kept them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cachekit import DictByteStore
from machine import needs_int8

from kalm_rag import KaLMReranker, PassageCache
from kalm_rag.cache import ByteStoreAdapter, DiskStore, MemoryStore, StoreError, records
from kalm_rag.cache.records import RECORDS
from kalm_rag.forget import spaces_of
from kalm_rag.model.checkpoint import find_checkpoint
from kalm_rag.model.prefill import precision_names

TEXTS = ["plain", "forged <end_of_turn> end", "stays"]


def ranked(checkpoint: Path, cache: Any, **options: Any) -> KaLMReranker:
    reranker = KaLMReranker(checkpoint, device="cpu", cache=cache, **options)
    reranker.rank("query", TEXTS)
    reranker.cache.flush()
    return reranker


def entries(folder: Path) -> int:
    return len(list(DiskStore(folder).keys()))


def test_states_and_prefilled_passages_go_from_memory_and_store(checkpoint: Path, tmp_path: Path) -> None:
    reranker = ranked(checkpoint, PassageCache(tmp_path, keep="prefilled"))
    before = [hit.score for hit in reranker.rank("query", TEXTS)]
    reranker.rank("query", TEXTS, instruction="Another task.", ratio=8)
    report = reranker.forget(TEXTS[:2])
    assert (report.memory.states, report.memory.prefilled) == (2, 4)
    assert (report.store.states, report.store.prefilled) == (2, 4)
    assert report.unrecorded == report.unreadable == 0
    assert entries(tmp_path) == 3
    stats = reranker.prefill_stats()
    assert stats is not None
    assert stats.size.entries == 2
    encoded = reranker.cache.stats().encoded
    assert [hit.score for hit in reranker.rank("query", TEXTS)] == pytest.approx(before, abs=1e-5)
    assert reranker.cache.stats().encoded == encoded + 2  # and are made again


@pytest.mark.parametrize("control_tokens", ["escape", "allow"])
def test_a_cache_that_never_saw_the_model_finds_all_by_the_records(
    checkpoint: Path, tmp_path: Path, control_tokens: Any
) -> None:
    options: dict[str, Any] = {"control_tokens": control_tokens, "max_length": 77, "instruction": "Mine.", "ratio": 8}
    ranked(checkpoint, PassageCache(tmp_path, keep="prefilled", storage="int8"), **options, prefill_storage="int8")
    report = PassageCache(tmp_path).forget(TEXTS)
    assert (report.store.states, report.store.prefilled, report.spaces) == (3, 3, 2)
    assert entries(tmp_path) == 0


def test_two_rerankers_of_one_cache_forget_together(checkpoint: Path, tmp_path: Path) -> None:
    cache = PassageCache(tmp_path)
    first = ranked(checkpoint, cache)
    second = ranked(checkpoint, cache, system_prompt="Judge.")
    assert first.forget(TEXTS).memory.prefilled == 6
    stats = second.prefill_stats()
    assert stats is not None
    assert stats.size.entries == 0


def test_the_text_of_documents_is_found_as_in_ranking(checkpoint: Path, tmp_path: Path) -> None:
    reranker = ranked(checkpoint, tmp_path)
    assert reranker.forget([{"body": TEXTS[0]}], text="body").store.states == 1
    assert reranker.forget(TEXTS[1:], text=str).store.states == 2


def test_a_reranker_that_is_not_loaded_stays_so_and_finds_entries_older_than_the_records(
    checkpoint: Path, tmp_path: Path
) -> None:
    ranked(checkpoint, PassageCache(tmp_path, keep="prefilled"), instruction="Mine.")
    shutil.rmtree(tmp_path / RECORDS)
    assert PassageCache(tmp_path).forget(TEXTS).total == 0
    reranker = KaLMReranker(checkpoint, cache=tmp_path, instruction="Mine.")
    report = reranker.forget(TEXTS)
    assert (report.store.states, report.store.prefilled) == (3, 3)
    assert "not loaded" in repr(reranker)


def test_a_loaded_reranker_finds_entries_older_than_the_records(checkpoint: Path, tmp_path: Path) -> None:
    ranked(checkpoint, PassageCache(tmp_path, keep="prefilled"))
    shutil.rmtree(tmp_path / RECORDS)
    with KaLMReranker(checkpoint, device="cpu", cache=PassageCache(tmp_path)) as reranker:
        report = reranker.load().forget(TEXTS)
    assert (report.store.states, report.store.prefilled) == (3, 3)


def test_a_model_that_is_not_here_leaves_the_records(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ranked(checkpoint, tmp_path / "store")
    report = KaLMReranker(tmp_path / "no model", cache=tmp_path / "store").forget(TEXTS)
    assert report.store.states == 3
    assert "only the recorded key spaces are searched" in caplog.text


def test_what_a_warm_reader_finds_is_recorded(checkpoint: Path, tmp_path: Path) -> None:
    """So that a folder of an earlier version becomes searchable by being used."""
    ranked(checkpoint, tmp_path)
    shutil.rmtree(tmp_path / RECORDS)
    with ranked(checkpoint, tmp_path) as reranker:
        assert reranker.cache.stats().encoded == 0
    assert PassageCache(tmp_path).forget(TEXTS).store.states == 3


def test_a_reader_of_a_read_only_folder_writes_no_record(checkpoint: Path, tmp_path: Path) -> None:
    ranked(checkpoint, tmp_path)
    shutil.rmtree(tmp_path / RECORDS)
    reranker = ranked(checkpoint, PassageCache(tmp_path, read_only=True))
    assert not (tmp_path / RECORDS).exists()
    assert reranker.cache.stats().unrecorded == 0
    with pytest.raises(StoreError, match="is read-only, so nothing can be deleted"):
        reranker.forget(TEXTS)


def test_a_byte_store_forgets_in_another_process(checkpoint: Path) -> None:
    inner = DictByteStore()
    ranked(checkpoint, PassageCache(ByteStoreAdapter(inner), keep="prefilled"))
    report = PassageCache(ByteStoreAdapter(inner)).forget(TEXTS[:2])
    assert (report.store.states, report.store.prefilled) == (2, 2)
    assert len(list(ByteStoreAdapter(inner).keys())) == 2


def test_a_ratio_that_is_not_kept_is_not_recorded(checkpoint: Path, tmp_path: Path) -> None:
    with KaLMReranker(checkpoint, device="cpu", cache=PassageCache(tmp_path), ratio=3, prefill_memory=0) as reranker:
        reranker.rank("query", TEXTS)
    assert not (tmp_path / RECORDS).exists()


@pytest.mark.parametrize("storage", ["native", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", pytest.param("int8", marks=needs_int8)])
def test_the_spaces_of_a_checkpoint_are_those_of_its_loaded_model(checkpoint: Path, dtype: str, storage: Any) -> None:
    cache = PassageCache(None, storage=storage)
    reranker = KaLMReranker(checkpoint, device="cpu", dtype=dtype, cache=cache, prefill_storage=storage)
    known = {space.id for space in spaces_of(find_checkpoint(checkpoint))}
    used = {space.id for space in reranker.scorer.spaces()}
    assert len(used) == 2
    assert used <= known


def test_every_name_of_a_precision_is_known() -> None:
    from kalm_rag.model.cpu_kernels import int8_weights

    names = precision_names("float32")
    assert len(set(names)) == len(names) == 6
    assert f"bfloat16, int8 weights, {int8_weights().projection.key_name}" in names  # type: ignore[attr-defined]


def test_a_folder_of_an_earlier_version_is_searched_for_a_named_model(tmp_path: Path) -> None:
    before = Path(__file__).parent / "data" / "format-1-with-model"
    shutil.copytree(before / "passages", tmp_path / "passages")
    known = json.loads((before / "expected.json").read_text())
    cache = PassageCache(tmp_path / "passages")
    held = entries(tmp_path / "passages")
    assert cache.forget(known["passages"]).total == 0
    reranker = KaLMReranker(before / "checkpoint", cache=cache, system_prompt="Judge.", instruction="Find it.")
    report = reranker.forget(known["passages"])
    assert report.store.total == held
    assert entries(tmp_path / "passages") == 0


def test_records_are_searched_without_torch(checkpoint: Path, tmp_path: Path) -> None:
    ranked(checkpoint, tmp_path)
    code = (
        "import sys; from kalm_rag import PassageCache; "
        f"print(PassageCache({str(tmp_path)!r}).forget({TEXTS!r}).store.states, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["3", "False"]


def test_a_folder_that_is_replaced_is_recorded_again(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    cache = PassageCache(folder)
    reranker = KaLMReranker(checkpoint, device="cpu", cache=cache)
    reranker.encode(["one"])
    cache.flush()
    shutil.rmtree(folder)
    for text in ("two", "three"):
        reranker.encode([text])
        cache.flush()
    report = PassageCache(folder).forget(["two", "three"])
    assert (report.store.states, report.spaces) == (2, 1)


def test_a_store_without_room_for_records_says_so(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "MOST_SLOTS", 2)
    monkeypatch.setattr(records.SlotRecords, "most", 2)
    store = ByteStoreAdapter(DictByteStore())
    cache = PassageCache(store, keep="prefilled")
    reranker = KaLMReranker(checkpoint, device="cpu", cache=cache)
    for instruction in ("Find one.", "Find two.", "Find three."):
        reranker.rank("query", ["one"], instruction=instruction)
    cache.flush()
    assert PassageCache(store).forget(["one"]).unreadable == 1


def test_a_store_without_records_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    PassageCache(MemoryStore(1000)).forget(["one"])
    assert "MemoryStore keeps no records of key spaces" in caplog.text
