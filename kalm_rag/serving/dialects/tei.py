"""Text Embeddings Inference: `texts` in, a bare list out."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from kalm_rag.serving.asked import Ask, Asked, Outcome, Truncation
from kalm_rag.serving.dialects.base import Count, Dialect, Extensions, Flag, Text, extras, score_of, scored


class TeiRequest(Extensions):
    """A request of TEI's clients."""

    query: Text
    texts: list[Text]
    raw_scores: Flag = Field(False, description="True gives margins instead of P(yes).")
    return_text: Flag = Field(False, description="True returns the texts.")
    return_documents: Flag = Field(False, description="The same.")
    truncate: bool | None = Field(None, description="False refuses texts that are longer than what is read.")
    truncation_direction: Text | None = Field(None, description="`Right` or `Left`: which end is cut off.")
    max_tokens_per_doc: Count | None = Field(None, description="Tokens of a passage that are read.")
    top_n: Annotated[int, Field(ge=0)] | None = Field(None, description="Results at most; 0 or null for all.")


def _asked(body: TeiRequest) -> Asked:
    direction = (body.truncation_direction or "right").lower()
    if direction not in ("left", "right"):
        msg = "truncation_direction must be 'Left' or 'Right'"
        raise ValueError(msg)
    return body.asked(
        [Ask(body.query, body.texts)],
        documents=body.texts,
        top_n=body.top_n or None,
        with_documents=body.return_text or body.return_documents,
        margins=body.raw_scores,
        truncation=Truncation(
            passage_tokens=body.max_tokens_per_doc,
            side="left" if direction == "left" else "right",
            refused=body.truncate is False,
        ),
    )


def _answer(asked: Asked, outcome: Outcome) -> list[dict[str, Any]]:
    [answer] = outcome.answers
    results = []
    for hit in scored(answer):
        result: dict[str, Any] = {"index": hit.index, "score": score_of(hit, margins=asked.margins)}
        if asked.with_documents:
            result["text"] = asked.documents[hit.index]
        results.append(result | extras(answer, hit, asked))
    return results


_TYPES = {413: "Validation", 422: "Validation", 400: "Validation", 429: "Overloaded", 503: "Unhealthy"}


def _error(status: int, message: str) -> dict[str, Any]:
    return {"error": message, "error_type": _TYPES.get(status, "Backend"), "message": message, "detail": message}


TEI = Dialect(
    name="tei",
    paths=("/rerank",),
    request=TeiRequest,
    asked=_asked,
    answer=_answer,
    error=_error,
    busy=429,
    summary="Rerank, as Text Embeddings Inference has it: `texts` instead of `documents`. `score` is P(yes).",
)
