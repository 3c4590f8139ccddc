"""Reads the runs of other rerankers, so that they stand in the table beside this package's."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kalm_rag.evaluation.candidates import Candidates
from kalm_rag.evaluation.trec import Ranking, read_run
from kalm_rag.retrieval.corpus import quoted
from kalm_rag.utils.display import Shown


@dataclass(frozen=True, slots=True, repr=False)
class ComparedRun(Shown):
    """Another reranker's order of the candidates.

    Attributes:
        name: what tables call it.
        rankings: query id to `(passage id, score)`, best first; only candidates of the first stage.
        milliseconds: time of one query as its user gave it, or None.
        digest: SHA-256 of the rankings.
        warnings: sentences about what was left out, each with its count.
    """

    name: str
    rankings: dict[str, list[tuple[str, float]]]
    milliseconds: float | None
    digest: str
    warnings: tuple[str, ...]


def parse_compared(given: str) -> tuple[str, Path, float | None]:
    """Split `NAME=FILE` or `NAME=FILE,MS` into its parts. A file whose whole name ends in a comma and a number wins.

    Raises:
        ValueError: a part is missing, or the time is not a positive number.
    """
    name, equals, rest = given.partition("=")
    name = name.strip()
    if not name or not equals or not rest.strip():
        msg = f"--compare takes NAME=FILE, or NAME=FILE,MS with its milliseconds per query; got {given!r:.80}"
        raise ValueError(msg)
    path, comma, text = rest.rpartition(",")
    if not comma or Path(rest).exists():
        return name, Path(rest), None
    try:
        milliseconds = float(text)
    except ValueError:
        return name, Path(rest), None  # a comma inside of a name; reading it tells whether the file exists
    if not 0 < milliseconds < math.inf:
        msg = f"the milliseconds of --compare must be a number above 0, got {text!r:.40} in {given!r:.80}"
        raise ValueError(msg)
    return name, Path(path), milliseconds


def read_compared(given: Sequence[str], candidates: Candidates) -> list[ComparedRun]:
    """Read the runs that `--compare` names.

    Args:
        given: each `NAME=FILE` or `NAME=FILE,MS`.
        candidates: what the first stage found. All rerankers order these passages; others are left out with a warning.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an argument or a line cannot be read, two runs have one name, or a run fits no candidate.
    """
    found: dict[str, ComparedRun] = {}
    for name, path, milliseconds in map(parse_compared, given):
        if name in found or name == candidates.name:
            msg = f"--compare names {name!r} twice or as the first stage; give each run a name of its own"
            raise ValueError(msg)
        found[name] = _fitted(name, path, milliseconds, candidates)
    return list(found.values())


def _fitted(name: str, path: Path, milliseconds: float | None, candidates: Candidates) -> ComparedRun:
    run = read_run(path)
    ids = {quoted(query): query for query in candidates.rankings}
    # The id itself goes first: a run may hold it as it is, or quoted.
    run = {query if query in candidates.rankings else ids.get(query, query): ranking for query, ranking in run.items()}
    rankings, foreign, missing = {}, 0, 0
    for query, ranking in candidates.rankings.items():
        known = {passage for passage, _ in ranking}
        unquoted = {quoted(passage): passage for passage in known}
        named = [
            (passage if passage in known else unquoted.get(passage, passage), score)
            for passage, score in run.get(query, ())
        ]
        rankings[query] = [(passage, score) for passage, score in named if passage in known]
        foreign += len(named) - len(rankings[query])
        missing += len(known) - len(rankings[query])
    if not any(rankings.values()):
        msg = (
            f"{path} ranks none of the candidates of {candidates.name} ({len(run)} queries, for example "
            f"{next(iter(run))!r:.80}): it is a run of another collection or of other candidates"
        )
        raise ValueError(msg)
    warnings = []
    if unknown := len(run.keys() - candidates.rankings.keys()):
        warnings.append(f"{unknown} queries of {name} are not among the judged queries and are left out")
    if absent := sum(query not in run for query in candidates.rankings):
        warnings.append(f"{absent} of {len(rankings)} queries are not in the run of {name}; they count as 0 for it")
    if foreign:
        warnings.append(f"{foreign} passages of {name} are not among the candidates and are left out")
    if missing:
        warnings.append(f"{missing} candidates are not in the run of {name}; they count as not found by it")
    return ComparedRun(name, rankings, milliseconds, _digest(rankings), tuple(warnings))


def _digest(rankings: Mapping[str, Ranking]) -> str:
    content = hashlib.sha256()
    for query, ranking in rankings.items():
        content.update(json.dumps([query, [passage for passage, _ in ranking]]).encode())
    return content.hexdigest()
