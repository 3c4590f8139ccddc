"""The reference of the compact form: from the cache, else from a few fixed texts."""

from __future__ import annotations

import hashlib
import math
import threading

from kalm_rag.cache import PassageCache
from kalm_rag.cache.frame import Frame, FrameError
from kalm_rag.cache.keys import KeySpace
from kalm_rag.model.compact import DIRECTIONS, Reference, reference_numbers
from kalm_rag.model.loading import LoadedModel
from kalm_rag.model.padding import to_device
from kalm_rag.model.prefill import PrefilledDecoder
from kalm_rag.model.prefiller import PromptPrefix
from kalm_rag.model.reference_texts import reference_texts
from kalm_rag.states import StatesSource
from kalm_rag.utils import forks
from kalm_rag.utils.turns import Turns

_MOST = 256


class ReferenceSource:
    """Gets the reference of a prompt's prefix and a ratio.

    The store keeps it, so that all processes that share the store take differences to the same one. Whoever needs it
    first makes it. Of another one, however near, every entry is a miss: its digest is part of their keys.

    Args:
        loaded: the model.
        cache: what keeps it.
        keys: the cache's keys.
        states: encodes the texts.
        decoder: runs the prefix on them.
        turns: taken for each batch.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        cache: PassageCache,
        keys: KeySpace,
        states: StatesSource,
        decoder: PrefilledDecoder,
        turns: Turns,
    ) -> None:
        self._loaded = loaded
        self._cache = cache
        self._keys = keys
        self._states = states
        self._decoder = decoder
        self._turns = turns
        self._found: dict[tuple[PromptPrefix, int], Reference] = {}
        self.after_fork_in_child()
        forks.watch(self)

    def after_fork_in_child(self) -> None:
        """Replace the lock, which another thread may have held."""
        self._lock = threading.Lock()  # held while a reference is looked up or made

    def get(self, prefix: PromptPrefix, ratio: int) -> Reference:
        """Return the reference; the first call for a prefix and ratio asks the store, and makes it if need be."""
        place = (prefix, ratio)
        found = self._found.get(place)
        if found is not None:
            return found
        with self._lock:
            if place not in self._found:
                if len(self._found) >= _MOST:
                    self._found.clear()
                self._found[place] = self._get(prefix, ratio)
            return self._found[place]

    def _get(self, prefix: PromptPrefix, ratio: int) -> Reference:
        layers, heads, width = self._decoder.shape
        key = self._keys.reference_key(
            ratio=ratio, prefix=prefix.ids, precision=self._decoder.precision, texts=reference_texts()
        )
        dtype = str(self._loaded.prefill_dtype).removeprefix("torch.")
        shape = (1 + DIRECTIONS, 2, layers, heads, len(prefix), width)

        def decode(frame: Frame) -> Reference:
            if not frame.reference or (frame.dtype, frame.rows * frame.width) != (dtype, math.prod(shape)):
                msg = f"{frame.rows} x {frame.width} numbers in {frame.dtype} are not the reference of this model"
                raise FrameError(msg)
            numbers = to_device(frame.tensors()[0].view(shape), self._loaded.device)
            return Reference(numbers, hashlib.sha256(frame.payload).hexdigest())

        return self._cache.get_or_add(key, lambda: self._make(key, prefix, ratio), decode)

    def _make(self, key: str, prefix: PromptPrefix, ratio: int) -> Frame:
        import torch

        texts = [self._loaded.tokenizer.clean(text) for text in reference_texts()]
        states = self._states.get(texts, ratio)
        passages = [states[text] for text in texts]
        prefixes: list[torch.Tensor] = []
        for batch in self._decoder.batches(prefix, passages):
            with self._turns:
                prefixes += self._decoder.prefiller.prefixes(prefix, [passages[place] for place in batch])
        numbers = self._loaded.compute(lambda: reference_numbers(torch.stack(prefixes)).to(self._loaded.prefill_dtype))
        return Frame.from_tensors(
            key,
            self._keys.model,
            numbers,
            ratio=ratio,
            tokens=len(passages),
            truncated=False,
            prefilled=True,
            reference=True,
        )
