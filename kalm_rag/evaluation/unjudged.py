"""Runs to compare without judgements: read from files and fitted to a collection, or made with a setting."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kalm_rag.cache import PassageCache
from kalm_rag.errors import MissingExtraError
from kalm_rag.evaluation.ranking import rank_candidates
from kalm_rag.evaluation.systems import System
from kalm_rag.evaluation.trec import Ranking, read_run
from kalm_rag.reranker import KaLMReranker
from kalm_rag.retrieval.bm25 import BM25
from kalm_rag.retrieval.corpus import Corpus, quoted
from kalm_rag.retrieval.segment import AUTO
from kalm_rag.settings import base_ratio
from kalm_rag.utils.progress import Progress

_NUMBERS = ("ratio", "window_tokens", "depth")
_NAMES = ("model", "ratio", "dtype", "lora", "storage", "prefill_storage", "window_tokens", "depth")


@dataclass(frozen=True, slots=True)
class Run:
    """One side of a comparison.

    Attributes:
        name: what to call it.
        rankings: query id to passages, best first.
        warnings: sentences about what was left out, each with its count.
    """

    name: str
    rankings: dict[str, list[tuple[str, float]]]
    warnings: tuple[str, ...] = ()


def parse_setting(text: str, model: str) -> System | None:
    """Read a setting such as `ratio=4,dtype=int8`; None if the text names a file.

    Args:
        text: names and values, separated by commas; see `System`, whose names are taken, `instruction` aside.
        model: if the text names none.

    Raises:
        FileNotFoundError: it is neither a file nor a setting.
        ValueError: a name is unknown or given twice, or a value is out of range.
    """
    if Path(text).is_file():
        return None
    if "=" not in text:
        msg = f"no file {text!r}; name a TREC run, or a setting such as model=nano,dtype=int8"
        raise FileNotFoundError(msg)
    found: dict[str, Any] = {}
    for part in text.split(","):
        name, _, value = (word.strip() for word in part.partition("="))
        name = name.replace("-", "_")
        if name not in _NAMES or name in found or not value:
            names = ", ".join(_NAMES)
            msg = f"a setting is NAME=VALUE with each of {names} at most once, got {part.strip()!r} in {text!r}"
            raise ValueError(msg)
        try:
            found[name] = int(value) if name in _NUMBERS else value
        except ValueError:
            msg = f"{name} must be a whole number, got {value!r} in {text!r}"
            raise ValueError(msg) from None
    system = replace(System(model), **found)
    system.check()
    return system


def read_fitted(path: Path, corpus: Corpus | None) -> Run:
    """Read a run, and leave out what is not in the collection.

    Args:
        path: a TREC run.
        corpus: the collection; None keeps everything.

    Raises:
        ValueError: a line cannot be read, or nothing of the run is in the collection.
    """
    run = read_run(path)
    if corpus is None:
        return Run(path.name, run)
    names = {quoted(name): name for name in (*corpus.queries, *corpus.passages)}
    named = {
        names.get(query, query): [(names.get(passage, passage), score) for passage, score in ranking]
        for query, ranking in run.items()
    }
    rankings = {
        query: [(passage, score) for passage, score in ranking if passage in corpus.passages]
        for query, ranking in named.items()
        if query in corpus.queries
    }
    if not any(rankings.values()):
        msg = f"{path} names no query of the collection with a passage of its corpus: it is a run of another collection"
        raise ValueError(msg)
    warnings = []
    if foreign := len(named) - len(rankings):
        warnings.append(f"{foreign} queries of {path.name} are not among the queries and are left out")
    unknown = sum(len(named[query]) - len(ranking) for query, ranking in rankings.items())
    if unknown:
        warnings.append(f"{unknown} passages of {path.name} are not in the corpus and are left out")
    return Run(path.name, rankings, tuple(warnings))


def first_stage(
    corpus: Corpus, run: Path | None, depth: int, *, language: str = AUTO, fold_accents: bool = False
) -> Run:
    """Return the candidates of every query: those of a run, or what BM25 finds, at most `depth` of them.

    Args:
        corpus: the collection.
        run: a TREC run, or None for BM25.
        depth: candidates of each query.
        language: as in `bm25_candidates`.
        fold_accents: as in `bm25_candidates`.

    Raises:
        MissingExtraError: `bm25s` is not installed.
        ValueError: the run cannot be read or is of another collection, or no query has a candidate.
    """
    if run is not None:
        found = read_fitted(run, corpus)
        return replace(found, rankings={query: ranking[:depth] for query, ranking in found.rankings.items()})
    try:
        index = BM25(corpus.passages, language=language, fold_accents=fold_accents)
    except MissingExtraError as error:
        raise MissingExtraError(error.module, "eval") from None
    rankings = {query: index.search(text, depth) for query, text in corpus.queries.items()}
    if not any(rankings.values()):
        msg = f"BM25 finds no candidate for any of {len(rankings)} queries; give the run of another first stage (--run)"
        raise ValueError(msg)
    return Run("BM25", {query: ranking for query, ranking in rankings.items() if ranking})


def rank_all(
    name: str,
    system: System,
    corpus: Corpus,
    rankings: Mapping[str, Ranking],
    *,
    cache: str | Path | None,
    device: str | None = None,
    max_length: int = 1024,
    show_progress: bool | None = None,
) -> Run:
    """Order every query's candidates with a system.

    Args:
        name: what to call the run.
        system: the setting.
        corpus: the texts.
        rankings: the candidates.
        cache: as in `KaLMReranker`; so are the following.
        device: where to compute.
        max_length: tokens of a passage that are read.
        show_progress: as in `KaLMReranker`.

    Raises:
        CheckpointError, ScoringError: as `KaLMReranker.rank`.
    """
    found = {}
    with (
        PassageCache(cache, base_ratio=base_ratio(system.ratio), storage=system.storage) as kept,
        KaLMReranker(
            system.model,
            lora=system.lora,
            dtype=system.dtype,
            device=device,
            max_length=max_length,
            cache=kept,
            prefill_storage=system.prefill_storage,
            long_passages=system.long_passages,
            window_tokens=system.window_tokens,
            show_progress=show_progress,
        ) as reranker,
        Progress(len(rankings), name, unit="query", show=show_progress) as progress,
    ):
        for query, ranking in rankings.items():
            found[query], _ = rank_candidates(reranker, system, corpus, query, ranking)
            progress.advance(1)
    return Run(name, found)
