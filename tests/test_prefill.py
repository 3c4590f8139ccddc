"""Prefilled passages: the same scores from a fraction of the work, under a budget, whatever is missing."""

from __future__ import annotations

import gc
import inspect
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from machine import needs_int8
from spies import passages_in

from kalm_rag import KaLMReranker, PassageCache
from kalm_rag.model.checkpoint import find_checkpoint
from kalm_rag.model.loading import load_model
from kalm_rag.model.prefiller import PromptPrefix, find_prompt_prefix
from kalm_rag.scorer import Scorer
from kalm_rag.settings import DEFAULT_INSTRUCTION, Settings

QUERIES = ["How do I sort a list?", "what is a method", "  odd spaces ", "北京?", "", "a\n\nb", "x" * 300]
TOLERANCE = 1e-5


class Counted:
    """A reranker with counters on what its model runs: encoder passages, and decoder tokens."""

    def __init__(self, checkpoint: Path, **options: Any) -> None:
        self.reranker = KaLMReranker(checkpoint, device="cpu", **{"cache": None, "score_memory": 0, **options})
        model = self.reranker.scorer.loaded.model
        self.encoded = self.decoded = 0
        model.get_encoder().register_forward_pre_hook(self._encoder, with_kwargs=True)
        model.get_decoder().register_forward_pre_hook(self._decoder, with_kwargs=True)

    def _encoder(self, _module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        self.encoded += passages_in(kwargs)

    def _decoder(self, _module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids")
        shape = kwargs["inputs_embeds"].shape[:2] if ids is None else ids.shape
        self.decoded += shape[0] * shape[1]

    def spent(self) -> tuple[int, int]:
        """Since the last call."""
        found = self.encoded, self.decoded
        self.encoded = self.decoded = 0
        return found

    def scores(self, query: str, passages: list[str], **options: Any) -> list[float]:
        return self.reranker.predict([(query, text) for text in passages], **options)

    @property
    def counters(self) -> Any:
        return self.reranker.prefill_stats().counters

    @property
    def size(self) -> Any:
        return self.reranker.prefill_stats().size


@pytest.fixture
def plain(checkpoint: Path) -> Callable[..., list[float]]:
    """Scores of the plain path."""

    def scores(query: str, passages: list[str], **options: Any) -> list[float]:
        call = {name: options.pop(name) for name in ("ratio", "instruction") if name in options}
        reranker = KaLMReranker(checkpoint, device="cpu", cache=None, prefill_memory=0, **options)
        return reranker.predict([(query, text) for text in passages], **call)

    return scores


def near(left: list[float], right: list[float], tolerance: float = TOLERANCE) -> bool:
    return max(abs(a - b) for a, b in zip(left, right, strict=True)) <= tolerance


def test_a_warm_query_runs_its_own_tokens_alone(checkpoint: Path, passages: list[str], plain: Any) -> None:
    counted = Counted(checkpoint)
    engine = counted.reranker.scorer
    counted.scores("first query", passages[:8])
    assert counted.spent()[0] == 8
    prefix = engine.passage_kv.prefix(engine.settings.instruction)
    for query in QUERIES:
        assert near(counted.scores(query, passages[:8]), plain(query, passages[:8]))
        new = len(engine.prompts.prompt(query).ids) - len(prefix.ids)
        assert counted.spent() == (0, 8 * new)
    assert counted.counters.full_prompts == 0


def test_new_stored_and_prefilled_passages_in_one_request(
    checkpoint: Path, tmp_path: Path, passages: list[str], plain: Any
) -> None:
    """Each pays for what it lacks."""
    KaLMReranker(checkpoint, device="cpu", cache=tmp_path).encode(passages[3:6])
    counted = Counted(checkpoint, cache=tmp_path)
    counted.scores("warm up", passages[:3])
    counted.spent()
    assert near(counted.scores("query", passages[:9]), plain("query", passages[:9]))
    encoded, _ = counted.spent()
    assert encoded == 3
    assert (counted.counters.hits, counted.counters.misses) == (3, 3 + 6)


@pytest.mark.parametrize("ratio", [1, 2, 3, 4, 8, 32])
def test_ratios_live_side_by_side(checkpoint: Path, passages: list[str], plain: Any, ratio: int) -> None:
    counted = Counted(checkpoint, cache=PassageCache(None, base_ratio=1))
    for _ in range(2):
        for used in (4, ratio):
            assert near(counted.scores("query", passages[:4], ratio=used), plain("query", passages[:4], ratio=used))
    assert counted.spent()[0] == 4
    assert counted.size.entries == (4 if ratio == 4 else 8)


def test_instructions_live_side_by_side(checkpoint: Path, passages: list[str], plain: Any) -> None:
    instructions = ["Given a question, find its answer.", "x", "", "long " * 80, "北京 <end_of_turn> {braces}"]
    counted = Counted(checkpoint)
    for _ in range(2):
        for instruction in instructions:
            found = counted.scores("query", passages[:3], instruction=instruction)
            assert near(found, plain("query", passages[:3], instruction=instruction))
    assert counted.size.entries == 3 * len(instructions)
    assert counted.counters.hits == 3 * len(instructions)


def test_system_prompt(checkpoint: Path, passages: list[str], plain: Any) -> None:
    options = {"system_prompt": "Say yes or no."}
    counted = Counted(checkpoint, **options)
    for _ in range(2):
        assert near(counted.scores("query", passages[:3]), plain("query", passages[:3], **options))


@pytest.mark.parametrize("words", [1, 20, 60, 200])
def test_prompts_beyond_the_sliding_window(checkpoint: Path, passages: list[str], plain: Any, words: int) -> None:
    """The window of the checkpoint is 48 tokens: its prompts exceed it before the query begins."""
    query = " ".join(f"word{number}" for number in range(words))
    short = "Rank."
    counted = Counted(checkpoint, system_prompt="S.", instruction=short)
    expected = plain(query, passages[:4], system_prompt="S.", instruction=short)
    assert near(counted.scores(query, passages[:4]), expected)
    assert near(counted.scores(query, passages[:4]), expected)


def test_mixed_lengths_in_a_batch(checkpoint: Path, passages: list[str]) -> None:
    pairs = [(query, text) for query in QUERIES for text in ["", "short", *passages[:5], passages[0] * 3]]
    expected = KaLMReranker(checkpoint, cache=None, prefill_memory=0).predict(pairs)
    reranker = KaLMReranker(checkpoint, cache=None, score_memory=0)
    assert near(reranker.predict(pairs), expected)
    assert near(reranker.predict(pairs[::-1]), expected[::-1])


@pytest.mark.parametrize("words", [1, 60])
def test_the_last_layer_runs_the_last_token_alone(
    checkpoint: Path, passages: list[str], plain: Any, words: int
) -> None:
    """Nothing else of it is scored. Where a transformers is built otherwise, it runs all tokens, to the same scores."""
    pairs = [(query, text) for query in ("word " * words, "two words", "three more words") for text in passages[:3]]
    expected = [score for query, text in pairs for score in plain(query, [text])]
    counted = Counted(checkpoint)
    layers = counted.reranker.scorer.loaded.model.get_decoder().layers
    shapes: list[tuple[int, ...]] = []
    for layer in (layers[0], layers[-1]):
        layer.mlp.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape[:2])))
    counted.reranker.predict(pairs)
    shapes.clear()
    assert near(counted.reranker.predict(pairs), expected)
    assert sum(rows for rows, _ in shapes[1::2]) == len(pairs)
    assert {tokens for _, tokens in shapes[1::2]} == {1}
    assert {tokens for _, tokens in shapes[::2]} != {1}
    shapes.clear()

    def by_keyword(layer: Any, args: Any, kwargs: Any) -> Any:
        names = list(inspect.signature(layer.forward).parameters)[1 : len(args)]
        return args[:1], {**dict(zip(names, args[1:], strict=True)), **kwargs}

    layers[-1].register_forward_pre_hook(by_keyword, with_kwargs=True, prepend=True)
    assert near(counted.reranker.predict(pairs), expected)
    assert {tokens for _, tokens in shapes[1::2]} == {tokens for _, tokens in shapes[::2]}


