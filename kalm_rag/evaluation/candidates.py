"""Reads the first stage's candidates and checks them against the collection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kalm_rag.errors import MissingExtraError
from kalm_rag.evaluation.trec import read_run
from kalm_rag.retrieval.bm25 import BM25
from kalm_rag.retrieval.corpus import Corpus, quoted
from kalm_rag.retrieval.segment import AUTO
from kalm_rag.utils.display import Shown
from kalm_rag.utils.progress import Progress


@dataclass(frozen=True, slots=True, repr=False)
class Candidates(Shown):
    """The first stage's candidates in order, and warnings about the input.

    Attributes:
        name: what the first stage is called in tables.
        rankings: query id to `(passage id, score)`, best first, at most `depth` of them.
        qrels: the judgements of those queries that count.
        warnings: sentences about what was left out, each with its count.
        unanswered: candidates of queries whose judgements name no relevant passage, which no metric counts: what a
            threshold should leave nothing of. Empty unless asked for.
    """

    name: str
    rankings: dict[str, list[tuple[str, float]]]
    qrels: dict[str, dict[str, int]]
    warnings: tuple[str, ...]
    unanswered: dict[str, list[tuple[str, float]]] = field(default_factory=dict)

    def every_ranking(self) -> dict[str, list[tuple[str, float]]]:
        """Return the candidates of all queries, those without an answer last."""
        return {**self.rankings, **self.unanswered}


def unanswered_queries(corpus: Corpus, most: int | None = None) -> list[str]:
    """Queries with judgements of which none is above 0, at most `most` of them."""
    judged = ((query, values) for query, values in corpus.qrels.items() if query in corpus.queries)
    return [query for query, values in judged if not any(value > 0 for value in values.values())][:most]


def judged_queries(corpus: Corpus, most: int | None = None) -> tuple[dict[str, dict[str, int]], list[str]]:
    """Judgements of queries that can be evaluated, at most `most` of them, and warnings about what was left out.

    Raises:
        ValueError: no query is left, or the judgements are of another corpus.
    """
    unknown = [query for query in corpus.qrels if query not in corpus.queries]
    known = {query: judged for query, judged in corpus.qrels.items() if query in corpus.queries}
    empty = [query for query, judged in known.items() if not any(value > 0 for value in judged.values())]
    for query in empty:
        del known[query]
    if not known:
        msg = (
            f"no query has a relevant passage: of {len(corpus.qrels)} judged queries {len(unknown)} are not among the "
            f"{len(corpus.queries)} queries and {len(empty)} have no judgement above 0; "
            "check that queries and judgements belong together"
        )
        raise ValueError(msg)
    known = dict(list(known.items())[:most])
    named = {passage for judged in known.values() for passage, value in judged.items() if value > 0}
    lost = named.difference(corpus.passages)
    others = {passage for judged in known.values() for passage in judged}.difference(corpus.passages, named)
    if lost == named:
        msg = (
            f"none of the {len(named)} relevant passages is in the corpus (for example {sorted(lost)[0]!r}): "
            "the judgements are of another corpus"
        )
        raise ValueError(msg)
    warnings = []
    if unknown:
        warnings.append(f"{len(unknown)} judged queries are not among the queries and are left out")
    if empty:
        warnings.append(f"{len(empty)} queries have no relevant passage and are left out")
    if lost:
        warnings.append(f"{len(lost)} relevant passages are not in the corpus; they count as not found")
    if others:
        warnings.append(f"{len(others)} passages judged irrelevant are not in the corpus; they change nothing")
    return known, warnings


def bm25_candidates(
    corpus: Corpus,
    depth: int,
    most_queries: int | None = None,
    show_progress: bool | None = None,
    *,
    language: str = AUTO,
    fold_accents: bool = False,
    unanswered: bool = False,
) -> Candidates:
    """The `depth` best passages of BM25 for each judged query.

    Args:
        corpus: the collection.
        depth: passages per query.
        most_queries: evaluate the first so many judged queries only.
        show_progress: as in `KaLMReranker`.
        language: whose stop words are left out: a code such as `de`, `none`, or `auto`: English ones if the passages
            are English, else none.
        fold_accents: read letters without their accents.
        unanswered: also find candidates of queries without a relevant passage, at most `most_queries` of them.

    Raises:
        MissingExtraError: `bm25s` is not installed.
        ValueError: there is nothing to evaluate, or the language is unknown.
    """
    qrels, warnings = judged_queries(corpus, most_queries)
    try:
        index = BM25(corpus.passages, language=language, fold_accents=fold_accents)
    except MissingExtraError as error:
        raise MissingExtraError(error.module, "eval") from None
    others = unanswered_queries(corpus, most_queries) if unanswered else []
    rankings = {}
    with Progress(len(qrels) + len(others), "BM25", unit="query", show=show_progress) as progress:
        for query in (*qrels, *others):
            rankings[query] = index.search(corpus.queries[query], depth)
            progress.advance(1)
    return _checked("BM25", rankings, qrels, warnings, others)


def run_candidates(
    corpus: Corpus, path: str | Path, depth: int, most_queries: int | None = None, *, unanswered: bool = False
) -> Candidates:
    """The `depth` best candidates of a TREC run file for each judged query.

    `unanswered` is as in `bm25_candidates`.

    Raises:
        ValueError: the file cannot be read, or belongs to another collection.
    """
    qrels, warnings = judged_queries(corpus, most_queries)
    names = {quoted(name): name for name in (*corpus.queries, *corpus.passages)}
    run = {
        names.get(query, query): [(names.get(passage, passage), score) for passage, score in ranking]
        for query, ranking in read_run(path).items()
    }
    if not run.keys() & qrels.keys():
        msg = (
            f"{path} has candidates for none of the {len(qrels)} judged queries (it has {len(run)} queries, for "
            f"example {next(iter(run))!r}): it is a run of another collection"
        )
        raise ValueError(msg)
    unknown = {passage for query in qrels for passage, _ in run.get(query, ()) if passage not in corpus.passages}
    others = unanswered_queries(corpus, most_queries) if unanswered else []
    rankings = {
        query: [(passage, score) for passage, score in run.get(query, ()) if passage in corpus.passages][:depth]
        for query in (*qrels, *others)
    }
    if not any(rankings[query] for query in qrels):
        msg = f"none of the passages that {path} names is in the corpus: it is a run of another corpus"
        raise ValueError(msg)
    foreign = len(run.keys() - corpus.queries.keys())
    if foreign:
        warnings.append(f"{foreign} queries of the run are not among the queries and are left out")
    if unknown:
        warnings.append(f"{len(unknown)} passages of the run are not in the corpus and are left out")
    return _checked(Path(path).stem, rankings, qrels, warnings, others)


def _checked(
    name: str,
    rankings: dict[str, list[tuple[str, float]]],
    qrels: dict[str, dict[str, int]],
    warnings: Sequence[str],
    others: Sequence[str],
) -> Candidates:
    unanswered = {query: rankings.pop(query) for query in others}
    without = sum(not ranking for ranking in rankings.values())
    if without == len(rankings):
        msg = (
            f"{name} finds no candidate for any of the {without} queries, so there is nothing to rerank. BM25 "
            "needs words that queries and passages share: check that they are in one language, or give the run of "
            "another first stage (--run)"
        )
        raise ValueError(msg)
    missed = sum(
        not any(qrels[query].get(passage, 0) > 0 for passage, _ in ranking) for query, ranking in rankings.items()
    )
    notes = list(warnings)
    if without:
        notes.append(f"{without} of {len(rankings)} queries have no candidates of {name}; they count as 0")
    if missed - without:
        notes.append(
            f"{missed - without} queries have no relevant passage among their candidates; no reranker can help them"
        )
    return Candidates(name, rankings, qrels, tuple(notes), unanswered)
