"""What both components share: the arguments that name a model, and the text of a document."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from haystack import Document
from haystack.core.errors import SerializationError
from haystack.utils import ComponentDevice, Secret

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
from kalm_rag.model.checkpoint import clean_token


class KalmBase:
    """Names a model and the cache of its encoded passages; equal arguments share one loaded model."""

    def __init__(
        self,
        model: str | Path,
        *,
        revision: str | None,
        lora: str | Path | None,
        cache: CacheLike,
        keep: Keep,
        server: str | None,
        device: ComponentDevice | None,
        dtype: str | None,
        token: Secret | None,
        max_length: int,
        ratio: int | None,
        meta_fields_to_embed: list[str] | None,
        embedding_separator: str,
        options: OptionsLike,
    ) -> None:
        self.options = Options.of(options)
        if self.options.token is not None:
            msg = "options.token does not apply here; give token= a Secret, such as Secret.from_env_var('HF_TOKEN')"
            raise ValueError(msg)
        check_cache(cache, keep, self.options)
        checked = check_arguments(
            {
                "model": model,
                "revision": revision,
                "lora": lora,
                "server": server,
                "dtype": dtype,
                "max_length": max_length,
                "ratio": ratio,
                "embedding_separator": embedding_separator,
            }
        )
        if device is not None and not isinstance(device, ComponentDevice):
            msg = f"device must be a ComponentDevice, got {device!r:.80}; use ComponentDevice.from_str('cpu')"
            raise TypeError(msg)
        if token is not None and not isinstance(token, Secret):
            # The message does not show it: it may be the token itself.
            msg = f"token must be a Secret, got {type(token).__name__}; use Secret.from_env_var('HF_TOKEN')"
            raise TypeError(msg)
        local = {"revision": revision, "lora": lora, "cache": cache, "keep": keep, "device": device, "dtype": dtype}
        check_server(checked["server"], self.options, {**local, "max_length": checked["max_length"]})
        self.model = str(model)
        self.server: str | None = checked["server"]
        self.revision = revision
        self.lora = None if lora is None else str(lora)
        self.cache: CacheLike = str(cache) if isinstance(cache, Path) else cache
        self.keep: Keep = keep
        self.device = device
        self.dtype = dtype
        self.token = token
        self.max_length: int = checked["max_length"]
        self.ratio: int | None = checked["ratio"]
        self.meta_fields_to_embed = _field_names(meta_fields_to_embed)
        self.embedding_separator = embedding_separator
        self._handle = SharedHandle()

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
            device=None if self.device is None else self.device.to_torch_str(),
            dtype=self.dtype,
            token=None if self.server is not None else self._own_token(),
            max_length=self.max_length,
            ratio=self.ratio,
            options=self.options,
        )

    def __eq__(self, other: object) -> bool:
        """Whether it is of the same class, with equal arguments; the loaded model is not compared."""
        return type(self) is type(other) and self._compared() == other._compared()

    def __hash__(self) -> int:
        return hash((type(self), self.model))

    def _compared(self) -> dict[str, Any]:
        """The arguments; other attributes are the framework's."""
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def _own_token(self) -> str | bool | None:
        """The token, unless it is the one that the hub client finds anyway: then nothing sets this instance apart."""
        from huggingface_hub import get_token

        token = None if self.token is None else clean_token(self.token.resolve_value())
        return None if token == get_token() else token

    async def warm_up_async(self) -> None:
        """Load the model without blocking the event loop."""
        await asyncio.to_thread(self.reranker.load)

    def forget(self, documents: list[Document]) -> ForgetReport:
        """Delete what the cache keeps of documents, by the text that is ranked; see `KaLMReranker.forget`."""
        return self.reranker.forget(self.texts(documents))

    async def forget_async(self, documents: list[Document]) -> ForgetReport:
        """`forget` without blocking the event loop."""
        return await self.reranker.aforget(self.texts(documents))

    def close(self) -> None:
        """Write out the cache, and free the model unless another component uses it. The next run loads it again."""
        self._handle.close()

    async def close_async(self) -> None:
        """`close` without blocking the event loop."""
        await asyncio.to_thread(self.close)

    def model_arguments(self) -> dict[str, Any]:
        """The arguments for `default_to_dict`.

        Raises:
            SerializationError: the cache is a ready-made one, or the options hold a credential.
        """
        try:
            cache, options = serialisable_cache(self.cache), self.options.serialised()
        except ValueError as error:
            raise SerializationError(str(error)) from None
        return {
            "model": self.model,
            "revision": self.revision,
            "lora": self.lora,
            "cache": cache,
            "keep": self.keep,
            "server": self.server,
            "device": self.device,
            "dtype": self.dtype,
            "token": self.token,
            "max_length": self.max_length,
            "ratio": self.ratio,
            "meta_fields_to_embed": list(self.meta_fields_to_embed),
            "embedding_separator": self.embedding_separator,
            "options": options,
        }

    def texts(self, documents: Sequence[Document]) -> list[str]:
        """The texts that are ranked and encoded, at ingestion and at query time alike.

        Raises:
            TypeError: it is not a list of documents.
        """
        if not isinstance(documents, list) or any(not isinstance(document, Document) for document in documents):
            msg = f"documents must be a list of haystack Documents, got {type(documents).__name__}: {documents!r:.80}"
            raise TypeError(msg)
        return [passage_text(document, self.meta_fields_to_embed, self.embedding_separator) for document in documents]


def _field_names(given: object) -> list[str]:
    if given is None:
        return []
    if not isinstance(given, (list, tuple)) or any(not isinstance(name, str) for name in given):
        msg = f"meta_fields_to_embed must be a list of strings, got {given!r:.80}; one name goes into a list: ['title']"
        raise TypeError(msg)
    return list(given)


def passage_text(document: Document, meta_fields: Sequence[str], separator: str) -> str:
    """Chosen metadata that is not None, then the content; a document without content has an empty one."""
    chosen = [str(document.meta[name]) for name in meta_fields if document.meta.get(name) is not None]
    return separator.join([*chosen, document.content or ""])
