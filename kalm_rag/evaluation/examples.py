"""What the page of an evaluation shows beside means: intervals, queries with their texts, and each query."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kalm_rag.evaluation.entries import Entry
from kalm_rag.evaluation.summary import Summary, interval_text
from kalm_rag.utils.display import shorten, visible

QUERIES = 5
"""Queries that gained most, and that lost most, with their texts."""
PASSAGES = 3
"""Passages of each side."""
CHARACTERS = 400
"""Of a passage; a longer one ends in an ellipsis."""
ROWS = 500
"""Queries in the table of each query; the page says how many are left out."""


def with_intervals(summary: Summary, rows: Sequence[Sequence[str]]) -> list[list[tuple[str, str]]]:
    """Put the interval of each figure beside it; the first row is the first stage, the last one has none."""
    last = len(rows) - 1
    found = []
    for place, row in enumerate(rows):
        entry = summary.entries[place - 1] if 0 < place < last else None
        intervals = summary.first_intervals if place == 0 else {} if entry is None else entry.intervals
        texts = [interval_text(intervals.get(metric)) for metric in summary.metrics]
        times = "" if entry is None else interval_text(entry.milliseconds_interval, 0)
        found.append(list(zip(row, ["", "", *texts, "", times], strict=True)))
    return found


def examples(summary: Summary) -> list[dict[str, Any]]:
    """Return the queries that the first system helped most and hurt most, with the passages before and after."""
    systems = [entry for entry in summary.entries if entry.kind == "system"]
    if not systems:
        return []
    entry = systems[0]
    name = f"{entry.name}, ratio {entry.ratio}"
    gains = entry.gains(summary.first_per_query[summary.metrics[0]])
    groups = [
        (f"Queries that gained most with {name}", [query for query, gain in gains[:QUERIES] if gain > 0]),
        (f"Queries that lost most with {name}", [query for query, gain in gains[: -QUERIES - 1 : -1] if gain < 0]),
    ]
    return [
        {"title": title, "queries": [_example(summary, entry, name, query) for query in queries]}
        for title, queries in groups
        if queries
    ]


def _example(summary: Summary, entry: Entry, name: str, query: str) -> dict[str, Any]:
    metric = summary.metrics[0]
    sides = [(summary.first_name, summary.rankings[query]), (name, entry.rankings[query])]
    return {
        "id": visible(query),
        "query": visible(shorten(summary.queries[query], CHARACTERS)),
        "before": f"{summary.first_per_query[metric][query]:.4f}",
        "after": f"{entry.per_query[metric][query]:.4f}",
        "sides": [{"name": title, "passages": _shown(summary, query, ranking)} for title, ranking in sides],
    }


def _shown(summary: Summary, query: str, ranking: Sequence[tuple[str, float]]) -> list[dict[str, Any]]:
    """Return the first passages, and the first relevant one if it lies below them."""
    relevant = {passage for passage, value in summary.qrels[query].items() if value > 0}
    ranked = list(enumerate((passage for passage, _ in ranking), start=1))
    chosen = ranked[:PASSAGES]
    if not any(passage in relevant for _, passage in chosen):
        chosen += [item for item in ranked[PASSAGES:] if item[1] in relevant][:1]
    return [
        {
            "rank": rank,
            "text": visible(shorten(summary.passages[passage], CHARACTERS)),
            "relevant": passage in relevant,
        }
        for rank, passage in chosen
    ]


def per_query(summary: Summary) -> dict[str, Any]:
    """Return the table of the first metric of each query, those that any row changes most first."""
    if not summary.entries:
        return {"heading": [], "rows": [], "left_out": 0}
    metric = summary.metrics[0]
    base = summary.first_per_query[metric]
    changes = {
        query: max(abs(entry.per_query[metric][query] - base[query]) for entry in summary.entries) for query in base
    }
    ordered = sorted(base, key=lambda query: -changes[query])
    names = [entry.name if entry.ratio is None else f"{entry.name} r{entry.ratio}" for entry in summary.entries]
    rows = [
        [
            f"{visible(query)}: {visible(shorten(summary.queries[query], 80))}",
            f"{base[query]:.3f}",
            *(f"{entry.per_query[metric][query]:.3f}" for entry in summary.entries),
        ]
        for query in ordered[:ROWS]
    ]
    return {"heading": ["query", summary.first_name, *names], "rows": rows, "left_out": len(ordered) - len(rows)}
