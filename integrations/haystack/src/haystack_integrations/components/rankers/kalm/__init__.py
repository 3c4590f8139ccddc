"""KaLM-Reranker for Haystack: documents are encoded once and reused by every later query."""

from haystack_integrations.components.rankers.kalm.encoder import KalmPassageEncoder
from haystack_integrations.components.rankers.kalm.ranker import KalmRanker

__all__ = ["KalmPassageEncoder", "KalmRanker"]
