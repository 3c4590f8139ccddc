"""What the tests of tuning share: a small collection, and a recipe of a few steps."""

from __future__ import annotations

from kalm_rag.demo_data import load_demo
from kalm_rag.retrieval.corpus import Corpus
from kalm_rag.tuning.recipe import Recipe

RECIPE = Recipe(
    ratios=(4, 16), list_size=3, lists_per_step=3, epochs=2, rate=2e-2, rank=2, alpha=4, warmup=1, negatives=4, depth=4
)


def small_corpus(queries: int = 20) -> Corpus:
    demo = load_demo()
    chosen = list(demo.qrels)[:queries]
    passages = {name: text[:200] for name, text in demo.passages.items()}
    return Corpus(passages, demo.queries, {query: demo.qrels[query] for query in chosen})
