"""The node postprocessor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llama_index.core.bridge.pydantic import Field, model_validator
from llama_index.core.callbacks import CBEventType, EventPayload
from llama_index.core.instrumentation import get_dispatcher  # type: ignore[attr-defined]
from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import BaseNode, MetadataMode, NodeWithScore, QueryBundle
from llama_index.postprocessor.kalm_rerank.model import KalmBase, node_list, passage_texts

from kalm_rag import EncodeReport, RankedPassage

dispatcher = get_dispatcher(__name__)

RETRIEVAL_SCORE = "retrieval_score"
"""Metadata key of the retriever's score, if it is kept."""


class KalmRerank(KalmBase, BaseNodePostprocessor):
    """Reranks nodes with KaLM-Reranker; encoded nodes are kept and reused by every later query.

    Example:
        ```python
        from llama_index.postprocessor.kalm_rerank import KalmRerank

        engine = index.as_query_engine(similarity_top_k=50, node_postprocessors=[KalmRerank(model="nano", top_n=5)])
        ```

    Nodes come back best first in new `NodeWithScore`s whose score is `P(yes)`; the given ones are not touched.
    """

    top_n: int | None = Field(default=5, ge=1, description="How many nodes to return; None for all.")
    instruction: str | None = Field(default=None, description="What 'relevant' means, in a sentence.")
    keep_retrieval_score: bool = Field(
        default=False,
        description="Keep the retriever's score in the metadata of a copied node, outside of its text.",
    )

    @model_validator(mode="after")
    def _keep_the_score_out_of_the_text(self) -> KalmRerank:
        if self.keep_retrieval_score and self.metadata_mode is MetadataMode.ALL:
            msg = (
                "keep_retrieval_score needs a metadata_mode other than ALL, which would make the score part of the text"
            )
            raise ValueError(msg)
        return self

    @classmethod
    def class_name(cls) -> str:
        """Name of the class in serialised form."""
        return "KalmRerank"

    def warm(self, nodes: Sequence[BaseNode | NodeWithScore]) -> EncodeReport:
        """Encode nodes that are indexed already, so that the first query is warm."""
        return self.reranker.encode(passage_texts(nodes, self.metadata_mode))

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        nodes = list(node_list(nodes))
        query, texts = self._checked(nodes, query_bundle)
        if not nodes:
            return []
        with self._events(nodes, query) as found:
            found += self._ranked(nodes, self.reranker.rank(query, texts, self.top_n, self.instruction))
        return found

    async def _apostprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        nodes = list(node_list(nodes))
        query, texts = self._checked(nodes, query_bundle)
        if not nodes:
            return []
        with self._events(nodes, query) as found:
            ranking = await self.reranker.arank(query, texts, self.top_n, self.instruction)
            found += self._ranked(nodes, ranking)
        return found

    def _checked(self, nodes: list[NodeWithScore], query_bundle: QueryBundle | str | None) -> tuple[str, list[str]]:
        if query_bundle is None:
            msg = "Missing query bundle in extra info."
            raise ValueError(msg)
        query = query_bundle if isinstance(query_bundle, str) else getattr(query_bundle, "query_str", query_bundle)
        if not isinstance(query, str):
            msg = f"query_bundle must be a QueryBundle or a string, got {type(query).__name__}: {query!r:.80}"
            raise TypeError(msg)
        for position, node in enumerate(nodes):
            if not isinstance(node, NodeWithScore):
                msg = (
                    f"nodes[{position}] must be a NodeWithScore, got {type(node).__name__}: {node!r:.80}; "
                    "use NodeWithScore(node=...)"
                )
                raise TypeError(msg)
        return query, passage_texts(nodes, self.metadata_mode)

    @contextmanager
    def _events(self, nodes: list[NodeWithScore], query: str) -> Iterator[list[NodeWithScore]]:
        """Instrumentation and callback events around a rerank: each start has its end, unless it fails."""
        found: list[NodeWithScore] = []
        count, name = self.top_n or len(nodes), self.model
        dispatcher.event(ReRankStartEvent(query=query, nodes=nodes, top_n=count, model_name=name))
        payload: dict[Any, Any] = {
            EventPayload.NODES: nodes,
            EventPayload.MODEL_NAME: name,
            EventPayload.QUERY_STR: query,
            EventPayload.TOP_K: count,
        }
        with self.callback_manager.event(CBEventType.RERANKING, payload=payload) as event:
            yield found
            event.on_end(payload={EventPayload.NODES: found})
        dispatcher.event(ReRankEndEvent(nodes=found))

    def _ranked(self, nodes: list[NodeWithScore], ranking: list[RankedPassage]) -> list[NodeWithScore]:
        return [NodeWithScore(node=self._node(nodes[hit.index]), score=hit.score) for hit in ranking]

    def _node(self, given: NodeWithScore) -> BaseNode:
        """The node itself, or a copy that carries the retriever's score where no text sees it."""
        node = given.node
        if not self.keep_retrieval_score:
            return node
        hidden = {
            name: [*(key for key in getattr(node, name) if key != RETRIEVAL_SCORE), RETRIEVAL_SCORE]
            for name in ("excluded_embed_metadata_keys", "excluded_llm_metadata_keys")
        }
        return node.model_copy(update={"metadata": {**node.metadata, RETRIEVAL_SCORE: given.score}, **hidden})
