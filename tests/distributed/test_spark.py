"""The encoder on a local Spark; `make test-spark` makes its environment."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kalm_rag import KaLMReranker
from kalm_rag.distributed import PassageEncoder

pyspark = pytest.importorskip("pyspark", reason="pyspark is not installed: make test-spark")


@pytest.fixture(scope="module")
def spark() -> Iterator[Any]:
    from pyspark.sql import SparkSession

    if shutil.which("java") is None:
        pytest.skip("Spark needs Java, which is not installed (Debian: default-jre-headless)")
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)  # the Python of the workers
    session = (
        SparkSession.builder.master("local[2]")
        .config("spark.ui.enabled", "false")
        .config("spark.sql.execution.arrow.maxRecordsPerBatch", 4)
        .getOrCreate()
    )
    yield session
    session.stop()


def test_map_in_pandas(spark: Any, checkpoint: Path, tmp_path: Path, passages: list[str]) -> None:
    texts = [*passages[:24], None]
    encoder = PassageEncoder(checkpoint, cache=tmp_path, device="cpu")
    corpus = spark.createDataFrame(list(enumerate(texts)), "id long, text string").repartition(2)

    def run() -> list[Any]:
        return list(corpus.mapInPandas(encoder.map_in_pandas, encoder.spark_schema("long")).collect())

    first = run()
    assert {row["id"]: row["status"] for row in first} == dict.fromkeys(range(24), "encoded") | {24: "failed"}
    [poison] = [row for row in first if row["status"] == "failed"]
    assert poison["message"].startswith("text must be a string, got ")
    assert poison["keys"] == []
    with KaLMReranker(checkpoint, cache=tmp_path, device="cpu") as reranker:
        assert reranker.unknown(passages[:24]) == []
        expected = dict(enumerate(reranker.scorer.states.keys(passages[:24], 4)))
    assert {row["id"]: row["keys"][0] for row in first if row["keys"]} == expected
    assert [row["status"] for row in run()].count("known") == 24
