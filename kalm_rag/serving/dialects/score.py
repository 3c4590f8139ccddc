"""vLLM's `/score`: pairs in, their scores in the same order out."""

from __future__ import annotations

import time
from typing import Any

from pydantic import Field

from kalm_rag.results import RankedPassage
from kalm_rag.serving.asked import Ask, Asked, Outcome, Truncation
from kalm_rag.serving.dialects.base import (
    Count,
    Dialect,
    Extensions,
    Given,
    about,
    any_error,
    document_text,
    extras,
    score_of,
)

Texts = list[Given] | Given


class ScoreRequest(Extensions):
    """A request of vLLM's `/score`: one query with many passages, or as many of both."""

    text_1: Texts | None = Field(None, description="Queries.")
    text_2: Texts | None = Field(None, description="Passages.")
    queries: Texts | None = Field(None, description="The same as text_1.")
    documents: Texts | None = Field(None, description="The same as text_2.")
    items: Texts | None = Field(None, description="The same as text_2.")
    data_1: Texts | None = Field(None, description="The same as text_1.")
    data_2: Texts | None = Field(None, description="The same as text_2.")
    max_tokens_per_doc: Count | None = Field(None, description="Tokens of a passage that are read.")
    max_tokens_per_query: Count | None = Field(None, description="Tokens of a query that are read.")
    truncate_prompt_tokens: int | None = Field(None, description="Tokens of a pair that are read.")
    use_activation: bool | None = Field(None, description="False gives margins instead of P(yes).")


_NAMES = (("text_1", "text_2"), ("queries", "documents"), ("queries", "items"), ("data_1", "data_2"))


def _asked(body: ScoreRequest) -> Asked:
    for first, second in _NAMES:
        if getattr(body, first) is not None and getattr(body, second) is not None:
            break
    else:
        msg = "give text_1 and text_2, or queries and documents: the queries, and the passages to score for them"
        raise ValueError(msg)
    queries, passages = _texts(getattr(body, first)), _texts(getattr(body, second))
    if len(queries) == 1:
        queries = queries * len(passages)
    if len(queries) != len(passages):
        msg = f"{first} must have one text, or as many as {second}, got {len(queries)} and {len(passages)}"
        raise ValueError(msg)
    places: dict[str, list[int]] = {}
    for place, query in enumerate(queries):
        places.setdefault(query, []).append(place)
    prompt_tokens = body.truncate_prompt_tokens
    return body.asked(
        [Ask(query, [passages[place] for place in own], own) for query, own in places.items()],
        documents=passages,
        margins=body.use_activation is False,
        truncation=Truncation(
            passage_tokens=body.max_tokens_per_doc,
            query_tokens=body.max_tokens_per_query,
            pair_tokens=prompt_tokens if prompt_tokens is not None and prompt_tokens > 0 else None,
        ),
    )


def _texts(given: Any) -> list[str]:
    texts = given if isinstance(given, list) else [given]
    return [document_text(text, place) for place, text in enumerate(texts)]


def _answer(asked: Asked, outcome: Outcome) -> dict[str, Any]:
    data: list[dict[str, Any]] = []
    for answer in outcome.answers:
        places = answer.ask.places or range(len(answer.ask.texts))
        for hit in answer.ranking:
            if isinstance(hit, RankedPassage):
                own = {"index": places[hit.index], "object": "score", "score": score_of(hit, margins=asked.margins)}
                data.append(own | extras(answer, hit, asked))
    return {
        "id": outcome.request_id,
        "object": "list",
        "created": int(time.time()),
        "model": outcome.model,
        "data": sorted(data, key=lambda own: int(own["index"])),
        "usage": {"prompt_tokens": outcome.tokens, "total_tokens": outcome.tokens},
        **about(asked, outcome),
    }


SCORE = Dialect(
    name="score",
    paths=("/score", "/v1/score"),
    request=ScoreRequest,
    asked=_asked,
    answer=_answer,
    error=any_error,
    busy=429,
    summary="Score pairs, as vLLM has it, in their order. `score` is P(yes).",
)
