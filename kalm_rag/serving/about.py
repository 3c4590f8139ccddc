"""What the server is, and how it is: identity, health, readiness, counters and metrics."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from starlette.responses import Response

from kalm_rag._version import __version__
from kalm_rag.cache.disk import DiskStore
from kalm_rag.cache.preflight import check_writable
from kalm_rag.serving.endpoints import AsciiJSON
from kalm_rag.serving.limits import Limits
from kalm_rag.serving.metrics import Metrics
from kalm_rag.serving.work import Work

if TYPE_CHECKING:
    from kalm_rag.reranker import KaLMReranker

_PROBE_SECONDS = 5.0
"""How long the answer of a probe of the cache holds."""


class AboutEndpoints:
    """What tells of the server.

    Args:
        work: what the endpoints ask of the model.
        metrics: that Prometheus reads.
        limits: what is accepted.
        model: the real name of the model.
        strict_model: whether another model's name is an error.
    """

    def __init__(self, work: Work, metrics: Metrics, limits: Limits, model: str, *, strict_model: bool) -> None:
        self._work = work
        self._metrics = metrics
        self._limits = limits
        self._model = model
        self._strict = strict_model
        self._started = int(time.time())
        self._probe: tuple[float, str | None] = (float("-inf"), None)

    def add_to(self, app: FastAPI) -> None:
        """Add the routes."""
        for path, action, summary in (
            ("/v1/stats", self.stats, "What calls took, and what is cached."),
            ("/v1/models", self.models, "The model, as OpenAI lists models."),
            ("/info", self.info, "Model, settings, limits and version."),
            ("/health", self.health, "Whether the process answers."),
            ("/ready", self.ready, "Whether the model and the cache can be used."),
            ("/metrics", self.metrics, "Metrics for Prometheus."),
        ):
            app.add_api_route(path, action, name=path.rsplit("/", 1)[-1], summary=summary, response_class=Response)

    async def stats(self) -> Response:
        """Return what calls took, and what is cached."""
        reranker = self._work.reranker

        def read() -> dict[str, Any]:
            return {
                "reranker": asdict(reranker.stats()),
                "cache": asdict(reranker.cache.stats()),
                "prefilled": _dict(reranker.prefill_stats()),
                "scores": _dict(reranker.score_stats()),
                "truncations": reranker.truncations.count,
                "repairs": reranker.repairs.count,
                "unknown_texts": reranker.unknown_texts,
                "queue": {"running": self._work.queue.running, "waiting": self._work.queue.waiting},
            }

        return AsciiJSON(await self._work.ask(read))

    async def models(self) -> Response:
        """Return the one model, as OpenAI's clients read it."""
        one = {"id": self._model, "object": "model", "created": self._started, "owned_by": "kalm-rag"}
        return AsciiJSON({"object": "list", "data": [one]})

    async def info(self) -> Response:
        """Return what identifies the model and its settings: servers that agree in both give the same scores."""
        return AsciiJSON(await self._work.ask(self._info), headers=self._work.identity)

    def _info(self) -> dict[str, Any]:
        reranker = self._work.reranker
        scorer, settings = reranker.scorer, reranker.settings
        lora = reranker.checkpoint().lora
        loaded = scorer.loaded
        dtype = str(loaded.dtype).removeprefix("torch.")
        dtype = "int8-all" if loaded.int8_encoder else "int8" if loaded.int8 else dtype
        return {
            "model": self._model,
            "digest": scorer.identity.mark,
            "lora": None if lora is None else lora.digest,
            "ratio": settings.ratio,
            "instruction": settings.instruction,
            "system_prompt": settings.system_prompt,
            "dtype": dtype,
            "device": str(loaded.device),
            "max_length": settings.max_length,
            "query_max_length": settings.query_max_length,
            "long_passages": settings.long_passages,
            "refine": settings.refine,
            "strict_model": self._strict,
            "limits": asdict(self._limits),
            "version": __version__,
            # What clients of Text Embeddings Inference read.
            "model_id": self._model,
            "model_dtype": dtype,
            "model_type": {"reranker": {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}},
            "max_input_length": settings.max_length,
            "max_client_batch_size": self._limits.documents,
            "max_concurrent_requests": self._limits.running + self._limits.waiting,
        }

    async def health(self) -> Response:
        """Answer that the process is alive."""
        return AsciiJSON({"status": "ok"})

    async def ready(self) -> Response:
        """Answer whether the model is loaded and the cache keeps what is written to it; a probe holds for seconds."""
        asked, fault = self._probe
        if time.monotonic() - asked > _PROBE_SECONDS:
            fault = await self._work.ask(self._fault)
            self._probe = (time.monotonic(), fault)
        if fault is not None:
            return AsciiJSON({"status": "not ready", "detail": fault}, 503, {"retry-after": "5"})
        return AsciiJSON({"status": "ready"})

    def _fault(self) -> str | None:
        reranker = self._work.reranker
        if reranker.prefill_stats() is None:
            return "the model is not loaded"
        store = reranker.cache.store
        if store is None or (isinstance(store, DiskStore) and store.read_only):
            return None
        try:
            check_writable(store)
        except Exception as error:  # noqa: BLE001 - a store may be anybody's code
            return f"the cache does not keep what is written to it ({type(error).__name__})"
        return None

    async def metrics(self) -> Response:
        """Return metrics in Prometheus's text format."""
        text = await self._work.ask(self._metrics.text)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


def model_name(reranker: KaLMReranker) -> str:
    """Return the name of the model for clients: of a folder its last part only."""
    name = str(reranker.model)
    return Path(name).name if Path(name).is_dir() else name


def _dict(record: Any) -> dict[str, Any] | None:
    return None if record is None else asdict(record)
