"""What a replica on Ray Serve serves: arguments with types, from YAML or from `name=value` on a command line."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from kalm_rag.adapters.options import Options
from kalm_rag.adapters.shared import shared_reranker
from kalm_rag.cache.passage_cache import Keep
from kalm_rag.reranker import KaLMReranker
from kalm_rag.serving.limits import Limits
from kalm_rag.settings import DEFAULT_INSTRUCTION
from kalm_rag.thresholds import check_threshold
from kalm_rag.utils.paths import DEFAULT


class ReplicaArguments(BaseModel):
    """What `kalm_rag.serving.ray:build` takes.

    Attributes:
        model: name, hub id, or a folder that every machine has; the same for `lora`, and the other arguments that are
            those of `KaLMReranker`.
        cache: a folder on each machine, which its replicas share. Default: as in `PassageCache`.
        keep: as in `PassageCache`.
        options: further options of the scorer and of the cache, as adapters take them (`kalm_rag.Options`), such as
            `cache_remote`, the tier that all machines share. Credentials are refused: they would lie in Ray's state.
        api_key_file: holds the keys that clients need, beside those in `KALM_RAG_API_KEY`; on every machine.
        cors_origins: pages of other origins that may call it from a browser.
        strict_model: whether a request that names another model is refused.
        threshold: of requests that name none: a number between 0 and 1, or the path of a profile.
        limits: of each replica: fields of `Limits` by name.
        cpus: of each replica; as many threads compute.
        gpus: of each replica, or a share of one.
        min_replicas: that always run.
        max_replicas: that may run.
        target_ongoing_requests: requests a replica that autoscaling aims at.
        sessions: whether requests with the same header `X-Session-Id` go to the same replica, whose memory then knows
            what they ask about. Requests without that header go to any, whatever each has to do.

    Raises:
        ValidationError: an argument is unknown, or wrong; the message names it, its value and the rule.
    """

    # A message must not show what was given as a whole: it may hold a credential.
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    model: str = "nano"
    revision: str | None = None
    lora: str | None = None
    device: str | None = None
    dtype: str | None = None
    max_length: int = 1024
    ratio: int = 4
    instruction: str = DEFAULT_INSTRUCTION
    cache: str | None = DEFAULT
    keep: Keep = "states"
    options: dict[str, Any] = Field(default_factory=dict)
    api_key_file: Path | None = None
    cors_origins: tuple[str, ...] = ()
    strict_model: bool = False
    threshold: float | str | None = Field(default=None, union_mode="left_to_right")  # "0.2" is a number
    limits: dict[str, int] = Field(default_factory=dict)
    cpus: float = Field(default=1, gt=0)
    gpus: float = Field(default=0, ge=0)
    min_replicas: int = Field(default=1, ge=1)
    max_replicas: int = Field(default=4, ge=1)
    target_ongoing_requests: float = Field(default=4, gt=0)
    sessions: bool = False

    @model_validator(mode="before")
    @classmethod
    def _known(cls, given: Any) -> Any:
        if isinstance(given, Mapping):
            _check_names("argument", given, cls.model_fields)
        return given

    @model_validator(mode="after")
    def _checked(self) -> ReplicaArguments:
        Options.of(self.options).serialised()  # refuses credentials
        _check_names("limit", self.limits, [limit.name for limit in fields(Limits)])
        self.checked_limits()
        if self.min_replicas > self.max_replicas:
            msg = f"min_replicas must be at most max_replicas, got {self.min_replicas} and {self.max_replicas}"
            raise ValueError(msg)
        if isinstance(self.threshold, float):
            check_threshold("threshold", self.threshold)
        KaLMReranker(self.model, cache=None, **self._of_reranker(), **Options.of(self.options).of_reranker())
        return self

    def checked_limits(self) -> Limits:
        """Return the limits of a replica."""
        return Limits(**self.limits)

    def reranker(self) -> KaLMReranker:
        """Return the reranker of a replica, which owns its cache; nothing is loaded yet."""
        options = Options.of(self.options)
        return shared_reranker(self.model, cache=self.cache, keep=self.keep, options=options, **self._of_reranker())

    def _of_reranker(self) -> dict[str, Any]:
        names = ("revision", "lora", "device", "dtype", "max_length", "ratio", "instruction")
        return {name: getattr(self, name) for name in names}


def _check_names(kind: str, given: Mapping[str, Any], known: Any) -> None:
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), list(known), n=1)
            advice = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(sorted(known))}"
            msg = f"unknown {kind} {name!r:.80}: {advice}"
            raise ValueError(msg)
