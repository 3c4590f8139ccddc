"""Scores equal those of an independent implementation: the KaLM wrapper in the package `mteb`."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mteb.models.model_implementations.kalm_reranker import KaLMRerankerWrapper

from kalm_rag import KaLMReranker

INSTRUCTION = "Given a web search query, retrieve passages that answer the query."
SYSTEM = 'Decide about the Document. Say only "yes" or "no".'
RATIOS = (1, 2, 3, 4, 8, 32, None)

ODD_PASSAGES = [
    "",
    " ",
    "x",
    "\n\n\n",
    "a\nb\n\nc\n\n\nd\n\n\n\ne",
    "\tindented  twice   thrice",
    "naïve café — “quotes” … ½ µm",
    "北京是中国的首都。",
    "العاصمة هي بكين",
    "🦜🔗 emoji 👩‍👩‍👧‍👦 zero\u200bwidth e\u0301",
    "<b>markup</b> & <not_a_token> [brackets]",
    "yes",
    "no " * 40,
]
ODD_QUERIES = ["", " ", "?", "\n", "  leading", "trailing  ", '"quoted": it\'s', "北京?", "🦜", "a\n\nb", ":", "\t"]


class Reference:
    """The wrapper, one call for any batch."""

    def __init__(self, checkpoint: Path, **options: Any) -> None:
        self.wrapper = KaLMRerankerWrapper(str(checkpoint), device="cpu", **options)

    def scores(self, pairs: list[tuple[str, str]], batch: int = 8) -> list[float]:
        found: list[float] = []
        for start in range(0, len(pairs), batch):
            part = pairs[start : start + batch]
            found += self.wrapper._predict_batch(part, [self.wrapper.instruction] * len(part))
        return found


class Ours:
    """Every path at once: the plain one, the one that prefills, and the one that finds everything prefilled."""

    def __init__(self, checkpoint: Path, **options: Any) -> None:
        self.plain = KaLMReranker(checkpoint, prefill_memory=0, score_memory=0, **options)
        self.prefilled = KaLMReranker(checkpoint, score_memory=0, **options)

    def predict(self, pairs: list[tuple[str, str]], **options: Any) -> list[float]:
        runs = [reranker.predict(pairs, **options) for reranker in (self.plain, self.prefilled, self.prefilled)]
        stats = self.prefilled.prefill_stats()
        assert stats is not None
        assert stats.counters.hits > 0, "nothing was found prefilled"
        assert largest(runs[0], runs[1]) <= 1e-5
        assert largest(runs[1], runs[2]) <= 1e-5
        return runs[2]


def largest(left: list[float], right: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(left, right, strict=True))


Compare = Callable[[list[float], list[float]], None]


@pytest.fixture
def same(record_property: Callable[[str, object], None]) -> Compare:
    """Assert equality within 1e-5, and keep the difference for the table at the end of the test run."""

    def compare(found: list[float], expected: list[float]) -> None:
        difference = largest(found, expected)
        record_property("parity", difference)
        assert difference <= 1e-5

    return compare


def assert_informative(scores: list[float]) -> None:
    """Equal scores of equal inputs would prove nothing."""
    assert max(scores) - min(scores) > 0.05


@pytest.fixture(scope="module")
def pairs(passages: list[str], queries: list[str]) -> list[tuple[str, str]]:
    return [(queries[number % 5], passage) for number, passage in enumerate(passages[:24])]


@pytest.mark.parametrize("ratio", RATIOS)
def test_ratios(same: Compare, checkpoint: Path, pairs: list[tuple[str, str]], ratio: int | None) -> None:
    expected = Reference(checkpoint, chunk_size=ratio).scores(pairs)
    assert_informative(expected)
    same(Ours(checkpoint, ratio=ratio).predict(pairs), expected)


def test_ratio_of_a_call_equals_ratio_of_the_instance(
    same: Compare, checkpoint: Path, pairs: list[tuple[str, str]]
) -> None:
    reranker = Ours(checkpoint)
    for ratio in (1, 2, 3, 8, 32):
        expected = Reference(checkpoint, chunk_size=ratio).scores(pairs)
        same(reranker.predict(pairs, ratio=ratio), expected)


@pytest.mark.parametrize("max_length", [1, 4, 7, 64, 200])
def test_passages_from_one_token_to_beyond_the_limit(
    same: Compare, checkpoint: Path, passages: list[str], queries: list[str], max_length: int
) -> None:
    pairs = [(queries[0], passage) for passage in [*ODD_PASSAGES, *passages[:6], passages[0] * 5]]
    expected = Reference(checkpoint, max_length=max_length).scores(pairs)
    same(Ours(checkpoint, max_length=max_length).predict(pairs), expected)
    reranker = KaLMReranker(checkpoint, max_length=max_length)
    hits = {hit.index: hit for hit in reranker.rank(queries[0], [passage for _, passage in pairs])}
    assert hits[len(pairs) - 1].passage_truncated
    assert all(hit.passage_truncated for hit in hits.values()) == (max_length < 7)


@pytest.mark.parametrize("limit", [1, 16, 512])
def test_queries_of_no_to_600_tokens(
    same: Compare, checkpoint: Path, passages: list[str], queries: list[str], limit: int
) -> None:
    """The longest prompts are ten times the sliding window of the small checkpoint."""
    long = " ".join(queries)
    asked = [*ODD_QUERIES, long[:40], long[:200], long[:800], long, long * 3]
    pairs = [(query, passages[number % 4]) for number, query in enumerate(asked)]
    expected = Reference(checkpoint, query_max_length=limit).scores(pairs)
    assert_informative(expected)
    same(Ours(checkpoint, query_max_length=limit).predict(pairs), expected)
    reranker = KaLMReranker(checkpoint, query_max_length=limit)
    assert reranker.rank(asked[-1], passages[:1])[0].query_truncated
    assert not reranker.rank("", passages[:1])[0].query_truncated


def test_unicode_newlines_and_empty_passages(same: Compare, checkpoint: Path) -> None:
    pairs = list(itertools.product(ODD_QUERIES, ODD_PASSAGES))
    same(Ours(checkpoint).predict(pairs), Reference(checkpoint).scores(pairs, batch=32))


def test_instruction_and_system_prompt(same: Compare, checkpoint: Path, pairs: list[tuple[str, str]]) -> None:
    expected = Reference(checkpoint, instruction=INSTRUCTION, system_instruction=SYSTEM).scores(pairs)
    plain = Reference(checkpoint).scores(pairs)
    assert largest(expected, plain) > 1e-3
    same(Ours(checkpoint, instruction=INSTRUCTION, system_prompt=SYSTEM).predict(pairs), expected)
    reranker = Ours(checkpoint, system_prompt=SYSTEM)
    same(reranker.predict(pairs, instruction=INSTRUCTION), expected)


@pytest.mark.parametrize("batch", [1, 3, 32])
def test_any_batch_in_any_order(same: Compare, checkpoint: Path, pairs: list[tuple[str, str]], batch: int) -> None:
    expected = dict(zip(pairs, Reference(checkpoint).scores(pairs, batch), strict=True))
    shuffled = random.Random(batch).sample(pairs, len(pairs))
    found = Ours(checkpoint, batch_size=batch).predict(shuffled)
    same(found, [expected[pair] for pair in shuffled])


def test_bfloat16_stays_within_the_reference_spread(checkpoint: Path, pairs: list[tuple[str, str]]) -> None:
    """In bfloat16 the reference's own scores move with the batch; ours may move about as much."""
    reference = Reference(checkpoint, dtype="bfloat16")
    runs = [reference.scores(pairs, batch) for batch in (1, 2, 3, 5, 8, 12, 24)]
    spread = max(largest(left, right) for left, right in itertools.combinations(runs, 2))
    found = KaLMReranker(checkpoint, dtype="bfloat16").predict(pairs)
    assert 0 < spread < 0.2
    spread *= 1.5  # seven runs show most of it
    assert min(largest(found, run) for run in runs) <= spread
    assert (
        max(
            abs(value - sum(column) / len(column)) for value, column in zip(found, zip(*runs, strict=True), strict=True)
        )
        <= spread
    )


