"""Ray Data encodes a corpus with a pool of workers; then any process ranks with what they wrote."""

import ray
import ray.data
from common import CACHE, PASSAGES, QUESTIONS, model, show_statuses, timed

from kalm_rag import KaLMReranker
from kalm_rag.distributed import PassageEncoder

name, cache = model(), CACHE / "passages"
ray.init(num_cpus=2, include_dashboard=False, object_store_memory=200_000_000, logging_level="ERROR")
ray.data.DataContext.get_current().enable_progress_bars = False

corpus = ray.data.from_items([{"id": number, "text": text} for number, text in enumerate([*PASSAGES, None])])
results = corpus.map_batches(
    PassageEncoder,
    fn_constructor_kwargs={"model": name, "cache": {"where": cache}},
    compute=ray.data.ActorPoolStrategy(min_size=1, max_size=2),  # workers, each with a model of its own
    batch_size=64,  # passages that a worker writes at once; Ray's default is a whole block
    num_cpus=1,  # or num_gpus=1
)
rows = timed("encode", results.take_all)  # ids, keys and statuses: the encoded passages are in the cache
show_statuses([row["status"] for row in rows])
print([f"{row['id']}: {row['message']}" for row in rows if row["status"] == "failed"])
ray.shutdown()

with KaLMReranker(name, cache=cache) as reranker:
    for hit in timed("first query", reranker.rank, QUESTIONS[0], PASSAGES)[:3]:
        print(f"{hit.score:.4f}  {hit.document[:60]}")
    print(f"passages encoded by this process: {reranker.cache.stats().encoded}")
