"""Splits long passages into windows of tokens, at the end of a paragraph, a sentence or a word.

Rules for where a window ends, the first that finds a place near the limit: the end of a paragraph in the last quarter
of the window; in its second half the end of a sentence, of a line, of a word; else the last character that fits.
"""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_left
from collections.abc import Sequence
from typing import TypeAlias

from kalm_rag.model.prompts import PASSAGE_PREFIX
from kalm_rag.model.tokenization import Tokenizer
from kalm_rag.utils.turns import check_stopped

Span: TypeAlias = tuple[int, int]
"""Where a window is in its passage: its first character, and the one after its last."""

_CHARACTERS_PER_TOKEN = 8
_LOOK_AHEAD = 200
"""Characters behind the limit that tell whether a paragraph or a sentence ends there."""

_CLOSERS = "\"'”’»)\\]」』”’）］】》〉"
_PARAGRAPH = re.compile(r"\S(?=[^\S\n]*\n\s*?\n)")
_SENTENCE = re.compile(f"[.!?…؟۔][{_CLOSERS}]{{0,3}}(?=\\s)|[。！？｡．।॥။።։།។][{_CLOSERS}]{{0,3}}")
"""Signs of scripts without spaces end a sentence wherever they stand; the others only in front of a space."""
_LINE = re.compile(r"\S(?=[^\S\n]*\n)")
_WORD = re.compile(r"\S(?=\s)")
_SPACES = re.compile(r"\s*")


class Splitter:
    """Cuts long texts into windows.

    Args:
        tokenizer: the checkpoint's.
        tokens: of a window at most, the prefix of a passage included.
        overlap: tokens that a window repeats of the one before, at most.
        most: windows of a text.

    Raises:
        ValueError: a window has no room for anything besides the prefix of a passage and the overlap.
    """

    def __init__(self, tokenizer: Tokenizer, tokens: int, overlap: int, most: int) -> None:
        self._tokenizer = tokenizer
        self._limit, self._overlap, self._most = tokens, overlap, most
        self._prefix = len(tokenizer.encode([PASSAGE_PREFIX])[0])
        if tokens - overlap <= self._prefix:
            msg = (
                f"window_tokens must be more than window_overlap and the {self._prefix} tokens that stand before a "
                f"passage, got window_tokens={tokens} and window_overlap={overlap}"
            )
            raise ValueError(msg)

    def split(self, text: str) -> tuple[tuple[Span, ...], bool]:
        """Return where the windows of a text are, and whether they are all that it has.

        Args:
            text: a passage of more tokens than a window, which went through `Tokenizer.clean`.
        """
        spans: list[Span] = []
        start = _after_spaces(text, 0)
        while start < len(text):
            if len(spans) == self._most:
                return tuple(spans), False
            check_stopped()
            end, following = self._next(text, start)
            spans.append((start, end))
            start = following
        return tuple(spans), True

    def _next(self, text: str, start: int) -> tuple[int, int]:
        """Return where the window that begins at `start` ends, and where the next one begins."""
        places = self._token_places(text, start)
        if len(places) <= self._limit:
            return start + len(text[start:].rstrip()), len(text)
        count, end = self._limit, 0
        while count > self._prefix and places[count] > start:
            end = self._end(text, start, places, count)
            more = len(self._tokenizer.encode([PASSAGE_PREFIX + text[start:end]])[0]) - self._limit
            if more <= 0:
                break
            count -= more  # tokens at the end are others than those of the longer text
        else:
            end = _whole_character(text, start + 1, len(text))  # a character of more tokens than a window
        return end, _after_spaces(text, self._following(text, start, end, places))

    def _token_places(self, text: str, start: int) -> list[int]:
        """Return where in the text each token from `start` on begins: more than a window has, or all there are."""
        size = _CHARACTERS_PER_TOKEN * self._limit
        while True:
            offsets = self._tokenizer.offsets(PASSAGE_PREFIX + text[start : start + size])
            if len(offsets) > self._limit or start + size >= len(text):
                return [start + max(0, offset - len(PASSAGE_PREFIX)) for offset in offsets]
            size *= 2

    def _end(self, text: str, start: int, places: Sequence[int], count: int) -> int:
        """Return where a window of at most `count` tokens ends."""
        hard, room = places[count], count - self._prefix
        # Behind the overlap, so that the next window begins later than this one.
        least = max(places[self._prefix + room // 2], places[min(count, self._prefix + self._overlap)], start) + 1
        last_quarter = max(least, places[self._prefix + 3 * room // 4])
        for pattern, lowest in ((_PARAGRAPH, last_quarter), (_SENTENCE, least), (_LINE, least), (_WORD, least)):
            found = 0
            for match in pattern.finditer(text, lowest - 1, hard + _LOOK_AHEAD):
                if match.end() > hard:
                    break
                found = match.end()
            if found:
                return found
        end = max(start + 1, hard)
        while end > least and _joins(text, end):
            end -= 1
        return end

    def _following(self, text: str, start: int, end: int, places: Sequence[int]) -> int:
        """Return where the next window begins: at most the overlap before `end`, at a sentence or a word if it can."""
        first = bisect_left(places, end) - self._overlap
        earliest = places[first] if self._overlap and first > 0 else end
        if not start < earliest < end:
            return end
        for pattern in (_SENTENCE, _WORD):
            match = pattern.search(text, earliest, end)
            if match is not None and match.end() < end:
                return match.end()
        return _whole_character(text, earliest, end)


def _after_spaces(text: str, place: int) -> int:
    match = _SPACES.match(text, place)
    return place if match is None else match.end()


def _joins(text: str, place: int) -> bool:
    """Whether the character at a place belongs to the one before, as accents and parts of emoji do."""
    if not 0 < place < len(text):
        return False
    return "\u200d" in text[place - 1 : place + 1] or unicodedata.category(text[place]).startswith("M")


def _whole_character(text: str, place: int, most: int) -> int:
    """Return the first place from `place` on that splits no character, at most `most`."""
    while place < most and _joins(text, place):
        place += 1
    return place
