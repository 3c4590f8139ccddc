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
