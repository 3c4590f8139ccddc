"""A reranker as a model of mteb, on a reranking task that lives in this file."""

from __future__ import annotations

from pathlib import Path

import datasets
import mteb
import pytest
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata

from kalm_rag import KaLMReranker
from kalm_rag.evaluation.mteb_model import MTEBReranker

PASSAGES = {"p1": "apples grow on trees", "p2": "pears are green", "p3": "cars need fuel"}
QUERIES = {"q1": "where do apples grow", "q2": "what do cars need"}


class Fruit(AbsTaskRetrieval):
    metadata = TaskMetadata(
        name="FruitReranking",
        description="Three passages.",
        dataset={"path": "none/none", "revision": "1"},
        type="Reranking",
        category="t2t",
        modalities=["text"],
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score="map_at_1000",
    )

    def load_data(self, **options: object) -> None:
        self.dataset = {
            "default": {
                "test": {
                    "corpus": datasets.Dataset.from_list([{"id": k, "text": v} for k, v in PASSAGES.items()]),
                    "queries": datasets.Dataset.from_list([{"id": k, "text": v} for k, v in QUERIES.items()]),
                    "relevant_docs": {"q1": {"p1": 1}, "q2": {"p3": 1}},
                    "top_ranked": {query: list(PASSAGES) for query in QUERIES},
                }
            }
        }
        self.data_loaded = True


@pytest.fixture
def model(checkpoint: Path) -> MTEBReranker:
    return MTEBReranker(KaLMReranker(checkpoint, cache=None))


def test_a_reranking_task_runs_with_the_cache(model: MTEBReranker, tmp_path: Path) -> None:
    cache = mteb.ResultCache(tmp_path)
    found = mteb.evaluate(model, tasks=[Fruit()], cache=cache, overwrite_strategy="always")
    expected = []
    for query, right in (("q1", "p1"), ("q2", "p3")):
        hits = model.reranker.rank(QUERIES[query], list(PASSAGES.values()))
        expected.append(1 / (1 + [list(PASSAGES)[hit.index] for hit in hits].index(right)))
    assert found.task_results[0].get_score() == pytest.approx(sum(expected) / 2, abs=1e-5)
    assert model.reranker.cache.stats().encoded == len(PASSAGES)
    assert model.mteb_model_meta.revision
    assert model.mteb_model_meta.name == "kalm-rag/tiny"


def test_pairs_keep_their_order_and_their_instruction(model: MTEBReranker) -> None:
    batches = [{"text": ["a", "b"], "instruction": ["Find fruit.", "Find cars."]}, {"text": ["a"], "instruction": [""]}]
    passages = [{"text": list(PASSAGES.values())}]
    found = model.predict(batches, passages)
    for place, (query, task) in enumerate([("a", "Find fruit."), ("b", "Find cars."), ("a", None)]):
        pair = (query, list(PASSAGES.values())[place])
        assert found[place] == pytest.approx(model.reranker.predict([pair], instruction=task)[0], abs=1e-5)
    with pytest.raises(ValueError, match="as long as each other, got 3 and 1"):
        model.predict(batches, [{"text": ["x"]}])
