"""The node postprocessor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

from llama_index.core.bridge.pydantic import Field, WithJsonSchema, field_serializer, model_validator
from llama_index.core.callbacks import CBEventType, EventPayload
from llama_index.core.instrumentation import get_dispatcher  # type: ignore[attr-defined]
from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import BaseNode, MetadataMode, NodeWithScore, QueryBundle
from llama_index.postprocessor.kalm_rerank.model import KalmBase, node_list, passage_texts
from pydantic import SerializationInfo, SkipValidation

from kalm_rag.adapters import check_arguments, hit_metadata, serialisable_threshold, trace_attributes
from kalm_rag.latency.limit import OnUnknown
from kalm_rag.results import EncodeReport, PartialRanking, RankedPassage, Ranking, UnscoredPassage
from kalm_rag.thresholds import ThresholdLike

dispatcher = get_dispatcher(__name__)

RETRIEVAL_SCORE = "retrieval_score"
"""Metadata key of the retriever's score, if it is kept."""


@dataclass
class KalmQueryBundle(QueryBundle):
    """A query with settings of its own; query engines hand it on to `KalmRerank`.

    What makes another bundle of it, such as a query transformation, drops them.

    Attributes:
        instruction: what "relevant" means for this query; None is the instance's.
        top_n: how many nodes to return for this query; None is the instance's.
        score_threshold: nodes with a lower score are left out; None is the instance's.
        calibrated: whether scores are mapped through the threshold profile's fit; None is the instance's.
        budget_ms: milliseconds that this query may take; None is the instance's.
        on_unknown: `skip` or `wait` for nodes that are not encoded yet; None is the instance's.
    """

    instruction: str | None = None
    top_n: int | None = None
    score_threshold: ThresholdLike | None = None
    calibrated: bool | None = None
    budget_ms: float | None = None
    on_unknown: OnUnknown | None = None


