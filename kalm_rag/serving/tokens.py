"""Counts tokens of texts, and cuts texts to a number of them."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal, NamedTuple

from kalm_rag.documents import repair_text
from kalm_rag.model.prompts import PASSAGE_PREFIX
from kalm_rag.model.tokenization import Tokenizer
from kalm_rag.utils import forks

Side = Literal["left", "right"]
"""Which end of a text is cut off."""

_MOST_REMEMBERED = 100_000
"""Texts whose number of tokens is remembered, each by a digest of 16 bytes: about 20 MB."""
_CHARACTERS_PER_TOKEN = 16
"""Ordinary text has three to six."""


class Cut(NamedTuple):
    """A text that may have been cut.

    Attributes:
        text: what is left of it.
        start: where that begins in the text, in characters.
        is_cut: whether something was cut off.
    """

    text: str
    start: int = 0
    is_cut: bool = False


class TokenCounter:
    """Counts tokens of texts and remembers the counts, since known passages come with every query.

    Args:
        tokenizer: the checkpoint's.
        most: tokens of a text that are counted; the rest of it is not read.
    """

    def __init__(self, tokenizer: Tokenizer, most: int) -> None:
        self._tokenizer = tokenizer
        self._most = most
        self.prefix = len(tokenizer.encode([PASSAGE_PREFIX])[0])
        self._lock = forks.Lock()  # of the next line
        self._known: OrderedDict[bytes, tuple[int, bool]] = OrderedDict()

    def count(self, texts: Sequence[str]) -> list[tuple[int, bool]]:
        """Return how many tokens of each text are read, and whether there are more."""
        digests = [hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest() for text in texts]
        found: dict[bytes, tuple[int, bool]] = {}
        with self._lock:
            for digest in digests:
                if digest in self._known:
                    self._known.move_to_end(digest)
                    found[digest] = self._known[digest]
        new = {digest: text for digest, text in zip(digests, texts, strict=True) if digest not in found}
        clean = [self._tokenizer.clean(repair_text(text)[0]) for text in new.values()]
        rows = self._tokenizer.encode_truncated(clean, self._most)
        counted = {digest: (len(ids), is_longer) for digest, (ids, is_longer) in zip(new, rows, strict=True)}
        with self._lock:
            self._known.update(counted)
            while len(self._known) > _MOST_REMEMBERED:
                self._known.popitem(last=False)
        found |= counted
        return [found[digest] for digest in digests]

    def cut(self, text: str, tokens: int, side: Side = "right") -> Cut:
        """Cut a text to so many tokens."""
        whole = repair_text(text)[0]
        if not self._is_longer(whole, tokens):
            return Cut(text)
        start, part = 0, whole
        near = _CHARACTERS_PER_TOKEN * (tokens + 1)
        if len(whole) > near:
            near_start = len(whole) - near if side == "left" else 0
            near_part = whole[near_start : near_start + near]
            if self._is_longer(near_part, tokens):
                start, part = near_start, near_part
        offsets = self._tokenizer.offsets(part)
        # A part of a text may have more tokens than it had within the text.
        for keep in range(tokens, 0, -1):
            first, end = (0, offsets[keep]) if side == "right" else (offsets[len(offsets) - keep], len(part))
            if not self._is_longer(part[first:end], tokens):
                # Half surrogate pairs stay, so that the result tells of them: repairing keeps the length of what JSON
                # can hold.
                return Cut(text[start + first : start + end], start + first, is_cut=True)
        return Cut("", len(text) if side == "left" else 0, is_cut=True)

    def _is_longer(self, text: str, tokens: int) -> bool:
        return self._tokenizer.encode_truncated([text], tokens)[0][1]
