"""The public scorer, and the model that it holds."""

from kalm_rag.reranker.reranker import KaLMReranker

__all__ = ["KaLMReranker"]
