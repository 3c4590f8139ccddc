"""The cache behind `KaLMReranker`: hits skip the encoder, scores stay, faults are misses."""

from __future__ import annotations

import json
import logging
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from cachekit import frames, get, key_of, lookup, pack, passage, put, space, texts, unpack
from machine import needs_bfloat16, needs_int8
from spies import passages_in

from kalm_rag import EncodeReport, KaLMReranker, PassageCache
from kalm_rag.cache import DiskStore, MemoryStore, StoreStats
from kalm_rag.cache import folder as folder_module
from kalm_rag.cache.transfer import WrongModelError, export_shards, import_shards

QUERY = "How do I sort a list?"


def counted(reranker: KaLMReranker) -> list[int]:
    """Passages per encoder call, from now on."""
    calls: list[int] = []
    encoder = reranker.scorer.loaded.model.get_encoder()
    encoder.register_forward_pre_hook(lambda _m, _a, kwargs: calls.append(passages_in(kwargs)), with_kwargs=True)
    return calls


def scores(reranker: KaLMReranker, passages: list[str], **options: Any) -> list[float]:
    return reranker.predict([(QUERY, text) for text in passages], **options)


def near(left: list[float], right: list[float], tolerance: float = 1e-5) -> bool:
    return max(abs(a - b) for a, b in zip(left, right, strict=True)) <= tolerance


def test_second_query_and_second_process_skip_the_encoder(
    checkpoint: Path, tmp_path: Path, passages: list[str]
) -> None:
    plain = scores(KaLMReranker(checkpoint, cache=None), passages[:8])
    first = KaLMReranker(checkpoint, cache=tmp_path / "cache", score_memory=0)
    calls = counted(first)
    assert near(scores(first, passages[:8]), plain)
    assert sum(calls) == 8
    assert near(scores(first, passages[:8]), plain)
    first.rank("another query", passages[:8])
    assert sum(calls) == 8
    first.close()
    second = KaLMReranker(checkpoint, cache=tmp_path / "cache")
    calls = counted(second)
    assert near(scores(second, passages[:8]), plain)
    assert calls == []
    stats = second.cache.stats()
    assert (stats.store.counters.hits, stats.store.counters.misses, stats.encoded) == (8, 0, 0)
    assert stats.store.counters.bytes_read > 0


def test_mixed_candidates_encode_only_the_new_ones(checkpoint: Path, tmp_path: Path, passages: list[str]) -> None:
    plain = scores(KaLMReranker(checkpoint, cache=None), passages[:10])
    reranker = KaLMReranker(checkpoint, cache=tmp_path, prefill_memory=0, score_memory=0)
    reranker.encode(passages[3:7])
    calls = counted(reranker)
    assert near(scores(reranker, passages[:10]), plain)
    assert sum(calls) == 6


def test_encode_reports_and_resumes(checkpoint: Path, tmp_path: Path, passages: list[str]) -> None:
    reranker = KaLMReranker(checkpoint, cache=tmp_path, max_length=100)
    first = reranker.encode(passages[:5])
    assert (first.new, first.known) == (5, 0)
    again = reranker.encode([*passages[:7], passages[0]])
    assert (again.new, again.known) == (2, 6)
    assert again.truncated >= first.truncated > 0


@pytest.mark.parametrize("base", [1, 2, 4])
def test_one_encoding_serves_its_multiples(checkpoint: Path, tmp_path: Path, passages: list[str], base: int) -> None:
    reranker = KaLMReranker(checkpoint, cache=PassageCache(tmp_path, base_ratio=base))
    reranker.encode(passages[:6])
    calls = counted(reranker)
    for ratio in (4, 8, 12, 32):
        direct = KaLMReranker(checkpoint, cache=PassageCache(None, memory=0, base_ratio=ratio))
        assert near(scores(reranker, passages[:6], ratio=ratio), scores(direct, passages[:6], ratio=ratio))
    assert calls == []


