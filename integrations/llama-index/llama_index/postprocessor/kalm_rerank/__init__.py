"""KaLM-Reranker for LlamaIndex: nodes are encoded once and reused by every later query."""

from llama_index.postprocessor.kalm_rerank.base import KalmQueryBundle, KalmRerank
from llama_index.postprocessor.kalm_rerank.ingestion import KalmPassageEncoder

__all__ = ["KalmPassageEncoder", "KalmQueryBundle", "KalmRerank"]