def test_a_transformers_that_computes_keys_otherwise_falls_back(
    checkpoint: Path, passages: list[str], plain: Any, monkeypatch: Any, caplog: Any
) -> None:
    """The last layer's keys are not its own: on the first query they are compared with what it would have computed."""
    from transformers.models.t5gemma2 import modeling_t5gemma2

    stock = modeling_t5gemma2.apply_rotary_pos_emb

    def partial(query: Any, key: Any, cos: Any, sin: Any, **options: Any) -> Any:
        return stock(query, key, cos * 0.9, sin, **options)

    monkeypatch.setattr(modeling_t5gemma2, "apply_rotary_pos_emb", partial)
    expected = plain("query", passages[:3])
    counted = Counted(checkpoint)
    assert near(counted.scores("query", passages[:3]), expected)
    assert "computes keys and values differently" in caplog.text
    assert near(counted.scores("other query", passages[:3]), plain("other query", passages[:3]))


def test_a_prompt_that_begins_otherwise_runs_in_full(
    checkpoint: Path, passages: list[str], plain: Any, monkeypatch: Any
) -> None:
    """As if the tokenizer had joined the query's first characters with the template."""
    counted = Counted(checkpoint)
    engine = counted.reranker.scorer
    starts = PromptPrefix.starts
    monkeypatch.setattr(PromptPrefix, "starts", lambda self, prompt: starts(self, prompt) and len(prompt.ids) % 2 == 0)
    queries = ["one", "one two", "one two three", "one two three four"]
    parity = {len(engine.prompts.prompt(query).ids) % 2 for query in queries}
    assert parity == {0, 1}, "some fit and some do not"
    pairs = [(query, text) for query in queries for text in passages[:3]]
    expected = [score for query in queries for score in plain(query, passages[:3])]
    assert near(counted.reranker.predict(pairs), expected)
    assert 0 < counted.counters.full_prompts < len(pairs)


