"""TREC run files: `query Q0 passage rank score tag`, one candidate a line."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from kalm_rag.retrieval.corpus import quoted, text_lines
from kalm_rag.utils.files import replace_file

_STEP = 1e-6
"""Least relative distance of neighbouring scores; single precision resolves 1.2e-7."""

Ranking = Sequence[tuple[str, float]]
"""Passage ids and scores, best first."""


def read_run(path: str | Path) -> dict[str, list[tuple[str, float]]]:
    """Read a run file.

    Returns:
        Query id to `(passage id, score)`, by falling score; equal scores keep the order of the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line does not have six columns, a score is not a number, or a query has a passage twice; the
            message names file and line.
    """
    found: dict[str, dict[str, float]] = {}
    if not Path(path).exists() or Path(path).is_dir():
        msg = f"no file of candidates '{path}'; name a TREC run (--run)"
        raise FileNotFoundError(msg)
    for number, line in text_lines(path):
        columns = line.strip().split("\t") if "\t" in line else line.split()
        if not line.strip():
            continue
        score = _number(columns[4]) if len(columns) == 6 else None
        if score is None:
            msg = (
                f"{path}, line {number}: expected the six columns `query Q0 passage rank score tag` of a TREC run, "
                f"got {line.strip()[:80]!r}"
            )
            raise ValueError(msg)
        query, passage = columns[0], columns[2]
        if passage in found.setdefault(query, {}):
            msg = f"{path}, line {number}: the passage {passage!r} occurs twice under query {query!r}"
            raise ValueError(msg)
        found[query][passage] = score
    if not found:
        msg = f"{path} holds no candidates"
        raise ValueError(msg)
    return {query: sorted(scores.items(), key=lambda item: -item[1]) for query, scores in found.items()}


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def write_run(path: str | Path, rankings: Mapping[str, Ranking], tag: str) -> None:
    """Write a run file, whole or not at all; see `run_text`."""
    replace_file(Path(path), run_text(rankings, tag).encode())


def run_text(rankings: Mapping[str, Ranking], tag: str) -> str:
    """A run as text.

    Evaluation tools order only by score, which they read in single precision: each written score is a little below
    the one before it where they would tie. Ids are `quoted`.
    """
    lines = []
    for query, ranking in rankings.items():
        last = math.inf
        for rank, (passage, score) in enumerate(ranking, start=1):
            highest = last - max(_STEP, abs(last) * _STEP)
            last = score if rank == 1 else min(score, highest)
            lines.append(f"{quoted(query)}\tQ0\t{quoted(passage)}\t{rank}\t{last!r}\t{tag}\n")
    return "".join(lines)
