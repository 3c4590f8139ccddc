"""`kalm-rag demo`: the main job on a small real corpus, offline."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from kalm_rag.cli.options import console, passage_table

_CANDIDATES = 20
T = TypeVar("T")


def demo(
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="A model to use instead of the untrained one.", metavar="MODEL"),
    ] = None,
) -> None:
    """Retrieve with BM25 from the Python FAQ, rerank, and show what moved and how long it took."""
    from rich.table import Table
    from rich.text import Text

    from kalm_rag.bm25 import BM25
    from kalm_rag.demo_data import load_demo
    from kalm_rag.reranker import KaLMReranker

    out = console()
    corpus = load_demo()
    out.print(
        f"Corpus: the Python 3.11 FAQ, {len(corpus.passages)} passages; "
        f"{len(corpus.queries)} questions; BM25 finds {_CANDIDATES} candidates for each."
    )
    folder = _untrained_model() if model is None else None
    if folder is not None:
        out.print(
            "Model: UNTRAINED, small, random weights. Its order means nothing; the steps and their costs are real.\n"
            "For a real order: kalm-rag demo --model nano"
        )
    index = BM25(corpus.passages)
    with KaLMReranker(folder or str(model), cache=None) as reranker:
        reranker.load()
        steps = ("BM25 retrieval", "rerank, new passages encoded", "rerank, all passages known")
        times: dict[str, list[float]] = {step: [] for step in steps}
        rankings = {}
        for query_id, query in corpus.queries.items():
            candidates = _timed(times[steps[0]], index.search, query, _CANDIDATES)
            texts = [corpus.passages[name] for name, _ in candidates]
            hits = _timed(times[steps[1]], reranker.rank, query, texts)
            rankings[query_id] = hits, candidates
        for query_id, query in corpus.queries.items():
            texts = [corpus.passages[name] for name, _ in rankings[query_id][1]]
            # A new query on known passages; the same one again would be no fair test.
            _timed(times[steps[2]], reranker.rank, f"{query} Please explain.", texts)
        stats, prefilled = reranker.cache.stats(), reranker.prefill_stats()
    query_id = next(iter(corpus.queries))
    hits, candidates = rankings[query_id]
    out.print(Text(f"\nQuery: {corpus.queries[query_id]}"))
    rows = []
    for place, hit in enumerate(hits[:10]):
        moved = hit.index - place
        name = candidates[hit.index][0]
        mark = "*" if name in corpus.qrels[query_id] else ""
        change = f"{moved:+d}" if moved else "="
        score = f"{hit.score:.4f}"
        rows.append([str(place + 1), str(hit.index + 1), change, score, mark, corpus.passages[name]])
    out.print(passage_table(["rank", "BM25", "moved", "score", "<", "<passage"], rows))
    out.print("* the answer, as judged by the authors of the FAQ\n")
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
            f"\n{asked} passages were asked for: {stats.encoded} were encoded, each once; "
            f"{prefilled.counters.hits} were found ready."
        )


def _timed(times: list[float], action: Callable[..., T], *arguments: object) -> T:
    start = time.perf_counter()
    result = action(*arguments)
    times.append(time.perf_counter() - start)
    return result


def _untrained_model() -> Path:
    """The small random checkpoint, built at the first run."""
    from kalm_rag._version import __version__
    from kalm_rag.paths import default_cache_dir
    from kalm_rag.testing import build_checkpoint

    folder = default_cache_dir() / "models" / f"untrained-{__version__}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as partial:
            build_checkpoint(Path(partial) / "model")
            with contextlib.suppress(OSError):  # another process was faster
                (Path(partial) / "model").rename(folder)
    return folder