def test_the_prefix_is_verified_token_by_token(checkpoint: Path) -> None:
    prompts = KaLMReranker(checkpoint).scorer.prompts
    prefix = find_prompt_prefix(prompts, "Find it.")
    text = prompts.tokenizer.decode(prefix.ids)
    assert prompts.prefix("Find it.").startswith(text)
    assert len(prompts.prefix("Find it.")) - len(text) <= 2
    for query in QUERIES:
        prompt = prompts.prompt(query, "Find it.")
        assert prefix.starts(prompt)
        assert list(prefix.ids) == prompt.ids[: len(prefix.ids)]
    assert not prefix.starts(prompts.prompt("query", "Find another."))


def test_budget_is_kept_and_eviction_falls_back(checkpoint: Path, passages: list[str], plain: Any) -> None:
    one = Counted(checkpoint)
    one.scores("query", passages[:1])
    budget = 5 * one.size.bytes
    counted = Counted(checkpoint, prefill_memory=budget)
    expected = plain("query", passages[:24])
    for _ in range(2):
        assert near(counted.scores("query", passages[:24]), expected)
        assert counted.size.bytes <= budget
    held = [value.nbytes for value in counted.reranker.scorer.passage_kv.cached.memory.values()]
    assert sum(held) == counted.size.bytes
    assert counted.size.evicted > 20
    assert counted.spent()[0] == 24, "states stayed, so nothing was encoded twice"


