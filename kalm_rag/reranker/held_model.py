"""A model and its cache: made of arguments, loaded at first use, copied, pickled and closed."""

from __future__ import annotations

import gc
import threading
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from kalm_rag.cache import PassageCache
from kalm_rag.model.checkpoint import Checkpoint, find_checkpoint
from kalm_rag.settings import Settings, base_ratio
from kalm_rag.utils import forks
from kalm_rag.utils.async_calls import AsyncCalls
from kalm_rag.utils.checks import check_dtype, check_flag

if TYPE_CHECKING:
    from typing_extensions import Self

    from kalm_rag.scorer import Scorer

_CLOSING_SECONDS = 10.0
"""What passages that wait in the background get when the model is closed."""


class HeldModel:
    """A model that loads at the first call that needs it, and the cache that it uses.

    A copy or a pickle is made of the arguments and loads a model of its own.

    Args:
        settings: how passages and queries become scores.
        arguments: those of the class that inherits from this one, by name; a copy is made of them.

    Attributes:
        model: as given.
        dtype: as given.
        settings: how passages and queries become scores.
        cache: the `PassageCache` in use.
        owns_cache: whether `close` closes the cache: True for one that was made here.
    """

    def __init__(self, settings: Settings, arguments: dict[str, Any]) -> None:
        self.settings = settings
        self._arguments = arguments
        self.model: str | Path = arguments["model"]
        cache = arguments["cache"]
        self.owns_cache = cache is None or isinstance(cache, (str, Path))
        self.cache = (
            cache if isinstance(cache, PassageCache) else PassageCache(cache, base_ratio=base_ratio(settings.ratio))
        )
        self.dtype = arguments["dtype"]
        if self.dtype is not None:
            check_dtype(self.dtype)
        self._scorer: Scorer | None = None
        self.after_fork_in_child()
        forks.watch(self)

    def after_fork_in_child(self) -> None:
        """Replace locks and threads, which did not survive; the model did."""
        self._lock = threading.RLock()  # held while the model loads
        self._calls = AsyncCalls()

    def __copy__(self) -> Self:
        """Return an instance with the same arguments and a model of its own."""
        return self._like(self._arguments, self.owns_cache)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return a copy as `__copy__` does."""
        return self._like(self._arguments, self.owns_cache)

    def __reduce__(self) -> tuple[Any, ...]:
        return self._like, (self._arguments, self.owns_cache)

    @classmethod
    def _like(cls, arguments: dict[str, Any], owns_cache: bool) -> Self:
        made = cls(**arguments)
        made.owns_cache = owns_cache
        return made

    def checkpoint(self) -> Checkpoint:
        """Find the model's files, downloading them if necessary, without loading them.

        Raises:
            CheckpointError: nothing usable is there.
        """
        named = {name: self._arguments[name] for name in ("revision", "token", "local_files_only", "lora")}
        return find_checkpoint(self.model, **named)

    def load(self, *, encoder: bool = True) -> Self:
        """Load the model now instead of at first use, and return this instance.

        It measures for about half a second what encoding and scoring cost here, so that the first call with `budget_ms`
        knows.

        Args:
            encoder: load the encoder's layers too. Without it they are loaded when the first passage must be encoded,
                as they are if `load` is not called: a process whose passages are all encoded already never needs
                them. Until then, calls with `budget_ms` leave out passages that are not encoded.

        Raises:
            CheckpointError: the model cannot be found or used.
            ValueError: no such device or dtype.
        """
        scorer = self.scorer
        scorer.encoder_later = not check_flag("encoder", encoder)
        scorer.calibrate(self.settings.instruction, self.settings.ratio, encoder=encoder)
        return self

    @property
    def scorer(self) -> Scorer:
        """The scorer of the loaded model; loads it if necessary. Its interface may change between releases."""
        scorer = self._scorer
        if scorer is not None:
            return scorer
        with self._lock:
            if self._scorer is None:
                with forks.native():  # a fork in the middle of an import would leave its lock held in the child
                    from kalm_rag.scorer import Scorer

                self._scorer = Scorer.load(
                    self.checkpoint(),
                    settings=self.settings,
                    cache=self.cache,
                    device=self._arguments["device"],
                    dtype=self.dtype,
                )
            return self._scorer

    def close(self) -> None:
        """Free the model's memory, once the calls that are running have ended. A later call loads it again.

        Passages that wait to be encoded in the background get ten seconds; what is left is given up, and logged.
        A cache that was made here is written out and closed; a cache or store that was handed in stays open.
        """
        if self._scorer is not None:
            self._scorer.background.close(_CLOSING_SECONDS)
        if self.owns_cache:
            self.cache.close()
        with self._lock:
            if self._scorer is None:
                return
            on_cuda = self._scorer.loaded.device.type == "cuda"
            self._scorer = None
        gc.collect()
        if on_cuda:
            import torch

            torch.cuda.empty_cache()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
