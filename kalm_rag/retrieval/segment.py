"""Cuts text of any language into the terms that BM25 counts."""

from __future__ import annotations

import importlib
import re
import unicodedata
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import chain

AUTO, NONE = "auto", "none"
_LISTS = {
    "de": "GERMAN",
    "en": "EN",
    "es": "SPANISH",
    "fr": "FRENCH",
    "it": "ITALIAN",
    "nl": "DUTCH",
    "no": "NORWEGIAN",
    "pt": "PORTUGUESE",
    "ru": "RUSSIAN",
    "sv": "SWEDISH",
    "zh": "CHINESE",
}
LANGUAGES = (AUTO, NONE, *_LISTS)
"""What `language` may be: those with a list of stop words, by their ISO 639-1 codes."""

_SAMPLE = 500
"""Passages that are looked at to tell whether a collection is English."""

_ENGLISH = frozenset(
    ("the", "and", "are", "that", "this", "they", "with", "their", "there", "these", "be", "it", "into", "such")
)
"""English stop words that hardly occur in another language."""

_ENGLISH_SHARE = 0.03
"""Their least share in English text. It is above 10 % in English collections, and about 0.1 % in German ones."""

# Scripts without spaces between words. A character of the first is a word or half of one; the second are alphabets.
_IDEOGRAMS = (
    "\u3005\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Han
    "\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff"  # Hiragana and Katakana
    "\uac00-\ud7a3"  # Hangul has spaces, but particles are attached to its words
)
_ALPHABETS = "\u0e01-\u0e4e\u0e81-\u0ede\u1000-\u109f\u1780-\u17dd"  # Thai, Lao, Burmese, Khmer
_ASCII = re.compile(r"\w\w+")
_UNSPACED = re.compile(f"[{_IDEOGRAMS}{_ALPHABETS}]")
_PARTS = re.compile(f"([{_IDEOGRAMS}]+)|([{_ALPHABETS}]+)|[^{_IDEOGRAMS}{_ALPHABETS}]+")

# Soft hyphens and joiners, Arabic and Hebrew reading aids: most texts leave them out, so no word may depend on them.
_LEFT_OUT = re.compile("[\u00ad\u200d\u0640\u064b-\u0652\u0670\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7]")
_ACCENTS = re.compile("[\u0300-\u036f\u0653-\u0655]")
_LETTERS = str.maketrans({"ß": "ss", "æ": "ae", "œ": "oe", "ø": "o", "ł": "l", "đ": "d", "ð": "d", "þ": "th", "ı": "i"})


def check_language(language: str) -> str:
    """Return a language whose stop words are known, `auto` or `none`.

    Raises:
        ValueError: it is neither.
    """
    if language not in LANGUAGES:
        msg = (
            f"language must be one of {', '.join(LANGUAGES)}, got {language!r}: these have lists of stop words; "
            "'none' suits every other language"
        )
        raise ValueError(msg)
    return language


class Segmenter:
    """Cuts texts of one collection, passages and queries alike, into terms.

    Words are runs of two letters, digits or combining marks at least, in lower case and in the Unicode form NFKC. Text
    without spaces between words gives overlapping pieces instead: single characters and pairs of Chinese, Japanese and
    Korean, pairs and triples of Thai, Lao, Burmese and Khmer. Arabic vowel marks and Hebrew points are left out.

    Args:
        language: whose stop words are left out: a code of `LANGUAGES`, `none`, or `auto`: English ones if the passages
            are English, else none.
        fold_accents: read `é` as `e`, `ß` as `ss` and so on, in Latin, Greek, Cyrillic and Arabic script.
        passages: what `auto` looks at; a sample of them is read.

    Attributes:
        language: what `auto` came to.

    Raises:
        ValueError: unknown language.
    """

    def __init__(self, language: str = AUTO, *, fold_accents: bool = False, passages: Sequence[str] = ()) -> None:
        self._fold = fold_accents
        self._stop: frozenset[str] = frozenset()
        if check_language(language) == AUTO:
            language = "en" if self._is_english(passages) else NONE
        self.language = language
        if language != NONE:
            self._stop = self._stop_words(language)

    def terms(self, text: str) -> list[str]:
        """The terms of a text in their order, without stop words."""
        return [term for term in _cut(_normal(text, fold_accents=self._fold)) if term not in self._stop]

    def numbered(self, texts: Iterable[str]) -> tuple[list[list[int]], dict[str, int]]:
        """The terms of each text as numbers, and the number of each term, as `bm25s` takes them."""
        numbers: dict[str, int] = {}
        rows = [[numbers.setdefault(term, len(numbers)) for term in self.terms(text)] for text in texts]
        return rows, numbers

    def _stop_words(self, language: str) -> frozenset[str]:
        words = getattr(importlib.import_module("bm25s.stopwords"), f"STOPWORDS_{_LISTS[language]}")
        return frozenset(_normal(word, fold_accents=self._fold) for word in words)

    def _is_english(self, passages: Sequence[str]) -> bool:
        sample = passages[:: max(1, len(passages) // _SAMPLE)]
        found = [term in _ENGLISH for term in chain.from_iterable(map(self.terms, sample))]
        return bool(found) and sum(found) >= _ENGLISH_SHARE * len(found)


def _normal(text: str, *, fold_accents: bool) -> str:
    if text.isascii():
        return text.lower()
    text = _LEFT_OUT.sub("", unicodedata.normalize("NFKC", text)).lower()
    if fold_accents:
        text = _ACCENTS.sub("", unicodedata.normalize("NFD", text)).translate(_LETTERS)
    return unicodedata.normalize("NFC", text)  # lower case may decompose a letter, as that of İ does


def _cut(text: str) -> list[str]:
    if text.isascii():
        return _ASCII.findall(text)
    found: list[str] = []
    for run in _runs().findall(text):
        if not _UNSPACED.search(run):
            if len(run) > 1:
                found.append(run)
            continue
        for part in _PARTS.finditer(run):
            ideograms, letters = part.groups()
            if ideograms:
                found += (*ideograms, *_pieces(ideograms, 2))
            elif letters:
                found += (*_pieces(letters, 2), *_pieces(letters, 3)) if len(letters) > 1 else (letters,)
            elif len(part[0]) > 1:
                found.append(part[0])
    return found


def _pieces(run: str, size: int) -> list[str]:
    """The overlapping pieces of `size` characters; none if the run is shorter."""
    return [run[start : start + size] for start in range(len(run) - size + 1)]


@cache
def _runs() -> re.Pattern[str]:
    """Runs of letters, digits and combining marks: those are vowels in Indian scripts, but no letters to `re`."""
    marks = "".join(chr(code) for code in range(0x300, 0x20000) if unicodedata.category(chr(code)).startswith("M"))
    return re.compile(rf"\w[\w{marks}]*")
