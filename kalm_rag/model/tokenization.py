"""Turns text into token ids, and makes control tokens in user text harmless."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kalm_rag.errors import CheckpointError
from kalm_rag.model.long_text import LongTextReader, encode
from kalm_rag.utils import forks
from kalm_rag.utils.control_tokens import ControlTokens

_LONG = 16
"""Characters per token from which a text is not read as a whole. Ordinary text has three to six."""


class Tokenizer:
    """A checkpoint's fast tokenizer, as the scorer needs it.

    Args:
        fast: a transformers fast tokenizer.
        escape: whether `clean` breaks control tokens in user text (see `clean`).
        where: the checkpoint, for messages.

    Attributes:
        control: its control tokens.

    Raises:
        CheckpointError: the tokenizer is not a fast one, or does not know `yes` and `no` apart.
    """

    def __init__(self, fast: Any, *, escape: bool = True, where: str = "the checkpoint") -> None:
        if not getattr(fast, "is_fast", False):
            msg = f"the tokenizer of {where} is not a fast one: kalm-rag needs its tokenizer.json"
            raise CheckpointError(msg)
        self._fast = fast
        self._lock = forks.Lock()  # truncation and padding are state of the Rust object
        self._prefixes = LongTextReader(fast)
        # With bytes to fall back on, no text is unknown.
        falls_back = getattr(getattr(fast.backend_tokenizer, "model", None), "byte_fallback", False)
        self._unknown_id = None if falls_back else fast.unk_token_id
        self._keep_right = getattr(fast, "truncation_side", "right") == "left"
        self.control = ControlTokens(str(token) for token in fast.added_tokens_decoder.values() if token.special)
        self._escape = escape
        self.yes_id, self.no_id = self._answer_id("yes", where), self._answer_id("no", where)
        if self.yes_id == self.no_id:
            msg = (
                f"the tokenizer of {where} maps 'yes' and 'no' to the same token {self.yes_id}: "
                "this is not a KaLM reranker checkpoint"
            )
            raise CheckpointError(msg)

    def _answer_id(self, answer: str, where: str) -> int:
        ids = self.encode([answer])[0]
        if not ids or ids[-1] == self._fast.unk_token_id:
            msg = (
                f"the tokenizer of {where} has no token for the answer {answer!r}: "
                "this is not a KaLM reranker checkpoint, or its tokenizer.json is another model's"
            )
            raise CheckpointError(msg)
        return ids[-1]

    @property
    def pad_id(self) -> int:
        """The id that pads short rows; it is masked, so any known id will do."""
        pad = self._fast.pad_token_id
        return 0 if pad is None else int(pad)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, whole and without special tokens around it. Safe from any thread."""
        if not texts:
            return []
        with self._lock:
            batch = encode(self._fast, texts)
        ids: list[list[int]] = batch["input_ids"]
        return ids

    def encode_truncated(self, texts: Sequence[str], limit: int) -> list[tuple[list[int], bool]]:
        """Return at most `limit` ids of each text, truncated on the tokenizer's own side, and whether it was truncated.

        The ids are those of `encode`, but of a long text no more is read than it takes to know them (see
        `kalm_rag.model.long_text`). A tokenizer that keeps the end of a text reads all of it.
        """
        whole: list[int] = []
        rows: list[list[int]] = [[] for _ in texts]
        for place, text in enumerate(texts):
            found = None
            if not self._keep_right and len(text) > _LONG * limit:
                with self._lock:
                    found = self._prefixes.first(text, limit)
            if found is None:
                whole.append(place)
            else:
                rows[place] = found
        for place, ids in zip(whole, self.encode([texts[place] for place in whole]), strict=True):
            rows[place] = ids
        return [self._truncate(ids, limit) for ids in rows]

    def is_mostly_unknown(self, ids: Sequence[int]) -> bool:
        """Whether more than half of these ids are the one that stands for anything unknown."""
        return self._unknown_id is not None and 2 * ids.count(self._unknown_id) > len(ids)

    def offsets(self, text: str) -> list[int]:
        """Return where each token of a text begins, in characters."""
        with self._lock:
            batch = encode(self._fast, [text], offsets=True)
        return [start for start, _ in batch["offset_mapping"][0]]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, control tokens included and nothing cleaned up, as the reference does it."""
        with self._lock:
            return str(self._fast.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _truncate(self, ids: list[int], limit: int) -> tuple[list[int], bool]:
        if len(ids) <= limit:
            return ids, False
        return (ids[-limit:] if self._keep_right else ids[:limit]), True

    def clean(self, text: str) -> str:
        """Break control tokens in text that comes from a user.

        The reference turns the characters `<end_of_turn>` in a passage or a query into the control token, so
        that a text can forge the end of the prompt. Here one space is put after the first character of every
        control token (`< end_of_turn>`): the reader of the text loses nothing, the model sees plain characters,
        and text without control tokens is returned as it is, so that its score equals the reference's.
        """
        return self.control.broken(text) if self._escape else text

    def original_span(self, text: str, span: tuple[int, int]) -> tuple[int, int]:
        """Return where in a text a part of `clean(text)` is: its first character, and the one after its last."""
        return self.control.original_span(text, span) if self._escape else span
