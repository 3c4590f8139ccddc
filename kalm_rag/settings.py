"""Every setting of the scorer, checked once when it is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from kalm_rag.utils.checks import (
    check_budget,
    check_bytes,
    check_choice,
    check_flag,
    check_positive,
    check_ratio,
    check_text,
)

DEFAULT_INSTRUCTION = "Given a query, retrieve documents that answer the query."
"""Task instruction of the KaLM-Reranker-V1 model cards."""

DEFAULT_SYSTEM_PROMPT = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct provided. "
    'Note that the answer can only be "yes" or "no".'
)
"""System sentence of the KaLM-Reranker-V1 model cards."""

ControlTokens = Literal["escape", "allow"]
PrefillStorage = Literal["native", "int8", "compact"]

PrefillMemory = int | Literal["auto"]
"""Bytes, or a share of what is free when the model is loaded: see `kalm_rag.utils.budget`."""

DEFAULT_PREFILL_MEMORY: PrefillMemory = "auto"

DEFAULT_SCORE_MEMORY = 16_000_000
"""Bytes of remembered scores: about 93,000 pairs in lists of 32, or 28,000 of a query with one passage each."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How passages and queries become scores. The fields are those of `KaLMReranker`.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field is out of range; the message names it, its value and the rule.
    """

    max_length: int = 1024
    query_max_length: int = 512
    ratio: int = 4
    instruction: str = DEFAULT_INSTRUCTION
    system_prompt: str = DEFAULT_SYSTEM_PROMPT
    batch_size: int = 32
    batch_tokens: int = 16384
    control_tokens: ControlTokens = "escape"
    prefill_memory: PrefillMemory = DEFAULT_PREFILL_MEMORY
    prefill_storage: PrefillStorage = "native"
    score_memory: int = DEFAULT_SCORE_MEMORY
    refine: bool = False

    def __post_init__(self) -> None:
        checked: dict[str, object] = {
            name: check_positive(name, getattr(self, name))
            for name in ("max_length", "query_max_length", "batch_size", "batch_tokens")
        }
        checked["ratio"] = check_ratio("ratio", self.ratio)
        checked["prefill_memory"] = check_budget("prefill_memory", self.prefill_memory)
        checked["score_memory"] = check_bytes("score_memory", self.score_memory)
        for name, value in checked.items():
            object.__setattr__(self, name, value)  # frozen, and a number may have come as one of numpy's
        for name in ("instruction", "system_prompt"):
            check_text(name, getattr(self, name))
        check_choice("control_tokens", self.control_tokens, get_args(ControlTokens))
        check_choice("prefill_storage", self.prefill_storage, get_args(PrefillStorage))
        check_flag("refine", self.refine)


def base_ratio(ratio: int) -> int:
    """Return the ratio at which states are kept: 4, which serves its multiples, or the requested one if 4 cannot."""
    return 4 if ratio % 4 == 0 else ratio
