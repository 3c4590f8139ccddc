"""A long passage gets the score of its best window, on every way to a score."""

from __future__ import annotations

import asyncio
import copy
import logging
import pickle
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kalm_rag import KaLMReranker, PassageCache
from kalm_rag.cache import DiskStore
from kalm_rag.cache.spaces import Space, WindowRule
from kalm_rag.errors import CheckpointError

QUERY = "How do I sort a list in place?"
WINDOWS: dict[str, Any] = {"long_passages": "windows", "window_tokens": 60, "window_overlap": 12}


def make(model: str | Path, cache: Any = None, **options: Any) -> KaLMReranker:
    return KaLMReranker(model, device="cpu", cache=cache, **{**WINDOWS, **options})


def plain(model: str | Path, cache: Any = None, **options: Any) -> KaLMReranker:
    return KaLMReranker(model, device="cpu", cache=cache, **options)


@pytest.fixture
def documents(passages: list[str]) -> list[str]:
    """Three long documents, and two that fit into a window."""
    return [
        "\n\n".join(sorted(passages, key=len)[20:28]),
        "A short one.",
        "\n\n".join(sorted(passages, key=len)[30:33]),
        "Another.",
        "\n\n".join(sorted(passages, key=len)[24:29]),
    ]


def parts(reranker: KaLMReranker, document: str) -> tuple[str, ...]:
    return reranker.scorer.windows.split([document])[document].texts


def test_the_best_window_counts_and_is_named(checkpoint: Path, documents: list[str]) -> None:
    reranker, reference = make(checkpoint), plain(checkpoint)
    hits = reranker.rank(QUERY, documents)
    assert [hit.margin for hit in hits] == sorted((hit.margin for hit in hits), reverse=True)
    for hit in hits:
        windows = parts(reranker, documents[hit.index])
        alone = {found.document: found.margin for found in reference.rank(QUERY, windows)}
        assert hit.margin == pytest.approx(max(alone.values()), abs=1e-5)
        assert not hit.passage_truncated
        assert hit.document is documents[hit.index]
        if len(windows) == 1:
            assert hit.span is None
        else:
            assert hit.span is not None
            named = hit.document[slice(*hit.span)]
            assert named in windows
            assert alone[named] == pytest.approx(hit.margin, abs=1e-5)
    assert len({len(parts(reranker, document)) for document in documents}) > 2
    scores = reranker.predict([(QUERY, document) for document in documents])
    assert scores == pytest.approx([hit.score for hit in sorted(hits, key=lambda hit: hit.index)], abs=1e-5)
    found = asyncio.run(reranker.arank(QUERY, documents))
    assert [(hit.index, hit.span) for hit in found] == [(hit.index, hit.span) for hit in hits]


def test_what_is_not_split_scores_as_before_and_is_the_same_entry(
    checkpoint: Path, tmp_path: Path, passages: list[str]
) -> None:
    texts = [passages[0], *sorted(passages, key=len)[:12]]
    with plain(checkpoint, tmp_path) as before:
        expected = before.rank(QUERY, texts)
    with make(checkpoint, tmp_path, window_tokens=None, window_overlap=None) as reranker:
        found = reranker.rank(QUERY, texts)
        assert reranker.cache.stats().encoded == 0
    assert [hit.index for hit in found] == [hit.index for hit in expected]
    assert [hit.margin for hit in found] == pytest.approx([hit.margin for hit in expected], abs=1e-5)
    assert {hit.span for hit in found} == {None}


def test_equal_windows_are_encoded_once(checkpoint: Path, documents: list[str]) -> None:
    reranker = make(checkpoint, window_overlap=0)
    reranker.rank(QUERY, documents[:1])
    first = reranker.cache.stats().encoded
    assert first == len(set(parts(reranker, documents[0])))
    longer = documents[0] + "\n\n" + "One more sentence. " * 20
    new = set(parts(reranker, longer)) - set(parts(reranker, documents[0]))
    reranker.rank(QUERY, [longer])
    assert reranker.cache.stats().encoded == first + len(new)
    assert len(new) < first


def test_encoding_ahead_encodes_the_windows(checkpoint: Path, tmp_path: Path, documents: list[str]) -> None:
    given = [*documents, documents[1]]
    with make(checkpoint, PassageCache(tmp_path, keep="prefilled")) as reranker:
        windows = [part for document in given for part in parts(reranker, document)]
        assert reranker.unknown(given) == documents
        estimate = reranker.estimate(given)
        assert len(estimate.tokens) == len(given)
        assert sum(estimate.tokens) == sum(reranker.estimate(windows).tokens)
        assert estimate.states_bytes == reranker.estimate(windows).states_bytes
        report = reranker.encode(given)
        assert (report.new, report.total, report.truncated) == (len(set(windows)), len(windows), 0)
        assert reranker.encode(document for document in given).new == 0
        assert reranker.unknown(given) == []
        reranker.cache.delete(reranker.scorer.keys.states_keys([parts(reranker, documents[2])[-1]]))
        assert reranker.unknown(given) == [documents[2]]
        reranker.encode(given)
    with make(checkpoint, PassageCache(tmp_path, keep="prefilled")) as reranker:
        reranker.rank(QUERY, documents)
        assert reranker.cache.stats().encoded == 0
        assert reranker.prefill_stats().counters.misses == 0  # type: ignore[union-attr]


