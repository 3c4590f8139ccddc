"""NVIDIA NIM: `passages` in, `rankings` with logits out."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from kalm_rag.serving.asked import Ask, Asked, Outcome, Truncation
from kalm_rag.serving.dialects.base import Dialect, Extensions, Text, about, any_error, extras, scored


class NvidiaText(BaseModel):
    """A text of NVIDIA's clients."""

    model_config = ConfigDict(extra="ignore")

    text: Text


class NvidiaRequest(Extensions):
    """A request of NVIDIA's clients."""

    query: NvidiaText
    passages: list[NvidiaText]
    truncate: Text | None = Field(None, description="`END` truncates texts, `NONE` refuses those that are longer.")


def _asked(body: NvidiaRequest) -> Asked:
    truncate = (body.truncate or "END").upper()
    if truncate not in ("END", "NONE"):
        msg = "truncate must be 'END' or 'NONE'"
        raise ValueError(msg)
    return body.asked(
        [Ask(body.query.text, [passage.text for passage in body.passages])],
        truncation=Truncation(refused=truncate == "NONE"),
    )


def _answer(asked: Asked, outcome: Outcome) -> dict[str, Any]:
    [answer] = outcome.answers
    rankings = [{"index": hit.index, "logit": hit.margin, **extras(answer, hit, asked)} for hit in scored(answer)]
    return {
        "rankings": rankings,
        "model": outcome.model,
        "usage": {"prompt_tokens": outcome.tokens, "total_tokens": outcome.tokens},
        **about(asked, outcome),
    }


NVIDIA = Dialect(
    name="nvidia",
    paths=("/v1/ranking",),
    request=NvidiaRequest,
    asked=_asked,
    answer=_answer,
    error=any_error,
    busy=503,
    summary="Rerank, as NVIDIA NIM has it. `logit` is the margin, of which P(yes) is the sigmoid.",
)
