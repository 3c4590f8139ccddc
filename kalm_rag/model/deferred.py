"""The part of a model that is loaded when it is first needed."""

from __future__ import annotations

import threading
from collections.abc import Callable

from kalm_rag.utils import forks


class Deferred:
    """Runs something once, at the first call of `ready`, in whichever thread that is; the others wait for it.

    Args:
        load: what is run; if it raises, the next call runs it again. None if nothing is left to do.
    """

    def __init__(self, load: Callable[[], None] | None = None) -> None:
        self._load = load
        self.after_fork_in_child()
        forks.watch(self)

    def after_fork_in_child(self) -> None:
        """Replace the lock, which another thread may have held; a fork waits until loading has ended."""
        self._lock = threading.Lock()

    @property
    def is_ready(self) -> bool:
        """Whether nothing is left to do."""
        return self._load is None

    def ready(self) -> None:
        """Return once it has run.

        Raises:
            CheckpointError: a file was overwritten, or cannot be read any more.
        """
        if self._load is None:
            return
        with self._lock, forks.native():
            if self._load is not None:
                self._load()
                self._load = None
