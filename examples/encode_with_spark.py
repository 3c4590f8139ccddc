"""Spark encodes a corpus with `mapInPandas`; then any process ranks with what its workers wrote."""

import os
import sys

from common import CACHE, PASSAGES, QUESTIONS, model, show_statuses, timed
from pyspark.sql import SparkSession

from kalm_rag import KaLMReranker
from kalm_rag.distributed import PassageEncoder

name, cache = model(), CACHE / "passages"
encoder = PassageEncoder(name, cache={"where": cache})

os.environ.setdefault("PYSPARK_PYTHON", sys.executable)  # the Python of the workers, which import kalm-rag
spark = (
    SparkSession.builder.master("local[2]")  # two Python workers, each with a model of its own
    .config("spark.ui.enabled", "false")
    .config("spark.sql.execution.arrow.maxRecordsPerBatch", 64)  # passages that a worker writes at once
    .getOrCreate()
)
corpus = spark.createDataFrame(list(enumerate([*PASSAGES, None])), "id long, text string").repartition(2)
results = corpus.mapInPandas(encoder.map_in_pandas, encoder.spark_schema("long"))
rows = timed("encode", results.collect)  # ids, keys and statuses: the encoded passages are in the cache
show_statuses([row["status"] for row in rows])
spark.stop()

with KaLMReranker(name, cache=cache) as reranker:
    for hit in timed("first query", reranker.rank, QUESTIONS[0], PASSAGES)[:3]:
        print(f"{hit.score:.4f}  {hit.document[:60]}")
    print(f"passages encoded by this process: {reranker.cache.stats().encoded}")
