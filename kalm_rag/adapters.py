"""Shares one loaded model between all adapters that name the same one."""

from __future__ import annotations

import hashlib
import os
import threading
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias, get_args

from kalm_rag.cache import PassageCache, Store
from kalm_rag.cache.passage_cache import Keep
from kalm_rag.model.checkpoint import clean_token
from kalm_rag.reranker import KaLMReranker
from kalm_rag.utils.checks import check_choice, check_dtype, check_positive, check_share, check_text
from kalm_rag.utils.paths import DEFAULT, passages_dir, user_path

CacheLike: TypeAlias = str | Path | PassageCache | Store | None
"""What an adapter takes as its cache: a folder, a ready-made cache or store, or None for memory only."""

DEFAULT_KEEP: Keep = "states"
"""What a folder keeps unless told otherwise, as in `PassageCache`."""

_instances: weakref.WeakValueDictionary[tuple[Any, ...], KaLMReranker] = weakref.WeakValueDictionary()
_lock = threading.Lock()
"""Held while a reranker is looked up or made, which loads nothing."""


def _renew_lock() -> None:
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


def check_cache(cache: object, keep: object) -> None:
    """Check that `cache` is a cache, and that `keep` applies to it.

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
    if keep != DEFAULT_KEEP and _ready_made(cache):
        msg = (
            f"keep= applies only when cache= is a folder, got keep={keep!r}, cache={cache!r:.80}; "
            f"pass cache=PassageCache(..., keep={keep!r}) instead"
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


def _check_share(name: str, value: Any) -> float:
    check_share(name, value)
    return float(value)


def _check_flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        msg = f"{name} must be True or False, got {value!r:.80}"
        raise TypeError(msg)
    return value


def _check_dtype(name: str, value: object) -> object:
    check_dtype(check_text(name, value))
    return value


def _or_none(check: Callable[[str, Any], Any]) -> Callable[[str, Any], Any]:
    return lambda name, value: None if value is None else check(name, value)


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "model": _check_model,
    "revision": _or_none(check_text),
    "device": _or_none(check_text),
    "dtype": _or_none(_check_dtype),
    "token": lambda _, value: clean_token(value),
    "max_length": check_positive,
    "ratio": _or_none(check_positive),
    "instruction": _or_none(check_text),
    "top_n": _or_none(check_positive),
    "top_k": _or_none(check_positive),
    "score_threshold": _or_none(_check_share),
    "keep_retrieval_score": _check_flag,
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


def _ready_made(cache: object) -> bool:
    return cache is not None and not isinstance(cache, (str, Path))


def shared_reranker(
    model: str | Path, *, cache: CacheLike = DEFAULT, keep: Keep = DEFAULT_KEEP, **options: Any
) -> KaLMReranker:
    """Return this process's reranker for these arguments; the first call makes it.

    It lives as long as somebody holds it; the model loads at first use.

    Args:
        model: as in `KaLMReranker`.
        cache: as in `KaLMReranker`; two equal folders are one cache, two cache objects are two.
        keep: as in `PassageCache`, for a folder. Different values share the folder but not the reranker.
        options: further arguments of `KaLMReranker`.

    Raises:
        ValueError, TypeError: an argument is wrong.
    """
    check_cache(cache, keep)
    key = _key(model, cache, keep, options)
    with _lock:
        found = _instances.get(key)
        if found is None:
            found = _instances[key] = _made(model, cache, keep, options)
        return found


def _made(model: str | Path, cache: CacheLike, keep: Keep, options: dict[str, Any]) -> KaLMReranker:
    reranker = KaLMReranker(model, cache=cache, **options)
    if keep == DEFAULT_KEEP or not (cache is None or isinstance(cache, (str, Path))):
        return reranker
    # Replace the cache that the reranker made for itself, which nothing has opened, by one with this `keep`.
    own = PassageCache(cache, base_ratio=reranker.cache.base_ratio, keep=keep)
    reranker = KaLMReranker(model, cache=own, **options)
    reranker.owns_cache = True
    return reranker


def _key(model: str | Path, cache: CacheLike, keep: Keep, options: dict[str, Any]) -> tuple[Any, ...]:
    place: Any = cache
    if cache == DEFAULT:
        place = str(passages_dir())
    elif isinstance(cache, (str, Path)):
        place = str(user_path(cache, "cache"))
    elif cache is not None:
        place = id(cache)
    shown = {name: _unreadable(value) if name == "token" else str(value) for name, value in options.items()}
    return (str(model), place, keep, *sorted(shown.items()))


def _unreadable(token: object) -> str:
    return hashlib.sha256(str(token).encode()).hexdigest()


class SharedHandle:
    """Holds an adapter's shared rerankers; it is empty until one is used, and in deep copies and pickles.

    A shallow copy shares the handle; it may name another model, so the handle keeps one for each set of arguments.
    """

    def __init__(self) -> None:
        self._held: dict[tuple[Any, ...], KaLMReranker] = {}

    def get(
        self, model: str | Path, *, cache: CacheLike = DEFAULT, keep: Keep = DEFAULT_KEEP, **options: Any
    ) -> KaLMReranker:
        """Return the shared reranker for these arguments and keep it alive; options that are None are left out."""
        given = {name: value for name, value in options.items() if value is not None}
        found = shared_reranker(model, cache=cache, keep=keep, **given)
        self._held[_key(model, cache, keep, given)] = found
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedHandle:
        return SharedHandle()

    def __reduce__(self) -> tuple[type[SharedHandle], tuple[()]]:
        return SharedHandle, ()
