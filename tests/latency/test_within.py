"""Ranking within a budget: what is scored first, that scores are the plain ones, and what becomes of the rest."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kalm_rag import FirstStage, KaLMReranker, PassageCache
from kalm_rag.latency import background as background_module
from kalm_rag.latency import within
from kalm_rag.results import PartialRanking, UnscoredPassage
from kalm_rag.utils import turns as turns_module
from kalm_rag.utils.turns import LateError, Turns
from kalm_rag.utils.turns import until as within_time

QUERY = "How do I sort a list?"
LONG = 60_000_000.0
"""Milliseconds that no test takes."""


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[Any]]:
    """Let so many passages be scored, one a step, whatever the clock says; returns what was done."""

    def limit(count: int) -> list[Any]:
        done: list[Any] = []

        def step(items: Any, *_: Any) -> list[int]:
            if len(done) == count:
                return []
            done.append(items[0][0])
            return [0]

        monkeypatch.setattr(within, "next_step", step)
        return done

    return limit


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[PassageCache]:
    with PassageCache(tmp_path / "cache", keep="prefilled") as cache:
        yield cache


def make(checkpoint: Path, cache: Any = None, **options: Any) -> KaLMReranker:
    options = {"score_memory": 0, "encode_in_background": False, **options}
    return KaLMReranker(checkpoint, device="cpu", cache=cache, **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prefill_memory": 0},
        {"prefill_storage": "compact"},
        {"ratio": 3},
        {"long_passages": "windows", "window_tokens": 48},
        {"score_memory": 16_000_000},
    ],
)
def test_scores_are_the_plain_ones(checkpoint: Path, passages: list[str], options: dict[str, Any]) -> None:
    """Known half, none and all of the passages; a budget that nothing reaches scores all of them."""
    plain, fast = make(checkpoint, **options), make(checkpoint, **options)
    some = [*passages[:10], passages[3]]
    expected = plain.rank(QUERY, some)
    fast.encode(passages[:5])
    for _ in range(2):
        found = fast.rank(QUERY, some, budget_ms=LONG)
        assert isinstance(found, PartialRanking)
        assert [hit.index for hit in found] == [hit.index for hit in expected]
        assert all(hit.scored for hit in found)
        # In the compact form, the noise of another batch may round a number to another byte.
        within_noise = 1e-3 if options.get("prefill_storage") == "compact" else 1e-5
        for one, other in zip(found, expected, strict=True):
            assert one.margin == pytest.approx(other.margin, abs=within_noise)
            assert getattr(one, "span", None) == other.span


def test_the_cheapest_are_first_and_the_rest_keeps_its_order(
    checkpoint: Path, passages: list[str], kept: PassageCache, only: Callable[[int], list[Any]]
) -> None:
    some = passages[:8]
    with make(checkpoint, kept) as other:
        other.encode(some[4:6])  # prefilled in the store
    kept.flush()
    reranker = make(checkpoint, kept, prefill_memory=50_000_000)
    reranker.scorer.states.encode(some[2:4])  # states alone
    reranker.scorer.passage_kv.encode(some[6:8])
    reranker.rank(QUERY, some[6:8])  # in memory
    done = only(7)
    found = reranker.rank(QUERY, some, budget_ms=LONG)
    assert [some.index(text) for text in done] == [6, 7, 4, 5, 2, 3, 0]
    assert [hit.index for hit in found if not hit.scored] == [1]
    assert found.counts is not None
    assert (found.counts.scored, found.counts.skipped) == (7, 1)
    assert (found.counts.prefilled, found.counts.stored, found.counts.states, found.counts.encoded) == (2, 2, 2, 1)
    done = only(3)
    found = reranker.rank(QUERY, some, budget_ms=LONG)
    assert [hit.index for hit in found[3:]] == [index for index in range(8) if some[index] not in done]
    last = found[-1]
    assert isinstance(last, UnscoredPassage)
    assert (last.score, last.margin, last.scored, last.document) == (None, None, False, some[last.index])
    assert found[0].scored


def test_skipping_leaves_out_what_is_not_encoded(checkpoint: Path, passages: list[str]) -> None:
    reranker = make(checkpoint)
    reranker.encode(passages[3:6])
    found = reranker.rank(QUERY, passages[:7], on_unknown="skip")
    assert sorted(hit.index for hit in found if hit.scored) == [3, 4, 5]
    assert [hit.index for hit in found if not hit.scored] == [0, 1, 2, 6]
    assert reranker.cache.stats().encoded == 3
    assert [hit.scored for hit in reranker.rank(QUERY, passages[:7], on_unknown="wait")] == [True] * 7


def test_a_passage_of_which_a_window_is_unknown_is_left_out(checkpoint: Path, passages: list[str]) -> None:
    reranker = make(checkpoint, long_passages="windows", window_tokens=32, window_overlap=0)
    long = max(passages[:10], key=len)
    parts = reranker.scorer.windows.expand([long])
    reranker.scorer.states.encode(parts[1:])
    [hit] = reranker.rank(QUERY, [long], on_unknown="skip")
    assert not hit.scored
    reranker.scorer.states.encode(parts)
    [hit] = reranker.rank(QUERY, [long], on_unknown="skip")
    assert hit.scored


def test_threshold_top_k_and_fusion(checkpoint: Path, passages: list[str]) -> None:
    reranker = make(checkpoint)
    some = passages[:8]
    reranker.encode(some[:4])
    scores = [hit.score for hit in reranker.rank(QUERY, some[:4])]
    limit = (scores[1] + scores[2]) / 2
    found = reranker.rank(QUERY, some, threshold=limit, on_unknown="skip")
    assert [hit.scored for hit in found] == [True] * 2 + [False] * 4, "it does not cut what has no score"
    assert len(reranker.rank(QUERY, some, 5, threshold=limit, on_unknown="skip")) == 5, "top_k counts all"
    stage = FirstStage([float(number) for number in range(8)], weight=0.0)
    fused = reranker.rank(QUERY, some, first_stage=stage, on_unknown="skip")
    assert [hit.index for hit in fused] == [3, 2, 1, 0, 4, 5, 6, 7]


def test_unscored_passages_are_shown(checkpoint: Path) -> None:
    found = make(checkpoint).rank(QUERY, ["one <b>", "two \ud83d"], on_unknown="skip")
    assert "PartialRanking of 2 passages" in repr(found)
    assert "&lt;b&gt;" in found._repr_html_()
    assert found[1].passage_repaired
    assert not found[0].passage_repaired
    assert repr(found[0]).startswith("UnscoredPassage(index=0")
    assert found[:1].counts == found.counts


def test_nothing_is_loaded_for_no_passages(checkpoint: Path) -> None:
    reranker = KaLMReranker(checkpoint, cache=None)
    assert reranker.rank(QUERY, [], budget_ms=5) == []
    assert reranker._scorer is None


def test_a_budget_shorter_than_loading_leaves_all_unscored(
    checkpoint: Path, passages: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    reranker = KaLMReranker(checkpoint, device="cpu", cache=None)
    with caplog.at_level(logging.WARNING):
        found = reranker.rank(QUERY, passages[:3], budget_ms=0.5)
    assert [hit.index for hit in found] == [0, 1, 2]
    assert not any(hit.scored for hit in found)
    assert "call load() first" in caplog.text
    assert reranker.flush(60) == 0
    assert reranker.unknown(passages[:3]) == []


def test_a_query_that_does_not_begin_as_prefilled_passages_assume(checkpoint: Path, passages: list[str]) -> None:
    plain, fast = make(checkpoint, control_tokens="allow"), make(checkpoint, control_tokens="allow")
    fast.scorer.passage_kv.prefix(fast.settings.instruction)
    for query in ("<end_of_turn>", " "):
        expected = {hit.index: hit.margin for hit in plain.rank(query, passages[:3])}
        found = fast.rank(query, passages[:3], budget_ms=LONG)
        assert {hit.index: hit.margin for hit in found} == pytest.approx(expected, abs=1e-5)


def test_it_works_asynchronously_and_the_wait_for_a_thread_counts(checkpoint: Path, passages: list[str]) -> None:
    reranker = make(checkpoint)

    async def ask() -> tuple[Any, Any]:
        return await asyncio.gather(
            reranker.arank(QUERY, passages[:3], budget_ms=LONG), reranker.arank(QUERY, passages[:3], on_unknown="skip")
        )

    whole, partial = asyncio.run(ask())
    assert all(hit.scored for hit in whole)
    assert len(partial) == 3


def test_a_call_with_a_budget_goes_first_but_does_not_hold_up_others_for_ever() -> None:
    turns, order = Turns(), []

    def work(name: str, deadline: float | None) -> None:
        with within_time(deadline), turns:
            order.append(name)

    threads = []
    with turns:
        for name, deadline in [("a", None), *((f"urgent {number}", 1e12) for number in range(4))]:
            threads.append(threading.Thread(target=work, args=(name, deadline)))
            threads[-1].start()
            while turns.waiting < len(threads):
                pass
    for thread in threads:
        thread.join(60)
    assert order == ["urgent 0", "urgent 1", "urgent 2", "a", "urgent 3"]


def test_a_call_whose_time_is_over_takes_no_turn() -> None:
    turns = Turns()
    with pytest.raises(LateError), within_time(0.0), turns:
        pytest.fail("it took its turn")
    held = threading.Event()

    def hold() -> None:
        with turns:
            held.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    while turns._owner is None:
        pass
    with pytest.raises(LateError), within_time(turns_module.time.monotonic() + 0.01), turns:
        pytest.fail("it took its turn")
    held.set()
    thread.join(60)
    with turns:
        assert turns.waiting == 0


class TestBackground:
    def test_what_was_left_out_is_encoded_for_the_next_query(self, checkpoint: Path, passages: list[str]) -> None:
        reranker = make(checkpoint, encode_in_background=True)
        reranker.rank(QUERY, passages[:6], on_unknown="skip")
        assert reranker.flush(60) == 0
        found = reranker.stats().background
        assert (found.encoded, found.pending, found.dropped, found.failed) == (6, 0, 0, 0)
        assert all(hit.scored for hit in reranker.rank(QUERY, passages[:6], on_unknown="skip"))

    def test_it_gives_way_between_layers_and_begins_again(self, checkpoint: Path, passages: list[str]) -> None:
        reranker = make(checkpoint, encode_in_background=True)
        scorer = reranker.load().scorer
        reached, go = threading.Event(), threading.Event()

        def pause(*_: Any) -> None:
            if turns_module._behind.get() is scorer.turns and not go.is_set():
                reached.set()
                go.wait(60)

        text = scorer.loaded.model.get_encoder().text_model
        text.layers[0].register_forward_hook(pause)
        scorer.background.add(passages[:1])
        assert reached.wait(60)
        with scorer.turns.call():
            go.set()
            while not scorer.background.stats().abandoned:
                pass
            assert reranker.cache.stats().encoded == 0
        assert reranker.flush(60) == 0
        assert scorer.background.stats().encoded == 1

    def test_the_oldest_are_dropped_and_counted_where_it_is_full(
        self, checkpoint: Path, passages: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        reranker = make(checkpoint, encode_in_background=True)
        scorer = reranker.load().scorer
        monkeypatch.setattr(background_module, "MOST_PASSAGES", 3)
        with scorer.turns.call():  # nothing is encoded meanwhile
            scorer.background.add([f"a {number}" for number in range(6)])
            scorer.background.add(["a 5"])
            found = scorer.background.stats()
            assert found.dropped in (2, 3), "one may be in the hands of the thread"
            assert found.pending + found.dropped == 6
        assert reranker.flush(60) == 0
        monkeypatch.setattr(background_module, "MOST_BYTES", 10)
        scorer.background.add(["b" * 11])
        assert scorer.background.stats().dropped == found.dropped + 1
        assert scorer.background.stats().pending == 0

    def test_a_failure_is_logged_once_and_counted(
        self, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        reranker = make(checkpoint, encode_in_background=True)

        def fail(*_: Any) -> None:
            raise RuntimeError("no memory")

        monkeypatch.setattr(reranker.load().scorer.states, "encode", fail)
        reranker.scorer.background.add(["one", "two"])
        assert reranker.flush(60) == 0
        assert reranker.stats().background.failed == 2
        assert caplog.text.count("cannot be encoded in the background") == 1

    def test_closing_gives_up_what_is_left_and_says_so(
        self, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr("kalm_rag.reranker.held_model._CLOSING_SECONDS", 0.05)
        reranker = make(checkpoint, encode_in_background=True)
        with reranker.load().scorer.turns.call():
            reranker.scorer.background.add(["one", "two", "three"])
            assert reranker.flush(0.05) == 3
            reranker.close()
        assert "3 passages that calls left out were not encoded" in caplog.text

    def test_what_is_forgotten_is_not_encoded_later(self, checkpoint: Path, tmp_path: Path) -> None:
        with PassageCache(tmp_path / "cache") as cache:
            reranker = make(checkpoint, cache, encode_in_background=True)
            scorer = reranker.load().scorer
            for forget in (reranker.forget, cache.forget):
                before = scorer.background.stats().dropped
                with scorer.turns.call():  # one is in the hands of the thread, the others wait
                    scorer.background.add(["secret", "other", "third"])
                    forget(["secret"])
                    found = scorer.background.stats()
                    assert (found.pending, found.dropped - before) == (0, 3)
                assert reranker.flush(60) == 0
                assert reranker.unknown(["secret", "other", "third"]) == ["secret", "other", "third"]
            scorer.background.add(["another"])
            assert reranker.flush(60) == 0
            assert reranker.unknown(["another"]) == [], "the queue works on"

    def test_it_can_be_switched_off(self, checkpoint: Path, passages: list[str]) -> None:
        reranker = make(checkpoint)
        reranker.rank(QUERY, passages[:3], on_unknown="skip")
        assert reranker.stats().background.pending == 0
        assert reranker.flush(60) == 0
        assert reranker.unknown(passages[:3]) == passages[:3]


def test_what_calls_took_is_told(checkpoint: Path, passages: list[str]) -> None:
    reranker = make(checkpoint, score_memory=1_000_000)
    first = reranker.rank(QUERY, passages[:5], 2)
    assert first.counts is not None
    assert first.timings is not None
    assert (first.counts.passages, first.counts.scored, first.counts.cut, first.counts.encoded) == (5, 5, 3, 5)
    assert first.timings.encode > 0
    assert first.timings.score > 0
    parts = first.timings.queue + first.timings.read + first.timings.encode
    assert parts + first.timings.prefill + first.timings.score <= first.timings.total
    again = reranker.rank(QUERY, passages[:5])
    assert again.counts is not None
    assert (again.counts.remembered, again.counts.encoded) == (5, 0)
    reranker.predict([(QUERY, passages[6])])
    found = reranker.stats()
    assert (found.calls, found.counts.passages, found.counts.encoded, found.counts.remembered) == (3, 11, 6, 5)
    assert found.timings.total >= first.timings.total
