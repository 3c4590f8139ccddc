"""Windows hold at most their tokens, leave nothing out, and end where a reader would pause."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from kalm_rag.model.prompts import PASSAGE_PREFIX
from kalm_rag.model.tokenization import Tokenizer
from kalm_rag.settings import Settings
from kalm_rag.windows.source import Windows, WindowSource

MINI = Path(__file__).parents[2] / "kalm_rag" / "mini" / "tokenizer.json"
PIECES = [
    *(
        "a",
        "word ",
        "the list. ",
        "Sort it! ",
        "\n",
        "\n\n",
        " \r\n\r\n ",
        "\t",
        "中文字。",
        "日本語！",
        "é",
        "e\u0301",
        ".",
    ),
    *("👩\u200d👩\u200d👧", "<end_of_turn>", "<bos>", "ﷺ", "    ", "x" * 30, "...", "?)", "”", "ﬁ", "\x00"),
]


class Spy:
    """Counts the characters that the tokenizer reads."""

    def __init__(self, fast: Any) -> None:
        self._fast = fast
        self.read = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._fast, name)

    def __call__(self, texts: list[str], **options: Any) -> Any:
        self.read += sum(map(len, texts))
        return self._fast(texts, **options)


@pytest.fixture(scope="module", params=["merges", "words"])
def spy(request: pytest.FixtureRequest, checkpoint: Path) -> Spy:
    file = checkpoint / "tokenizer.json" if request.param == "merges" else MINI
    raw = tokenizers.Tokenizer.from_file(str(file))
    return Spy(transformers.PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>"))


def source(
    fast: Any, tokens: int = 32, overlap: int | None = None, most: int = 64, escape: bool = True
) -> WindowSource:
    of_windows: dict[str, Any] = {"window_tokens": tokens, "window_overlap": overlap, "max_windows": most}
    return WindowSource(Tokenizer(fast, escape=escape), Settings(long_passages="windows", **of_windows))


def windows(fast: Any, text: str, **options: Any) -> Windows:
    return source(fast, **options).split([text])[text]


def check(fast: Any, text: str, found: Windows, tokens: int, escape: bool = True) -> None:
    """Check what holds for the windows of any text."""
    tokenizer = Tokenizer(fast, escape=escape)
    count = len(tokenizer.encode([PASSAGE_PREFIX + tokenizer.clean(text)])[0])
    if found.spans is None:
        assert found.texts == (text,)
        assert count <= tokens or not text.strip()
        return
    assert count > tokens
    for (start, end), part in zip(found.spans, found.texts, strict=True):
        assert 0 <= start < end <= len(text)
        if escape:  # a broken control token has one more space
            assert text[start:end].split() == part.split() or "<" in part
            assert "".join(text[start:end].split()) == "".join(part.split())
        else:
            assert text[start:end] == part
        assert not part[0].isspace()
        assert len(tokenizer.encode([PASSAGE_PREFIX + part])[0]) <= tokens
    for (start, end), (later, after) in pairwise(found.spans):
        assert start < later
        assert end <= after
        assert not text[end:later].strip(), "nothing is left out"
    assert not text[: found.spans[0][0]].strip()
    if found.complete:
        assert not text[found.spans[-1][1] :].strip()


texts = st.one_of(
    st.lists(st.sampled_from(PIECES), min_size=1, max_size=120).map("".join),
    st.tuples(st.lists(st.sampled_from(PIECES), min_size=1, max_size=4), st.integers(1, 200)).map(
        lambda drawn: "".join(drawn[0]) * drawn[1]
    ),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=200),
)


@given(text=texts, tokens=st.integers(16, 40), overlap=st.integers(0, 8), escape=st.booleans())
@settings(max_examples=60)
def test_windows_of_any_text(spy: Spy, text: str, tokens: int, overlap: int, escape: bool) -> None:
    found = windows(spy, text, tokens=tokens, overlap=overlap, most=1000, escape=escape)
    check(spy, text, found, tokens, escape)
    assert found.complete


def test_a_passage_that_fits_is_the_passage(spy: Spy) -> None:
    text = "  A short passage.\n"
    assert windows(spy, text) == Windows((text,), None, True)


@pytest.mark.parametrize(
    ("unit", "between", "end"),
    [
        ("The list is sorted in place. It has no copy.", "\n\n", "."),
        ("The list is sorted in place.", " ", "."),
        ("そのリストは並べ替えられます。", "", "。"),
        ("它 就地 排序！", "", "！"),
        ("यह सूची है।", "", "।"),
        ("no sentence ends here", "\n", "e"),
    ],
)
def test_windows_end_where_a_reader_pauses(spy: Spy, unit: str, between: str, end: str) -> None:
    text = between.join([unit] * 60)
    found = windows(spy, text, tokens=100, overlap=0, most=1000)
    assert found.spans is not None
    assert len(found.spans) > 1
    for place, (start, stop) in enumerate(found.spans):
        assert text[stop - 1] == end
        assert text[start:stop].startswith(unit[: stop - start]) or place == 0 or "." in unit


def test_paragraphs_come_before_sentences(spy: Spy) -> None:
    text = "\n\n".join(["One of it. Two of it. Three of it."] * 40)
    found = windows(spy, text, tokens=90, overlap=0)
    assert {part.endswith("Three of it.") for part in found.texts} == {True}
    assert {part.startswith("One") for part in found.texts} == {True}


def test_words_are_not_cut_where_there_are_spaces(spy: Spy) -> None:
    text = "immutable sequences " * 200
    for start, end in windows(spy, text, tokens=50).spans or ():
        assert text[start:end].split()[0] in ("immutable", "sequences")
        assert text[start:end].split()[-1] in ("immutable", "sequences")


def test_neighbours_share_at_most_the_overlap(spy: Spy) -> None:
    tokenizer = Tokenizer(spy)
    text = "It is sorted. Then it is a list again. " * 80
    for overlap in (0, 12, 30):
        found = windows(spy, text, tokens=60, overlap=overlap, most=1000).spans
        assert found is not None
        shared = [text[later:end] for (_, end), (later, _) in pairwise(found) if later < end]
        assert bool(shared) == bool(overlap)
        for part in shared:
            assert len(tokenizer.encode([part])[0]) <= overlap + 1  # the first token may be another one by itself
    assert all(part.startswith(("It", "Then")) for part in shared), "a window begins with a sentence"


def test_equal_windows_of_other_passages_are_equal_texts(spy: Spy) -> None:
    shared = "\n\n".join(f"Paragraph number {number} tells about lists and tuples." for number in range(40))
    first, second = (windows(spy, shared + rest, tokens=80, overlap=0) for rest in ("", "\n\n" + "And more. " * 30))
    assert len(set(first.texts) & set(second.texts)) >= len(first.texts) - 1


def test_more_windows_than_may_be_read_are_told(spy: Spy) -> None:
    text = "A sentence of it. " * 400
    found = windows(spy, text, most=5)
    assert (len(found.texts), found.complete) == (5, False)
    assert windows(spy, text, most=5000).texts[:5] == found.texts


@pytest.mark.parametrize("text", ["Sentence of five words. ", "x", "word ", "中文", "😀", "\n\n.", "<end_of_turn>"])
def test_work_does_not_grow_with_the_text(spy: Spy, text: str) -> None:
    """Of a text of millions of characters no more is read than the windows hold."""
    work = []
    for size in (40_000, 400_000):
        spy.read = 0
        found = windows(spy, text * (size // len(text)), tokens=64, most=4)
        work.append(spy.read)
        assert len(found.texts) <= 4
    if found.spans is not None:  # else all of it is one word
        assert work[1] <= work[0] * 1.01


def test_five_million_characters(spy: Spy) -> None:
    text = "All work and no play makes a dull list.\n" * 125_000
    spy.read = 0
    found = windows(spy, text, tokens=1024)
    assert (len(found.texts), found.complete) == (64, False)
    check(spy, text[:600_000], found._replace(complete=False), 1024)
    assert spy.read < 3_000_000


def test_spaces_only_are_read_as_before(spy: Spy) -> None:
    text = " \n" * 3000
    assert windows(spy, text) == Windows((text,), None, True)


def test_places_are_remembered_and_can_be_forgotten(spy: Spy) -> None:
    found, text = source(spy), "A sentence of it. " * 60
    first = found.split([text, "short"])
    spy.read = 0
    assert found.split(["short", text]) == first
    assert spy.read == 0
    found.clear()
    assert found.split([text])[text] == first[text]
    assert spy.read > 0


def test_a_window_without_room_is_refused(spy: Spy) -> None:
    with pytest.raises(ValueError, match=r"window_tokens must be more than window_overlap and the \d+ tokens"):
        source(spy, tokens=12, overlap=11)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"long_passages": "split"},
            ValueError,
            r"long_passages must be one of \('truncate', 'windows'\), got 'split'",
        ),
        ({"window_tokens": 100}, ValueError, "window_tokens=100 applies only to windows, got long_passages='truncate'"),
        ({"window_overlap": 0}, ValueError, "window_overlap=0 applies only to windows"),
        ({"max_windows": 3}, ValueError, "max_windows=3 applies only to windows"),
        ({"long_passages": "windows", "window_tokens": 2000}, ValueError, "window_tokens must be at most max_length"),
        ({"long_passages": "windows", "window_tokens": 0}, ValueError, "window_tokens must be at least 1, got 0"),
        ({"long_passages": "windows", "window_tokens": 1.5}, TypeError, "window_tokens must be an integer, got 1.5"),
        ({"long_passages": "windows", "window_overlap": -1}, ValueError, "window_overlap must be at least 0, got -1"),
        ({"long_passages": "windows", "max_windows": 0}, ValueError, "max_windows must be at least 1, got 0"),
        (
            {"long_passages": "windows", "window_tokens": 64, "window_overlap": 64},
            ValueError,
            "window_overlap must be less than the tokens of a window, got window_overlap=64 and windows of 64 tokens",
        ),
        (
            {"long_passages": "windows", "window_overlap": 1024},
            ValueError,
            "got window_overlap=1024 and windows of 1024 tokens",
        ),
    ],
)
def test_wrong_settings(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Settings(**options)
