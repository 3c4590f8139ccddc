"""Encoder states of passages: from the cache, else from the encoder."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from kalm_rag.cache import PassageCache
from kalm_rag.cache.frame import Frame, FrameError, payload_bytes
from kalm_rag.cache.keys import KeySpace
from kalm_rag.cache.spaces import Space, WindowRule
from kalm_rag.model.encoder import Encoder
from kalm_rag.model.identity import ModelIdentity
from kalm_rag.model.loading import LoadedModel
from kalm_rag.model.pooling import PassageStates
from kalm_rag.model.prompts import PassageTokens, Prompts
from kalm_rag.model.quantization import dequantize, quantize
from kalm_rag.results import EncodeReport
from kalm_rag.settings import Settings
from kalm_rag.source import CachedSource, Patience, ValueCache
from kalm_rag.utils import forks
from kalm_rag.utils.computing import compute
from kalm_rag.utils.progress import Progress
from kalm_rag.utils.recording import add_count
from kalm_rag.utils.turns import Turns, check_stopped

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

_TOKENISED_AT_ONCE = 256


class StatesCache(ValueCache[int, PassageStates]):
    """Encoder states in a `PassageCache`: kept at its `base_ratio`, requested at any ratio.

    Args:
        cache: what keeps them.
        keys: says which model they are of.
        dtype: what they are needed in.
        width: of the model's states.
    """

    def __init__(self, cache: PassageCache, keys: KeySpace, dtype: torch.dtype, width: int) -> None:
        super().__init__("states", cache)
        self._model = keys.model
        self._dtype = dtype
        self._width = width

    def keeps(self, ratio: int) -> bool:
        """Whether a ratio can be derived from `base_ratio`; otherwise nothing is kept."""
        return ratio % self.cache.base_ratio == 0

    def get_many(self, keys: Sequence[str], request: int, patience: Patience | None = None) -> dict[str, PassageStates]:
        """As in `ValueCache`."""
        found = self.cache.get_many(self.kind, keys, partial(self._decode, request), patience)
        add_count("states", len(found))
        return found

    def recall(self, keys: Sequence[str], request: int) -> dict[str, PassageStates]:
        """As in `ValueCache`."""
        return self.cache.recall(keys, partial(self._decode, request)) if self.keeps(request) else {}

    def put_in_memory(
        self, made: Mapping[str, PassageStates], request: int
    ) -> tuple[dict[str, PassageStates], dict[str, bytes]]:
        """As in `ValueCache`: states at `base_ratio` become states at the ratio of the request."""
        if not self.keeps(request):
            return dict(made), {}
        return compute(partial(self._put_in_memory, made, request))

    def _put_in_memory(
        self, made: Mapping[str, PassageStates], ratio: int
    ) -> tuple[dict[str, PassageStates], dict[str, bytes]]:
        sealed = self.seal(made)
        self.cache.put_in_memory(sealed, encoded=len(made))
        if self.cache.storage == "int8":
            # As they will be read later: a score must not depend on whether the cache was warm.
            made = {key: rounded(states) if key in sealed else states for key, states in made.items()}
        return {key: states.at(ratio) for key, states in made.items()}, sealed

    def put_in_store(self, made: Mapping[str, PassageStates], sealed: Mapping[str, bytes]) -> None:
        """As in `ValueCache`."""
        self.cache.put_in_store(self.kind, sealed)

    def to_frame(self, key: str, value: PassageStates) -> Frame:
        """As in `ValueCache`."""
        return to_frame(key, self._model, value, int8=self.cache.storage == "int8")

    def _decode(self, ratio: int, frame: Frame) -> PassageStates | None:
        if frame.width != self._width:
            msg = f"states of width {frame.width}, the model has {self._width}"
            raise FrameError(msg)
        if ratio % frame.ratio:
            return None
        if frame.dtype != "int8" and ratio == frame.ratio:
            return from_frame(frame, self._dtype)
        return compute(lambda: from_frame(frame, self._dtype).at(ratio))


class StatesSource(CachedSource[int, PassageTokens, PassageStates]):
    """Gets encoder states at a ratio, which is what a request is.

    Args:
        loaded: the model.
        settings: how passages are read, and batch sizes.
        cache: what keeps states.
        keys: the cache's keys.
        prompts: tokenises passages.
        turns: taken for each batch.

    Attributes:
        encoder: runs the encoder.
    """

    cached: StatesCache

    def __init__(
        self,
        loaded: LoadedModel,
        settings: Settings,
        cache: PassageCache,
        keys: KeySpace,
        prompts: Prompts,
        turns: Turns,
    ) -> None:
        self._width = int(loaded.model.config.decoder.hidden_size)
        cached = StatesCache(cache, keys, loaded.dtype, self._width)
        super().__init__(loaded, cached, turns, "encode", lambda passage, _: len(passage.ids))
        self.encoder = Encoder(loaded, settings)
        self._cache = cache
        self._key_space = keys
        rule = WindowRule(*settings.window, settings.max_windows) if settings.splits else None
        self._space = Space(keys, loaded.tokenizer.control, windows=rule)
        self._prompts = prompts
        self._lock = forks.Lock()  # of the next line
        self._warned_ratios: set[int] = set()

    def encode(self, texts: Sequence[str], progress: Progress | None = None) -> EncodeReport:
        """Encode the passages that the cache does not hold, and keep them batch by batch."""
        ratio = self._cache.base_ratio
        unique = list(dict.fromkeys(texts))
        truncated = {text: known.truncated for text, known in self.find(unique, ratio).items()}
        missing = [text for text in unique if text not in truncated]
        if progress is not None:
            progress.advance(len(texts) - len(missing))
        new = 0
        for encoded, fresh in self.make(missing, ratio):
            truncated |= {text: states.truncated for text, states in encoded.items()}
            new += fresh
            if progress is not None:
                progress.advance(len(encoded))
        return EncodeReport(new, len(texts) - new, sum(truncated[text] for text in texts))

    def unknown(self, texts: Sequence[str]) -> list[str]:
        """Return the distinct passages that `encode` would encode."""
        unique = list(dict.fromkeys(texts))
        known = self.find(unique, self._cache.base_ratio)
        return [text for text in unique if text not in known]

    def bytes_of(self, tokens: int, ratio: int | None = None) -> int:
        """Return the bytes of the states of a passage of so many tokens, at the cache's ratio or another one."""
        dtype = "int8" if self._cache.storage == "int8" else str(self._loaded.dtype).removeprefix("torch.")
        return payload_bytes(tokens, ratio or self._cache.base_ratio, self._width, dtype)

    def time_encoding(self, texts: Sequence[str]) -> float:
        """Return the seconds that encoding takes, after one passage to warm up. Nothing is kept."""
        self.encoder.prepare()
        warmup, passages = self._prompts.passages(texts[:1]), self._prompts.passages(texts)
        with self._turns:
            self.encoder.encode(warmup, self._cache.base_ratio)
            start = time.perf_counter()
            for batch in self.encoder.batches(passages):
                self.encoder.encode([passages[place] for place in batch], self._cache.base_ratio)
            return time.perf_counter() - start

    def keys(self, texts: Sequence[str], request: int) -> list[str]:
        """As in `CachedSource`; they are the same at every ratio."""
        return self._key_space.states_keys(texts)

    def space(self, request: int) -> Space | None:
        """As in `CachedSource`."""
        return self._space if self.cached.keeps(request) else None

    def _inputs(self, texts: Sequence[str], request: int) -> list[PassageTokens]:
        """Tokenise in parts, so that other calls can come in between."""
        self.encoder.prepare()
        if not self.cached.keeps(request):
            self._warn_ratio(request)
        found: list[PassageTokens] = []
        for start in range(0, len(texts), _TOKENISED_AT_ONCE):
            check_stopped()
            found += self._prompts.passages(texts[start : start + _TOKENISED_AT_ONCE])
        is_unknown = self._loaded.tokenizer.is_mostly_unknown
        self._prompts.unknown.add(sum(is_unknown(passage.ids) for passage in found))
        return found

    def _batches(self, inputs: Sequence[PassageTokens], request: int) -> Iterator[list[int]]:
        return self.encoder.batches(inputs)

    def _run(self, inputs: Sequence[PassageTokens], request: int) -> list[PassageStates]:
        return self.encoder.encode(inputs, self._cache.base_ratio if self.cached.keeps(request) else request)

    def _warn_ratio(self, ratio: int) -> None:
        with self._lock:
            if ratio in self._warned_ratios:
                return
            self._warned_ratios.add(ratio)
        logger.warning(
            "ratio %d is not a multiple of %d, the ratio at which the cache keeps passages: they are encoded again at "
            "every call; make the cache with base_ratio=%d to keep them",
            ratio,
            self._cache.base_ratio,
            ratio,
        )


