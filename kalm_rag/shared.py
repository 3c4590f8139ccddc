"""One loaded model for all that name the same one: what the framework adapters stand on."""

from __future__ import annotations

import hashlib
import os
import threading
import weakref
from pathlib import Path
from typing import Any

from kalm_rag.paths import default_cache_dir
from kalm_rag.reranker import KaLMReranker

_instances: weakref.WeakValueDictionary[tuple[Any, ...], KaLMReranker] = weakref.WeakValueDictionary()
_lock = threading.Lock()


def shared_reranker(model: str | Path, *, cache: Any = "default", **options: Any) -> KaLMReranker:
    """The reranker of this process for these arguments, made at the first call.

    It lives as long as somebody holds it; the model loads at first use, as always.

    Args:
        model: as in `KaLMReranker`.
        cache: as in `KaLMReranker`; two equal folders are one cache, two cache objects are two.
        options: further arguments of `KaLMReranker`.

    Raises:
        ValueError, TypeError: an argument is wrong.
    """
    key = _key(model, cache, options)
    with _lock:
        found = _instances.get(key)
        if found is None:
            found = _instances[key] = KaLMReranker(model, cache=cache, **options)
        return found


def _key(model: str | Path, cache: Any, options: dict[str, Any]) -> tuple[Any, ...]:
    place: Any = cache
    if cache == "default":
        place = str(default_cache_dir() / "passages")
    elif isinstance(cache, (str, Path)):
        place = str(Path(os.path.expandvars(cache)).expanduser().absolute())
    elif cache is not None:
        place = id(cache)
    shown = {name: _unreadable(value) if name == "token" else str(value) for name, value in options.items()}
    return (str(model), place, *sorted(shown.items()))


def _unreadable(token: object) -> str:
    return hashlib.sha256(str(token).encode()).hexdigest()


class SharedHandle:
    """What an adapter keeps of shared rerankers: none until one is used, and none in a deep copy or a pickle.

    A shallow copy shares the handle; it may name another model, so the handle keeps one for each set of arguments.
    """

    def __init__(self) -> None:
        self._held: dict[tuple[Any, ...], KaLMReranker] = {}

    def get(self, model: str | Path, *, cache: Any = "default", **options: Any) -> KaLMReranker:
        """The shared reranker for these arguments, kept alive by this handle; an option that is None is left out."""
        given = {name: value for name, value in options.items() if value is not None}
        found = shared_reranker(model, cache=cache, **given)
        self._held[_key(model, cache, given)] = found
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedHandle:
        return SharedHandle()

    def __reduce__(self) -> tuple[type[SharedHandle], tuple[()]]:
        return SharedHandle, ()
