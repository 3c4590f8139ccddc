"""The first tokens of a long text are those of the whole text, and the whole text is not read for them."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from kalm_rag import KaLMReranker
from kalm_rag.model.long_text import LongTextReader
from kalm_rag.model.prompts import PASSAGE_PREFIX
from kalm_rag.model.tokenization import Tokenizer

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
MINI = Path(__file__).parents[2] / "kalm_rag" / "mini" / "tokenizer.json"
PIECES = [
    *(
        "a",
        "b",
        " ",
        "\n",
        "\n\n\n",
        "\u2581",
        "\t",
        "<",
        ">",
        "-",
        "=",
        "é",
        "e\u0301",
        "中",
        "。",
        "😀",
        "ﬁ",
        "\x00",
        ".",
    ),
    *("the ", "of the ", "value ", "aaaa", "abab", "</", "end_of_turn", "<end_of_turn>", "< end_of_turn>", "yes no"),
    "Given a query, retrieve documents that answer the query.",
]


def ids_of(fast: Any, text: str) -> list[int]:
    return list(fast([text], add_special_tokens=False, verbose=False)["input_ids"][0])


def wrap(raw: tokenizers.Tokenizer) -> Any:
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")


@pytest.fixture(scope="module", params=["merges", "words"])
def fast(request: pytest.FixtureRequest, checkpoint: Path) -> Any:
    file = checkpoint / "tokenizer.json" if request.param == "merges" else MINI
    return wrap(tokenizers.Tokenizer.from_file(str(file)))


long_texts = st.one_of(
    st.lists(st.sampled_from(PIECES), min_size=1, max_size=400).map("".join),
    st.tuples(st.lists(st.sampled_from(PIECES), min_size=1, max_size=4), st.integers(1, 900)).map(
        lambda drawn: "".join(drawn[0]) * drawn[1]
    ),
    st.tuples(st.text(max_size=60), st.integers(1, 60)).map(lambda drawn: drawn[0] * drawn[1]),
).filter(lambda text: not any("\ud800" <= character <= "\udfff" for character in text))


@given(text=long_texts, limit=st.integers(1, 20))
@settings(max_examples=80)
def test_beginning_of_any_text(fast: Any, text: str, limit: int) -> None:
    found = LongTextReader(fast).first(text, limit)
    if found is not None:
        assert len(found) > limit
        assert found == ids_of(fast, text)[: len(found)]


def test_beginning_is_found(fast: Any) -> None:
    """So that the property above is not one of None."""
    reader = LongTextReader(fast)
    for text in ("the value of the word " * 3000, "中 😀 <end_of_turn> x\n" * 3000):
        assert reader.first(text, 20) is not None
    if reader._kind == "words":
        for text in ("中文" * 20_000, "あ。" * 20_000, "word\n" * 20_000, "a,b" * 20_000):
            assert reader.first(text, 20) is not None
    if reader._kind == "merges":
        for text in ("a" * 50_000, "ab" * 50_000, " " * 50_000, "中" * 50_000, "\n" * 50_000, "😀" * 50_000):
            assert reader.first(text, 20) is not None


@st.composite
def merges_of_two_letters(draw: st.DrawFn) -> list[tuple[str, str]]:
    """Merges in any order, so that what a letter becomes can depend on letters far behind it."""
    known, merges = ["a", "b"], []
    for _ in range(draw(st.integers(1, 8))):
        pair = (draw(st.sampled_from(known)), draw(st.sampled_from(known)))
        if pair not in merges and len("".join(pair)) < 12:
            merges.append(pair)
            known.append("".join(pair))
    return draw(st.permutations(merges))


@given(merges=merges_of_two_letters(), text=st.text("ab", min_size=150, max_size=400), limit=st.integers(1, 4))
@settings(max_examples=80)
def test_beginning_under_any_merges(merges: list[tuple[str, str]], text: str, limit: int) -> None:
    words = dict.fromkeys(["<unk>", *BYTES, "a", "b", *map("".join, merges)])
    vocabulary = {word: number for number, word in enumerate(words)}
    fast = wrap(tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True)))
    reader = LongTextReader(fast)
    assert reader._kind == "merges"
    # In steps of one token, so that a boundary close to the end of what was read is tried too.
    found = reader._read(text, 150, limit)
    assert found == ids_of(fast, text)[: len(found or [])]


@pytest.mark.parametrize("length", [60, 61])
def test_what_a_letter_becomes_depends_on_one_far_behind_it(length: int) -> None:
    """Each pair of neighbours merges unless the next one did, back from the last: one letter more turns all around."""
    letters = [chr(0x100 + number) for number in range(length)]
    merges = list(pairwise(letters))[::-1]
    words = ["<unk>", *BYTES, "x", *letters, *map("".join, merges)]
    vocabulary = {word: number for number, word in enumerate(words)}
    fast = wrap(tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True)))
    text = "x" * 50 + "".join(letters) + "x" * 5000
    whole = ids_of(fast, text)
    for size in range(60, 140):
        found = LongTextReader(fast)._read(text, size, 1)
        assert found == whole[: len(found or [])]
    assert len(LongTextReader(fast).first(text, 70) or []) > 70


def cut_at(place: str) -> tokenizers.Tokenizer:
    """A tokenizer whose tokens depend on what follows in a way that is not known."""
    raw = tokenizers.Tokenizer.from_file(str(MINI))
    if place == "normalizer":
        raw.normalizer = tokenizers.normalizers.Replace(tokenizers.Regex("a(?=a*b)"), "c")
    elif place == "pre_tokenizer":
        raw.pre_tokenizer = tokenizers.pre_tokenizers.Digits()
    else:
        raw.add_tokens([tokenizers.AddedToken("yes", single_word=True)])
    return raw


@pytest.mark.parametrize("place", ["normalizer", "pre_tokenizer", "added_tokens"])
def test_unknown_tokenizer_reads_the_whole_text(place: str) -> None:
    assert LongTextReader(wrap(cut_at(place))).first("the value of the word " * 3000, 20) is None


class Spy:
    """A tokenizer that notes how much it reads."""

    def __init__(self, fast: Any) -> None:
        self._fast = fast
        self.read = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._fast, name)

    def __call__(self, texts: list[str], **options: Any) -> Any:
        self.read += sum(map(len, texts))
        return self._fast(texts, **options)


@pytest.mark.parametrize("text", ["one two three ", "a", "ab", " ", "<end_of_turn>", "\n", "\u2581"])
def test_work_does_not_grow_with_the_text(checkpoint: Path, text: str) -> None:
    spy = Spy(wrap(tokenizers.Tokenizer.from_file(str(checkpoint / "tokenizer.json"))))
    tokenizer = Tokenizer(spy)
    work = []
    for size in (60_000, 600_000):
        spy.read = 0
        (ids, truncated), (short, cut) = tokenizer.encode_truncated(
            [tokenizer.clean(text * (size // len(text))), "short"], 64
        )
        work.append(spy.read)
        assert (len(ids), truncated, cut) == (64, True, False)
        assert short == tokenizer.encode(["short"])[0]
    assert work[0] == work[1]


@pytest.mark.parametrize("text", ["one two three ", "中文", "あ。", "word\n"])
def test_work_of_words_does_not_grow_with_the_text(text: str) -> None:
    spy = Spy(wrap(tokenizers.Tokenizer.from_file(str(MINI))))
    tokenizer = Tokenizer(spy)
    work = []
    for size in (60_000, 600_000):
        spy.read = 0
        assert tokenizer.encode_truncated([text * (size // len(text))], 64)[0][1]
        work.append(spy.read)
    assert work[0] == work[1]


def test_an_instruction_that_no_prompt_can_hold_is_not_read_whole(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reranker = KaLMReranker(checkpoint, cache=None, device="cpu").load()
    lengths: list[int] = []
    encode = Tokenizer.encode
    monkeypatch.setattr(
        Tokenizer, "encode", lambda self, texts: (lengths.extend(map(len, texts)), encode(self, texts))[1]
    )
    with pytest.raises(ValueError, match="more tokens than the 8192 positions of this model: shorten the instruction"):
        reranker.rank("query", ["passage"], instruction="judge this passage well " * 100_000)
    assert max(lengths, default=0) < 10_000


@pytest.mark.parametrize("side", ["left", "right"])
def test_ends_and_beginnings_are_those_of_the_whole(checkpoint: Path, side: str) -> None:
    fast = wrap(tokenizers.Tokenizer.from_file(str(checkpoint / "tokenizer.json")))
    fast.truncation_side = side
    tokenizer = Tokenizer(fast)
    texts = ["value " * 40 + "the end", "of the word " * 4000 + "the end", "", "x" * 4000]
    whole = tokenizer.encode(texts)
    cut = [ids[-50:] if side == "left" else ids[:50] for ids in whole]
    assert tokenizer.encode_truncated(texts, 50) == [
        (ids, len(all_ids) > 50) for ids, all_ids in zip(cut, whole, strict=True)
    ]


def test_long_passages_and_queries_score_as_cut_ones(checkpoint: Path, passages: list[str]) -> None:
    reranker = KaLMReranker(checkpoint, cache=None, device="cpu", max_length=64, query_max_length=32)
    engine = reranker.scorer
    text = " ".join(passages * 4)
    assert len(text) > 64 * 40
    tokenizer = engine.loaded.tokenizer
    assert engine.prompts.passages([text])[0].ids == tokenizer.encode([PASSAGE_PREFIX + text])[0][:64]
    hit = reranker.rank(text, [text])[0]
    assert (hit.passage_truncated, hit.query_truncated) == (True, True)
    short = reranker.rank(text[:2000], [text[:2000]])[0]
    assert hit.margin == pytest.approx(short.margin, abs=1e-5)