class KalmRerank(KalmBase, BaseNodePostprocessor):
    """Reranks nodes with KaLM-Reranker; encoded nodes are kept and reused by every later query.

    Example:
        ```python
        from llama_index.postprocessor.kalm_rerank import KalmRerank

        engine = index.as_query_engine(similarity_top_k=50, node_postprocessors=[KalmRerank(model="nano", top_n=5)])
        ```

    Copies of the nodes come back best first in new `NodeWithScore`s whose score is `P(yes)`; the given ones are not
    touched. Their metadata gains `relevance_margin`, and the truth values `relevance_scored`, `relevance_exact`,
    `passage_truncated`, `query_truncated`, `passage_repaired` and `query_repaired`, and `passage_span` (see
    `kalm_rag.RankedPassage`), all excluded from the text of a node.
    `KalmQueryBundle` is a query with settings of its own.

    Under `budget_ms` or `on_unknown="skip"`, nodes that were not reached follow the others in the order given. Their
    score is None, and `relevance_scored` is False.
    """

    top_n: int | None = Field(default=5, ge=1, description="How many nodes to return; None for all.")
    score_threshold: Annotated[
        ThresholdLike | None, SkipValidation, WithJsonSchema({"type": ["number", "string", "null"]})
    ] = Field(
        default=None,
        description="Nodes with a lower score are left out: a number, or a kalm_rag.ThresholdProfile or the path of "
        "one.",
    )
    calibrated: bool = Field(
        default=False,
        description="Scores are the shares of relevant nodes that the profile was fitted to, instead of P(yes).",
    )
    instruction: str | None = Field(default=None, description="What 'relevant' means, in a sentence.")
    budget_ms: float | None = Field(
        default=None,
        gt=0,
        description="Milliseconds that a query may take; None waits for all nodes. Loading the model counts: load it "
        "before, with reranker.load().",
    )
    on_unknown: OnUnknown | None = Field(
        default=None,
        description="skip leaves nodes that are not encoded yet without a score and encodes them in the background; "
        "wait, the default, encodes them, under budget_ms while time lasts.",
    )
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

    @field_serializer("score_threshold")
    def _serialise_threshold(self, threshold: ThresholdLike | None, info: SerializationInfo) -> Any:
        return threshold if info.mode == "python" else serialisable_threshold(threshold)

    def to_json(self, **kwargs: Any) -> str:
        """The arguments as JSON.

        Raises:
            ValueError: as for all classes here; or the threshold is a profile without a path.
        """
        serialisable_threshold(self.score_threshold)
        return super().to_json(**kwargs)

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
        query, texts, options = self._checked(nodes, query_bundle)
        if not nodes:
            return []
        with self._events(nodes, query, options["top_k"]) as (found, tags):
            ranking = self.reranker.rank(query, texts, **options)
            found += self._ranked(nodes, ranking)
            tags.update(trace_attributes(ranking))
        return found

    async def _apostprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        nodes = list(node_list(nodes))
        query, texts, options = self._checked(nodes, query_bundle)
        if not nodes:
            return []
        with self._events(nodes, query, options["top_k"]) as (found, tags):
            ranking = await self.reranker.arank(query, texts, **options)
            found += self._ranked(nodes, ranking)
            tags.update(trace_attributes(ranking))
        return found

    def _checked(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | str | None
    ) -> tuple[str, list[str], dict[str, Any]]:
        """Return the query, the texts, and what `rank` is told."""
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
        names = ("top_n", "score_threshold", "calibrated", "instruction", "budget_ms", "on_unknown")
        own = {name: getattr(query_bundle, name, None) for name in names}
        chosen = check_arguments({name: getattr(self, name) if own[name] is None else own[name] for name in names})
        options = {
            "top_k": chosen["top_n"],
            "threshold": chosen["score_threshold"],
            "calibrated": chosen["calibrated"],
            "instruction": chosen["instruction"],
            "budget_ms": chosen["budget_ms"],
            "on_unknown": chosen["on_unknown"],
        }
        return query, passage_texts(nodes, self.metadata_mode), options

    @contextmanager
    def _events(
        self, nodes: list[NodeWithScore], query: str, top_n: int | None
    ) -> Iterator[tuple[list[NodeWithScore], dict[str, Any]]]:
        """Instrumentation and callback events around a rerank: each start has its end, unless it fails.

        What is put into the list and the mapping becomes the nodes and the tags of the end.
        """
        found: list[NodeWithScore] = []
        tags: dict[str, Any] = {}
        count, name = top_n or len(nodes), self.model
        dispatcher.event(ReRankStartEvent(query=query, nodes=nodes, top_n=count, model_name=name))
        payload: dict[Any, Any] = {
            EventPayload.NODES: nodes,
            EventPayload.MODEL_NAME: name,
            EventPayload.QUERY_STR: query,
            EventPayload.TOP_K: count,
        }
        with self.callback_manager.event(CBEventType.RERANKING, payload=payload) as event:
            yield found, tags
            event.on_end(payload={EventPayload.NODES: found})
        dispatcher.event(ReRankEndEvent(nodes=found, tags=tags))

    def _ranked(self, nodes: list[NodeWithScore], ranking: Ranking[str] | PartialRanking[str]) -> list[NodeWithScore]:
        return [NodeWithScore(node=self._marked(nodes[hit.index], hit), score=hit.score) for hit in ranking]

    def _marked(self, given: NodeWithScore, hit: RankedPassage[str] | UnscoredPassage[str]) -> BaseNode:
        """Return a copy of the node that carries what is known of its rank where no text sees it."""
        node, marks = given.node, hit_metadata(hit)
        if self.keep_retrieval_score:
            marks[RETRIEVAL_SCORE] = given.score
        hidden = {
            name: [*(key for key in getattr(node, name) if key not in marks), *marks]
            for name in ("excluded_embed_metadata_keys", "excluded_llm_metadata_keys")
        }
        return node.model_copy(update={"metadata": {**node.metadata, **marks}, **hidden})