def test_scores_of_windows_are_remembered(checkpoint: Path, documents: list[str]) -> None:
    reranker = make(checkpoint)
    first = reranker.rank(QUERY, documents)
    again = reranker.rank(QUERY, documents[::-1])
    stats = reranker.score_stats()
    assert stats is not None
    pairs = {part for document in documents for part in parts(reranker, document)}
    assert (stats.counters.hits, stats.counters.misses) == (len(pairs), len(pairs))
    spans = {hit.document: (hit.span, hit.margin) for hit in first}
    assert {hit.document: (hit.span, hit.margin) for hit in again} == spans


def test_two_passes_return_what_one_does(passages: list[str]) -> None:
    """Of passages with many windows and with few."""
    by_length = sorted(passages, key=len)
    documents = ["\n\n".join(by_length[start : start + 1 + start % 5 * (start % 2)]) for start in range(50)]
    once, refining = make("mini"), make("mini", refine=True, score_memory=0)
    counts = [len(parts(once, document)) for document in documents]
    assert max(counts) > 2 > min(counts)
    everything = once.rank(QUERY, documents)
    theirs = {hit.index: hit for hit in everything}
    cases: list[tuple[int | None, float | None]] = [(1, None), (4, 0.3), (None, 0.5)]
    for top_k, threshold in cases:
        refining.scorer.passage_kv.cached.memory.clear()
        expected = [hit for hit in everything if threshold is None or hit.score >= threshold][:top_k]
        found = refining.rank(QUERY, documents, top_k, threshold=threshold)
        assert sorted(hit.index for hit in found) == sorted(hit.index for hit in expected)
        for hit in found:
            if hit.exact:
                assert hit.span == theirs[hit.index].span
                assert hit.margin == pytest.approx(theirs[hit.index].margin, abs=1e-5)
        if top_k is not None:
            assert [hit.index for hit in found] == [hit.index for hit in expected]
            assert all(hit.exact for hit in found)
    stats = refining.prefill_stats()
    assert stats is not None
    assert stats.counters.skipped > 0


def test_the_end_of_a_long_document_is_found() -> None:
    filler = "The museum opens at nine. Visitors leave their coats at the door. " * 120
    answer = "To sort a list in place, call its method sort: names.sort()."
    documents = [filler, filler + answer, filler[:400]]
    best = make("mini", window_tokens=128, window_overlap=None).rank(QUERY, documents)[0]
    assert best.index == 1
    assert best.span is not None
    assert answer in documents[1][slice(*best.span)]
    cut = plain("mini", max_length=128).rank(QUERY, documents)
    assert cut[0].margin == pytest.approx(cut[1].margin, abs=1e-5), "both begin alike"


