"""Every setting of the scorer, checked once when it is made."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

from kalm_rag.utils.checks import (
    check_budget,
    check_bytes,
    check_choice,
    check_count,
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

LongPassages = Literal["truncate", "windows"]

PrefillMemory = int | Literal["auto"]
"""Bytes, or a share of what is free when the model is loaded: see `kalm_rag.utils.budget`."""

DEFAULT_PREFILL_MEMORY: PrefillMemory = "auto"

DEFAULT_SCORE_MEMORY = 16_000_000
"""Bytes of remembered scores: about 93,000 pairs in lists of 32, or 28,000 of a query with one passage each."""

DEFAULT_MAX_WINDOWS = 64

AT_ONCE = 2048
"""Passages, windows or pairs held at once: bounds memory on long inputs, and is enough to batch by length."""

_OVERLAP_SHARE = 8
"""A window shares at most one of so many tokens with the next one, unless told otherwise."""


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
    long_passages: LongPassages = "truncate"
    window_tokens: int | None = None
    window_overlap: int | None = None
    max_windows: int = DEFAULT_MAX_WINDOWS
    encode_in_background: bool = True

    def __post_init__(self) -> None:
        checked: dict[str, object] = {
            name: check_positive(name, getattr(self, name))
            for name in ("max_length", "query_max_length", "batch_size", "batch_tokens", "max_windows")
        }
        checked["ratio"] = check_ratio("ratio", self.ratio)
        checked["prefill_memory"] = check_budget("prefill_memory", self.prefill_memory)
        checked["score_memory"] = check_bytes("score_memory", self.score_memory)
        if self.window_tokens is not None:
            checked["window_tokens"] = check_positive("window_tokens", self.window_tokens)
        if self.window_overlap is not None:
            checked["window_overlap"] = check_count("window_overlap", self.window_overlap)
        for name, value in checked.items():
            object.__setattr__(self, name, value)  # frozen, and a number may have come as one of numpy's
        for name in ("instruction", "system_prompt"):
            check_text(name, getattr(self, name))
        check_choice("control_tokens", self.control_tokens, get_args(ControlTokens))
        check_choice("prefill_storage", self.prefill_storage, get_args(PrefillStorage))
        check_flag("refine", self.refine)
        check_flag("encode_in_background", self.encode_in_background)
        check_choice("long_passages", self.long_passages, get_args(LongPassages))
        self._check_windows()

    def _check_windows(self) -> None:
        changed = {
            "window_tokens": self.window_tokens is not None,
            "window_overlap": self.window_overlap is not None,
            "max_windows": self.max_windows != DEFAULT_MAX_WINDOWS,
        }
        given = [name for name, is_changed in changed.items() if is_changed]
        if given and not self.splits:
            msg = (
                f"{given[0]}={getattr(self, given[0])} applies only to windows, got "
                f"long_passages={self.long_passages!r}; pass long_passages='windows', or leave {given[0]} out"
            )
            raise ValueError(msg)
        tokens, overlap = self.window
        if tokens > self.max_length:
            msg = (
                f"window_tokens must be at most max_length, got window_tokens={tokens} and max_length={self.max_length}"
            )
            raise ValueError(msg)
        if overlap >= tokens:
            msg = (
                f"window_overlap must be less than the tokens of a window, got window_overlap={overlap} and windows of "
                f"{tokens} tokens"
            )
            raise ValueError(msg)

    @property
    def splits(self) -> bool:
        """Whether long passages are split into windows."""
        return self.long_passages == "windows"

    @property
    def window(self) -> tuple[int, int]:
        """Tokens of a window of a long passage, and how many of them the next one may repeat."""
        tokens = self.max_length if self.window_tokens is None else self.window_tokens
        return tokens, tokens // _OVERLAP_SHARE if self.window_overlap is None else self.window_overlap

    def splitting(self, tokens: int, overlap: int, most: int) -> Settings:
        """Return the same settings with windows of so many tokens."""
        return replace(
            self,
            max_length=max(tokens, self.max_length),
            long_passages="windows",
            window_tokens=tokens,
            window_overlap=overlap,
            max_windows=most,
        )


def base_ratio(ratio: int) -> int:
    """Return the ratio at which states are kept: 4, which serves its multiples, or the requested one if 4 cannot."""
    return 4 if ratio % 4 == 0 else ratio
