"""Gives memory back that the allocator would keep: no two batches of a server are alike."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import sys
from collections.abc import AsyncIterator, Callable

_ARENAS = 2
_M_ARENA_MAX = -8
"""`M_ARENA_MAX` of glibc's `mallopt`."""
_SECONDS = 5.0


def keep_little() -> None:
    """Bound what the allocator keeps in this process, before threads start.

    It changes nothing that a user has set, and nothing where there is no glibc.
    """
    mallopt = _of_glibc("mallopt")
    if mallopt is not None and "MALLOC_ARENA_MAX" not in os.environ:
        mallopt(_M_ARENA_MAX, _ARENAS)


@contextlib.asynccontextmanager
async def giving_back() -> AsyncIterator[None]:
    """Every few seconds, give free memory back to the system while the block runs."""
    trim = _of_glibc("malloc_trim")
    task = None if trim is None else asyncio.create_task(_trim(trim))
    try:
        yield
    finally:
        if task is not None:
            task.cancel()


async def _trim(trim: Callable[[int], int]) -> None:
    while True:
        await asyncio.sleep(_SECONDS)
        await asyncio.to_thread(trim, 0)


def _of_glibc(name: str) -> Callable[..., int] | None:
    if not sys.platform.startswith("linux"):
        return None
    try:
        found: Callable[..., int] = getattr(ctypes.CDLL(None), name)
    except (OSError, AttributeError):
        return None
    return found
