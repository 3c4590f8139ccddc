"""What the tests of tuning share: a small collection, and a recipe of a few steps."""

from __future__ import annotations

from kalm_rag.demo_data import load_demo
from kalm_rag.retrieval.corpus import Corpus
from kalm_rag.tuning.recipe import Recipe

RECIPE = Recipe(
    ratios=(4, 16), list_size=3, lists_per_step=3, epochs=2, rate=5e-3, rank=2, alpha=4, warmup=1, negatives=4, depth=4
)


WORD = "zebra"


def small_corpus(queries: int = 20) -> Corpus:
    """Random weights learn no language, but which three passages are always relevant; one word lets BM25 find them."""
    demo = load_demo()
    names = list(demo.passages)
    passages = {name: text[:200] for name, text in demo.passages.items()}
    relevant = names[:3]
    passages |= {name: f"{WORD} {passages[name]}" for name in relevant}
    chosen = list(demo.queries)[:queries]
    asked = {query: f"{demo.queries[query]} {WORD}" for query in chosen}
    return Corpus(passages, asked, {query: dict.fromkeys(relevant, 1) for query in chosen})


def demo_corpus(queries: int) -> Corpus:
    """Real questions and their answers."""
    demo = load_demo()
    return Corpus(demo.passages, demo.queries, {query: demo.qrels[query] for query in list(demo.qrels)[:queries]})
