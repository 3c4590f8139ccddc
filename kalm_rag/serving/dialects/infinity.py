"""Infinity: `documents` in, `results` out, with documents as plain strings."""

from __future__ import annotations

import time
from typing import Any

from pydantic import Field

from kalm_rag.serving.asked import Ask, Asked, Outcome
from kalm_rag.serving.dialects.base import (
    Count,
    Dialect,
    Extensions,
    Flag,
    Given,
    Text,
    about,
    any_error,
    document_text,
    extras,
    score_of,
    scored,
)


class InfinityRequest(Extensions):
    """A request of Infinity's clients."""

    query: Text
    documents: list[Given]
    top_n: Count | None = Field(None, description="Results at most.")
    return_documents: Flag = Field(False, description="True returns the documents, as strings.")
    raw_scores: Flag = Field(False, description="True gives margins instead of P(yes).")


def _asked(body: InfinityRequest) -> Asked:
    texts = [document_text(document, place) for place, document in enumerate(body.documents)]
    return body.asked(
        [Ask(body.query, texts)],
        documents=texts,
        top_n=body.top_n,
        with_documents=body.return_documents,
        margins=body.raw_scores,
    )


def _answer(asked: Asked, outcome: Outcome) -> dict[str, Any]:
    [answer] = outcome.answers
    results = []
    for hit in scored(answer):
        result: dict[str, Any] = {"relevance_score": score_of(hit, margins=asked.margins), "index": hit.index}
        if asked.with_documents:
            result["document"] = asked.documents[hit.index]
        results.append(result | extras(answer, hit, asked))
    return {
        "object": "rerank",
        "results": results,
        "model": outcome.model,
        "usage": {"prompt_tokens": outcome.tokens, "total_tokens": outcome.tokens},
        "id": outcome.request_id,
        "created": int(time.time()),
        **about(asked, outcome),
    }


INFINITY = Dialect(
    name="infinity",
    paths=("/infinity/rerank",),
    request=InfinityRequest,
    asked=_asked,
    answer=_answer,
    error=any_error,
    busy=429,
    summary="Rerank, as Infinity has it. `relevance_score` is P(yes).",
)
