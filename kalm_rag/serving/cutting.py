"""Cuts the texts of a request to what the request allows."""

from __future__ import annotations

from kalm_rag.serving.asked import Ask, Truncation
from kalm_rag.serving.limits import ServingError
from kalm_rag.serving.tokens import Cut, TokenCounter
from kalm_rag.settings import Settings


def most_tokens(settings: Settings, counter: TokenCounter) -> tuple[int, int]:
    """Return how many tokens are read of a query and of a passage, whatever a request allows."""
    windows = settings.max_windows if settings.splits else 1
    return settings.query_max_length, windows * (settings.window[0] - counter.prefix)


def cut(ask: Ask, truncation: Truncation, settings: Settings, counter: TokenCounter) -> tuple[Cut, list[Cut]]:
    """Return the query and the passages; what the model would not read either way is left to it.

    Args:
        ask: what is asked.
        truncation: what the request says of it.
        settings: of the reranker.
        counter: counts tokens.

    Raises:
        ServingError: a text is longer, and the request refuses that.
    """
    if truncation == Truncation():
        return Cut(ask.query), [Cut(text) for text in ask.texts]
    most_query, most_passage = most_tokens(settings, counter)
    query_limit = min(most_query, truncation.query_tokens or most_query)
    limit = min(most_passage, truncation.passage_tokens or most_passage)
    if truncation.chunks is not None and settings.splits:
        limit = min(limit, truncation.chunks * (settings.window[0] - counter.prefix))
    [(own, _)] = counter.count([ask.query])
    if truncation.pair_tokens is not None:
        limit = max(1, min(limit, truncation.pair_tokens - min(own, query_limit)))
    if own > query_limit and truncation.refused:
        raise _refused("query", query_limit)
    query = counter.cut(ask.query, query_limit) if own > query_limit else Cut(ask.query)
    texts = []
    for place, (text, (count, _)) in enumerate(zip(ask.texts, counter.count(ask.texts), strict=True)):
        is_longer = count > limit
        if is_longer and truncation.refused:
            raise _refused(f"documents[{place}]", limit)
        must = is_longer and (truncation.side == "left" or limit < most_passage)
        texts.append(counter.cut(text, limit, truncation.side) if must else Cut(text))
    return query, texts


def _refused(name: str, limit: int) -> ServingError:
    msg = f"{name} has more than the {limit} tokens that are read: shorten it, or let the server truncate it"
    return ServingError(413, msg)
