"""Makes the store that the first argument of a `PassageCache` asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kalm_rag.cache.disk import DiskStore
from kalm_rag.cache.store import Store
from kalm_rag.utils.paths import DEFAULT, passages_dir, user_path


def open_store(where: Any, limit: int | None, read_only: bool) -> Store | None:
    """Return a folder's store, a store as it was given, or None; nothing is opened yet.

    Args:
        where: as in `PassageCache`.
        limit: bytes that a folder may take.
        read_only: write nothing to a folder.

    Raises:
        TypeError: it is none of them.
    """
    if where is None:
        return None
    if isinstance(where, (str, Path)):
        folder = passages_dir() if where == DEFAULT else user_path(where, "cache")
        return None if folder is None else DiskStore(folder, limit=limit, read_only=read_only)
    if isinstance(where, Store):
        return where
    msg = f"the cache must be a folder, a store or None, got {type(where).__name__}: {where!r:.80}"
    raise TypeError(msg)