def key_space(identity: ModelIdentity, *, max_length: int, dtype: str, storage: str) -> KeySpace:
    """Return the cache's keys of a model; the other arguments are those of `KeySpace`."""
    return KeySpace(
        model=identity.digest,
        encoder=identity.encoder,
        tokenizer=identity.tokenizer,
        template=identity.template,
        decoder=identity.decoder,
        max_length=max_length,
        dtype=dtype,
        storage=storage,
    )


def to_frame(key: str, model: bytes, passage: PassageStates, *, int8: bool = False) -> Frame:
    """Make the frame of a passage's states, on any device.

    Args:
        key: its key.
        model: digest of the model's identity, 32 bytes.
        passage: its states.
        int8: keep one byte per number and one scale per vector.

    Raises:
        ValueError: the states hold NaN or infinity, which must not be kept.
    """
    states, scales = quantize(passage.states.detach().cpu()) if int8 else (passage.states, None)
    return Frame.from_tensors(
        key, model, states, scales, ratio=passage.ratio, tokens=passage.tokens, truncated=passage.truncated
    )


def from_frame(frame: Frame, dtype: torch.dtype) -> PassageStates:
    """Return the states in a frame as a new tensor, shape `(rows, width)`.

    Args:
        frame: a verified frame.
        dtype: of the tensor.

    Raises:
        FrameError: it holds a prefilled passage.
    """
    if frame.prefilled:
        msg = "a prefilled passage under the key of states"
        raise FrameError(msg)
    tensor, scales = frame.tensors()
    states = tensor if scales is None else dequantize(tensor, scales)
    return PassageStates(states.to(dtype), frame.tokens, frame.ratio, frame.truncated)


def rounded(passage: PassageStates) -> PassageStates:
    """Return states as a cache that keeps 8 bits gives them back."""
    states = dequantize(*quantize(passage.states.detach().cpu()))
    return replace(passage, states=states.to(passage.states.dtype).to(passage.states.device))
