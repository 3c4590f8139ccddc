"""Every option of the scorer and of the cache that is not an adapter's own argument."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeAlias, get_args

from kalm_rag.cache.passage_cache import DEFAULT_MEMORY, Storage
from kalm_rag.cache.remote.address import PASSWORD, read_address
from kalm_rag.cache.remote.opening import DEFAULT_NAMESPACE, SECRET, check_namespace, check_timeout
from kalm_rag.cache.remote.tier import RemoteMode
from kalm_rag.client.server import DEFAULT_RETRIES, DEFAULT_TIMEOUT, KEY, OnFailure, check_key, check_seconds
from kalm_rag.settings import (
    DEFAULT_MAX_WINDOWS,
    DEFAULT_PREFILL_MEMORY,
    DEFAULT_SCORE_MEMORY,
    DEFAULT_SYSTEM_PROMPT,
    ControlTokens,
    LongPassages,
    PrefillMemory,
    PrefillStorage,
    Settings,
)
from kalm_rag.utils.checks import (
    check_bytes,
    check_choice,
    check_count,
    check_flag,
    check_positive,
    check_ratio,
    check_secret,
)

_CACHE = "cache_"
SERVER = "server_"
"""What the names of options begin with that are those of `RerankerClient`."""
_CREDENTIALS = ("token", "cache_secret", "server_api_key")
_WAYS_OUT = {
    "token": "set HF_TOKEN in the environment",
    "cache_secret": f"set {SECRET} in the environment",
    "server_api_key": f"set {KEY} in the environment",
    "cache_remote": f"set {PASSWORD} in the environment and give the URL without it",
}


@dataclass(frozen=True, slots=True)
class Options:
    """Options of an adapter beside its arguments; a mapping of the same names does as well, for YAML and JSON.

    Names that begin with `cache_` are those of `PassageCache`, and apply when `cache=` is a folder or None; those
    that begin with `server_` are those of `kalm_rag.RerankerClient`, and apply with `server=`, where no others do; the
    others are those of `KaLMReranker`. Adapters with equal arguments and options share a loaded model; those that
    differ in options of the scorer share the cache.

    Attributes:
        query_max_length: tokens of a query that are read.
        system_prompt: the sentence before the instruction. Default: the model cards'.
        batch_size: rows per forward pass at most.
        batch_tokens: tokens per forward pass at most, padding included.
        control_tokens: `escape` or `allow` control tokens such as `<end_of_turn>` in passages and queries.
        prefill_memory: bytes of prefilled passages kept in memory, on the model's device, or `auto` for a share of what
            is free there.
        prefill_storage: `native`, or `int8` or `compact` for fewer bytes and slightly different scores.
        score_memory: bytes of remembered scores of pairs; 0 remembers none.
        refine: rank passages that are not prefilled in two passes; see `KaLMReranker`.
        long_passages: `truncate` passages of more than `max_length` tokens, or read them as `windows`; see
            `KaLMReranker`.
        window_tokens: tokens of a window at most. Default: `max_length`.
        window_overlap: tokens that a window repeats of the one before, at most. Default: an eighth of a window.
        max_windows: windows of a passage that are read.
        encode_in_background: encode passages that a call with a budget left out while nobody waits for the model.
        show_progress: True, False, or None for bars on long work when standard error is a terminal.
        token: hub token, if the model needs one. It is never written to JSON or YAML; a pickle holds it.
        local_files_only: never ask the hub, use what was downloaded.
        cache_memory: bytes of encoded passages kept in memory in front of the folder.
        cache_limit: bytes a folder may take; None leaves its limit as it is, 10 GB for a new one.
        cache_base_ratio: the ratio at which states are kept. Default: 4, or `ratio` if 4 does not divide it.
        cache_storage: `native`, or `int8` for fewer bytes and slightly different scores.
        cache_secret: authenticates entries of a folder that others can write to. It is never written to JSON or YAML; a
            pickle holds it.
        cache_read_only: write nothing to the folder.
        cache_remote: URL of a tier that several machines share behind the folder, see `PassageCache`. One with a
            password is never written to JSON or YAML: put it into `KALM_RAG_REMOTE_PASSWORD`.
        cache_remote_mode: `read-write`, or `read` to write nothing to it.
        cache_remote_timeout_ms: milliseconds that all reads of a query may wait for it together.
        cache_remote_prefilled: with `keep="prefilled"`, share the prefilled passages as well.
        cache_namespace: separates tenants that share it.
        cache_unauthenticated: share without `cache_secret`, where everybody who can write to it is trusted.
        server_api_key: the server's key. Default: the first one in `KALM_RAG_API_KEY`. It is never written to JSON or
            YAML; a pickle holds it.
        server_timeout: seconds that a ranking may take, with all of its attempts.
        server_retries: how often a request is sent again while the server is away or busy.
        server_on_failure: `raise`; or `keep-order`, which returns passages in the order given and without a score while
            the server is away.

    Raises:
        TypeError: an option has the wrong type; the message names it.
        ValueError: an option is out of range; the message names it, its value and the rule.
    """

    query_max_length: int = 512
    system_prompt: str = DEFAULT_SYSTEM_PROMPT
    batch_size: int = 32
    batch_tokens: int = 16384
    control_tokens: ControlTokens = "escape"
    prefill_memory: PrefillMemory = DEFAULT_PREFILL_MEMORY
    prefill_storage: PrefillStorage = "native"
    score_memory: int = DEFAULT_SCORE_MEMORY
    refine: bool = False
    long_passages: LongPassages = "truncate"
    window_tokens: int | None = None
    window_overlap: int | None = None
    max_windows: int = DEFAULT_MAX_WINDOWS
    encode_in_background: bool = True
    show_progress: bool | None = None
    token: str | bool | None = field(default=None, repr=False)
    local_files_only: bool = False
    cache_memory: int = DEFAULT_MEMORY
    cache_limit: int | None = None
    cache_base_ratio: int | None = None
    cache_storage: Storage = "native"
    cache_secret: str | bytes | None = field(default=None, repr=False)
    cache_read_only: bool = False
    cache_remote: str | None = field(default=None, repr=False)
    cache_remote_mode: RemoteMode = "read-write"
    cache_remote_timeout_ms: float | None = None
    cache_remote_prefilled: bool = False
    cache_namespace: str = DEFAULT_NAMESPACE
    cache_unauthenticated: bool = False
    server_api_key: str | None = field(default=None, repr=False)
    server_timeout: float = DEFAULT_TIMEOUT
    server_retries: int = DEFAULT_RETRIES
    server_on_failure: OnFailure = "raise"

    def __post_init__(self) -> None:
        of_scorer = {name: getattr(self, name) for name in _names() & {field.name for field in fields(Settings)}}
        # `max_length` is an argument of its own, so windows are compared with it when the reranker is made.
        settings = Settings(**of_scorer, max_length=sys.maxsize)
        checked: dict[str, Any] = {name: getattr(settings, name) for name in of_scorer}
        checked["cache_memory"] = check_bytes("cache_memory", self.cache_memory)
        if self.cache_limit is not None:
            checked["cache_limit"] = check_positive("cache_limit", self.cache_limit)
        if self.cache_base_ratio is not None:
            checked["cache_base_ratio"] = check_ratio("cache_base_ratio", self.cache_base_ratio)
        check_choice("cache_storage", self.cache_storage, get_args(Storage))
        check_secret("cache_secret", self.cache_secret)
        self._check_remote()
        checked["server_timeout"] = check_seconds("server_timeout", self.server_timeout)
        checked["server_retries"] = check_count("server_retries", self.server_retries)
        check_choice("server_on_failure", self.server_on_failure, get_args(OnFailure))
        check_key("server_api_key", self.server_api_key)
        for name in ("local_files_only", "cache_read_only", "cache_remote_prefilled", "cache_unauthenticated"):
            check_flag(name, getattr(self, name))
        if self.show_progress is not None:
            check_flag("show_progress", self.show_progress)
        if not isinstance(self.token, (str, bool, type(None))):
            # The message does not show it: it may hold the token.
            msg = f"token must be a string, True, False or None, got {type(self.token).__name__}"
            raise TypeError(msg)
        for name, value in checked.items():
            object.__setattr__(self, name, value)  # frozen, and a number may have come as one of numpy's

    def _check_remote(self) -> None:
        if self.cache_remote is not None:
            read_address(self.cache_remote, "cache_remote")
        check_choice("cache_remote_mode", self.cache_remote_mode, get_args(RemoteMode))
        check_timeout("cache_remote_timeout_ms", self.cache_remote_timeout_ms)
        check_namespace("cache_namespace", self.cache_namespace)

    @classmethod
    def of(cls, given: OptionsLike) -> Options:
        """Return options as given, or made of a mapping; None is the defaults.

        Raises:
            ValueError: a name is unknown, or a value is out of range.
            TypeError: it is neither, or a value has the wrong type.
        """
        if given is None:
            return cls()
        if isinstance(given, Options):
            return given
        if not isinstance(given, Mapping):
            msg = f"options must be a kalm_rag.Options or a mapping, got {type(given).__name__}: {given!r:.80}"
            raise TypeError(msg)
        for name in given:
            if name not in _names():
                near = difflib.get_close_matches(str(name), _names(), n=1)
                advice = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(sorted(_names()))}"
                if name in _ARGUMENTS:
                    advice = "it is an argument of its own, outside of options"
                msg = f"unknown option {name!r:.80}: {advice}"
                raise ValueError(msg)
        return cls(**{name: _unwrapped(value) for name, value in given.items()})

    def of_reranker(self) -> dict[str, Any]:
        """Return the arguments of `KaLMReranker` among them."""
        return {name: getattr(self, name) for name in sorted(_names()) if not name.startswith((_CACHE, SERVER))}

    def of_cache(self) -> dict[str, Any]:
        """Return the arguments of `PassageCache` among them."""
        return {name.removeprefix(_CACHE): getattr(self, name) for name in sorted(_names()) if name.startswith(_CACHE)}

    def of_client(self) -> dict[str, Any]:
        """Return the arguments of `RerankerClient` among them."""
        return {name.removeprefix(SERVER): getattr(self, name) for name in sorted(_names()) if name.startswith(SERVER)}

    def changed(self) -> dict[str, Any]:
        """Return what differs from the defaults, by name."""
        default = Options()
        found = {name: getattr(self, name) for name in sorted(_names())}
        return {name: value for name, value in found.items() if value != getattr(default, name)}

    def wrapped(self, wrap: Callable[[Any], Any]) -> dict[str, Any] | None:
        """Return what differs from the defaults, or None, with credentials wrapped so that they are not shown."""
        found = self.changed()
        hidden = (*_CREDENTIALS, *self._remote_with_credentials())
        secret = {name: wrap(found[name]) for name in hidden if isinstance(found.get(name), (str, bytes))}
        return (found | secret) or None

    def serialised(self) -> dict[str, Any] | None:
        """Return the options as JSON and YAML hold them: what differs from the defaults, or None.

        Raises:
            ValueError: they hold a credential.
        """
        found = self.changed()
        for name in (*_CREDENTIALS, *self._remote_with_credentials()):
            if isinstance(found.get(name), (str, bytes)):
                way_out = _WAYS_OUT[name]
                msg = f"options.{name} is a credential and is never serialised; leave it out and {way_out} instead"
                raise ValueError(msg)
        return found or None

    def _remote_with_credentials(self) -> tuple[str, ...]:
        remote = self.cache_remote
        return ("cache_remote",) if remote is not None and read_address(remote).given_credentials else ()


OptionsLike: TypeAlias = Options | Mapping[str, Any] | None
"""What an adapter takes as its options."""

_ARGUMENTS = frozenset(
    {
        "model",
        "revision",
        "lora",
        "cache",
        "keep",
        "server",
        "device",
        "dtype",
        "max_length",
        "ratio",
        "instruction",
        "top_n",
        "top_k",
    }
    | {"score_threshold", "calibrated"}
)


def _unwrapped(value: Any) -> Any:
    """A credential may come wrapped, as in pydantic's `SecretStr` or Haystack's `Secret`."""
    for name in ("get_secret_value", "resolve_value"):
        if hasattr(value, name):
            return getattr(value, name)()
    return value


def _names() -> frozenset[str]:
    return frozenset(option.name for option in fields(Options))
