"""Haystack: from documents to a reranked answer, a cold and a warm query."""

from common import CACHE, PASSAGES, QUESTIONS, model, timed
from haystack import Document, Pipeline
from haystack.components.retrievers.in_memory import InMemoryBM25Retriever
from haystack.document_stores.in_memory import InMemoryDocumentStore
from haystack_integrations.components.rankers.kalm import KalmRanker

store = InMemoryDocumentStore()
store.write_documents([Document(content=text) for text in PASSAGES])

pipeline = Pipeline()
pipeline.add_component("retriever", InMemoryBM25Retriever(store, top_k=20))
pipeline.add_component("ranker", KalmRanker(model=model(), cache=CACHE / "passages", top_k=3))
pipeline.connect("retriever.documents", "ranker.documents")


def ask(question: str) -> list[Document]:
    """Run the pipeline."""
    return pipeline.run({"retriever": {"query": question}, "ranker": {"query": question}})["ranker"]["documents"]


timed("cold query", ask, QUESTIONS[0])
for document in timed("warm query", ask, QUESTIONS[1]):
    print(f"{document.score:.4f}  {document.content[:60]}")
