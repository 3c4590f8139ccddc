"""Cohere v1 and v2, Jina and vLLM: `documents` in, `results` out. One response satisfies the clients of all."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from kalm_rag.serving.asked import Ask, Asked, Outcome, Truncation
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
    warnings,
)


class DocumentsRequest(Extensions):
    """A request of Cohere, Jina or vLLM."""

    query: Text
    documents: list[Given]
    top_n: Annotated[int, Field(ge=0)] | None = Field(None, description="Results at most; 0 or null for all.")
    return_documents: bool | None = Field(None, description="Default: true on /rerank, as vLLM has it, else false.")
    rank_fields: list[Text] | None = Field(None, description="Fields of documents that are objects (Cohere v1).")
    max_tokens_per_doc: Count | None = Field(None, description="Tokens of a passage that are read.")
    max_tokens_per_query: Count | None = Field(None, description="Tokens of the query that are read.")
    max_chunks_per_doc: Count | None = Field(None, description="Windows of a passage, with long_passages=windows.")
    truncate_prompt_tokens: int | None = Field(None, description="Tokens of a passage and its query that are read.")
    truncation_side: Text | None = Field(None, description="`right` or `left`: which end is cut off.")
    truncation: bool | None = Field(None, description="False refuses texts that are longer (Jina).")
    use_activation: bool | None = Field(None, description="False gives margins instead of P(yes) (vLLM).")
    raw_scores: Flag = Field(False, description="True gives margins instead of P(yes).")


def _asked(body: DocumentsRequest, *, with_documents: bool) -> Asked:
    side = body.truncation_side or "right"
    if side not in ("left", "right"):
        msg = "truncation_side must be 'left' or 'right'"
        raise ValueError(msg)
    texts = [document_text(document, place, body.rank_fields) for place, document in enumerate(body.documents)]
    prompt_tokens = body.truncate_prompt_tokens
    if prompt_tokens is not None and prompt_tokens < -1:
        msg = f"truncate_prompt_tokens must be -1, for as many as the model reads, or more, got {prompt_tokens}"
        raise ValueError(msg)
    return body.asked(
        [Ask(body.query, texts)],
        documents=body.documents,
        top_n=body.top_n or None,
        with_documents=with_documents if body.return_documents is None else body.return_documents,
        margins=body.raw_scores or body.use_activation is False,
        truncation=Truncation(
            passage_tokens=body.max_tokens_per_doc,
            query_tokens=body.max_tokens_per_query,
            pair_tokens=prompt_tokens if prompt_tokens is not None and prompt_tokens > 0 else None,
            chunks=body.max_chunks_per_doc,
            side="left" if side == "left" else "right",
            refused=body.truncation is False,
        ),
    )


def _as_object(document: Any) -> dict[str, Any]:
    return {"text": document} if isinstance(document, str) else document


def _answer(asked: Asked, outcome: Outcome) -> dict[str, Any]:
    [answer] = outcome.answers
    results = []
    for hit in scored(answer):
        result: dict[str, Any] = {"index": hit.index, "relevance_score": score_of(hit, margins=asked.margins)}
        if asked.with_documents:
            result["document"] = _as_object(asked.documents[hit.index])
        results.append(result | extras(answer, hit, asked))
    meta: dict[str, Any] = {"api_version": {"version": "2"}, "billed_units": {"search_units": 1}}
    if told := warnings(outcome):
        meta["warnings"] = told
    return {
        "id": outcome.request_id,
        "object": "rerank",
        "model": outcome.model,
        "results": results,
        "usage": {"prompt_tokens": outcome.tokens, "total_tokens": outcome.tokens},
        "meta": meta,
        **about(asked, outcome),
    }


COHERE = Dialect(
    name="cohere",
    paths=("/v1/rerank", "/v2/rerank"),
    request=DocumentsRequest,
    asked=lambda body: _asked(body, with_documents=False),
    answer=_answer,
    error=any_error,
    busy=503,
    summary="Rerank, as Cohere v1 and v2, Jina and vLLM have it. `relevance_score` is P(yes).",
)
VLLM = Dialect(
    name="vllm",
    paths=("/rerank",),
    request=DocumentsRequest,
    asked=lambda body: _asked(body, with_documents=True),
    answer=_answer,
    error=any_error,
    busy=429,
    summary="Rerank, as vLLM has it. `relevance_score` is P(yes).",
)