def test_a_scan_over_a_corpus_leaves_passages_that_queries_use(
    checkpoint: Path, passages: list[str], plain: Any
) -> None:
    hot, corpus = passages[:5], passages[5:90]
    one = Counted(checkpoint)
    one.scores("query", passages[:90])
    counted = Counted(checkpoint, prefill_memory=one.size.bytes // 9)
    for query in ("query", "another query"):
        counted.scores(query, hot)
    counted.scores("query", corpus)
    assert counted.size.evicted > 60
    before = counted.counters.hits
    assert near(counted.scores("a third query", hot), plain("a third query", hot))
    assert counted.counters.hits == before + len(hot)


def test_budget_below_one_passage_keeps_nothing_and_says_so_once(
    checkpoint: Path, passages: list[str], plain: Any, caplog: pytest.LogCaptureFixture
) -> None:
    counted = Counted(checkpoint, prefill_memory=1000)
    for _ in range(2):
        assert near(counted.scores("query", passages[:3]), plain("query", passages[:3]))
    assert counted.size.entries == 0
    assert caplog.text.count("more than the budget of 1000") == 1


def test_budget_of_zero_runs_full_prompts(checkpoint: Path, passages: list[str]) -> None:
    counted = Counted(checkpoint, prefill_memory=0)
    counted.scores("query", passages[:3])
    assert (counted.size.entries, counted.counters.misses) == (0, 0)


def test_int8_keys_and_values_take_a_fraction_and_move_scores_little(
    checkpoint: Path, passages: list[str], plain: Any
) -> None:
    native, small = Counted(checkpoint), Counted(checkpoint, prefill_storage="int8")
    expected = plain("query", passages[:16])
    native.scores("query", passages[:16])
    cold = small.scores("query", passages[:16])
    warm = small.scores("query", passages[:16])
    assert cold == warm, "a score must not depend on what was warm"
    assert 0 < max(abs(a - b) for a, b in zip(warm, expected, strict=True)) < 0.05
    assert small.size.bytes < 0.3 * native.size.bytes


def test_bfloat16_warm_equals_cold(checkpoint: Path, passages: list[str]) -> None:
    counted = Counted(checkpoint, dtype="bfloat16")
    cold = counted.scores("query", passages[:8])
    assert counted.scores("query", passages[:8]) == cold


def test_memory_is_freed_on_close(checkpoint: Path, passages: list[str]) -> None:
    reranker = KaLMReranker(checkpoint, cache=None)
    reranker.rank("query", passages[:4])
    assert reranker.prefill_stats().size.entries == 4
    kept = weakref.ref(reranker.scorer.passage_kv.cached.memory)
    reranker.close()
    gc.collect()
    assert reranker.prefill_stats() is None
    assert kept() is None


def test_a_transformers_that_drops_the_argument_falls_back(
    checkpoint: Path, passages: list[str], plain: Any, monkeypatch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A future release that stops handing arguments on must not give wrong scores."""
    counted = Counted(checkpoint)
    decoder = counted.reranker.scorer.loaded.model.get_decoder()
    forward = decoder.forward
    monkeypatch.setattr(
        decoder, "forward", lambda **options: forward(**{k: v for k, v in options.items() if k != "key_values"})
    )
    for _ in range(2):
        assert near(counted.scores("query", passages[:4]), plain("query", passages[:4]))
    assert caplog.text.count("every query runs its full prompt") == 1


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_products_made_less_exact_for_the_process_keep_prefill(
    checkpoint: Path, passages: list[str], precision: str, caplog: pytest.LogCaptureFixture
) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        counted = Counted(checkpoint)
        for _ in range(2):
            counted.scores("query", passages[:4])
    finally:
        torch.set_float32_matmul_precision(before)
    assert counted.counters.hits == 4
    assert "full prompt" not in caplog.text


def test_query_beyond_the_positions_of_the_model(checkpoint: Path) -> None:
    reranker = KaLMReranker(checkpoint, query_max_length=100_000, cache=None)
    with pytest.raises(
        ValueError,
        match=r"more tokens than the 8192 positions .* lower query_max_length \(now 100000\)",
    ):
        reranker.rank("word " * 20_000, ["passage"])
    with pytest.raises(ValueError, match="max_length=9000 is more than the 8192 positions"):
        KaLMReranker(checkpoint, max_length=9000).load()


def test_many_queries_times_many_passages(checkpoint: Path, passages: list[str]) -> None:
    """More passages than are prefilled at a time, shuffled over queries."""
    texts = [f"{number} {text[:60]}" for number, text in enumerate(passages * 2)]
    pairs = [(QUERIES[(7 * number) % 3], text) for number, text in enumerate(texts)]
    expected = KaLMReranker(checkpoint, cache=None, prefill_memory=0).predict(pairs)
    reranker = KaLMReranker(checkpoint, cache=None, batch_size=8)
    assert near(reranker.predict(pairs), expected)


def test_attention_is_left_alone_elsewhere(checkpoint: Path) -> None:
    """The decoder without prefilled passages computes what it computed before."""
    import transformers

    model = transformers.T5Gemma2ForConditionalGeneration.from_pretrained(checkpoint).eval()
    ids = torch.arange(5, 60)[None]
    with torch.inference_mode():
        before = model(input_ids=ids, decoder_input_ids=ids).logits
        from kalm_rag.model.merged_attention import install

        install(model.get_decoder())
        after = model(input_ids=ids, decoder_input_ids=ids).logits
    torch.testing.assert_close(after, before, atol=0, rtol=0)


def test_the_store_keeps_prefilled_passages_on_request(
    checkpoint: Path, tmp_path: Path, passages: list[str], plain: Any
) -> None:
    """A second process reads them, and runs neither the encoder nor the prompt's prefix."""
    expected = plain("query", passages[:6])
    first = Counted(checkpoint, cache=PassageCache(tmp_path, keep="prefilled"))
    assert near(first.scores("query", passages[:6]), expected)
    first.reranker.cache.close()
    second = Counted(checkpoint, cache=PassageCache(tmp_path, keep="prefilled"))
    assert near(second.scores("query", passages[:6]), expected)
    engine = second.reranker.scorer
    new = len(engine.prompts.prompt("query").ids) - len(engine.passage_kv.prefix(engine.settings.instruction).ids)
    assert second.spent() == (0, 6 * new)
    assert (second.counters.stored, second.counters.misses) == (6, 0)
    assert second.reranker.cache.stats().prefilled.hits == 6
    states_only = Counted(checkpoint, cache=PassageCache(tmp_path))
    assert near(states_only.scores("query", passages[:6]), expected)
    assert states_only.counters.stored == 0


def test_encode_ahead_prefills_into_the_store(
    checkpoint: Path, tmp_path: Path, passages: list[str], plain: Any
) -> None:
    with KaLMReranker(checkpoint, cache=PassageCache(tmp_path, keep="prefilled"), ratio=8) as writer:
        writer.encode(passages[:4])
        writer.cache.flush()
    counted = Counted(checkpoint, cache=PassageCache(tmp_path, keep="prefilled"), ratio=8)
    assert near(counted.scores("query", passages[:4]), plain("query", passages[:4], ratio=8))
    assert counted.counters.stored == 4


@pytest.mark.parametrize("change", ["decoder", "instruction", "system_prompt", "ratio", "storage"])
def test_stored_prefilled_passages_are_no_hit_for_another_model_or_prompt(
    checkpoint: Path, tmp_path: Path, passages: list[str], plain: Any, change: str
) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    with KaLMReranker(checkpoint, cache=PassageCache(tmp_path / "cache", keep="prefilled")) as writer:
        writer.rank("query", passages[:3])
    folder = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    options: dict[str, Any] = {}
    if change == "decoder":
        tensors = load_file(folder / "model.safetensors")
        tensors["model.decoder.layers.0.mlp.up_proj.weight"].mul_(1.5)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    elif change == "storage":
        options["prefill_storage"] = "int8"
    else:
        options[change] = {"instruction": "Another.", "system_prompt": "Another.", "ratio": 8}[change]
    counted = Counted(folder, cache=PassageCache(tmp_path / "cache", keep="prefilled"), **options)
    found = counted.scores("query", passages[:3])
    assert (counted.counters.stored, counted.counters.misses) == (0, 3)
    assert counted.spent()[0] == 0, "the states are still known"
    if change == "decoder":
        expected = KaLMReranker(folder, cache=None, prefill_memory=0).predict(
            [("query", text) for text in passages[:3]]
        )
        assert near(found, expected)


@pytest.mark.parametrize(
    ("damage", "dtype"),
    [
        ("flip", "float32"),
        ("nan", "float32"),
        ("nan", "bfloat16"),
        pytest.param("nan", "int8", marks=needs_int8),
        ("states", "float32"),
    ],
)
def test_a_damaged_prefilled_entry_is_computed_again(
    checkpoint: Path, tmp_path: Path, passages: list[str], plain: Any, damage: str, dtype: str
) -> None:
    from kalm_rag.cache import DiskStore
    from kalm_rag.cache import frame as module

    with KaLMReranker(checkpoint, dtype=dtype, cache=PassageCache(tmp_path, keep="prefilled")) as writer:
        writer.rank("query", passages[:3])
        engine = writer.scorer
        [key] = engine.keys.prefilled_keys(
            [passages[1]],
            ratio=4,
            prefix=engine.passage_kv.prefix(engine.settings.instruction).ids,
            kind=engine.passage_kv.decoder.name,
        )
        other = engine.keys.states_keys([passages[1]])[0]
        writer.cache.flush()  # it was handed in, so the end of the block leaves its writes pending
    store = DiskStore(tmp_path)
    data = store.get_many([key])[key]
    head, payload = data[: module._HEAD.size], bytearray(data[module.HEADER_BYTES :])
    if damage == "flip":
        store.put_many({key: data[:-1] + bytes([data[-1] ^ 1])})
    elif damage == "nan":
        payload[:4] = b"\x00\x00\xc0\x7f"
        store.put_many({key: head + module._checksum(head, bytes(payload)) + bytes(payload)})
    else:
        store.put_many({key: store.get_many([other])[other]})
    store.close()
    counted = Counted(checkpoint, dtype=dtype, cache=PassageCache(tmp_path, keep="prefilled"))
    expected = plain("query", passages[:3], dtype=dtype)
    assert near(counted.scores("query", passages[:3]), expected, TOLERANCE if dtype == "float32" else 0.02)
    assert counted.counters.stored == (3 if damage == "nan" else 2)
    stats = counted.reranker.cache.stats()
    assert stats.prefilled.corrupt + stats.store.counters.corrupt >= 1


@needs_int8
def test_int8_weights_stay_close(checkpoint: Path, passages: list[str], plain: Any) -> None:
    """Random weights, so that nothing but the arithmetic is compared."""
    expected = plain("query", passages[:16])
    counted = Counted(checkpoint, dtype="int8")
    cold = counted.scores("query", passages[:16])
    warm = counted.scores("query", passages[:16])
    assert cold == warm
    assert max(abs(a - b) for a, b in zip(warm, expected, strict=True)) < 0.1
    ranks = [torch.tensor(scores).argsort().argsort().float() for scores in (warm, expected)]
    assert torch.corrcoef(torch.stack(ranks))[0, 1] > 0.95
    kinds = {type(module) for module in counted.reranker.scorer.loaded.model.get_decoder().modules()}
    assert torch.nn.Linear not in kinds


def test_int8_weights_are_refused_elsewhere(checkpoint: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("kalm_rag.scorer.resolve_device", lambda _: torch.device("cuda"))
    with pytest.raises(ValueError, match="dtype='int8' runs only on the CPU, not on cuda: use bfloat16 there"):
        KaLMReranker(checkpoint, device="cuda", dtype="int8").load()


@needs_int8
def test_int8_weights_share_the_states_of_float32(checkpoint: Path, tmp_path: Path, passages: list[str]) -> None:
    KaLMReranker(checkpoint, cache=tmp_path).encode(passages[:3])
    assert KaLMReranker(checkpoint, cache=tmp_path, dtype="int8").encode(passages[:3]).known == 3


def test_scorers_may_share_a_loaded_model(checkpoint: Path, passages: list[str]) -> None:
    found = find_checkpoint(checkpoint)
    settings = Settings(score_memory=0)
    loaded = load_model(found, settings=settings, device=torch.device("cpu"), dtype="float32")
    pairs = [("query", passage) for passage in passages[:3]]
    first, second = (
        [
            score.margin
            for score in Scorer(loaded, found, settings, PassageCache(None)).score(pairs, DEFAULT_INSTRUCTION, 4)
        ]
        for _ in range(2)
    )
    assert second == pytest.approx(first, abs=1e-5)
