"""What both classes share: the arguments that name a model, and the text of a node."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llama_index.core.bridge.pydantic import BaseModel, ConfigDict, Field, PrivateAttr, field_validator, model_validator
from llama_index.core.schema import BaseNode, MetadataMode, NodeWithScore

from kalm_rag import KaLMReranker
from kalm_rag.shared import SharedHandle


class KalmModel(BaseModel):
    """Names a model and the cache of its encoded passages; equal arguments share one loaded model.

    All arguments are plain values, so that `to_dict`, `from_dict` and pickle keep them.
    """

    model: str = Field(default="nano", description="nano, small, large, a folder, or a hub id.")
    revision: str | None = Field(default=None, description="Branch, tag or commit on the hub.")
    cache: str | None = Field(
        default="default", description="Folder of encoded passages; None keeps them in the process."
    )
    device: str | None = Field(default=None, description="cpu, cuda, ...; by default the best there is.")
    dtype: str | None = Field(
        default=None, description="float32, bfloat16, int8; by default bfloat16 on CUDA, else float32."
    )
    max_length: int = Field(default=1024, ge=1, description="Tokens of a node that are read.")
    ratio: int | None = Field(
        default=None, ge=1, description="Encoder states averaged into one; by default 4. The same for all that share."
    )
    metadata_mode: MetadataMode = Field(
        default=MetadataMode.EMBED,
        description="Which metadata is part of the text; the same for ranking and for encoding.",
    )
    _handle: SharedHandle = PrivateAttr(default_factory=SharedHandle)

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _without_class_name(cls, values: Any) -> Any:
        # Serialised forms carry the name of the class, which is no argument.
        return {k: v for k, v in values.items() if k != "class_name"} if isinstance(values, dict) else values

    @field_validator("model", "cache", mode="before")
    @classmethod
    def _plain(cls, value: Any) -> Any:
        return str(value) if isinstance(value, Path) else value

    @property
    def reranker(self) -> KaLMReranker:
        """The shared `kalm_rag.KaLMReranker`."""
        return self._handle.get(
            self.model,
            cache=self.cache,
            revision=self.revision,
            device=self.device,
            dtype=self.dtype,
            max_length=self.max_length,
            ratio=self.ratio,
        )


def passage_text(node: BaseNode | NodeWithScore, mode: MetadataMode) -> str:
    """The text that is ranked and encoded, at ingestion and at query time alike.

    Raises:
        TypeError: it is no node.
    """
    inner = node.node if isinstance(node, NodeWithScore) else node
    if not isinstance(inner, BaseNode):
        msg = f"expected a node, got {type(inner).__name__}: {inner!r:.80}"
        raise TypeError(msg)
    return str(inner.get_content(metadata_mode=mode))


def passage_texts(nodes: Sequence[BaseNode | NodeWithScore], mode: MetadataMode) -> list[str]:
    """`passage_text` of each."""
    return [passage_text(node, mode) for node in nodes]
