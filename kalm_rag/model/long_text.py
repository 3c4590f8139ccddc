"""Tokenises the start of a long text without reading all of it, with exactly the tokens of the whole text.

The first tokens of a text can depend on what follows, so the text is not simply cut. Where the structure of the
tokenizer proves that the tokens are the same, only the start is read; otherwise the whole text is.

Byte-pair merges are made in an order of their own, wherever they apply, and two neighbours in a result are neighbours
because no merge joined them; what stands further left or right has no say in that. Hence:

1. A boundary in the tokens of a text is one in the tokens of what precedes it: both sides merge on their own.
2. The whole text has a boundary in the last `reach` characters of any beginning, `reach` being the longest token.
3. A place is a boundary of a text if its two neighbours, taken from the tokens of what precedes and of what follows it,
   are neighbours in the tokens of any text.

So a boundary of the beginning is one of the whole text if the first token after it stays the same wherever the text is
cut within the last `reach` characters.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from typing import Any

_CHARACTERS_PER_TOKEN = 8
_TRIES = 8

_WORD_ENDS = " \t\n\r!-/:-@[-`{-~\u3001\u3002\uff01\uff0c\uff1a\uff1b\uff1f"
"""What BERT's pre-tokenizer splits after: spaces, and the punctuation of ASCII and of Chinese and Japanese texts."""

_IDEOGRAPHS = "\u4e00-\u9fff"
"""What BERT's normalizer puts spaces around, if told so."""


class LongTextReader:
    """Reads the first tokens of long texts.

    Args:
        fast: a transformers fast tokenizer. It is called without a lock of its own.
    """

    def __init__(self, fast: Any) -> None:
        self._fast = fast

    def first(self, text: str, limit: int) -> list[int] | None:
        """Return more than `limit` token ids that the text starts with, or None if only the whole text can tell.

        The work is bounded by `limit` for byte-pair tokenizers as Gemma's. For one of words, as that of `mini`, it is
        bounded where the text has spaces, punctuation or ideographs.
        """
        size = _CHARACTERS_PER_TOKEN * limit
        while 2 * (size + 4 * self._reach) <= len(text):
            size += 4 * self._reach
            found = self._read(text, size, limit)
            if found is None:
                return None
            if len(found) > limit:
                return found
            size *= 2
        return None

    def _read(self, text: str, size: int, limit: int) -> list[int] | None:
        """Return the tokens that the first `size` characters determine; None if none ever are."""
        if self._kind == "merges":
            return self._read_merges(text, size, limit)
        return self._read_words(text, size) if self._kind == "words" else None

    def _read_merges(self, text: str, size: int, limit: int) -> list[int]:
        batch = encode(self._fast, [text[:size]], offsets=True)
        ids, offsets = batch["input_ids"][0], batch["offset_mapping"][0]
        tries = 0
        for place in range(len(ids) - 1, limit, -1):
            start = offsets[place][0]
            # The bytes of a character that has no token share its offsets.
            if start > size - 2 * self._reach or start < offsets[place - 1][1]:
                continue
            ends = range(size - self._reach + 1, size + 1)
            followers = encode(self._fast, [text[start:end] for end in ends])["input_ids"]
            if all(row[:1] == ids[place : place + 1] for row in followers):
                return list(ids[:place])
            tries += 1
            if tries == _TRIES:
                break
        return []

    def _read_words(self, text: str, size: int) -> list[int]:
        """Words are tokenised one by one, so what ends with one is certain unless an added token lies across."""
        last = self._last_word_end.search(text[:size])
        end = last.end(1) if last else 0
        if any(text.find(token, max(0, end - len(token) + 1), end + len(token) - 1) >= 0 for token in self._added):
            return []
        return list(encode(self._fast, [text[:end]])["input_ids"][0]) if end else []

    @functools.cached_property
    def _added(self) -> list[str]:
        return [token.content for token in self._fast.added_tokens_decoder.values()]

    @functools.cached_property
    def _last_word_end(self) -> re.Pattern[str]:
        splits = _state(self._fast.backend_tokenizer.normalizer).get("handle_chinese_chars")
        ends = _WORD_ENDS + (_IDEOGRAPHS if splits else "")
        return re.compile(f"([{ends}])[^{ends}]*$")

    @functools.cached_property
    def _reach(self) -> int:
        """Characters of the longest token."""
        return max(map(len, [*self._fast.get_vocab(), *self._added]))

    @functools.cached_property
    def _kind(self) -> str:
        """`merges` or `words` where the tokenizer is known to be one of these, else empty."""
        added = self._fast.added_tokens_decoder.values()
        if any(token.lstrip or token.rstrip or token.single_word or token.normalized for token in added):
            return ""
        backend = self._fast.backend_tokenizer
        normalizer, pre_tokenizer = _state(backend.normalizer), _state(backend.pre_tokenizer)
        model = type(backend.model).__name__
        if model == "WordPiece" and normalizer.get("type") == "BertNormalizer":
            return "words" if pre_tokenizer == {"type": "BertPreTokenizer"} else ""
        plain = model == "BPE" and _merges_only(backend.model) and _has_all_bytes(self._fast.get_vocab())
        return "merges" if plain and _keeps_length(normalizer) and _splits_after(pre_tokenizer) else ""


def encode(fast: Any, texts: Sequence[str], *, offsets: bool = False) -> Any:
    """Tokenise whole texts without special tokens around them; the caller holds the lock."""
    return fast(
        list(texts),
        add_special_tokens=False,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        return_offsets_mapping=offsets,
        verbose=False,
    )


def _state(part: Any) -> dict[str, Any]:
    """Return a normalizer's or pre-tokenizer's description from tokenizer.json; empty if there is none."""
    return {} if part is None else dict(json.loads(part.__getstate__()))


def _merges_only(model: Any) -> bool:
    return (
        model.byte_fallback
        and not model.dropout
        and not model.ignore_merges
        and not model.continuing_subword_prefix
        and not model.end_of_word_suffix
    )


def _has_all_bytes(vocabulary: dict[str, int]) -> bool:
    """Whether every character has a token; unknown ones in a row may become one, however many they are."""
    return all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))


def _keeps_length(normalizer: dict[str, Any]) -> bool:
    """Whether it turns each character into one, whatever stands beside it."""
    if not normalizer:
        return True
    old, new = normalizer.get("pattern", {}).get("String", ""), normalizer.get("content", "")
    return normalizer.get("type") == "Replace" and len(old) == len(new) == 1


def _splits_after(pre_tokenizer: dict[str, Any]) -> bool:
    """Whether it splits after a certain character or not at all."""
    if not pre_tokenizer:
        return True
    return (
        pre_tokenizer.get("type") == "Split"
        and len(pre_tokenizer.get("pattern", {}).get("String", "")) == 1
        and pre_tokenizer.get("behavior") == "MergedWithPrevious"
        and not pre_tokenizer.get("invert")
    )