def test_a_ratio_that_the_base_cannot_give_is_encoded_and_said_once(
    checkpoint: Path, tmp_path: Path, passages: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    reranker = KaLMReranker(checkpoint, cache=tmp_path, prefill_memory=0, score_memory=0)
    reranker.encode(passages[:4])
    calls = counted(reranker)
    expected = scores(KaLMReranker(checkpoint, cache=None, ratio=2), passages[:4])
    assert near(scores(reranker, passages[:4], ratio=2), expected)
    scores(reranker, passages[:4], ratio=2)
    assert sum(calls) == 8
    assert caplog.text.count("make the cache with base_ratio=2") == 1
    scores(reranker, passages[:4])
    assert sum(calls) == 8


def test_an_instance_with_ratio_2_keeps_ratio_2(checkpoint: Path, tmp_path: Path, passages: list[str]) -> None:
    reranker = KaLMReranker(checkpoint, cache=tmp_path, ratio=2, score_memory=0)
    scores(reranker, passages[:4])
    calls = counted(reranker)
    scores(reranker, passages[:4])
    scores(reranker, passages[:4], ratio=4)
    assert calls == []


@pytest.mark.parametrize(
    "change",
    ["weights", "tokenizer", "max_length", "dtype", "storage"],
)
def test_whatever_changes_states_is_no_hit(checkpoint: Path, tmp_path: Path, passages: list[str], change: str) -> None:
    KaLMReranker(checkpoint, cache=tmp_path / "cache").encode(passages[:3])
    folder = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    options: dict[str, Any] = {"cache": tmp_path / "cache"}
    if change == "weights":
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / "model.safetensors")
        tensors["model.encoder.layers.0.mlp.up_proj.weight"].view(torch.uint8).view(-1)[0] ^= 1
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    elif change == "tokenizer":
        content = json.loads((folder / "tokenizer.json").read_text())
        (folder / "tokenizer.json").write_text(json.dumps(content, indent=1))
    elif change == "storage":
        options["cache"] = PassageCache(tmp_path / "cache", storage="int8")
    else:
        options[change] = {"max_length": 1023, "dtype": "bfloat16"}[change]
    reranker = KaLMReranker(folder, **options)
    assert reranker.encode(passages[:3]).new == 3
    unchanged = KaLMReranker(checkpoint, cache=tmp_path / "cache", ratio=8, instruction="Another.", query_max_length=9)
    assert unchanged.encode(passages[:3]).known == 3


def test_int8_scores_do_not_depend_on_a_warm_cache(checkpoint: Path, tmp_path: Path, passages: list[str]) -> None:
    plain = scores(KaLMReranker(checkpoint, cache=None), passages[:12])
    small = KaLMReranker(checkpoint, cache=PassageCache(tmp_path, storage="int8", memory=0), score_memory=0)
    cold = scores(small, passages[:12])
    small.cache.flush()
    warm = scores(small, passages[:12])
    assert near(cold, warm)
    assert 0 < max(abs(a - b) for a, b in zip(plain, warm, strict=True)) < 0.1


