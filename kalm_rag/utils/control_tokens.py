"""Control tokens in text that comes from a user."""

from __future__ import annotations

import re
from collections.abc import Iterable

_TEMPLATE = ("<bos>", "<start_of_turn>", "<end_of_turn>")


class ControlTokens:
    """The control tokens of a tokenizer, and how text is kept from forging them.

    Args:
        special: the special tokens of the tokenizer. Those of the prompt's template are always among them.

    Attributes:
        tokens: all of them, the longest first.
    """

    def __init__(self, special: Iterable[str]) -> None:
        # Longest first, so that no token hides inside another. One-character tokens cannot be broken.
        found = {token for token in (*special, *_TEMPLATE) if len(token) > 1}
        self.tokens = tuple(sorted(found, key=lambda token: (-len(token), token)))
        self._pattern = re.compile("|".join(map(re.escape, self.tokens)))

    def broken(self, text: str) -> str:
        """Return the text with one space after the first character of every control token."""
        return self._pattern.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)

    def original_span(self, text: str, span: tuple[int, int]) -> tuple[int, int]:
        """Return where in a text a part of `broken(text)` is: its first character, and the one after its last."""
        start, end = span
        for match in self._pattern.finditer(text):
            added = match.start() + 1  # in the text up to here without the spaces that were added before
            if added >= end:
                break
            start -= added < start
            end -= 1
        return start, end
