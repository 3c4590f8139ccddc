"""One loaded model for all that name the same one: what the framework adapters stand on."""

from __future__ import annotations

import threading
import weakref
from pathlib import Path
from typing import Any

from kalm_rag.cache import PassageCache
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
    place = str(Path(cache).expanduser().absolute()) if isinstance(cache, Path) else cache
    mark = id(place) if isinstance(place, PassageCache) or not isinstance(place, (str, type(None))) else place
    key = (str(model), mark, *sorted((name, str(value)) for name, value in options.items() if value is not None))
    with _lock:
        found = _instances.get(key)
        if found is None:
            found = _instances[key] = KaLMReranker(model, cache=cache, **options)
        return found


class SharedHandle:
    """What an adapter keeps of a shared reranker: nothing until it is used, and nothing in a copy or a pickle."""

    def __init__(self) -> None:
        self._held: KaLMReranker | None = None

    def get(self, model: str | Path, **options: Any) -> KaLMReranker:
        """The shared reranker for these arguments, kept alive by this handle."""
        self._held = shared_reranker(model, **options)
        return self._held

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedHandle:
        return SharedHandle()

    def __reduce__(self) -> tuple[type[SharedHandle], tuple[()]]:
        return SharedHandle, ()
