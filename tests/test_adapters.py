"""Rerankers shared by arguments, and calls from asynchronous programs."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import threading
from pathlib import Path
from typing import Any

import pytest
from lorakit import write_lora

from kalm_rag import KaLMReranker, PassageCache
from kalm_rag.adapters import SharedHandle, check_arguments, check_cache, serialisable_cache, shared_reranker
from kalm_rag.cache import ByteStoreAdapter, DiskStore, MemoryStore
from kalm_rag.model.checkpoint import clean_token, find_checkpoint


def test_equal_arguments_share_and_others_do_not(checkpoint: Path, tmp_path: Path) -> None:
    first = shared_reranker(checkpoint, cache=tmp_path, device="cpu")
    assert shared_reranker(str(checkpoint), cache=tmp_path, device="cpu") is first
    assert shared_reranker(checkpoint, cache=tmp_path / "other", device="cpu") is not first
    assert shared_reranker(checkpoint, cache=tmp_path, device="cpu", dtype="bfloat16") is not first
    cache = PassageCache(tmp_path)
    assert shared_reranker(checkpoint, cache=cache) is shared_reranker(checkpoint, cache=cache)
    assert shared_reranker(checkpoint, cache=PassageCache(tmp_path)) is not shared_reranker(checkpoint, cache=cache)


def test_places_of_the_cache_are_compared_as_places(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PLACE", str(tmp_path))
    first = shared_reranker(checkpoint, cache="passages")
    assert shared_reranker(checkpoint, cache=Path("passages")) is first
    assert shared_reranker(checkpoint, cache=str(tmp_path / "passages")) is first
    assert shared_reranker(checkpoint, cache="$PLACE/passages") is first
    default = shared_reranker(checkpoint)
    monkeypatch.setenv("KALM_RAG_CACHE", str(tmp_path / "other"))
    assert shared_reranker(checkpoint) is not default
    assert shared_reranker(checkpoint, ratio=None).settings.ratio == 1
    assert shared_reranker(checkpoint).settings.ratio == 4


def test_what_a_folder_keeps_sets_rerankers_apart(checkpoint: Path, tmp_path: Path) -> None:
    states = shared_reranker(checkpoint, cache=tmp_path)
    prefilled = shared_reranker(checkpoint, cache=tmp_path, keep="prefilled")
    assert prefilled is not states
    assert (states.cache.keeps_prefilled, prefilled.cache.keeps_prefilled) == (False, True)
    assert shared_reranker(checkpoint, cache=str(tmp_path), keep="states") is states
    assert shared_reranker(checkpoint, cache=str(tmp_path), keep="prefilled") is prefilled
    handle = SharedHandle()
    assert handle.get(checkpoint, cache=tmp_path, keep="prefilled") is prefilled
    assert handle.get(checkpoint, cache=tmp_path) is states


@pytest.mark.parametrize("ratio", [None, 1, 2, 8])
def test_what_a_folder_keeps_leaves_its_ratio_alone(checkpoint: Path, tmp_path: Path, ratio: int | None) -> None:
    plain = shared_reranker(checkpoint, cache=tmp_path, ratio=ratio).cache
    assert shared_reranker(checkpoint, cache=tmp_path, keep="prefilled", ratio=ratio).cache.base_ratio == (
        plain.base_ratio
    )


def test_prefilled_passages_are_on_disk_once_the_reranker_is_closed(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reranker = shared_reranker(checkpoint, cache=tmp_path, keep="prefilled", device="cpu")
    closed: list[PassageCache] = []
    close = PassageCache.close
    monkeypatch.setattr(PassageCache, "close", lambda cache: (closed.append(cache), close(cache)))
    reranker.rank("query", ["one", "two"])
    reranker.close()
    assert closed == [reranker.cache]
    other = KaLMReranker(checkpoint, cache=PassageCache(tmp_path, keep="prefilled"), device="cpu")
    other.rank("another query", ["one", "two"])
    assert (other.cache.stats().prefilled.hits, other.cache.stats().encoded) == (2, 0)


READY_MADE = {
    "cache": lambda place: PassageCache(place),
    "store": lambda place: DiskStore(place),
    "byte store": lambda _: ByteStoreAdapter({}),  # type: ignore[arg-type]
    "memory": lambda _: MemoryStore(1000),
}


@pytest.mark.parametrize("kind", READY_MADE)
def test_a_ready_made_cache_has_no_keep_beside_it(checkpoint: Path, tmp_path: Path, kind: str) -> None:
    cache = READY_MADE[kind](tmp_path)
    check_cache(cache, "states")
    with pytest.raises(ValueError, match=r"is a folder, got keep='prefilled', cache=.*pass cache=PassageCache"):
        shared_reranker(checkpoint, cache=cache, keep="prefilled")


@pytest.mark.parametrize(
    ("cache", "keep", "message"),
    [
        ("folder", "all", r"keep must be one of \('states', 'prefilled', 'compact'\), got 'all'"),
        (None, None, r"keep must be one of \('states', 'prefilled', 'compact'\), got None"),
        (7, "states", "cache must be a folder, a PassageCache, a store or None, got int: 7; leave it out"),
        ({}, "prefilled", "cache must be a folder, a PassageCache, a store or None, got dict"),
    ],
)
def test_what_is_no_cache_and_what_no_cache_keeps(cache: Any, keep: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_cache(cache, keep)


@pytest.mark.parametrize(
    ("given", "clean"),
    [("hf_x", "hf_x"), (" hf_x\r\n", "hf_x"), ("", None), (" \n", None), (None, None), (True, True), (False, False)],
)
def test_blanks_around_a_token_are_left_out(given: Any, clean: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    seen: list[object] = []

    def download(*_: object, token: object, **__: object) -> None:
        seen.append(token)
        raise OSError

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(ValueError, match="could not get"):
        find_checkpoint("owner/name", token=given)
    assert seen == [clean]


@pytest.mark.parametrize("token", ["hf_\nx", "hf_ x", "hf_\u00e9", 7, b"hf_secret", ["hf_secret"]])
def test_a_token_that_no_header_carries_is_refused_unseen(token: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="token must be") as error:
        clean_token(token)
    assert "hf_" not in str(error.value)


def test_adapter_arguments_are_checked_by_name() -> None:
    wrong: dict[str, list[object]] = {
        "model": [None, 7, "", " "],
        "revision": [7],
        "lora": [7, "", " "],
        "device": [7],
        "dtype": [7, True],
        "token": [7],
        "max_length": [None, True, 2.0, "2", 0],
        "ratio": [True, 2.0, "2", 0],
        "instruction": [7, ["text"]],
        "top_n": [True, 2.0, "2", 0],
        "top_k": [True, 2.0, "2", 0],
        "score_threshold": [True, "0.5", 50, -0.1, float("nan"), float("inf")],
        "calibrated": [None, 1, "yes"],
        "keep_retrieval_score": [None, 1, "yes"],
        "embedding_separator": [None, 7],
    }
    for name, values in wrong.items():
        for value in values:
            with pytest.raises((ValueError, TypeError), match=f"^{name} must be"):
                check_arguments({name: value})
    given = {"model": "nano", "top_n": 3, "score_threshold": 1, "ratio": None, "of_one_framework": object()}
    assert check_arguments(given) == given


@pytest.mark.parametrize("kind", READY_MADE)
def test_a_ready_made_cache_is_not_serialised(tmp_path: Path, kind: str) -> None:
    with pytest.raises(ValueError, match=r"serialised with a component, got cache=.*give a folder, and keep="):
        serialisable_cache(READY_MADE[kind](tmp_path))
    assert serialisable_cache(tmp_path) == str(tmp_path)
    assert serialisable_cache("default") == "default"
    assert serialisable_cache(None) is None


def test_the_loop_stays_free_while_the_model_loads(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reranker = KaLMReranker(checkpoint, cache=None)
    gate = threading.Event()
    find = reranker.checkpoint

    def slow() -> object:
        gate.wait(30)
        return find()

    monkeypatch.setattr(reranker, "checkpoint", slow)

    async def main() -> None:
        calls = [asyncio.create_task(reranker.arank("query", ["passage"])) for _ in range(3)]
        for _ in range(20):
            await asyncio.sleep(0.01)
        assert not any(call.done() for call in calls)
        gate.set()
        assert [len(found) for found in await asyncio.gather(*calls)] == [1, 1, 1]

    asyncio.run(asyncio.wait_for(main(), 60))


def test_queries_come_in_between_while_a_corpus_is_encoded(checkpoint: Path, passages: list[str]) -> None:
    reranker = KaLMReranker(checkpoint, cache=None, batch_size=1)
    texts = [f"{number} {text}" for number, text in enumerate(passages * 2)]

    async def main() -> tuple[bool, int]:
        encoding = asyncio.create_task(reranker.aencode(texts))
        await asyncio.sleep(0.3)
        await reranker.arank("query", ["passage"])
        return encoding.done(), (await encoding).new

    done, new = asyncio.run(main())
    assert not done
    assert new == len(texts)


def test_nothing_is_held_that_nobody_uses(checkpoint: Path) -> None:
    from kalm_rag.adapters import shared

    gc.collect()
    before = len(shared._rerankers)
    shared_reranker(checkpoint, cache=None)
    gc.collect()
    assert len(shared._rerankers) == before


def test_fifty_concurrent_calls_give_the_scores_of_one(
    checkpoint: Path, passages: list[str], queries: list[str]
) -> None:
    reranker = KaLMReranker(checkpoint, cache=None, score_memory=0)
    expected = {query: reranker.rank(query, passages[:5]) for query in queries[:10]}

    async def main() -> None:
        asked = [queries[number % 10] for number in range(50)]
        answers = await asyncio.gather(*(reranker.arank(query, passages[:5]) for query in asked))
        for query, answer in zip(asked, answers, strict=True):
            assert answer == expected[query]
        assert await reranker.apredict([(queries[0], passages[0])]) == pytest.approx(
            [hit.score for hit in expected[queries[0]] if hit.index == 0], abs=1e-5
        )
        assert (await reranker.aencode(passages[:5])).known == 5

    for _ in range(2):  # two event loops, one instance
        asyncio.run(main())


def test_context_variables_travel(checkpoint: Path) -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("trace", default="none")
    reranker = KaLMReranker(checkpoint, cache=None)
    reranker.rank = lambda *_, **__: [variable.get()]  # type: ignore[assignment,method-assign]

    async def main() -> None:
        variable.set("here")
        assert await reranker.arank("query", []) == ["here"]

    asyncio.run(main())


def test_adapters_of_the_model_are_compared_as_places_with_their_content(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same relative path in another working directory, and the same folder after it was tuned again."""
    found = []
    for name in ("one", "two"):
        write_lora(checkpoint, tmp_path / name / "tuned", 0.1)
        monkeypatch.chdir(tmp_path / name)
        found.append(shared_reranker(checkpoint, lora="tuned"))
    assert found[0] is not found[1]
    assert shared_reranker(checkpoint, lora=tmp_path / "two" / "tuned") is found[1]
    write_lora(checkpoint, tmp_path / "two" / "tuned", 0.3)
    assert shared_reranker(checkpoint, lora="tuned") is not found[1]


def test_relative_folders_of_models_are_compared_as_places(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model").symlink_to(checkpoint)
        monkeypatch.chdir(tmp_path / name)
        found.append(shared_reranker("model"))
    assert found[0] is not found[1]
