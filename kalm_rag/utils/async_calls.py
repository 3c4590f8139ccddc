"""Runs blocking calls for asynchronous programs, in threads of their own."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from kalm_rag.utils.turns import stop_with

T = TypeVar("T")

_CALLS = 16
"""Calls of a kind that run side by side; further ones wait."""


class AsyncCalls:
    """Threads for each kind of call, so that many calls of one kind do not hold up another. They start when used."""

    def __init__(self) -> None:
        self._threads: dict[str, ThreadPoolExecutor] = {}
        self._lock = threading.Lock()  # held for no longer than a look-up: `run` takes it on the event loop

    async def run(self, kind: str, action: Callable[..., T], *arguments: Any) -> T:
        """Call `action` in a thread, in this context. If the task is cancelled, the call ends at its next batch."""
        with self._lock:
            threads = self._threads.get(kind)
            if threads is None:
                threads = ThreadPoolExecutor(_CALLS, thread_name_prefix=f"kalm-rag-{kind}")
                self._threads[kind] = threads
        context, stop = contextvars.copy_context(), threading.Event()
        context.run(stop_with, stop)
        call = partial(context.run, action, *arguments)
        try:
            return await asyncio.get_running_loop().run_in_executor(threads, call)
        except asyncio.CancelledError:
            stop.set()
            raise
