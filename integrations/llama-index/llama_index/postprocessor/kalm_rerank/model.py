"""What both classes share: the arguments that name a model, and the text of a node."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from llama_index.core.bridge.pydantic import (
    ConfigDict,
    Field,
    PrivateAttr,
    WithJsonSchema,
    field_serializer,
    field_validator,
    model_validator,
)
from llama_index.core.schema import BaseComponent, BaseNode, MetadataMode, NodeWithScore
from pydantic import SecretBytes, SecretStr, SerializationInfo, SkipValidation

from kalm_rag.adapters import (
    HIT_KEYS,
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


class KalmBase(BaseComponent):
    """Names a model and the cache of its encoded passages; equal arguments share one loaded model.

    Arguments are plain values, so that `to_dict`, `from_dict`, JSON and pickle keep them. A ready-made cache is not:
    it belongs to its process, and JSON and pickle are errors that say so. `to_dict` hands it on as it is, because
    an `IngestionPipeline` asks for that at every run.
    """

    model: str = Field(default="nano", description="nano, small, large, a folder, or a hub id.")
    revision: str | None = Field(default=None, description="Branch, tag or commit on the hub.")
    lora: str | None = Field(
        default=None, description="Folder of an adapter that `kalm-rag tune` trained on this model."
    )
    cache: Annotated[CacheLike, SkipValidation, WithJsonSchema({"type": ["string", "null"]})] = Field(
        default="default",
        description="Folder of encoded passages; None keeps them in the process; a ready-made kalm_rag.PassageCache or "
        "store is used as it is, shared with all that are given it.",
    )
    keep: Keep = Field(
        default="states",
        description="What a folder keeps: states, or prefilled to keep prefilled passages too, for fast first queries "
        "on a CPU at about 25 times the bytes. The same for all that share.",
    )
    server: str | None = Field(
        default=None,
        description="The address of `kalm-rag serve`, such as http://127.0.0.1:8000, which ranks instead of a model in "
        "this process; its model must be `model`, an alias or the digest.",
    )
    device: str | None = Field(default=None, description="cpu, cuda, ...; by default the best there is.")
    dtype: str | None = Field(
        default=None, description="float32, bfloat16, int8, int8-all; by default bfloat16 on CUDA, else float32."
    )
    max_length: int = Field(default=1024, ge=1, description="Tokens of a node that are read.")
    ratio: int | None = Field(
        default=None, ge=1, description="Encoder states averaged into one; by default 4. The same for all that share."
    )
    options: Annotated[OptionsLike, SkipValidation, WithJsonSchema({"type": ["object", "null"]})] = Field(
        default_factory=Options,
        description="All other options of scorer and cache: a kalm_rag.Options, or a mapping of the same names.",
    )
    metadata_mode: MetadataMode = Field(
        default=MetadataMode.EMBED,
        description="Which metadata is part of the text; the same for ranking and for encoding.",
    )
    _handle: SharedHandle = PrivateAttr(default_factory=SharedHandle)

    # Errors do not repeat what was given: options may hold a credential.
    model_config = ConfigDict(
        arbitrary_types_allowed=True, extra="forbid", protected_namespaces=(), hide_input_in_errors=True
    )

    @model_validator(mode="before")
    @classmethod
    def _check_arguments(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        # Serialised forms carry the name of the class, which is not an argument.
        given = {name: value for name, value in values.items() if name != "class_name"}
        try:
            return check_arguments(given)  # before pydantic, which reads True as 1 and "5" as 5
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
        """Whether it is of the same class, with equal arguments; the loaded model and callbacks are not compared."""
        return type(self) is type(other) and self._arguments() == other._arguments()

    def _arguments(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "callback_manager"}

    def to_json(self, **kwargs: Any) -> str:
        """The arguments as JSON.

        Raises:
            ValueError: the cache is a ready-made one, or the options hold a credential.
        """
        serialisable_cache(self.cache)
        Options.of(self.options).serialised()
        return super().to_json(**kwargs)

    def __getstate__(self) -> dict[str, Any]:
        # LlamaIndex drops what cannot be pickled: a worker process would go on with the user's cache folder.
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

    def forget(self, nodes: Iterable[BaseNode | NodeWithScore]) -> ForgetReport:
        """Delete what the cache keeps of nodes, by the text that is ranked; see `KaLMReranker.forget`."""
        return self.reranker.forget(passage_texts(node_list(nodes), self.metadata_mode))

    async def aforget(self, nodes: Iterable[BaseNode | NodeWithScore]) -> ForgetReport:
        """`forget` without blocking the event loop."""
        return await self.reranker.aforget(passage_texts(node_list(nodes), self.metadata_mode))

    def close(self) -> None:
        """Write out the cache, and free the model unless another instance uses it. The next use loads it again."""
        self._handle.close()


def wrapped(credential: str | bytes) -> SecretStr | SecretBytes:
    """A credential that does not show when it is printed."""
    return SecretBytes(credential) if isinstance(credential, bytes) else SecretStr(credential)


def node_list(nodes: object) -> Sequence[Any]:
    """The nodes as a sequence: a list or tuple as it is, any other iterable of nodes read into a list.

    Raises:
        TypeError: it is one node, or not an iterable of nodes.
    """
    if isinstance(nodes, (list, tuple)):
        return nodes
    # A node is iterable too: over its fields.
    if isinstance(nodes, (str, bytes, Mapping, BaseComponent)) or not isinstance(nodes, Iterable):
        msg = f"nodes must be a list of nodes, got {type(nodes).__name__}: {nodes!r:.80}; put one into a list: [node]"
        raise TypeError(msg)
    return list(nodes)


def passage_text(node: BaseNode | NodeWithScore, mode: MetadataMode) -> str:
    """The text that is ranked and encoded, at ingestion and at query time alike.

    Raises:
        TypeError: it is not a node.
    """
    inner = node.node if isinstance(node, NodeWithScore) else node
    if not isinstance(inner, BaseNode):
        msg = f"expected a node, got {type(inner).__name__}: {inner!r:.80}"
        raise TypeError(msg)
    if mode is MetadataMode.ALL and not inner.metadata.keys().isdisjoint(HIT_KEYS):
        # An earlier ranking left its marks, which are not part of the text.
        left = {name: value for name, value in inner.metadata.items() if name not in HIT_KEYS}
        inner = inner.model_copy(update={"metadata": left})
    return str(inner.get_content(metadata_mode=mode))


def passage_texts(nodes: Sequence[BaseNode | NodeWithScore], mode: MetadataMode) -> list[str]:
    """`passage_text` of each."""
    return [passage_text(node, mode) for node in node_list(nodes)]
