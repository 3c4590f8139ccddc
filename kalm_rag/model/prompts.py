"""The two texts the model reads: the encoder's passage and the decoder's prompt.

Both templates are those of the KaLM-Reranker-V1 model cards (arXiv 2606.22807, section 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kalm_rag.documents import UNKNOWN, TextCounter
from kalm_rag.model.tokenization import Tokenizer
from kalm_rag.settings import Settings

PASSAGE_PREFIX = "<Document>: "
"""What precedes every passage in the encoder; its tokens count towards `max_length`."""


@dataclass(frozen=True, slots=True)
class PassageTokens:
    """Token ids of one passage, prefix included, at most `max_length` of them."""

    ids: list[int]
    truncated: bool


@dataclass(frozen=True, slots=True)
class Prompt:
    """The decoder's input for one query.

    Attributes:
        ids: token ids of the whole prompt.
        truncated: whether the query was cut at `query_max_length` tokens.
        unknown: whether more than half of the query's tokens are unknown to the tokenizer.
    """

    ids: list[int]
    truncated: bool
    unknown: bool = False


class Prompts:
    """Builds both texts for one tokenizer and one group of settings.

    Args:
        tokenizer: the checkpoint's.
        settings: how passages and queries become scores.
        positions: tokens of the longest prompt that the decoder can read.

    Attributes:
        tokenizer: the checkpoint's.
        unknown: counts queries that are scored and passages that are encoded, where most tokens are unknown.
    """

    def __init__(self, tokenizer: Tokenizer, settings: Settings, positions: int) -> None:
        self.tokenizer = tokenizer
        self.unknown = TextCounter(UNKNOWN)
        self._settings = settings
        self._positions = positions

    def passages(self, texts: Sequence[str]) -> list[PassageTokens]:
        """Tokenise passages that went through `Tokenizer.clean` already."""
        rows = self.tokenizer.encode_truncated([PASSAGE_PREFIX + text for text in texts], self._settings.max_length)
        return [PassageTokens(*row) for row in rows]

    def prompt(self, query: str, instruction: str | None = None) -> Prompt:
        """The prompt of one query under `instruction` (default: the one of the settings).

        Raises:
            ValueError: the model has no positions for so long a prompt.
        """
        clean = self.tokenizer.clean
        ids, truncated = self.tokenizer.encode_truncated([clean(query)], self._settings.query_max_length)[0]
        unknown = self.tokenizer.is_mostly_unknown(ids)
        # The reference puts the decoded ids into the prompt, not the query: the round trip is part of the model.
        text = self.prefix(instruction) + clean(self.tokenizer.decode(ids)) + self.suffix()
        ids, is_longer = self.tokenizer.encode_truncated([text], self._positions)[0]
        if is_longer:
            msg = (
                f"the prompt of this query has more tokens than the {self._positions} positions of this model: shorten "
                f"the instruction or the system prompt, or lower query_max_length (now "
                f"{self._settings.query_max_length})"
            )
            raise ValueError(msg)
        return Prompt(ids, truncated, unknown)

    def prefix(self, instruction: str | None = None) -> str:
        """The prompt up to the query: the same for every query under one instruction."""
        clean = self.tokenizer.clean
        task = self._settings.instruction if instruction is None else instruction
        return (
            f"<bos><start_of_turn>user\n{clean(self._settings.system_prompt)}\n\n<Instruct>: {clean(task)}\n<Query>: "
        )

    @staticmethod
    def suffix() -> str:
        """The prompt after the query. The model was trained with four newlines at the end."""
        return "<end_of_turn>\n<start_of_turn>model\n\n\n\n"
