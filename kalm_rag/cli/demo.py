"""`kalm-rag demo`: the main job on a small real corpus, offline."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from kalm_rag.cli.options import LoraOption, choices
from kalm_rag.cli.output import console, note_mini, passage_table
from kalm_rag.model.checkpoint import MINI
from kalm_rag.utils.display import visible

if TYPE_CHECKING:
    from kalm_rag.results import RankedPassage
    from kalm_rag.retrieval.corpus import Corpus

_CANDIDATES = 20
T = TypeVar("T")


def demo(
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            help="Use this model: mini, nano, small, large, a folder, or a hub id.",
            metavar="MODEL",
            autocompletion=choices("nano", "small", "large", "mini"),
        ),
    ] = MINI,
    lora: LoraOption = None,
) -> None:
    """Show what reranking gains on a small corpus.

    BM25 retrieves candidates for 44 questions from the Python FAQ, and the model reranks them.
    """
    from rich.table import Table
    from rich.text import Text

    from kalm_rag.demo_data import load_demo
    from kalm_rag.errors import MissingExtraError
    from kalm_rag.evaluation.metrics import Metrics, means
    from kalm_rag.reranker import KaLMReranker
    from kalm_rag.retrieval.bm25 import BM25

    out = console()
    try:
        metrics = Metrics(["nDCG@10"])
    except MissingExtraError as error:
        raise MissingExtraError(error.module, "demo") from None
    corpus = load_demo()
    out.print(
        f"Corpus: the Python 3.11 FAQ, {len(corpus.passages)} passages; "
        f"{len(corpus.queries)} questions; BM25 finds up to {_CANDIDATES} candidates for each."
    )
    out.print(Text(visible(f"Model: {model}" + ("" if lora is None else f" with the adapter {lora}"))))
    note_mini(model)
    index = BM25(corpus.passages)
    with KaLMReranker(model, lora=lora, cache=None) as reranker:
        _ = reranker.scorer  # loads the model
        steps = ("BM25 retrieval", "rerank, new passages encoded", "rerank, all passages known")
        times: dict[str, list[float]] = {step: [] for step in steps}
        before: dict[str, list[tuple[str, float]]] = {}
        hits: dict[str, list[RankedPassage]] = {}
        for query_id, query in corpus.queries.items():
            before[query_id] = _timed(times[steps[0]], index.search, query, _CANDIDATES)
            texts = [corpus.passages[name] for name, _ in before[query_id]]
            hits[query_id] = _timed(times[steps[1]], reranker.rank, query, texts)
        for query_id, query in corpus.queries.items():
            texts = [corpus.passages[name] for name, _ in before[query_id]]
            # A new query on known passages: repeating the same query would not be a fair test.
            _timed(times[steps[2]], reranker.rank, f"{query} Please explain.", texts)
        stats, prefilled = reranker.cache.stats(), reranker.prefill_stats()
    after = {query: [(before[query][hit.index][0], hit.margin) for hit in found] for query, found in hits.items()}
    _show_query(corpus, before, hits)
    old, new = (means(metrics.per_query(ranking, corpus.qrels))["nDCG@10"] for ranking in (before, after))
    out.print(f"nDCG@10 over all {len(before)} questions: BM25 {old:.3f}, reranked {new:.3f}\n")
    timings = Table(box=None, pad_edge=False)
    timings.add_column("step")
    for name in ("queries", "median ms", "max ms"):
        timings.add_column(name, justify="right")
    for step, seconds in times.items():
        ordered = sorted(seconds)
        median, most = ordered[len(ordered) // 2], ordered[-1]
        timings.add_row(step, str(len(seconds)), f"{1000 * median:.1f}", f"{1000 * most:.1f}")
    out.print(timings)
    if prefilled is not None:
        asked = prefilled.counters.hits + prefilled.counters.misses
        out.print(
            f"\n{asked} passages requested: {stats.encoded} encoded (once each), "
            f"{prefilled.counters.hits} served from the cache."
        )


def _show_query(
    corpus: Corpus, before: dict[str, list[tuple[str, float]]], hits: dict[str, list[RankedPassage]]
) -> None:
    """Show one question that reranking helped, and how many it helped and hurt."""
    from rich.text import Text

    out = console()
    moves = {query: _places(corpus, query, before[query], hits[query]) for query in before}
    up = [query for query, (old, new) in moves.items() if new < old]
    down = [query for query, (old, new) in moves.items() if new > old]
    query = (up or list(before))[0]
    out.print(Text(f"\n{'A question that reranking helped' if up else 'Question'}: {corpus.queries[query]}"))
    rows = []
    for rank, hit in enumerate(hits[query][:10]):
        moved = hit.index - rank
        name = before[query][hit.index][0]
        mark = "*" if name in corpus.qrels[query] else ""
        change = f"{moved:+d}" if moved else "="
        rows.append([str(rank + 1), str(hit.index + 1), change, f"{hit.score:.4f}", mark, corpus.passages[name]])
    out.print(passage_table(["rank", "BM25", "moved", "score", "<", "<passage"], rows))
    out.print("* the answer, as judged by the authors of the FAQ\n")
    out.print(f"The answer moved up for {len(up)} questions and down for {len(down)}.")


def _places(corpus: Corpus, query: str, before: list[tuple[str, float]], hits: list[RankedPassage]) -> tuple[int, int]:
    """Return the answer's old and new place; equal if the first stage did not find it."""
    old = [name for name, _ in before]
    found = [place for place, name in enumerate(old) if name in corpus.qrels[query]]
    if not found:
        return 0, 0
    return found[0], [hit.index for hit in hits].index(found[0])


def _timed(times: list[float], action: Callable[..., T], *arguments: object) -> T:
    start = time.perf_counter()
    result = action(*arguments)
    times.append(time.perf_counter() - start)
    return result
