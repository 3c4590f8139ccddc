"""What the classes of this package share: the arguments that name a model, and the text of a document."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from langchain_core.documents import Document
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    SecretBytes,
    SecretStr,
    SerializationInfo,
    SkipValidation,
    WithJsonSchema,
    field_serializer,
    field_validator,
    model_validator,
)

from kalm_rag.adapters import (
    AnyReranker,
    CacheLike,
    Options,
    OptionsLike,
    SharedHandle,
    check_arguments,
    check_cache,
    check_server,
    serialisable_cache,
)
from kalm_rag.cache import ForgetReport
from kalm_rag.cache.passage_cache import Keep


class KalmBase(BaseModel):
    """Names a model and the cache of its encoded passages.

    Classes with equal arguments share one loaded model, which loads at first use. JSON and pickle keep the arguments,
    unless one is a ready-made cache, which belongs to its process: that is an error that says so.
    """

    model: str | Path = "nano"
    """`nano`, `small`, `large`, a folder, or a hub id."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    lora: str | Path | None = None
    """Folder of an adapter that `kalm-rag tune` trained on this model."""
    cache: Annotated[CacheLike, SkipValidation, WithJsonSchema({"type": ["string", "null"]})] = "default"
    """A folder, by default the user's cache folder; None keeps documents in the process; a ready-made
    `kalm_rag.PassageCache` or store is used as it is, shared with all that are given it."""
    keep: Keep = "states"
    """What a folder keeps: `states`, or `prefilled` to keep prefilled documents too, for fast first queries on a CPU
    at about 25 times the bytes. Encoder and reranker must name the same."""
    server: str | None = None
    """The address of `kalm-rag serve`, such as `http://127.0.0.1:8000`, which ranks instead of a model in this process;
    its model must be `model`, an alias or the digest."""
    device: str | None = None
    """`cpu`, `cuda`, ...; by default the best there is."""
    dtype: str | None = None
    """`float32`, `bfloat16`, `int8`, `int8-all`; by default bfloat16 on CUDA, else float32."""
    max_length: int = Field(default=1024, ge=1)
    """Tokens of a document that are read."""
    ratio: int | None = Field(default=None, ge=1)
    """Encoder states averaged into one; by default 4. Encoder and reranker must name the same to find each other's."""
    options: Annotated[OptionsLike, SkipValidation, WithJsonSchema({"type": ["object", "null"]})] = Field(
        default_factory=Options
    )
    """All other options of scorer and cache: a `kalm_rag.Options`, or a mapping of the same names."""

    _handle: SharedHandle = PrivateAttr(default_factory=SharedHandle)

    # Errors do not repeat what was given: options may hold a credential.
    model_config = ConfigDict(
        arbitrary_types_allowed=True, extra="forbid", protected_namespaces=(), hide_input_in_errors=True
    )

    @model_validator(mode="before")
    @classmethod
    def _check_arguments(cls, values: Any) -> Any:
        # Before pydantic, which reads True as 1 and "0.5" as 0.5.
        try:
            return check_arguments(values) if isinstance(values, dict) else values
        except TypeError as error:
            raise ValueError(str(error)) from None

    @field_validator("model", "lora", "cache", mode="before")
    @classmethod
    def _plain(cls, value: Any) -> Any:
        return str(value) if isinstance(value, Path) else value

    @model_validator(mode="after")
    def _check_cache(self) -> KalmBase:
        check_cache(self.cache, self.keep, self.options)
        check_server(self.server, self.options, self.__dict__)
        return self

    @field_serializer("cache", when_used="json")
    def _serialise_cache(self, cache: CacheLike) -> str | None:
        return serialisable_cache(cache)

    @field_serializer("options")
    def _serialise_options(self, options: OptionsLike, info: SerializationInfo) -> Any:
        given = Options.of(options)
        return given.wrapped(wrapped) if info.mode == "python" else given.serialised()

    def __eq__(self, other: object) -> bool:
        """Whether it is of the same class, with equal arguments; the loaded model is not compared."""
        return type(self) is type(other) and self.__dict__ == other.__dict__

    def __getstate__(self) -> dict[Any, Any]:
        serialisable_cache(self.cache)
        return super().__getstate__()

    @property
    def reranker(self) -> AnyReranker:
        """The shared `kalm_rag.KaLMReranker`, or with `server` the shared `kalm_rag.RerankerClient`."""
        return self._handle.get(
            self.model,
            cache=self.cache,
            keep=self.keep,
            server=self.server,
            revision=self.revision,
            lora=self.lora,
            device=self.device,
            dtype=self.dtype,
            max_length=self.max_length,
            ratio=self.ratio,
            options=Options.of(self.options),
        )

    def forget(self, documents: Iterable[Document]) -> ForgetReport:
        """Delete what the cache keeps of documents, by the text that is ranked; see `KaLMReranker.forget`."""
        return self.reranker.forget(passage_texts(document_list(documents)))

    async def aforget(self, documents: Iterable[Document]) -> ForgetReport:
        """`forget` without blocking the event loop."""
        return await self.reranker.aforget(passage_texts(document_list(documents)))

    def close(self) -> None:
        """Write out the cache, and free the model unless another instance uses it. The next use loads it again."""
        self._handle.close()


def wrapped(credential: str | bytes) -> SecretStr | SecretBytes:
    """A credential that does not show when it is printed."""
    return SecretBytes(credential) if isinstance(credential, bytes) else SecretStr(credential)


def passage_text(document: Document) -> str:
    """The text that is ranked and encoded: `page_content`, at ingestion and at query time alike.

    Raises:
        TypeError: it is no `Document`.
    """
    if not isinstance(document, Document):
        msg = f"expected a langchain_core Document, got {type(document).__name__}: {document!r:.80}"
        raise TypeError(msg)
    return document.page_content


def document_list(documents: object) -> Sequence[Any]:
    """The documents as a sequence: a list or tuple as it is, any other iterable of documents read into a list.

    Raises:
        TypeError: it is one document, or not an iterable of documents.
    """
    if isinstance(documents, (list, tuple)):
        return documents
    # A document is iterable too: over its fields.
    if isinstance(documents, (str, bytes, Mapping, BaseModel)) or not isinstance(documents, Iterable):
        msg = (
            f"documents must be a list of langchain_core Documents, got {type(documents).__name__}: {documents!r:.80}; "
            "one document goes into a list: [document]"
        )
        raise TypeError(msg)
    return list(documents)


def passage_texts(documents: Sequence[Document]) -> list[str]:
    """`passage_text` of each."""
    return [passage_text(document) for document in documents]
