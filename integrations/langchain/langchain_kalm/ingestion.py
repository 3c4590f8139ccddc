"""Encode chunks while they are indexed, so that the first query is warm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from langchain_core.documents import BaseDocumentTransformer, Document
from langchain_core.embeddings import Embeddings

from langchain_kalm.base import KalmBase, document_list, passage_texts


class KalmPassageEncoder(KalmBase, BaseDocumentTransformer):
    """A step after the text splitter: encodes the documents into the cache and returns them unchanged."""

    def transform_documents(self, documents: Sequence[Document], **kwargs: Any) -> Sequence[Document]:
        """Encode what the cache does not hold."""
        documents = document_list(documents)
        if documents:
            self.reranker.encode(passage_texts(documents))
        return documents

    async def atransform_documents(self, documents: Sequence[Document], **kwargs: Any) -> Sequence[Document]:
        """Encode without blocking the event loop."""
        documents = document_list(documents)
        if documents:
            await self.reranker.aencode(passage_texts(documents))
        return documents


class KalmCachingEmbeddings(KalmBase, Embeddings):
    """Wraps an embedding model and encodes exactly the texts that are embedded for the index.

    With `langchain_core.indexing.index` these are only the new and changed documents.

    Example:
        ```python
        store = InMemoryVectorStore(KalmCachingEmbeddings(embeddings=embeddings, model="nano"))
        ```
    """

    embeddings: Embeddings
    """The embedding model that is wrapped."""

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Encode the texts for reranking, and embed them."""
        if texts:
            self.reranker.encode(texts)
        return self.embeddings.embed_documents(texts)

    async def aembed_documents(self, texts: list[str]) -> list[list[float]]:
        """Encode the texts for reranking, and embed them, without blocking the event loop."""
        if texts:
            await self.reranker.aencode(texts)
        return await self.embeddings.aembed_documents(texts)

    def embed_query(self, text: str) -> list[float]:
        """Embed a query; queries are not encoded."""
        return self.embeddings.embed_query(text)

    async def aembed_query(self, text: str) -> list[float]:
        """Embed a query."""
        return await self.embeddings.aembed_query(text)
