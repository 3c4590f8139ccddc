"""A reranker that runs elsewhere: the client of `kalm-rag serve`. It imports neither torch nor transformers."""

from kalm_rag.client.client import RerankerClient

__all__ = ["RerankerClient"]
