"""LangChain: from documents to a reranked answer, a cold and a warm query."""

from common import CACHE, PASSAGES, QUESTIONS, model, timed
from langchain_classic.retrievers import ContextualCompressionRetriever
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_kalm import KalmReranker

store = InMemoryVectorStore(DeterministicFakeEmbedding(size=32))  # put your embedding model here
store.add_documents([Document(page_content=text) for text in PASSAGES])

retriever = ContextualCompressionRetriever(
    base_compressor=KalmReranker(model=model(), cache=CACHE / "passages", top_n=3),
    base_retriever=store.as_retriever(search_kwargs={"k": 20}),
)
timed("cold query", retriever.invoke, QUESTIONS[0])
for document in timed("warm query", retriever.invoke, QUESTIONS[1]):
    print(f"{document.metadata['relevance_score']:.4f}  {document.page_content[:60]}")
