"""Encode documents while they are indexed, so that the first query is warm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from haystack import Document, component, default_from_dict, default_to_dict
from haystack.utils import ComponentDevice, Secret
from haystack_integrations.components.rankers.kalm.model import KalmBase
from haystack_integrations.components.rankers.kalm.ranker import restored

from kalm_rag import RerankerClient
from kalm_rag.adapters import CacheLike, OptionsLike
from kalm_rag.cache.passage_cache import Keep


@component
class KalmPassageEncoder(KalmBase):
    """Encodes documents into the cache and hands them on unchanged; stands before the `DocumentWriter`.

    Its `meta_fields_to_embed`, `embedding_separator`, `ratio` and `keep` must be those of the `KalmRanker`.
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
        ratio: int | None = None,
        meta_fields_to_embed: list[str] | None = None,
        embedding_separator: str = "\n",
        options: OptionsLike = None,
    ) -> None:
        """Create an encoder; the arguments are those of `KalmRanker`."""
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

    def warm_up(self) -> None:
        """Load the model, or check the server. Calling it again does nothing."""
        reranker = self.reranker
        _ = reranker.load() if isinstance(reranker, RerankerClient) else reranker.scorer  # loads the model

    @component.output_types(documents=list[Document], encoded=int, known=int, truncated=int)
    def run(self, documents: list[Document]) -> dict[str, Any]:
        """Encode what the cache does not hold.

        Returns:
            `documents`: the given ones; `encoded` and `known`: how many were encoded now, and
                known before; `truncated`: how many among both are longer than `max_length` tokens.

        Raises:
            TypeError: it is not a list of documents.
        """
        texts = self.texts(documents)
        if not texts:
            return {"documents": documents, "encoded": 0, "known": 0, "truncated": 0}
        report = self.reranker.encode(texts)
        return {"documents": documents, "encoded": report.new, "known": report.known, "truncated": report.truncated}

    @component.output_types(documents=list[Document], encoded=int, known=int, truncated=int)
    async def run_async(self, documents: list[Document]) -> dict[str, Any]:
        """Encode without blocking the event loop; argument and result are those of `run`."""
        texts = self.texts(documents)
        if not texts:
            return {"documents": documents, "encoded": 0, "known": 0, "truncated": 0}
        report = await self.reranker.aencode(texts)
        return {"documents": documents, "encoded": report.new, "known": report.known, "truncated": report.truncated}

    def to_dict(self) -> dict[str, Any]:
        """Serialise the component.

        Raises:
            SerializationError: its cache is a ready-made one; give it a folder.
        """
        return default_to_dict(self, **self.model_arguments())

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> KalmPassageEncoder:
        """Deserialise the component."""
        found: KalmPassageEncoder = default_from_dict(cls, restored(data))
        return found
