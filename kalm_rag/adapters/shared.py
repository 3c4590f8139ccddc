"""Shares one loaded model between all adapters that name the same one."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import weakref
from pathlib import Path
from typing import Any, TypeAlias

from kalm_rag.adapters.arguments import DEFAULT_KEEP, CacheLike, check_cache
from kalm_rag.adapters.options import Options
from kalm_rag.cache import PassageCache
from kalm_rag.cache.passage_cache import Keep
from kalm_rag.client import RerankerClient
from kalm_rag.model.lora import CONFIG, WEIGHTS
from kalm_rag.reranker import KaLMReranker
from kalm_rag.settings import base_ratio
from kalm_rag.utils.checks import check_ratio
from kalm_rag.utils.paths import DEFAULT, passages_dir, user_path

AnyReranker: TypeAlias = KaLMReranker | RerankerClient
"""What an adapter ranks with: a model in this process, or a server."""

_rerankers: weakref.WeakValueDictionary[tuple[Any, ...], KaLMReranker] = weakref.WeakValueDictionary()
_caches: weakref.WeakValueDictionary[tuple[Any, ...], PassageCache] = weakref.WeakValueDictionary()
_clients: weakref.WeakValueDictionary[tuple[Any, ...], RerankerClient] = weakref.WeakValueDictionary()
_handles: weakref.WeakSet[SharedHandle] = weakref.WeakSet()
_lock = threading.Lock()
"""Held while one of these is looked up or changed, which loads nothing."""


def _renew_lock() -> None:
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


def shared_reranker(
    model: str | Path,
    *,
    cache: CacheLike = DEFAULT,
    keep: Keep = DEFAULT_KEEP,
    options: Options | None = None,
    **arguments: Any,
) -> KaLMReranker:
    """Return this process's reranker for these arguments; the first call makes it.

    It lives as long as somebody holds it; the model loads at first use.

    Args:
        model: as in `KaLMReranker`.
        cache: as in `KaLMReranker`; two equal folders are one cache, two cache objects are two.
        keep: as in `PassageCache`, for a folder. Different values share the folder but not the reranker.
        options: further options of the scorer and of the cache.
        arguments: further arguments of `KaLMReranker`; they override options.

    Raises:
        ValueError, TypeError: an argument is wrong.
    """
    options = options or Options()
    check_cache(cache, keep, options)
    ratio = arguments.get("ratio", 4)
    of_cache = options.of_cache()
    if of_cache["base_ratio"] is None:
        of_cache["base_ratio"] = base_ratio(1 if ratio is None else check_ratio("ratio", ratio))
    of_reranker = {**options.of_reranker(), **arguments}
    where = (_place(cache), keep, *_comparable(of_cache))
    lora = {"lora": _lora_place(arguments.get("lora"))}
    key = (_model_place(model), where, *_comparable({**of_reranker, **lora}))
    with _lock:
        found = _rerankers.get(key)
        if found is None:
            if cache is None or isinstance(cache, (str, Path)):
                own = _caches.get(where)
                if own is None:
                    own = _caches[where] = PassageCache(cache, keep=keep, **of_cache)
                found = KaLMReranker(model, cache=own, **of_reranker)
                found.owns_cache = True
            else:
                found = KaLMReranker(model, cache=cache, **of_reranker)
            _rerankers[key] = found
        return found


def shared_client(
    server: str, model: str | Path, *, options: Options | None = None, ratio: int | None = None
) -> RerankerClient:
    """Return this process's client for these arguments; the first call makes it, and connects to nothing.

    Args:
        server: as in `RerankerClient`.
        model: as in `RerankerClient`.
        options: holds its further arguments.
        ratio: as in `RerankerClient`.

    Raises:
        ValueError, TypeError: an argument is wrong.
    """
    arguments = {**(options or Options()).of_client(), "model": str(model), "ratio": ratio}
    key = (server, *_comparable(arguments))
    with _lock:
        found = _clients.get(key)
        if found is None:
            found = _clients[key] = RerankerClient(server, **arguments)
        return found


def _place(cache: CacheLike) -> Any:
    """Return what tells a place from others."""
    if cache == DEFAULT:
        return str(passages_dir())
    if isinstance(cache, (str, Path)):
        return str(user_path(cache, "cache"))
    return None if cache is None else id(cache)


def _model_place(model: str | Path) -> str:
    """Return what tells a model from others: the same relative path may be another folder later."""
    return str(Path(model).absolute()) if Path(model).is_dir() else str(model)


def _lora_place(lora: str | Path | None) -> list[str]:
    """Return what tells an adapter from others, and from what was in its folder before it was tuned again."""
    if lora is None:
        return []
    folder = user_path(lora, "lora")
    found = [str(folder)]
    for name in (CONFIG, WEIGHTS):
        with contextlib.suppress(OSError):  # loading it says what is wrong
            status = (folder / name).stat()
            found.append(f"{name} {status.st_ino} {status.st_size} {status.st_mtime_ns}")
    return found


def _comparable(arguments: dict[str, Any]) -> list[tuple[str, str]]:
    """Return arguments in a form that can be compared and shown; credentials cannot be read from it."""
    hidden = ("token", "secret", "remote", "api_key")
    return sorted((name, _digest(value) if name in hidden else str(value)) for name, value in arguments.items())


def _digest(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()


class SharedHandle:
    """Holds an adapter's shared rerankers; it is empty until one is used, and in deep copies and pickles.

    A shallow copy shares the handle; it may name another model, so the handle keeps one for each set of arguments.
    """

    def __init__(self) -> None:
        self._held: list[AnyReranker] = []
        with _lock:
            _handles.add(self)

    def get(
        self,
        model: str | Path,
        *,
        cache: CacheLike = DEFAULT,
        keep: Keep = DEFAULT_KEEP,
        options: Options | None = None,
        server: str | None = None,
        **arguments: Any,
    ) -> AnyReranker:
        """Return the shared reranker for these arguments and keep it alive; arguments that are None are left out.

        With `server`, it is a client, whose other arguments are in `ratio` and `options`.
        """
        found: AnyReranker
        if server is None:
            given = {name: value for name, value in arguments.items() if value is not None}
            found = shared_reranker(model, cache=cache, keep=keep, options=options, **given)
        else:
            found = shared_client(server, model, options=options, ratio=arguments.get("ratio"))
        with _lock:
            if not any(held is found for held in self._held):
                self._held.append(found)
        return found

    def close(self) -> None:
        """Let go of the rerankers; those that no other adapter holds free their model, and all write out their cache.

        The next use loads them again.
        """
        with _lock:
            held, self._held = self._held, []
            others = {id(found) for handle in _handles for found in handle._held}
        for found in held:
            if id(found) not in others:
                found.close()
            elif isinstance(found, KaLMReranker):
                found.cache.flush()

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedHandle:
        return SharedHandle()

    def __reduce__(self) -> tuple[type[SharedHandle], tuple[()]]:
        return SharedHandle, ()
