"""What BM25 counts as a term, in languages with and without spaces."""

from __future__ import annotations

import unicodedata

import pytest

from kalm_rag.demo_data import load_demo
from kalm_rag.retrieval.bm25 import BM25
from kalm_rag.retrieval.segment import LANGUAGES, Segmenter

PLAIN = Segmenter("none")


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("Python 3.11's FAQ, a_b", ["python", "11", "faq", "a_b"]),
        ("Straße im café", ["straße", "im", "café"]),
        ("用Python编程", ["用", "python", "编", "程", "编程"]),
        ("東京タワー", [*"東京タワー", "東京", "京タ", "タワ", "ワー"]),
        ("한국어는", [*"한국어는", "한국", "국어", "어는"]),
        ("猫", ["猫"]),
        ("ภาษา ก", ["ภา", "าษ", "ษา", "ภาษ", "าษา", "ก"]),
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),
        ("ＡＢＣ　ｶﾀ", ["abc", "カ", "タ", "カタ"]),
        ("كِتَابٌ", ["كتاب"]),
        ("dis\u00adplay", ["display"]),
        ("", []),
        ("... ! 。", []),
    ],
)
def test_terms(text: str, terms: list[str]) -> None:
    assert PLAIN.terms(text) == terms


def test_composed_and_decomposed_text_have_the_same_terms() -> None:
    for text in ("Un café à Zürich", "ガギグゲゴ", "한국어", "Ёлка й", "İstanbul"):
        assert PLAIN.terms(unicodedata.normalize("NFD", text)) == PLAIN.terms(unicodedata.normalize("NFC", text))


def test_accents_are_folded_by_choice() -> None:
    folded = Segmenter("none", fold_accents=True)
    text = "Straße, Ærø, Łódź, café, ёлка, أحمد"
    assert folded.terms(text) == ["strasse", "aero", "lodz", "cafe", "елка", "احمد"]
    assert PLAIN.terms(text) == ["straße", "ærø", "łódź", "café", "ёлка", "أحمد"]
    # Marks that are letters stay: another word would be read otherwise.
    for word in ("हिन्दी", "ガギ", "한국", "น้ำ"):
        assert folded.terms(word) == PLAIN.terms(word)


def test_english_is_what_the_library_makes_of_it() -> None:
    """The figures of the demonstration and of earlier evaluations stay."""
    import bm25s

    corpus = load_demo()
    texts = list(corpus.passages.values())
    segmenter = Segmenter(passages=texts)
    assert segmenter.language == "en"
    expected = bm25s.tokenize(texts, stopwords="en", show_progress=False)
    words = {number: word for word, number in expected.vocab.items()}
    for text, numbers in zip(texts, expected.ids, strict=True):
        assert segmenter.terms(text) == [words[number] for number in numbers]


@pytest.mark.parametrize(
    ("passages", "language"),
    [
        (["The cat sat on the mat.", "It is not there."], "en"),
        (["Der Hund war in der Stadt, an der Ecke.", "Das will niemand."], "none"),
        (["Ils ont trouvé de l'or, mais le but était loin."], "none"),
        (["Toget kjører by for by, og folk går i land."], "none"),
        (["猫坐在垫子上。"], "none"),
        (["def main(): return 0", "x = 1"], "none"),
        ([""], "none"),
    ],
)
def test_english_stop_words_are_for_english(passages: list[str], language: str) -> None:
    assert Segmenter(passages=passages).language == language


def test_a_word_that_is_a_stop_word_only_in_english_is_found_elsewhere() -> None:
    passages = {"or": "Le cours de l'or monte chaque année.", "fer": "Le cours du fer baisse chaque année."}
    index = BM25(passages)
    assert [name for name, _ in index.search("or", 2)] == ["or"]
    assert BM25(passages, language="en").search("or", 2) == []


def test_stop_words_of_a_language_in_any_spelling() -> None:
    assert Segmenter("es").terms("Él está en la casa") == ["casa"]
    assert Segmenter("es", fold_accents=True).terms("El esta en la casa") == ["casa"]
    for language in LANGUAGES:
        assert Segmenter(language).terms("xylophon") == ["xylophon"]


@pytest.mark.parametrize("language", ["", "EN", "klingon", "ar"])
def test_an_unknown_language_is_refused(language: str) -> None:
    with pytest.raises(ValueError, match=rf"language must be one of auto, none, de, .*, got '{language}'"):
        BM25({"a": "text"}, language=language)


def test_text_without_spaces_is_found() -> None:
    passages = {
        "zh": "北京是中华人民共和国的首都。",
        "ja": "日本の首都は東京です。",
        "ko": "서울은 대한민국의 수도이다.",
        "th": "กรุงเทพมหานครเป็นเมืองหลวงของประเทศไทย",
    }
    index = BM25(passages)
    for query, name in (("中国首都在哪里", "zh"), ("東京", "ja"), ("대한민국 수도", "ko"), ("เมืองหลวงของไทย", "th")):
        assert index.search(query, 4)[0][0] == name
