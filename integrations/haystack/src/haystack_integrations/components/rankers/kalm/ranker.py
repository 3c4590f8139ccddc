"""The ranker."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from haystack import Document, component, default_from_dict, default_to_dict
from haystack.core.errors import SerializationError
from haystack.tracing.tracer import tracer
from haystack.utils import ComponentDevice, Secret
from haystack_integrations.components.rankers.kalm.model import KalmBase

from kalm_rag.adapters import (
    CacheLike,
    OptionsLike,
    check_arguments,
    hit_metadata,
    serialisable_threshold,
    trace_attributes,
)
from kalm_rag.cache.passage_cache import Keep
from kalm_rag.latency.limit import OnUnknown
from kalm_rag.results import PartialRanking, Ranking
from kalm_rag.thresholds import ThresholdLike


@component
class KalmRanker(KalmBase):
    """Ranks documents with KaLM-Reranker; encoded documents are kept and reused by every later query.

    Example:
        ```python
        from haystack import Document
        from haystack_integrations.components.rankers.kalm import KalmRanker

        ranker = KalmRanker(model="nano", top_k=2)
        documents = [Document(content="Paris"), Document(content="Berlin")]
        print(ranker.run(query="City in Germany", documents=documents)["documents"])
        ```

    Documents come back best first as copies whose score is `P(yes)`. Their `meta` gains `relevance_margin`, and the
    truth values `relevance_scored`, `relevance_exact`, `passage_truncated`, `query_truncated`, `passage_repaired` and
    `query_repaired`, and `passage_span` (see `kalm_rag.RankedPassage`). Of documents with one id the best is kept.

    Under `budget_ms` or `on_unknown="skip"`, documents that were not reached follow the others in the order given.
    Their score is None, and `relevance_scored` is False.
    """

    def __init__(
        self,
        model: str | Path = "nano",
        *,
        revision: str | None = None,
        lora: str | Path | None = None,
        cache: CacheLike = "default",
        keep: Keep = "states",
        server: str | None = None,
        device: ComponentDevice | None = None,
        dtype: str | None = None,
        token: Secret | None = Secret.from_env_var(["HF_API_TOKEN", "HF_TOKEN"], strict=False),
        max_length: int = 1024,
        top_k: int = 10,
        score_threshold: ThresholdLike | None = None,
        calibrated: bool = False,
        instruction: str | None = None,
        budget_ms: float | None = None,
        on_unknown: OnUnknown | None = None,
        ratio: int | None = None,
        meta_fields_to_embed: list[str] | None = None,
        embedding_separator: str = "\n",
        options: OptionsLike = None,
    ) -> None:
        """Create a ranker; the model loads at `warm_up` or at the first run.

        Args:
            model: `nano`, `small`, `large`, a folder, or a hub id.
            revision: branch, tag or commit on the hub.
            lora: folder of an adapter that `kalm-rag tune` trained on this model.
            cache: folder of encoded documents, by default the user's cache folder; None keeps them in the process; a
                ready-made `kalm_rag.PassageCache` or store is used as it is, shared with all that are given it.
            keep: what a folder keeps: `states`, or `prefilled` to keep prefilled documents too, for fast first queries
                on a CPU at about 25 times the bytes. Encoder and ranker must name the same.
            server: the address of `kalm-rag serve`, such as `http://127.0.0.1:8000`, which ranks instead of a model in
                this process; its model must be `model`, an alias or the digest.
            device: by default the best there is.
            dtype: `float32`, `bfloat16`, `int8`, `int8-all`; by default bfloat16 on CUDA, else float32.
            token: hub token, if the model needs one.
            max_length: tokens of a document that are read.
            top_k: how many documents to return.
            score_threshold: documents with a lower score are left out: a number, or a `kalm_rag.ThresholdProfile` or
                the path of one.
            calibrated: scores are the shares of relevant documents that the profile was fitted to, instead of
                `P(yes)`.
            instruction: what "relevant" means, in a sentence; by default the model's own.
            budget_ms: milliseconds that a run may take; None waits for all documents. Loading the model counts:
                `warm_up` before.
            on_unknown: `skip` leaves documents that are not encoded yet without a score and encodes them in the
                background; `wait`, the default, encodes them, under `budget_ms` while time lasts.
            ratio: encoder states averaged into one; by default 4.
            meta_fields_to_embed: metadata put in front of the content.
            embedding_separator: what stands between them.
            options: all other options of scorer and cache: a `kalm_rag.Options`, or a mapping of the same names.

        Raises:
            ValueError: an argument is out of range, `cache` or `keep` is none of these, or `keep` is given with a
                ready-made cache.
            TypeError: an argument has the wrong type; the message names it.
        """
        # By name: `@component` makes a new class, which `super()` does not know.
        KalmBase.__init__(
            self,
            model,
            revision=revision,
            lora=lora,
            cache=cache,
            keep=keep,
            server=server,
            device=device,
            dtype=dtype,
            token=token,
            max_length=max_length,
            ratio=ratio,
            meta_fields_to_embed=meta_fields_to_embed,
            embedding_separator=embedding_separator,
            options=options,
        )
        if top_k is None:
            msg = "top_k must be an integer, got None; give the number of documents to return"
            raise TypeError(msg)
        checked = check_arguments(
            {
                "top_k": top_k,
                "score_threshold": score_threshold,
                "calibrated": calibrated,
                "instruction": instruction,
                "budget_ms": budget_ms,
                "on_unknown": on_unknown,
            }
        )
        self.top_k: int = checked["top_k"]
        self.score_threshold: ThresholdLike | None = checked["score_threshold"]
        self.calibrated: bool = checked["calibrated"]
        self.instruction = instruction
        self.budget_ms: float | None = checked["budget_ms"]
        self.on_unknown: OnUnknown | None = checked["on_unknown"]

    def warm_up(self) -> None:
        """Load the model, or check the server. Calling it again does nothing."""
        self.reranker.load()

    @component.output_types(documents=list[Document])
    def run(
        self,
        query: str,
        documents: list[Document],
        top_k: int | None = None,
        score_threshold: ThresholdLike | None = None,
        instruction: str | None = None,
        ratio: int | None = None,
        calibrated: bool | None = None,
        budget_ms: float | None = None,
        on_unknown: OnUnknown | None = None,
    ) -> dict[str, list[Document]]:
        """Rank documents.

        Args:
            query: the query.
            documents: what to rank.
            top_k: for this run, instead of the instance's; so are the following.
            score_threshold: documents with a lower score are left out.
            instruction: what "relevant" means.
            ratio: encoder states averaged into one.
            calibrated: whether scores are mapped through the threshold profile's fit.
            budget_ms: milliseconds that the run may take.
            on_unknown: `skip` or `wait` for documents that are not encoded yet.

        Returns:
            `documents`: copies, best first, then those without a score.

        Raises:
            ValueError: the query is empty, or an argument is out of range.
            TypeError: the query is not a string, the documents are not a list of documents, or an argument has the
                wrong type.
        """
        call = {"top_k": top_k, "score_threshold": score_threshold, "instruction": instruction, "ratio": ratio}
        call |= {"calibrated": calibrated, "budget_ms": budget_ms, "on_unknown": on_unknown}
        texts, options, most = self._checked(query, documents, call)
        if not texts:
            return {"documents": []}
        ranking = self.reranker.rank(query, texts, **options)
        _trace(ranking)
        return {"documents": self._chosen(documents, ranking, most)}

    @component.output_types(documents=list[Document])
    async def run_async(
        self,
        query: str,
        documents: list[Document],
        top_k: int | None = None,
        score_threshold: ThresholdLike | None = None,
        instruction: str | None = None,
        ratio: int | None = None,
        calibrated: bool | None = None,
        budget_ms: float | None = None,
        on_unknown: OnUnknown | None = None,
    ) -> dict[str, list[Document]]:
        """Rank documents without blocking the event loop; arguments and result are those of `run`."""
        call = {"top_k": top_k, "score_threshold": score_threshold, "instruction": instruction, "ratio": ratio}
        call |= {"calibrated": calibrated, "budget_ms": budget_ms, "on_unknown": on_unknown}
        texts, options, most = self._checked(query, documents, call)
        if not texts:
            return {"documents": []}
        ranking = await self.reranker.arank(query, texts, **options)
        _trace(ranking)
        return {"documents": self._chosen(documents, ranking, most)}

    def to_dict(self) -> dict[str, Any]:
        """Serialise the component.

        Raises:
            SerializationError: its cache is a ready-made one, or its threshold a profile; give a folder, or a path.
        """
        try:
            threshold = serialisable_threshold(self.score_threshold)
        except ValueError as error:
            raise SerializationError(str(error)) from None
        return default_to_dict(
            self,
            **self.model_arguments(),
            top_k=self.top_k,
            score_threshold=threshold,
            calibrated=self.calibrated,
            instruction=self.instruction,
            budget_ms=self.budget_ms,
            on_unknown=self.on_unknown,
        )

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> KalmRanker:
        """Deserialise the component."""
        found: KalmRanker = default_from_dict(cls, restored(data))
        return found

    def _checked(self, query: Any, documents: Any, call: dict[str, Any]) -> tuple[list[str], dict[str, Any], int]:
        """The texts, what `rank` is told, and how many documents to return; what a call leaves out is ours."""
        if not isinstance(query, str):
            msg = f"query must be a string, got {type(query).__name__}"
            raise TypeError(msg)
        if not query:
            msg = "query must not be empty"
            raise ValueError(msg)
        own = {name: getattr(self, name) for name in call if name != "ratio"}
        chosen = check_arguments(own | {name: value for name, value in call.items() if value is not None})
        texts = self.texts(documents)
        options = {
            # Of documents with one id the best is kept, so that as many may be needed as there are.
            "top_k": max(1, len(texts)),
            "instruction": chosen["instruction"],
            "ratio": chosen.get("ratio"),
            "threshold": chosen["score_threshold"],
            "calibrated": chosen["calibrated"],
            "budget_ms": chosen["budget_ms"],
            "on_unknown": chosen["on_unknown"],
        }
        return texts, options, chosen["top_k"]

    def _chosen(
        self, documents: list[Document], ranking: Ranking[str] | PartialRanking[str], most: int
    ) -> list[Document]:
        found: dict[str, Document] = {}
        for hit in ranking:
            document = documents[hit.index]
            if document.id not in found:
                found[document.id] = replace(document, score=hit.score, meta={**document.meta, **hit_metadata(hit)})
        return list(found.values())[:most]


def _trace(ranking: Ranking[str] | PartialRanking[str]) -> None:
    """Tag the span of the running component, if Haystack traces, with what the call took."""
    span = tracer.current_span()
    if span is not None:
        span.set_tags(trace_attributes(ranking))


def restored(data: dict[str, Any]) -> dict[str, Any]:
    """Serialised arguments with device and token made objects again, whichever release of Haystack wrote them."""
    arguments = dict(data.get("init_parameters", {}))
    if isinstance(arguments.get("device"), dict):
        arguments["device"] = ComponentDevice.from_dict(arguments["device"])
    if isinstance(arguments.get("token"), dict):
        arguments["token"] = Secret.from_dict(arguments["token"])
    return {**data, "init_parameters": arguments}
