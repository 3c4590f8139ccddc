"""Gets one value for each passage: look up, verify, count, promote, make what is missing, keep.

`StatesSource` and `PassageKVSource` are the two sources. They share the code here: `CachedSource` decides when the
model makes values, and `ValueCache` converts between values and frames of the cache.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Generic, TypeAlias, TypeVar

from kalm_rag.cache import PassageCache
from kalm_rag.cache.frame import Frame
from kalm_rag.cache.spaces import Kind, Space
from kalm_rag.model.loading import LoadedModel
from kalm_rag.utils.costs import Work
from kalm_rag.utils.recording import add_count, add_sources, rename_sources, timed
from kalm_rag.utils.turns import Turns, time_left

R = TypeVar("R")
"""What a request fixes besides the passages."""
W = TypeVar("W")
"""What the model makes a value from."""
T = TypeVar("T")

Patience: TypeAlias = Callable[[Sequence[str]], tuple[float, float]]
"""Tells of missing keys what computing their values would take, and how many seconds the call has left."""

_CHARACTERS = 3.5
"""Characters of a token, near enough to tell how long a shared tier is worth waiting for."""


class ValueCache(ABC, Generic[R, T]):
    """Values of one kind in a `PassageCache`.

    Args:
        kind: what the cache calls them.
        cache: what keeps them.
    """

    def __init__(self, kind: Kind, cache: PassageCache) -> None:
        self.kind: Kind = kind
        self.cache = cache

    @abstractmethod
    def get_many(self, keys: Sequence[str], request: R, patience: Patience | None = None) -> dict[str, T]:
        """Return cached values by key, and count; missing keys are left out.

        Args:
            keys: of the passages.
            request: what else the values depend on.
            patience: as in `PassageCache.get_many`.
        """

    @abstractmethod
    def recall(self, keys: Sequence[str], request: R) -> dict[str, T]:
        """Return values in memory by key, without counting."""

    @abstractmethod
    def put_in_memory(self, made: Mapping[str, T], request: R) -> tuple[dict[str, T], dict[str, bytes]]:
        """Keep values in memory; this never waits.

        Returns:
            The values as a later call will get them, and what `put_in_store` needs.
        """

    @abstractmethod
    def put_in_store(self, made: Mapping[str, T], sealed: Mapping[str, bytes]) -> None:
        """Store values asynchronously; waits while too many bytes are pending."""

    @abstractmethod
    def to_frame(self, key: str, value: T) -> Frame:
        """Turn a value into a frame.

        Raises:
            ValueError: it must not be kept.
        """

    def seal(self, values: Mapping[str, T]) -> dict[str, bytes]:
        """Turn values into the cache's bytes; values that must not be kept are reported and left out."""
        frames = {}
        for key, value in values.items():
            try:
                frames[key] = self.to_frame(key, value)
            except ValueError as error:
                self.cache.report("unkept", f"a passage is not kept: {error}")
        return self.cache.seal(frames)


class CachedSource(ABC, Generic[R, W, T]):
    """Gets values from memory, then from the store; has the model make those that are missing, and keeps them.

    Calls may come from any thread. The model's turn is held for one batch and for what makes its result known to other
    calls, never while something waits for a store or tokenises.

    Args:
        loaded: the model.
        cached: what keeps the values.
        turns: taken for each batch.
        work: what they are used for.
        size: tokens that the model runs for one value.

    Attributes:
        cached: as given.
    """

    def __init__(
        self, loaded: LoadedModel, cached: ValueCache[R, T], turns: Turns, work: Work, size: Callable[[W, R], int]
    ) -> None:
        self.cached = cached
        self._loaded = loaded
        self._turns = turns
        self._work = work
        self._size = size

    def get(self, texts: Sequence[str], request: R) -> dict[str, T]:
        """Return the value of every passage.

        Args:
            texts: distinct passages that went through `Tokenizer.clean`.
            request: what else it depends on.
        """
        found = self.find(texts, request)
        return found | self.make_all([text for text in texts if text not in found], request)

    def find(self, texts: Sequence[str], request: R) -> dict[str, T]:
        """Return the cached values; missing ones are left out."""
        keys = dict(zip(self.keys(texts, request), texts, strict=True))
        patience = partial(self._patience, keys)
        with timed("read"):
            found = {keys[key]: value for key, value in self.cached.get_many(list(keys), request, patience).items()}
        rename_sources(keys.items())
        self._use(request, kept=bool(found))
        return found

    def make_all(self, texts: Sequence[str], request: R) -> dict[str, T]:
        """Make and keep the values of all these passages without looking them up."""
        found: dict[str, T] = {}
        for made, _ in self.make(texts, request):
            found |= made
        return found

    def make(
        self, texts: Sequence[str], request: R, inputs: Sequence[W] | None = None
    ) -> Iterator[tuple[dict[str, T], int]]:
        """Make and keep values, one batch at a time.

        Args:
            texts: passages without a cached value.
            request: what else it depends on.
            inputs: what the values are made from, where the caller has it already.

        Yields:
            The values of a batch, and how many of them were made: what another call has made while this one waited for
            its turn is not made again.
        """
        if not texts:
            return
        self._use(request, kept=True)
        keys = self.keys(texts, request)
        inputs = self._inputs(texts, request) if inputs is None else inputs
        for batch in self._batches(inputs, request):
            with self._turns.of(self._work) as turn:
                known = self.cached.recall([keys[place] for place in batch], request)
                rest = [place for place in batch if keys[place] not in known]
                new = self._run([inputs[place] for place in rest], request) if rest else []
                turn.size, turn.rows = sum(self._size(inputs[place], request) for place in rest), len(rest)
                self._loaded.files.check()
                made = dict(zip([keys[place] for place in rest], new, strict=True))
                made, sealed = self.cached.put_in_memory(made, request)
            add_count(self._work, len(rest))
            new_texts = [texts[place] for place in rest] if self._work == "encode" else []
            add_sources(encoded=new_texts, memory=[texts[place] for place in batch if keys[place] in known])
            self.cached.put_in_store(made, sealed)
            both = known | made
            yield {texts[place]: both[keys[place]] for place in batch}, len(rest)

    def _patience(self, texts: Mapping[str, str], missing: Sequence[str]) -> tuple[float, float]:
        """Return what making the missing values would take, and how many seconds the call has left."""
        tokens = sum(len(texts[key]) for key in missing) / _CHARACTERS
        return self._turns.costs.predict({self._work: tokens}), time_left()

    def _use(self, request: R, *, kept: bool) -> None:
        space = self.space(request)
        if space is not None:
            self.cached.cache.use(space, kept=kept)

    @abstractmethod
    def keys(self, texts: Sequence[str], request: R) -> list[str]:
        """Return the cache's key of each passage."""

    @abstractmethod
    def space(self, request: R) -> Space | None:
        """Return the key space of these keys, or None if no value is kept under them."""

    @abstractmethod
    def _inputs(self, texts: Sequence[str], request: R) -> Sequence[W]:
        """Return what the values are made from."""

    @abstractmethod
    def _batches(self, inputs: Sequence[W], request: R) -> Iterator[list[int]]:
        """Yield batches as positions into `inputs`."""

    @abstractmethod
    def _run(self, inputs: Sequence[W], request: R) -> list[T]:
        """Make the values of one batch."""
