"""KaLM-Reranker for LangChain: chunks are encoded once and reused by every later query."""

from langchain_kalm.cross_encoder import KalmCrossEncoder
from langchain_kalm.ingestion import KalmCachingEmbeddings, KalmPassageEncoder
from langchain_kalm.reranker import KalmReranker

__all__ = ["KalmCachingEmbeddings", "KalmCrossEncoder", "KalmPassageEncoder", "KalmReranker"]