def test_more_windows_than_are_read_are_told(
    checkpoint: Path, documents: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    reranker = make(checkpoint, max_windows=3)
    with caplog.at_level(logging.WARNING):
        hits = {hit.index: hit for hit in reranker.rank(QUERY, documents)}
    cut = [index for index, document in enumerate(documents) if len(parts(make(checkpoint), document)) > 3]
    assert cut
    assert [index for index in sorted(hits) if hits[index].passage_truncated] == cut
    assert reranker.truncations.count == len(cut)
    assert f"{len(cut)} texts are longer than the reranker reads" in caplog.text
    assert "max_windows windows" in caplog.text
    assert reranker.encode(documents).truncated == len(cut)


def test_a_passage_of_five_million_characters(checkpoint: Path) -> None:
    reranker = make(checkpoint, max_windows=2)
    text = "All work and no play makes a dull list.\n" * 125_000
    hit = reranker.rank(QUERY, [text])[0]
    assert hit.passage_truncated
    assert hit.span is not None
    assert hit.span[1] < 1000
    assert reranker.cache.stats().encoded <= 2


def test_spans_are_of_the_text_that_was_given(checkpoint: Path, documents: list[str]) -> None:
    r"""Half characters are joined (`\ud83d\ude00` is one) and control tokens broken before anything is split."""
    odd = "\ud83d\ude00 <end_of_turn> \ud83d <bos>\n"
    text = odd * 5 + (documents[0] + odd * 3) * 2
    reranker = make(checkpoint)
    for query in (QUERY, "tuple", "string"):
        hit = reranker.rank(query, [{"text": text, "id": 1}])[0]
        assert hit.passage_repaired
        assert hit.span is not None
        start, end = hit.span
        repaired = text[start:end].encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        windows = parts(reranker, text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace"))
        squeezed = {"".join(part.split()): part for part in windows}
        assert "".join(repaired.split()) in squeezed
        assert not text[start].isspace()
        assert not text[end - 1].isspace()


def entries(folder: Path) -> int:
    return len(list(DiskStore(folder).keys()))


@pytest.mark.parametrize("loaded", [True, False])
def test_forgetting_forgets_the_windows(checkpoint: Path, tmp_path: Path, documents: list[str], loaded: bool) -> None:
    reranker = make(checkpoint, PassageCache(tmp_path, keep="prefilled"))
    reranker.rank(QUERY, documents)
    reranker.cache.flush()
    kept = entries(tmp_path)
    gone = {part for document in documents[:3] for part in parts(reranker, document)}
    shared = {part for document in documents[3:] for part in parts(reranker, document)} - gone
    if not loaded:
        reranker.close()
        reranker = make(checkpoint, PassageCache(tmp_path, keep="prefilled"))
    report = reranker.forget(documents[:3])
    assert (report.texts, report.store.states, report.store.prefilled) == (3, len(gone), len(gone))
    if loaded:
        assert report.memory.scores == len(gone)
    assert entries(tmp_path) == kept - 2 * len(gone) == 2 * len(shared)


def test_forgetting_without_the_tokenizer_is_an_error(tmp_path: Path) -> None:
    reranker = make(tmp_path / "nowhere", PassageCache(tmp_path / "cache"))
    with pytest.raises(CheckpointError, match="windows of passages cannot be found without the model's tokenizer"):
        reranker.forget(["text"])


def test_a_cache_tells_that_windows_are_left(checkpoint: Path, tmp_path: Path, documents: list[str]) -> None:
    """By the text alone they are not found; a reranker of the same tokenizer finds what others split."""
    for options in ({}, {"window_tokens": 80}, {}):
        with make(checkpoint, tmp_path, **options) as reranker:
            reranker.encode(documents)
    report = PassageCache(tmp_path).forget(documents)
    assert (report.windowed, report.unreadable) == (2, 0)
    assert report.store.states == 2, "those that were not split"
    left = entries(tmp_path)
    assert left > len(documents)
    report = plain(checkpoint, tmp_path).forget([*documents, documents[0]])
    assert (report.texts, report.windowed, report.store.states) == (len(documents) + 1, 0, left)
    assert entries(tmp_path) == 0


def test_the_windows_of_both_forms_of_control_tokens_are_forgotten(checkpoint: Path, tmp_path: Path) -> None:
    text = "It was <end_of_turn> the list. " * 40
    for control_tokens in ("escape", "allow"):
        with make(checkpoint, tmp_path, control_tokens=control_tokens) as reranker:
            reranker.encode([text])
    assert entries(tmp_path) > 2
    assert make(checkpoint, tmp_path).forget([text]).windowed == 0
    assert entries(tmp_path) == 0


def test_a_forged_rule_is_no_error_and_is_told(
    checkpoint: Path, tmp_path: Path, documents: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    with make(checkpoint, tmp_path) as reranker:
        reranker.encode(documents)
        [space] = [space for space in reranker.scorer.spaces() if space.windows is not None]
        reranker.cache.use(replace(space, windows=WindowRule(5, 9, 0)), kept=True)
    report = make(checkpoint, tmp_path).forget(documents)
    assert (report.windowed, entries(tmp_path)) == (1, 0)
    assert "names windows that cannot be" in caplog.text


def test_a_record_tells_how_passages_were_split(checkpoint: Path) -> None:
    for options in (
        {},
        {"max_windows": 3},
        {"long_passages": "truncate", "window_tokens": None, "window_overlap": None},
    ):
        space = make(checkpoint, **options).scorer.spaces()[0]
        again = Space.from_bytes(space.to_bytes())
        assert (again.id, again.windows) == (space.id, space.windows)
        assert (space.windows is None) == (b'"windows"' not in zlib.decompress(space.to_bytes()[40:]))


def test_copies_split_alike(checkpoint: Path, documents: list[str]) -> None:
    reranker = make(checkpoint, max_windows=7)
    for other in (copy.copy(reranker), pickle.loads(pickle.dumps(reranker))):
        assert other.settings == reranker.settings
        assert parts(other, documents[0]) == parts(reranker, documents[0])


def test_a_window_without_room_is_an_error_when_the_model_loads(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="window_tokens must be more than window_overlap and the"):
        make(checkpoint, window_tokens=13, window_overlap=12).load()
