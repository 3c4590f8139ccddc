"""The document compressor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from langchain_core.callbacks import (
    AsyncCallbackManagerForChainRun,
    BaseRunManager,
    CallbackManagerForChainRun,
    Callbacks,
)
from langchain_core.documents import BaseDocumentCompressor, Document
from langchain_core.runnables import RunnableLambda
from langchain_core.tracers.base import AsyncBaseTracer, BaseTracer
from pydantic import Field, SerializationInfo, SkipValidation, WithJsonSchema, field_serializer

from kalm_rag.adapters import check_arguments, hit_metadata, serialisable_threshold, trace_attributes
from kalm_rag.latency.limit import OnUnknown
from kalm_rag.results import PartialRanking, Ranking
from kalm_rag.thresholds import ThresholdLike
from langchain_kalm.base import KalmBase, document_list, passage_texts


class KalmReranker(KalmBase, BaseDocumentCompressor):
    """Reranks documents with KaLM-Reranker; encoded documents are kept and reused by every later query.

    Example:
        ```python
        from langchain_classic.retrievers import ContextualCompressionRetriever
        from langchain_kalm import KalmReranker

        retriever = ContextualCompressionRetriever(
            base_compressor=KalmReranker(model="nano", top_n=5), base_retriever=vector_store.as_retriever()
        )
        ```

    Documents come back as copies, best first; ids and metadata are kept. `metadata` gains `relevance_score`, which is
    `P(yes)`, `relevance_margin`, and the truth values `relevance_scored`, `relevance_exact`, `passage_truncated`,
    `query_truncated`, `passage_repaired` and `query_repaired`, and `passage_span` (see `kalm_rag.RankedPassage`). An
    empty list returns an empty list without loading the model.

    Under `budget_ms` or `on_unknown="skip"`, documents that were not reached follow the others in the order given.
    They have no `relevance_score`, and `relevance_scored` is False.
    """

    top_n: int | None = Field(default=3, ge=1)
    """How many documents to return; None for all."""
    score_threshold: Annotated[
        ThresholdLike | None, SkipValidation, WithJsonSchema({"type": ["number", "string", "null"]})
    ] = None
    """Documents with a lower score are left out: a number, or a `kalm_rag.ThresholdProfile` or the path of one."""
    calibrated: bool = False
    """Scores are the shares of relevant documents that the profile was fitted to, instead of `P(yes)`."""
    instruction: str | None = None
    """What "relevant" means, in a sentence; by default the model's own."""
    budget_ms: float | None = Field(default=None, gt=0)
    """Milliseconds that a call may take; None waits for all documents. Loading the model counts: load it before, with
    `reranker.load()`."""
    on_unknown: OnUnknown | None = None
    """`skip` leaves documents that are not encoded yet without a score and encodes them in the background; `wait`, the
    default, encodes them, under `budget_ms` while time lasts."""

    @field_serializer("score_threshold")
    def _serialise_threshold(self, threshold: ThresholdLike | None, info: SerializationInfo) -> Any:
        return threshold if info.mode == "python" else serialisable_threshold(threshold)

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> Sequence[Document]:
        """Rerank; a step named `KalmReranker` shows in traces, with counts and timings in its metadata.

        Raises:
            TypeError: the query is not a string, or the documents are not an iterable of documents.
        """
        documents = document_list(documents)
        if not documents:
            return []
        return self._step().invoke({"documents": documents, "query": query}, config={"callbacks": callbacks})

    async def acompress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> Sequence[Document]:
        """Rerank without blocking the event loop."""
        documents = document_list(documents)
        if not documents:
            return []
        return await self._step().ainvoke({"documents": documents, "query": query}, config={"callbacks": callbacks})

    def as_runnable(self) -> RunnableLambda[dict[str, Any], list[Document]]:
        """A runnable for LCEL.

        It takes `{"query": ..., "documents": [...]}`, and maybe `"instruction"`, `"top_n"`, `"score_threshold"`,
        `"calibrated"`, `"ratio"`, `"budget_ms"` and `"on_unknown"` in place of the instance's.
        """
        return self._step()

    def _step(self) -> RunnableLambda[dict[str, Any], list[Document]]:
        return RunnableLambda(self._rank, afunc=self._arank, name="KalmReranker")

    def _rank(self, call: dict[str, Any], run_manager: CallbackManagerForChainRun) -> list[Document]:
        documents, query, options = self._arguments(call)
        if not documents:
            return []
        ranking = self.reranker.rank(query, passage_texts(documents), **options)
        _trace(run_manager, ranking)
        return _copies(documents, ranking)

    async def _arank(self, call: dict[str, Any], run_manager: AsyncCallbackManagerForChainRun) -> list[Document]:
        documents, query, options = self._arguments(call)
        if not documents:
            return []
        ranking = await self.reranker.arank(query, passage_texts(documents), **options)
        _trace(run_manager, ranking)
        return _copies(documents, ranking)

    def _arguments(self, call: Any) -> tuple[Sequence[Document], Any, dict[str, Any]]:
        if not isinstance(call, Mapping):
            msg = (
                f"expected a mapping with a query and documents, got {type(call).__name__}: {call!r:.80}; "
                'give {"query": ..., "documents": [...]}'
            )
            raise TypeError(msg)
        names = ("instruction", "top_n", "score_threshold", "calibrated", "ratio", "budget_ms", "on_unknown")
        unknown = call.keys() - {"query", "documents", *names}
        if unknown or not {"query", "documents"} <= call.keys():
            maybe = ", ".join(names)
            msg = f"expected a query and documents (and maybe {maybe}), got {sorted(map(str, call))}"
            raise ValueError(msg)
        chosen = check_arguments({name: call.get(name, getattr(self, name)) for name in names})
        options = {
            "top_k": chosen["top_n"],
            "threshold": chosen["score_threshold"],
            "calibrated": chosen["calibrated"],
            "instruction": chosen["instruction"],
            "ratio": chosen["ratio"],
            "budget_ms": chosen["budget_ms"],
            "on_unknown": chosen["on_unknown"],
        }
        return document_list(call["documents"]), call["query"], options


def _trace(run_manager: BaseRunManager, ranking: Ranking[str] | PartialRanking[str]) -> None:
    """Add what a call took to the metadata of its run, in every tracer.

    A run's metadata is handed to tracers when it starts; what is known later belongs into their record of the run.
    """
    for handler in run_manager.handlers:
        run = (
            handler.run_map.get(str(run_manager.run_id)) if isinstance(handler, (BaseTracer, AsyncBaseTracer)) else None
        )
        if run is not None:
            extra = run.extra or {}
            run.extra = {**extra, "metadata": {**(extra.get("metadata") or {}), **trace_attributes(ranking)}}


def _copies(documents: Sequence[Document], ranking: Ranking[str] | PartialRanking[str]) -> list[Document]:
    """The ranked documents as copies, in order, with their scores."""
    found = []
    for hit in ranking:
        document = documents[hit.index]
        metadata = {**document.metadata, "relevance_score": hit.score, **hit_metadata(hit)}
        if not hit.scored:
            del metadata["relevance_score"]  # also one that an earlier ranking left
        found.append(document.model_copy(update={"metadata": metadata}))
    return found
