"""Parses judgements: BEIR's and TREC's columns, and JSON lines that a person filled in."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable

logger = logging.getLogger(__name__)

_MOST_RELEVANT = 1000


def parse_judgements(lines: Iterable[tuple[int, str]], where: str) -> dict[str, dict[str, int]]:
    """Parse numbered lines; see `kalm_rag.retrieval.corpus.read_qrels`.

    Args:
        lines: numbers from 1, and texts.
        where: what they come from, for messages.
    """
    found: dict[str, dict[str, int]] = {}
    rows = empty = 0
    for number, line in lines:
        is_json = line.lstrip().startswith("{")
        columns = line.strip().split("\t") if "\t" in line else line.split()
        if not columns or (number == 1 and columns[-1] == "score"):
            continue
        rows += 1
        try:
            if is_json:
                query, passage, relevance = _judged_object(line)
                if relevance is None:
                    empty += 1
                    continue
            else:
                query, passage, relevance = columns if len(columns) == 3 else [columns[0], *columns[2:]]
            value = int(relevance)
            if abs(value) > _MOST_RELEVANT:
                raise ValueError
        except ValueError:
            if is_json:
                msg = (
                    f"{where}, line {number}: expected a JSON object with query_id, passage_id and a relevance that is "
                    f"an integer within {_MOST_RELEVANT} of 0, or null if not judged; got {line.strip()[:80]!r}"
                )
                raise ValueError(msg) from None
            msg = (
                f"{where}, line {number}: expected query-id, corpus-id and an integer score within {_MOST_RELEVANT} of "
                f"0 (or TREC's query-id, iteration, corpus-id, relevance), got {line.strip()[:80]!r}"
            )
            raise ValueError(msg) from None
        if found.setdefault(query, {}).setdefault(passage, value) != value:
            msg = f"{where}, line {number}: {query!r} and {passage!r} were judged before, with another score"
            raise ValueError(msg)
    if empty and not found:
        msg = f"none of the {empty} pairs in {where} is judged; replace the null after relevance by 0, 1 or higher"
        raise ValueError(msg)
    if not found:
        msg = f"{where} holds no judgement; there is nothing to evaluate"
        raise ValueError(msg)
    if empty:
        logger.warning("%d of %d pairs in %s are not judged yet and are left out", empty, rows, where)
    return found


def _judged_object(line: str) -> tuple[str, str, str | None]:
    """Return query, passage and relevance of a line of JSON; None for a relevance that is not filled in.

    Raises:
        ValueError: it is no such object.
    """
    try:
        row = json.loads(line)
        query, passage, relevance = row["query_id"], row["passage_id"], row["relevance"]
    except (KeyError, RecursionError):
        raise ValueError from None
    if not isinstance(query, str) or not isinstance(passage, str):
        raise ValueError
    if relevance is None or (isinstance(relevance, str) and not relevance.strip()):
        return query, passage, None
    # A person may write the number in quotes. True and 1.5 are no judgements.
    if isinstance(relevance, bool) or not isinstance(relevance, (int, str)):
        raise ValueError
    return query, passage, str(relevance)