def test_default_cache_place(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KALM_RAG_CACHE", str(tmp_path / "mine"))
    reranker = KaLMReranker(checkpoint)
    reranker.encode(["a passage"])
    assert (tmp_path / "mine" / "cache.db").is_file()


def test_shared_cache_object_stays_open(checkpoint: Path, tmp_path: Path, passages: list[str]) -> None:
    with PassageCache(tmp_path) as cache:
        with KaLMReranker(checkpoint, cache=cache) as first:
            first.encode(passages[:3])
        assert cache.stats().memory.size.entries == 3
        with KaLMReranker(checkpoint, cache=cache) as second:
            assert second.encode(passages[:3]).known == 3


class BrokenStore:
    """Fails as asked, in the middle of whatever is going on."""

    def __init__(self, error: Exception, broken: str) -> None:
        self.inner = MemoryStore(1 << 30)
        self.error = error
        self.broken = broken

    def _maybe(self, name: str) -> None:
        if self.broken in (name, "all"):
            raise self.error

    def get_many(self, keys: Sequence[str]) -> dict[str, bytes]:
        self._maybe("get")
        return self.inner.get_many(keys)

    def put_many(self, items: Mapping[str, bytes]) -> int:
        self._maybe("put")
        return self.inner.put_many(items)

    def delete(self, keys: Iterable[str]) -> int:
        self._maybe("delete")
        return self.inner.delete(keys)

    def keys(self) -> Iterator[str]:
        self._maybe("keys")
        return self.inner.keys()

    def stats(self) -> StoreStats:
        self._maybe("stats")
        return self.inner.stats()

    def close(self) -> None:
        self._maybe("close")


@pytest.mark.parametrize("broken", ["get", "put", "stats", "close", "all"])
@pytest.mark.parametrize("error", [OSError("disk on fire"), RuntimeError("lost"), KeyError("x"), MemoryError()])
def test_a_failing_store_is_never_an_exception(
    checkpoint: Path, passages: list[str], error: Exception, broken: str, caplog: pytest.LogCaptureFixture
) -> None:
    expected = scores(KaLMReranker(checkpoint, cache=None), passages[:3])
    cache = PassageCache(BrokenStore(error, broken), memory=0)
    reranker = KaLMReranker(checkpoint, cache=cache, prefill_memory=0, score_memory=0)
    for _ in range(2):
        assert near(scores(reranker, passages[:3]), expected)
        cache.flush()
    counters = cache.stats().store.counters
    if broken in ("get", "all"):
        assert counters.read_failed == 6
    if broken in ("put", "all"):
        assert counters.write_failed == 6
    cache.close()
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert 1 <= len(warnings) <= 4, "one line per kind of fault"


@pytest.mark.parametrize("answer", [b"", b"junk" * 100, None, "text", 7, ["list"]])
def test_a_store_that_answers_nonsense_is_a_miss(checkpoint: Path, passages: list[str], answer: Any) -> None:
    class Liar(BrokenStore):
        def get_many(self, keys: Sequence[str]) -> dict[str, bytes]:
            return dict.fromkeys(keys, answer)

    cache = PassageCache(Liar(OSError(), ""), memory=0)
    expected = scores(KaLMReranker(checkpoint, cache=None), passages[:3])
    assert near(scores(KaLMReranker(checkpoint, cache=cache), passages[:3]), expected)
    assert cache.stats().store.counters.corrupt == 3


def test_nan_with_a_valid_checksum_is_encoded_again(checkpoint: Path, passages: list[str], tmp_path: Path) -> None:
    expected = scores(KaLMReranker(checkpoint, cache=None), passages[:3])
    reranker = KaLMReranker(checkpoint, cache=PassageCache(tmp_path, memory=0), score_memory=0)
    reranker.encode(passages[:3])
    store = reranker.cache.store
    assert isinstance(store, DiskStore)
    [key] = [reranker.scorer.keys.states_keys([passages[1]])[0]]
    frame = unpack(store.get_many([key])[key], key)
    from kalm_rag.cache import frame as module

    payload = bytearray(frame.payload)
    payload[:4] = b"\x00\x00\xc0\x7f"
    head = store.get_many([key])[key][: module._HEAD.size]
    store.put_many({key: head + module._checksum(head, bytes(payload)) + bytes(payload)})
    assert near(scores(reranker, passages[:3]), expected)
    assert reranker.cache.stats().store.counters.corrupt == 1
    reranker.cache.flush()
    calls = counted(reranker)
    assert near(scores(reranker, passages[:3]), expected)
    assert calls == [], "the entry was replaced"


def test_a_slow_store_does_not_slow_a_query(checkpoint: Path, passages: list[str]) -> None:
    gate = threading.Event()

    class Slow(BrokenStore):
        def put_many(self, items: Mapping[str, bytes]) -> int:
            gate.wait(60)
            return super().put_many(items)

    cache = PassageCache(Slow(OSError(), ""))
    reranker = KaLMReranker(checkpoint, cache=cache, prefill_memory=0, score_memory=0)
    assert len(reranker.rank(QUERY, passages[:3])) == 3, "answers while the write still waits"
    assert cache.stats().store.size.entries == 0
    gate.set()
    cache.flush()
    assert cache.stats().store.size.entries == 3


def test_memory_budget_holds(tmp_path: Path) -> None:
    cache = PassageCache(tmp_path, memory=5_000)
    for seed in range(40):
        put(cache, {f"text {seed}": passage(seed)})
    size = cache.stats().memory.size
    assert size.bytes is not None
    assert 4_000 < size.bytes <= 5_000
    assert size.evicted > 30
    cache.flush()
    assert lookup(cache.store, 40)[:2] == (40, 0)


def test_secret_makes_foreign_entries_misses(tmp_path: Path) -> None:
    foreign = PassageCache(tmp_path)
    put(foreign, {"text 0": passage(0)})
    foreign.flush()  # else its write may come after the one below
    DiskStore(tmp_path).put_many(frames(2))
    cache = PassageCache(tmp_path, secret="0123456789abcdef", memory=0)
    assert get(cache, texts(2)) == {}
    assert cache.stats().store.counters.corrupt == 2
    put(cache, {"text 0": passage(0)})
    cache.flush()
    assert set(get(cache, texts(2))) == {"text 0"}
    assert get(PassageCache(tmp_path, secret="another-secret-of-16", memory=0), texts(1)) == {}


def test_read_only_hits_and_writes_nothing(
    checkpoint: Path, tmp_path: Path, passages: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    with KaLMReranker(checkpoint, cache=tmp_path) as writer:
        writer.encode(passages[:3])
    before = (tmp_path / "cache.db").read_bytes()
    cache = PassageCache(tmp_path, read_only=True, memory=0)
    reranker = KaLMReranker(checkpoint, cache=cache, prefill_memory=0, score_memory=0)
    for _ in range(2):
        scores(reranker, passages[:5])
        cache.flush()
    assert cache.stats().store.counters.hits == 6
    assert cache.stats().encoded == 4
    assert caplog.text.count("is read-only: new passages are not kept") == 1
    assert (tmp_path / "cache.db").read_bytes() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": -1}, "memory must be a number of bytes, 0 to keep nothing in memory, got -1"),
        ({"memory": "1GB"}, "memory must be a number of bytes"),
        ({"limit": 0}, "limit must be at least 1"),
        ({"base_ratio": 0}, "base_ratio must be at least 1"),
        ({"storage": "int4"}, r"storage must be one of .*, got 'int4'"),
        ({"secret": "short"}, "secret must have at least 16 bytes, got 5"),
    ],
)
def test_bad_settings(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PassageCache(tmp_path, **options)


def test_bad_place() -> None:
    with pytest.raises(TypeError, match="the cache must be a folder, a store or None, got int"):
        PassageCache(7)  # type: ignore[arg-type]


def test_network_file_system_is_refused_once_and_ranking_goes_on(
    checkpoint: Path,
    tmp_path: Path,
    passages: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(folder_module, "filesystem_of", lambda _: "nfs4")
    reranker = KaLMReranker(checkpoint, cache=PassageCache(tmp_path / "share", memory=0), score_memory=0)
    assert near(scores(reranker, passages[:3]), scores(KaLMReranker(checkpoint, cache=None), passages[:3]))
    scores(reranker, passages[:3])
    reranker.cache.flush()
    assert caplog.text.count("cannot read the passage cache") == 1
    assert "network file system (nfs4)" in caplog.text
    assert not (tmp_path / "share").exists()


def test_filesystem_of_this_machine() -> None:
    assert folder_module.filesystem_of(Path("/proc")) in ("proc", None)
    assert folder_module.filesystem_of(Path("/nowhere/at/all")) == folder_module.filesystem_of(Path("/"))


def test_export_and_import(checkpoint: Path, tmp_path: Path, passages: list[str]) -> None:
    reranker = KaLMReranker(checkpoint, cache=tmp_path / "a")
    reranker.encode(passages[:9])
    store = reranker.cache.store
    report = export_shards(store, tmp_path / "shards", shard_bytes=60_000)
    assert report.passages == 9
    assert len(report.shards) > 1
    with pytest.raises(FileExistsError, match="export into an empty folder"):
        export_shards(store, tmp_path / "shards")
    model = reranker.scorer.keys.model
    imported = import_shards(DiskStore(tmp_path / "b"), [tmp_path / "shards"], model=model)
    assert (imported.passages, imported.bytes) == (9, report.bytes)
    assert KaLMReranker(checkpoint, cache=tmp_path / "b").encode(passages[:9]) == EncodeReport(
        0, 9, reranker.encode(passages[:9]).truncated
    )


def test_import_refuses_another_model_and_names_both(tmp_path: Path) -> None:
    store = MemoryStore(1 << 30)
    store.put_many(frames(3))
    export_shards(store, tmp_path)
    other = b"\xab" * 32
    target = MemoryStore(1 << 30)
    with pytest.raises(WrongModelError, match=f"the model {space().model.hex()[:12]}, not of abababababab"):
        import_shards(target, [tmp_path], model=other)
    assert list(target.keys()) == []
    assert export_shards(store, tmp_path / "none", model=other).other_models == 3


def test_import_skips_what_is_damaged_and_counts_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = MemoryStore(1 << 30)
    store.put_many(frames(8))
    export_shards(store, tmp_path, shard_bytes=2_000)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) >= 3
    shards[0].write_bytes(shards[0].read_bytes()[:100])
    data = bytearray(shards[1].read_bytes())
    data[-1] ^= 1
    shards[1].write_bytes(bytes(data))
    target = MemoryStore(1 << 30)
    report = import_shards(target, [tmp_path])
    assert report.bad_shards == (str(shards[0]),)
    assert report.corrupt == 1
    assert shards[0].name in caplog.text
    right, wrong, _ = lookup(target, 8)
    assert (right, wrong) == (report.passages, 0)
    assert report.passages >= 3
    with pytest.raises(FileNotFoundError, match="no shard or folder"):
        import_shards(target, [tmp_path / "nothing"])


def test_export_leaves_damaged_entries_out(tmp_path: Path) -> None:
    store = MemoryStore(1 << 30)
    store.put_many({**frames(3), key_of(1): b"damaged"})
    report = export_shards(store, tmp_path)
    assert (report.passages, report.corrupt) == (3, 1)


def test_folder_that_an_earlier_release_wrote(tmp_path: Path) -> None:
    """`tests/data/cache-format-1` was written by the release that introduced the format, and is never written again."""
    shutil.copytree(Path(__file__).parent.parent / "data" / "cache-format-1", tmp_path / "store")
    for read_only in (True, False):
        store = DiskStore(tmp_path / "store", read_only=read_only)
        assert lookup(store, 4)[:2] == (4, 0)
        store.close()


@pytest.mark.parametrize("width", [3, 17])
def test_states_of_another_width_are_a_miss(checkpoint: Path, passages: list[str], width: int) -> None:
    """A frame that verifies and cannot be this model's."""
    reranker = KaLMReranker(
        checkpoint, cache=PassageCache(MemoryStore(1 << 30), memory=0), prefill_memory=0, score_memory=0
    )
    keys = reranker.scorer.keys
    key = keys.states_keys([passages[0]])[0]
    reranker.cache.store.put_many({key: pack(key, keys.model, passage(0, width=width))})
    expected = scores(KaLMReranker(checkpoint, cache=None), passages[:1])
    assert near(scores(reranker, passages[:1]), expected)
    assert reranker.cache.stats().store.counters.corrupt == 1


@pytest.mark.parametrize("answer", [lambda keys: [], lambda keys: {**dict.fromkeys(keys), "x": b""}, lambda keys: None])
def test_a_store_that_answers_another_shape_is_a_miss(checkpoint: Path, passages: list[str], answer: Any) -> None:
    class Liar(BrokenStore):
        def get_many(self, keys: Sequence[str]) -> dict[str, bytes]:
            return answer(keys)

    cache = PassageCache(Liar(OSError(), ""), memory=0)
    expected = scores(KaLMReranker(checkpoint, cache=None), passages[:3])
    assert near(scores(KaLMReranker(checkpoint, cache=cache), passages[:3]), expected)


BEFORE = Path(__file__).parent.parent / "data" / "format-1-with-model"


@pytest.mark.parametrize("storage", ["native", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", pytest.param("int8", marks=[needs_int8, needs_bfloat16])])
def test_a_folder_of_an_earlier_version_is_all_hits(tmp_path: Path, dtype: str, storage: Any) -> None:
    """`tests/data/format-1-with-model` holds a checkpoint, what an earlier version kept of it, and its margins."""
    known = json.loads((BEFORE / "expected.json").read_text())
    shutil.copytree(BEFORE / "passages", tmp_path / "passages")
    expected = known["margins"][f"{dtype} {storage}"]
    options: dict[str, Any] = {"device": "cpu", "dtype": dtype, "system_prompt": "Judge.", "instruction": "Find it."}
    for keep in ("prefilled", "states"):
        cache = PassageCache(tmp_path / "passages", keep=keep, storage=storage, memory=0)
        options |= {"cache": cache, "prefill_storage": storage, "prefill_memory": 0, "score_memory": 0}
        with cache, KaLMReranker(BEFORE / "checkpoint", **options) as reranker:
            found = sorted(reranker.rank(known["query"], known["passages"]), key=lambda hit: hit.index)
            stats = cache.stats()
            hits = stats.prefilled.hits if keep == "prefilled" else stats.store.counters.hits
            assert (hits, stats.encoded) == (len(expected), 0)
        tolerance = 1e-5 if dtype == "float32" and (storage == "native" or keep == "prefilled") else 0.05
        assert [hit.margin for hit in found] == pytest.approx(expected, abs=tolerance)
