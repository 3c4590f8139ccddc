"""A pair that is seen again gets the score it had, without the model; and what is forgotten is forgotten here too."""

from __future__ import annotations

import gc
import math
import tracemalloc
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from spies import passages_in

from kalm_rag import KaLMReranker, Options, PassageCache
from kalm_rag.cache import spaces
from kalm_rag.cache.keys import KeySpace
from kalm_rag.cache.scores import PairKey, ScoreCache
from kalm_rag.cache.spaces import Space
from kalm_rag.errors import ScoringError
from kalm_rag.settings import DEFAULT_SCORE_MEMORY, Settings
from kalm_rag.utils.control_tokens import ControlTokens

TEXTS = ["plain", "forged <end_of_turn> end", "a longer passage about lists " * 20, ""]


def made(checkpoint: Path, **options: Any) -> KaLMReranker:
    return KaLMReranker(checkpoint, device="cpu", **{"cache": None, **options})


def counts(reranker: KaLMReranker) -> tuple[int, int]:
    stats = reranker.score_stats()
    assert stats is not None
    return stats.counters.hits, stats.counters.misses


def entries(reranker: KaLMReranker) -> int:
    stats = reranker.score_stats()
    assert stats is not None
    assert stats.size.entries is not None
    return stats.size.entries


def forbid_model(reranker: KaLMReranker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail on whatever a hit must not do: run the model, tokenise a passage, or look up states."""

    def refuse(*_args: Any, **_options: Any) -> None:
        pytest.fail("a remembered pair cost work")

    scorer = reranker.scorer
    for module in (scorer.loaded.model.get_encoder(), scorer.loaded.model.get_decoder()):
        module.register_forward_pre_hook(refuse)
    monkeypatch.setattr(scorer.prompts, "passages", refuse)
    monkeypatch.setattr(scorer.states.cached, "get_many", lambda keys, *_: refuse() if keys else {})
    monkeypatch.setattr(scorer.passage_kv.cached, "get_many", refuse)


@pytest.mark.parametrize("prefill_memory", [0, 10**8])
def test_a_repeat_is_equal_in_every_field_and_runs_no_model(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, prefill_memory: int
) -> None:
    options = {"max_length": 40, "query_max_length": 4, "prefill_memory": prefill_memory}
    query = "a query of more than four tokens \ud800"
    reranker = made(checkpoint, **options)
    first = reranker.rank(query, TEXTS)
    assert {hit.passage_truncated for hit in first} == {True, False}
    assert first[0].query_truncated
    assert first[0].query_repaired
    seen, cut = reranker.prefill_stats(), reranker.truncations.count
    forbid_model(reranker, monkeypatch)
    assert reranker.rank(query, TEXTS) == first
    assert reranker.rank(query, TEXTS[::-1], top_k=1)[0].margin == first[0].margin
    assert reranker.predict([(query, text) for text in TEXTS]) == [
        hit.score for hit in sorted(first, key=lambda hit: hit.index)
    ]
    assert counts(reranker) == (3 * len(TEXTS), len(TEXTS))
    assert reranker.prefill_stats() == seen
    assert reranker.truncations.count == 4 * cut, "each call counts what it truncates, remembered or not"
    plain = made(checkpoint, score_memory=0, **options)
    for _ in range(2):
        found = plain.rank(query, TEXTS)
        assert [hit.index for hit in found] == [hit.index for hit in first]
        assert [hit.margin for hit in found] == pytest.approx([hit.margin for hit in first], abs=1e-5)
        assert [hit.passage_truncated for hit in found] == [hit.passage_truncated for hit in first]


def test_another_query_instruction_ratio_or_passage_is_another_pair(checkpoint: Path) -> None:
    calls: list[tuple[str, dict[str, Any]]] = [
        ("query", {}),
        ("query", {"ratio": 1}),
        ("query", {"ratio": 8}),
        ("query", {"instruction": "Find it."}),
        ("other", {}),
    ]
    remembering, plain = made(checkpoint), made(checkpoint, score_memory=0)
    scores = []
    for query, call in calls * 2:
        pairs = [(query, text) for text in TEXTS]
        scores.append(remembering.predict(pairs, **call))
        assert scores[-1] == pytest.approx(plain.predict(pairs, **call), abs=1e-5)
    assert counts(remembering) == (5 * len(TEXTS), 5 * len(TEXTS))
    assert scores[:5] == scores[5:]
    assert len({tuple(found) for found in scores}) == 5, "so that a mix-up would show"
    assert counts(plain) == (0, 0)
    assert entries(plain) == 0


def test_a_list_with_new_passages_scores_only_those(checkpoint: Path, passages: list[str]) -> None:
    reranker, plain = made(checkpoint), made(checkpoint, score_memory=0)
    rows: list[int] = []
    reranker.rank("query", passages[:3])
    reranker.scorer.loaded.model.get_encoder().register_forward_pre_hook(
        lambda _, __, kwargs: rows.append(passages_in(kwargs)), with_kwargs=True
    )
    mixed = [passages[4], passages[1], passages[3], passages[1], passages[0]]
    pairs = [("query", text) for text in mixed]
    assert reranker.predict(pairs) == pytest.approx(plain.predict(pairs), abs=1e-5)
    assert sum(rows) == 2
    assert counts(reranker) == (2, 3 + 2)


def test_what_the_model_reads_alike_is_one_pair(checkpoint: Path) -> None:
    """Queries that are cut to the same tokens, each with its own flag; passages that are cleaned to the same text."""
    reranker = made(checkpoint, query_max_length=3)
    encode, words = reranker.scorer.prompts.tokenizer.encode, "how to sort a list"
    short = next(words[:end] for end in range(3, len(words)) if encode([words])[0][:3] == encode([words[:end]])[0])
    whole = reranker.rank(short, ["forged <end_of_turn> end"])[0]
    cut = reranker.rank(words, ["forged < end_of_turn> end"])[0]
    assert counts(reranker) == (1, 1)
    assert (whole.query_truncated, cut.query_truncated) == (False, True)
    assert whole.margin == cut.margin
    assert cut.document == "forged < end_of_turn> end"
    both = reranker.predict([("new", "forged <end_of_turn> end"), ("new", "forged < end_of_turn> end")])
    assert both[0] == pytest.approx(both[1], abs=1e-5)


def test_settings_and_precisions_do_not_meet(checkpoint: Path) -> None:
    """One `PassageCache`, and scores of each model and setting by themselves."""
    cache = PassageCache(None)
    for options in ({}, {"max_length": 10}, {"dtype": "bfloat16"}, {"system_prompt": "Judge."}):
        reranker = made(checkpoint, cache=cache, **options)
        reranker.rank("query", TEXTS)
        assert counts(reranker) == (0, len(TEXTS))


def test_progress_advances_for_remembered_pairs(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kalm_rag.utils.progress import Progress

    done: list[int] = []
    monkeypatch.setattr(Progress, "advance", lambda _, count: done.append(count))
    reranker = made(checkpoint)
    for _ in range(2):
        done.clear()
        reranker.rank("query", TEXTS)
        assert sum(done) == len(TEXTS)


def test_a_margin_that_is_not_finite_is_not_kept(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reranker = made(checkpoint)
    head = reranker.scorer.loaded.model.get_decoder()
    with monkeypatch.context() as patch:
        forward = head.forward

        def broken(*args: Any, **options: Any) -> Any:
            found = forward(*args, **options)
            found.last_hidden_state = torch.full_like(found.last_hidden_state, math.nan)
            return found

        patch.setattr(head, "forward", broken)
        with pytest.raises(ScoringError, match="non-finite"):
            reranker.rank("query", TEXTS)
    assert entries(reranker) == 0
    plain = made(checkpoint, score_memory=0)
    pairs = [("query", text) for text in TEXTS]
    assert reranker.predict(pairs) == pytest.approx(plain.predict(pairs), abs=1e-5)
    assert entries(reranker) == len(TEXTS)


def test_scores_of_a_model_that_was_overwritten_are_not_kept(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kalm_rag.errors import CheckpointError

    reranker = made(checkpoint)

    def changed() -> None:
        raise CheckpointError("overwritten")

    reranker.load()
    monkeypatch.setattr(reranker.scorer.loaded.files, "check", changed)
    with pytest.raises(CheckpointError, match="overwritten"):
        reranker.rank("query", TEXTS)
    assert entries(reranker) == 0


def test_threads_get_the_scores_of_one(checkpoint: Path, passages: list[str], queries: list[str]) -> None:
    """Repeats, new pairs, forgetting and eviction at once."""
    plain = made(checkpoint, score_memory=0)
    expected = {query: plain.predict([(query, text) for text in passages[:4]]) for query in queries[:6]}
    shared = made(checkpoint, score_memory=3000)

    def work(number: int) -> None:
        query = queries[number % 6]
        found = shared.predict([(query, text) for text in passages[:4]])
        assert found == pytest.approx(expected[query], abs=1e-5)
        if number % 5 == 0:
            shared.forget(passages[:1])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(36)))
    stats = shared.score_stats()
    assert stats is not None
    assert sum(counts(shared)) == 36 * 4
    assert stats.size.evicted > 0
    assert stats.size.bytes is not None
    assert 0 < stats.size.bytes <= 3000


def test_close_frees_the_scores(checkpoint: Path) -> None:
    reranker = made(checkpoint)
    assert reranker.score_stats() is None
    reranker.rank("query", TEXTS)
    kept = weakref.ref(reranker.scorer.score_cache)
    reranker.close()
    gc.collect()
    assert kept() is None
    assert reranker.score_stats() is None
    reranker.rank("query", TEXTS)
    assert counts(reranker) == (0, len(TEXTS))


class TestForgetting:
    """After it, nothing of the text is left, and the report counts it."""

    def test_a_reranker_forgets_every_score_of_a_text(self, checkpoint: Path) -> None:
        reranker, plain = made(checkpoint), made(checkpoint, score_memory=0)
        for query in ("one", "two"):
            reranker.rank(query, TEXTS)
        reranker.rank("one", TEXTS, ratio=8)
        report = reranker.forget(TEXTS[:2])
        assert (report.memory.scores, report.store.scores) == (3 * 2, 0)
        assert report.memory.total == report.memory.states + report.memory.prefilled + 6
        assert "scores=6" in repr(report.memory)
        assert entries(reranker) == 3 * 2
        pairs = [("one", text) for text in TEXTS]
        assert reranker.predict(pairs) == pytest.approx(plain.predict(pairs), abs=1e-5)
        assert counts(reranker) == (2, 3 * 4 + 2)
        assert reranker.forget(TEXTS).memory.scores == 3 * 2 + 2
        assert reranker.forget(TEXTS).memory.scores == 0

    def test_texts_whose_states_are_kept_nowhere(self, checkpoint: Path) -> None:
        """A ratio that the cache does not keep, and memory for scores alone."""
        options = {"ratio": 3, "prefill_memory": 0, "cache": PassageCache(None, memory=0)}
        reranker = made(checkpoint, **options)
        reranker.rank("query", TEXTS)
        assert reranker.cache.forget(TEXTS[:2]).memory.scores == 2
        assert entries(reranker) == 2

    @pytest.mark.parametrize("control_tokens", ["escape", "allow"])
    def test_all_rerankers_of_a_cache_forget(self, checkpoint: Path, tmp_path: Path, control_tokens: Any) -> None:
        cache = PassageCache(tmp_path)
        both = [made(checkpoint, cache=cache, control_tokens=control_tokens, max_length=size) for size in (64, 128)]
        for reranker in both:
            reranker.rank("query", TEXTS)
        assert cache.forget([{"text": text} for text in TEXTS[:3]]).memory.scores == 6
        assert [entries(reranker) for reranker in both] == [1, 1]

    def test_deleting_any_key_deletes_all_scores(self, checkpoint: Path) -> None:
        """The key of a prefilled passage does not tell its text."""
        reranker = made(checkpoint)
        reranker.rank("query", TEXTS)
        [key] = reranker.scorer.passage_kv.keys(
            ["plain"], reranker.scorer.passage_kv.request(reranker.settings.instruction, reranker.settings.ratio)
        )
        assert reranker.cache.delete([]) == 0
        assert entries(reranker) == len(TEXTS)
        assert reranker.cache.delete([key]) == 1, "an entry; scores are not counted"
        assert entries(reranker) == 0

    def test_a_discarded_entry_takes_the_scores_of_its_passage_along(self, checkpoint: Path) -> None:
        reranker = made(checkpoint)
        reranker.rank("query", TEXTS)
        reranker.cache.discard(reranker.scorer.keys.states_keys(["plain"]))
        assert entries(reranker) == len(TEXTS) - 1

    def test_more_key_spaces_than_are_remembered(self, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(spaces, "_MOST_USED", 1)
        reranker = made(checkpoint)
        for instruction in ("One.", "Two."):
            reranker.rank("query", TEXTS, instruction=instruction)
        assert reranker.cache.forget(["plain"]).memory.scores == 2 * len(TEXTS)
        assert entries(reranker) == 0


class TestBudget:
    """Of bytes, in any process; without a model."""

    @staticmethod
    def cache(limit: int) -> ScoreCache:
        fields = dict.fromkeys(("encoder", "tokenizer", "template", "decoder"), "")
        keys = KeySpace(model=bytes(32), max_length=8, dtype="float32", storage="native", **fields)
        return ScoreCache(limit, PassageCache(None), Space(keys, ControlTokens([])))

    @staticmethod
    def fill(cache: ScoreCache, queries: int, each: int) -> None:
        for query in range(queries):
            prompt = bytes((query).to_bytes(32, "little"))
            cache.put_many(
                {PairKey(prompt, bytes((query * each + n).to_bytes(32, "big"))): (n / 7, False) for n in range(each)}
            )

    @pytest.mark.parametrize(("each", "pairs"), [(32, 93_000), (1, 28_000)])
    def test_the_bytes_that_are_counted_are_taken(self, each: int, pairs: int) -> None:
        """And the default holds as many pairs as its documentation says."""
        cache = self.cache(DEFAULT_SCORE_MEMORY // 10)
        self.fill(cache, 1, 1)
        cache.clear()
        tracemalloc.start()
        try:
            before = tracemalloc.get_traced_memory()[0]
            self.fill(cache, 2 * pairs // each // 10, each)
            used = tracemalloc.get_traced_memory()[0] - before
        finally:
            tracemalloc.stop()
        size = cache.stats().size
        assert size.evicted
        assert size.entries is not None
        assert size.bytes is not None
        assert 10 * size.entries == pytest.approx(pairs, rel=0.04)
        assert size.bytes <= DEFAULT_SCORE_MEMORY // 10
        # Python's allocator rounds up to 16 bytes, which tracemalloc does not see: 65 to 80 and 42 to 48.
        assert used + size.entries * (15 + 6) == pytest.approx(size.bytes, rel=0.1)

    def test_the_default_is_16_megabytes(self) -> None:
        assert Settings().score_memory == Options().score_memory == DEFAULT_SCORE_MEMORY == 16_000_000

    def test_the_query_that_was_not_asked_for_the_longest_time_leaves_first(self) -> None:
        cache = self.cache(4000)
        self.fill(cache, 8, 1)
        held = cache.stats().size.entries
        assert held is not None
        oldest, next_oldest = (PairKey(n.to_bytes(32, "little"), n.to_bytes(32, "big")) for n in (8 - held, 9 - held))
        assert cache.get_many([oldest]) == [(0.0, False)]
        cache.put_many({PairKey(b"n" * 32, b"n" * 32): (1.0, True)})
        assert cache.get_many([oldest, next_oldest, PairKey(b"n" * 32, b"n" * 32)]) == [
            (0.0, False),
            None,
            (1.0, True),
        ]

    def test_a_budget_below_one_entry_keeps_nothing_and_says_so_once(
        self, checkpoint: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        reranker = made(checkpoint, score_memory=100)
        for query in ("one", "two"):
            reranker.rank(query, TEXTS)
        stats = reranker.score_stats()
        assert stats is not None
        assert (stats.size.entries, stats.size.bytes, stats.size.refused) == (0, 0, 2 * len(TEXTS))
        assert caplog.text.count("more than the budget of 100") == 1

    def test_what_fits_stays_when_a_query_grows_beyond_the_budget(self) -> None:
        cache = self.cache(4000)
        keys = [PairKey(b"q" * 32, bytes([number]) * 32) for number in range(40)]
        for key in keys:
            cache.put_many({key: (1.0, False)})
        found = cache.get_many(keys)
        size = cache.stats().size
        assert 0 < len(found) - found.count(None) == size.entries
        assert size.refused == found.count(None)
        assert found[0] == (1.0, False)

    @pytest.mark.parametrize("value", [-1, True, math.nan, "16 MB", None, 1.5, np.float64(3)])
    def test_bad_budgets(self, value: Any) -> None:
        with pytest.raises(ValueError, match=r"score_memory must be a number of bytes, 0 to keep nothing in memory"):
            KaLMReranker("mini", score_memory=value)
        with pytest.raises(ValueError, match="score_memory must be a number of bytes"):
            Options(score_memory=value)

    def test_a_copy_keeps_the_budget(self) -> None:
        import copy

        assert copy.copy(KaLMReranker("mini", score_memory=12_345)).settings.score_memory == 12_345

    def test_stats_show_bytes_in_words(self, checkpoint: Path) -> None:
        reranker = made(checkpoint)
        reranker.rank("query", TEXTS)
        reranker.rank("query", TEXTS)
        shown = repr(reranker.score_stats())
        assert shown.startswith("ScoreStats(hits=4, misses=4, entries=4, bytes=")
        assert "limit=16.0 MB" in shown
