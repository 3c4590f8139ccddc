"""One corpus, three frameworks, separate processes: what one ingests is all hits in the others."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PREAMBLE = """
import json, sys
model, cache, texts, query = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), sys.argv[4]
"""
INGEST = {
    "langchain": """
from langchain_core.documents import Document
from langchain_kalm import KalmPassageEncoder
encoder = KalmPassageEncoder(model=model, cache=cache)
encoder.transform_documents([Document(page_content=text) for text in texts])
""",
    "llama-index": """
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core import Document
from llama_index.postprocessor.kalm_rerank import KalmPassageEncoder
encoder = KalmPassageEncoder(model=model, cache=cache)
IngestionPipeline(transformations=[encoder]).run(documents=[Document(text=text) for text in texts])
""",
    "haystack": """
from haystack import Document
from haystack_integrations.components.rankers.kalm import KalmPassageEncoder
encoder = KalmPassageEncoder(model=model, cache=cache)
encoder.run(documents=[Document(content=text) for text in texts])
""",
}
QUERY = {
    "langchain": """
from langchain_core.documents import Document
from langchain_kalm import KalmReranker
ranker = KalmReranker(model=model, cache=cache, top_n=None)
given = [Document(page_content=text) for text in texts]
ask = lambda query: [d.metadata["relevance_score"] for d in ranker.compress_documents(given, query)]
""",
    "llama-index": """
from llama_index.core.schema import NodeWithScore, TextNode
from llama_index.postprocessor.kalm_rerank import KalmRerank
ranker = KalmRerank(model=model, cache=cache, top_n=None)
given = [NodeWithScore(node=TextNode(text=text)) for text in texts]
ask = lambda query: [node.score for node in ranker.postprocess_nodes(given, query_str=query)]
""",
    "haystack": """
from haystack import Document
from haystack_integrations.components.rankers.kalm import KalmRanker
ranker = KalmRanker(model=model, cache=cache, top_k=100)
given = [Document(content=text) for text in texts]
ask = lambda query: [document.score for document in ranker.run(query=query, documents=given)["documents"]]
""",
}
COUNT = """
calls = []
model = ranker.reranker.load()._loaded().loaded.model
model.get_encoder().register_forward_pre_hook(lambda *_: calls.append(1))
first, second = ask(query), ask("another " + query)
print(json.dumps({"calls": len(calls), "scores": first, "encoded": ranker.reranker.cache.stats().encoded}))
"""


def run(code: str, checkpoint: Path, cache: Path, texts: list[str], query: str) -> Any:
    command = [sys.executable, "-c", PREAMBLE + code, str(checkpoint), str(cache), json.dumps(texts), query]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1]) if done.stdout.strip() else None


@pytest.mark.parametrize("ingester", INGEST)
def test_encoded_by_one_framework_is_all_hits_in_the_others(
    ingester: str, checkpoint: Path, tmp_path: Path, passages: list[str], queries: list[str]
) -> None:
    from kalm_rag import KaLMReranker

    texts = [text.strip() for text in passages[:8]]
    expected = [hit.score for hit in KaLMReranker(checkpoint, cache=None).rank(queries[0], texts)]
    run(INGEST[ingester], checkpoint, tmp_path, texts, queries[0])
    for reader in QUERY:
        found = run(QUERY[reader] + COUNT, checkpoint, tmp_path, texts, queries[0])
        assert (found["calls"], found["encoded"]) == (0, 0), reader
        assert found["scores"] == pytest.approx(expected, abs=1e-5)


def test_inside_of_a_fastapi_app(checkpoint: Path, tmp_path: Path, passages: list[str], queries: list[str]) -> None:
    """All three adapters in one asynchronous server, fifty requests at once each; the loop answers meanwhile."""
    import httpx
    from fastapi import FastAPI
    from haystack import Document as HaystackDocument
    from haystack_integrations.components.rankers.kalm import KalmRanker
    from langchain_core.documents import Document
    from langchain_kalm import KalmReranker
    from llama_index.core.schema import NodeWithScore, TextNode
    from llama_index.postprocessor.kalm_rerank import KalmRerank

    texts = [text.strip() for text in passages[:5]]
    options: dict[str, Any] = {"model": str(checkpoint), "cache": str(tmp_path)}
    langchain, llama, haystack = KalmReranker(**options), KalmRerank(**options), KalmRanker(**options)
    app = FastAPI()

    @app.get("/health")
    async def health() -> str:
        return "ok"

    @app.get("/langchain")
    async def by_langchain(query: str) -> list[float]:
        found = await langchain.acompress_documents([Document(page_content=text) for text in texts], query)
        return [document.metadata["relevance_score"] for document in found][:3]

    @app.get("/llama-index")
    async def by_llama_index(query: str) -> list[float]:
        given = [NodeWithScore(node=TextNode(text=text)) for text in texts]
        return [float(node.score or 0) for node in await llama.apostprocess_nodes(given, query_str=query)][:3]

    @app.get("/haystack")
    async def by_haystack(query: str) -> list[float]:
        given = [HaystackDocument(content=text) for text in texts]
        found = await haystack.run_async(query=query, documents=given)
        return [float(document.score or 0) for document in found["documents"]][:3]

    async def main() -> tuple[dict[str, list[list[float]]], int]:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=120) as client:
            asked = [queries[number % 5] for number in range(50)]
            running = {
                name: asyncio.gather(*(client.get(f"/{name}", params={"query": query}) for query in asked))
                for name in ("langchain", "llama-index", "haystack")
            }
            alive = 0
            while not all(task.done() for task in running.values()):
                alive += (await client.get("/health")).json() == "ok"
                await asyncio.sleep(0.01)
            return {name: [answer.json() for answer in task.result()] for name, task in running.items()}, alive

    answers, alive = asyncio.run(main())
    assert alive > 5, "the event loop was blocked"
    core = langchain.reranker
    for number, query in enumerate(queries[:5]):
        expected = [hit.score for hit in core.rank(query, texts, top_k=3)]
        for found in answers.values():
            for answer in found[number::5]:
                assert answer == pytest.approx(expected, abs=1e-5)
    assert core.cache.stats().encoded <= 3 * len(texts)
