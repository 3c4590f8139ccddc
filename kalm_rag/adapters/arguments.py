"""Checks the arguments that the adapters of all frameworks have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias, get_args

from kalm_rag.adapters.options import SERVER, Options, OptionsLike
from kalm_rag.cache import PassageCache, Store
from kalm_rag.cache.passage_cache import Keep
from kalm_rag.client.server import check_url
from kalm_rag.latency.limit import check_milliseconds, check_on_unknown
from kalm_rag.model.checkpoint import clean_token
from kalm_rag.thresholds import ThresholdLike, ThresholdProfile, check_threshold
from kalm_rag.utils.checks import check_choice, check_dtype, check_flag, check_positive, check_text
from kalm_rag.utils.paths import DEFAULT

CacheLike: TypeAlias = str | Path | PassageCache | Store | None
"""What an adapter takes as its cache: a folder, a ready-made cache or store, or None for memory only."""

DEFAULT_KEEP: Keep = "states"
"""What a folder keeps unless told otherwise, as in `PassageCache`."""


def check_cache(cache: object, keep: object, options: OptionsLike = None) -> None:
    """Check that `cache` is a cache, and that `keep` and the cache's options apply to it.

    Raises:
        ValueError: the message names the rule, what was given, and the way out.
    """
    check_choice("keep", keep, get_args(Keep))
    if not isinstance(cache, CacheLike):
        msg = (
            f"cache must be a folder, a PassageCache, a store or None, got {type(cache).__name__}: {cache!r:.80}; "
            "leave it out for the user's cache folder"
        )
        raise ValueError(msg)
    if not _is_ready_made(cache):
        return
    if keep != DEFAULT_KEEP:
        msg = (
            f"keep= applies only when cache= is a folder, got keep={keep!r}, cache={cache!r:.80}; "
            f"pass cache=PassageCache(..., keep={keep!r}) instead"
        )
        raise ValueError(msg)
    for name in Options.of(options).changed():
        if name.startswith("cache_"):
            msg = (
                f"options.{name} applies only when cache= is a folder or None, got cache={cache!r:.80}; "
                f"pass cache=PassageCache(..., {name.removeprefix('cache_')}=...) instead"
            )
            raise ValueError(msg)


_OF_A_MODEL: dict[str, object] = {
    "revision": None,
    "lora": None,
    "cache": DEFAULT,
    "keep": DEFAULT_KEEP,
    "device": None,
    "dtype": None,
    "max_length": 1024,
}
"""Arguments that only a model in this process has, and their defaults."""


def check_server(server: str | None, options: OptionsLike, given: Mapping[str, object]) -> None:
    """Check that nothing is given that a server decides, or that applies only to a server where there is none.

    Args:
        server: the address, or None.
        options: of the adapter.
        given: its arguments `revision`, `lora`, `cache`, `keep`, `device`, `dtype` and `max_length`.

    Raises:
        ValueError: the message names the argument or the option.
    """
    for name in Options.of(options).changed():
        if server is None and name.startswith(SERVER):
            msg = f"options.{name} applies only with server=, got server=None; give the address of `kalm-rag serve`"
            raise ValueError(msg)
        if server is not None and not name.startswith(SERVER):
            msg = f"options.{name} does not apply with server=, which has settings of its own; leave it out"
            raise ValueError(msg)
    for name, default in _OF_A_MODEL.items():
        if server is not None and given[name] != default:
            msg = (
                f"{name} does not apply with server=, got {name}={given[name]!r:.80}; leave it out, and give it to "
                "`kalm-rag serve`"
            )
            raise ValueError(msg)


def check_arguments(given: Mapping[str, object]) -> dict[str, Any]:
    """Check the arguments of an adapter, or of one of its calls, by name; numbers become Python's own types.

    Arguments that only one framework has are passed through.

    Raises:
        ValueError, TypeError: the message names the argument, what was given, and the rule.
    """
    return {name: _CHECKS[name](name, value) if name in _CHECKS else value for name, value in given.items()}


def _check_model(name: str, value: object) -> object:
    if not isinstance(value, Path) and not check_text(name, value).strip():
        msg = f"{name} must be an alias, a folder or a hub id, got {value!r}; nano is the default"
        raise ValueError(msg)
    return value


def _check_folder(name: str, value: object) -> object:
    if not isinstance(value, Path) and not check_text(name, value).strip():
        msg = f"{name} must be the folder of an adapter, got {value!r}; leave it out for none"
        raise ValueError(msg)
    return value


def _check_threshold(name: str, value: Any) -> ThresholdLike:
    """A path stays a path: each call reads the file, and what is saved with a component is its name."""
    found = check_threshold(name, value)
    return str(value) if isinstance(value, (str, Path)) else found


def _check_dtype(name: str, value: object) -> object:
    check_dtype(check_text(name, value))
    return value


def _or_none(check: Callable[[str, Any], Any]) -> Callable[[str, Any], Any]:
    return lambda name, value: None if value is None else check(name, value)


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "model": _check_model,
    "revision": _or_none(check_text),
    "server": _or_none(check_url),
    "lora": _or_none(_check_folder),
    "device": _or_none(check_text),
    "dtype": _or_none(_check_dtype),
    "token": lambda _, value: clean_token(value),
    "max_length": check_positive,
    "ratio": _or_none(check_positive),
    "instruction": _or_none(check_text),
    "top_n": _or_none(check_positive),
    "top_k": _or_none(check_positive),
    "score_threshold": _or_none(_check_threshold),
    "calibrated": check_flag,
    "budget_ms": _or_none(check_milliseconds),
    "on_unknown": _or_none(check_on_unknown),
    "keep_retrieval_score": check_flag,
    "options": lambda _, value: Options.of(value),
    "embedding_separator": check_text,
}


def serialisable_cache(cache: CacheLike) -> str | None:
    """Return the cache as a serialised component stores it: a folder or None.

    Raises:
        ValueError: it is a ready-made cache, which belongs to this process.
    """
    if isinstance(cache, (str, Path)):
        return str(cache)
    if cache is None:
        return None
    msg = (
        "only the folder of a cache can be serialised with a component, got "
        f"cache={cache!r:.80}; give a folder, and keep= for what it keeps"
    )
    raise ValueError(msg)


def serialisable_threshold(threshold: ThresholdLike | None) -> float | str | None:
    """Return the threshold as a serialised component stores it: a number, the path of a profile, or None.

    Raises:
        ValueError: it is a profile without a path.
    """
    if isinstance(threshold, ThresholdProfile):
        msg = (
            "only a number or the path of a profile can be serialised with a component, got "
            f"score_threshold={threshold!r:.80}; save(path) the profile and give score_threshold= the path"
        )
        raise ValueError(msg)
    return str(threshold) if isinstance(threshold, Path) else threshold


def _is_ready_made(cache: CacheLike) -> bool:
    """Whether a cache is an object of its own rather than a folder or None."""
    return cache is not None and not isinstance(cache, (str, Path))
