"""Daft encodes a corpus; then any process ranks with what it wrote."""

import daft
from common import CACHE, PASSAGES, QUESTIONS, model, show_statuses, timed

from kalm_rag import KaLMReranker
from kalm_rag.distributed import PassageEncoder

name, cache = model(), CACHE / "passages"
encoder = PassageEncoder(name, cache={"where": cache})


@daft.cls(max_concurrency=1, use_process=False)  # or gpus=1
class Encode:
    """A process of Daft's with a model of its own."""

    @daft.method.batch(return_dtype=daft.DataType.string(), batch_size=64)
    def __call__(self, ids: daft.Series, texts: daft.Series) -> list[str]:
        """Encode a batch and return the status of each row."""
        return encoder({"id": ids, "text": texts})["status"]


corpus = daft.from_pydict({"id": list(range(len(PASSAGES) + 1)), "text": [*PASSAGES, None]})
results = corpus.select("id", Encode()(daft.col("id"), daft.col("text")).alias("status"))
rows = timed("encode", results.to_pydict)  # ids and statuses: the encoded passages are in the cache
show_statuses(rows["status"])

with KaLMReranker(name, cache=cache) as reranker:
    for hit in timed("first query", reranker.rank, QUESTIONS[0], PASSAGES)[:3]:
        print(f"{hit.score:.4f}  {hit.document[:60]}")
    print(f"passages encoded by this process: {reranker.cache.stats().encoded}")
