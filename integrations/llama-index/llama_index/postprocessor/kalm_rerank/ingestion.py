"""Encode nodes while they are ingested, so that the first query is warm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llama_index.core.schema import BaseNode, TransformComponent
from llama_index.postprocessor.kalm_rerank.model import KalmBase, node_list, passage_texts


class KalmPassageEncoder(KalmBase, TransformComponent):
    """A transformation that encodes nodes into the cache and returns them unchanged.

    Put it last among those that change text or metadata: metadata added later is part of the text that is ranked. Where
    the pipeline's own cache answers, this is not called; if the passages have left the cache since, use
    `KalmRerank.warm`.
    """

    @classmethod
    def class_name(cls) -> str:
        """Name of the class in serialised form."""
        return "KalmPassageEncoder"

    def __call__(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """Encode what the cache does not hold."""
        nodes = node_list(nodes)
        if nodes:
            self.reranker.encode(passage_texts(nodes, self.metadata_mode))
        return nodes

    async def acall(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """Encode without blocking the event loop."""
        nodes = node_list(nodes)
        if nodes:
            await self.reranker.aencode(passage_texts(nodes, self.metadata_mode))
        return nodes