def test_layers_exceed_one_period_and_prompts_exceed_the_window(checkpoint: Path, queries: list[str]) -> None:
    """What the other tests rely on."""
    engine = KaLMReranker(checkpoint).scorer
    config = engine.loaded.model.config.decoder
    assert {"sliding_attention", "full_attention"} == set(config.layer_types)
    assert config.layer_types.index("full_attention") < len(config.layer_types) - 1
    assert len(engine.prompts.prompt(queries[0]).ids) > config.sliding_window


def test_more_passages_than_one_window(
    same: Compare, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, pairs: list[tuple[str, str]]
) -> None:
    monkeypatch.setattr("kalm_rag.windows.passages.AT_ONCE", 5)
    same(Ours(checkpoint).predict(pairs * 2), Reference(checkpoint).scores(pairs) * 2)


@pytest.mark.weights
def test_published_scores_of_the_card() -> None:
    """The model card of Large prints these; runs only where its weights are in the local hub cache."""
    from kalm_rag.errors import CheckpointError

    passages = ["The capital of China is Beijing.", "Gravity attracts bodies toward one another."]
    reranker = KaLMReranker("KaLM-Embedding/KaLM-Reranker-V1-Large", local_files_only=True)
    try:
        reranker.checkpoint()
    except CheckpointError:
        pytest.skip("the weights of KaLM-Reranker-V1-Large are not in the local hub cache")
    query = "What is the capital of China?"
    near = 0.02 if torch.cuda.is_available() else 0.05
    first, second = reranker.rank(query, passages)
    assert (first.index, second.index) == (0, 1)
    assert first.score == pytest.approx(0.99984646, abs=near)
    assert first.margin == pytest.approx(8.78125, abs=0.5)
    assert second.margin == pytest.approx(-14.1875, abs=0.5)
    first, second = reranker.rank(query, passages, instruction=INSTRUCTION)
    assert first.score == pytest.approx(0.997285, abs=near)
    assert second.score == pytest.approx(5.896418e-07, abs=near)
