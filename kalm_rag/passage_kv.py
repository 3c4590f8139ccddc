"""Keys and values of prefilled passages: from the cache, else from encoder states and the prompt's prefix."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from kalm_rag.cache import PassageCache
from kalm_rag.cache.frame import HEADER_BYTES, Frame, FrameError
from kalm_rag.cache.keys import KeySpace
from kalm_rag.cache.sieve import BudgetSieve
from kalm_rag.cache.spaces import Behind, Space
from kalm_rag.model.compact import CompactKV, Reference, from_rows, rows_of, to_rows
from kalm_rag.model.loading import LoadedModel
from kalm_rag.model.padding import to_device
from kalm_rag.model.passage import PassageKV
from kalm_rag.model.pooling import PassageStates
from kalm_rag.model.prefill import PrefilledDecoder
from kalm_rag.model.prefiller import PromptPrefix, find_prompt_prefix
from kalm_rag.model.prompts import Prompts
from kalm_rag.reference import ReferenceSource
from kalm_rag.results import PrefillCounters, PrefillStats
from kalm_rag.settings import Settings
from kalm_rag.source import CachedSource, Patience, ValueCache
from kalm_rag.states import StatesSource
from kalm_rag.utils import forks
from kalm_rag.utils.budget import LEAST, MemoryBudget, memory_budget
from kalm_rag.utils.computing import compute
from kalm_rag.utils.recording import add_count, add_sources
from kalm_rag.utils.refining import ErrorBounds
from kalm_rag.utils.turns import Room, Turns

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

Prefilled: TypeAlias = PassageKV | CompactKV
"""A prefilled passage in either form."""

_MOST_INSTRUCTIONS = 256
_GROUP_BYTES = 1_000_000_000
_READ_AT_ONCE = 64


class BehindPrefix(NamedTuple):
    """A request for keys and values: what they depend on besides the passage.

    Attributes:
        prefix: of the prompt.
        ratio: of the passage's states.
        reference: of both, for the compact form.
    """

    prefix: PromptPrefix
    ratio: int
    reference: Reference | None = None

    def kind(self, precision: str) -> str:
        """What the keys and values are kept in: their precision, and the reference if there is one."""
        return precision if self.reference is None else f"{precision}, {self.reference.digest}"


class PassageKVCache(ValueCache[BehindPrefix, Prefilled]):
    """Keys and values as tensors in memory, and in the store of a `PassageCache` that keeps prefilled passages.

    `_lock` guards the counters; `memory` has a lock of its own.

    Args:
        budget: what they may take in memory.
        cache: what keeps them, with `keep="prefilled"`.
        keys: says which model they are of.
        shape: layers, kv heads and head width of the decoder.
        device: where they are needed.

    Attributes:
        memory: by key, on the model's device.
        bounds: how far margins are off that were computed without them.
    """

    def __init__(
        self,
        budget: MemoryBudget,
        cache: PassageCache,
        keys: KeySpace,
        shape: tuple[int, int, int],
        device: torch.device,
    ) -> None:
        super().__init__("passage_kv", cache)
        self.memory: BudgetSieve[str, Prefilled] = BudgetSieve(
            budget.bytes, lambda passage: passage.nbytes, "prefilled passages"
        )
        cache.attach(self.memory)
        self._limit_source = budget.source
        self.bounds = ErrorBounds()
        self._model = keys.model
        self._shape = shape
        self._device = device
        self._lock = forks.Lock()
        self._counters = PrefillCounters()

    def get_many(
        self, keys: Sequence[str], request: BehindPrefix, patience: Patience | None = None
    ) -> dict[str, Prefilled]:
        """As in `ValueCache`."""
        found: dict[str, Prefilled] = self.memory.get_many(keys)
        missing = [key for key in keys if key not in found]
        decode: Callable[[Frame], Prefilled] = partial(self._decode, request)
        stored: dict[str, Prefilled] = self.cache.get_many(self.kind, missing, decode, patience)
        for key, passage in stored.items():
            if isinstance(passage, PassageKV):  # the other form needs its states first
                self.memory.put(key, passage)
        add_sources(memory=found)
        self.count(hits=len(found), stored=len(stored), misses=len(missing) - len(stored))
        return found | stored

    def recall(self, keys: Sequence[str], request: BehindPrefix) -> dict[str, Prefilled]:
        """As in `ValueCache`."""
        return self.memory.get_many(keys)

    def put_in_memory(
        self, made: Mapping[str, Prefilled], request: BehindPrefix
    ) -> tuple[dict[str, Prefilled], dict[str, bytes]]:
        """As in `ValueCache`."""
        for key, passage in made.items():
            self.memory.put(key, passage)
        return dict(made), {}

    def put_in_store(self, made: Mapping[str, Prefilled], sealed: Mapping[str, bytes]) -> None:
        """As in `ValueCache`; sealing happens here, where no other call waits."""
        if self.cache.keeps(self.kind):
            self.cache.put_in_store(self.kind, compute(partial(self.seal, made), self._device))

    def to_frame(self, key: str, value: Prefilled) -> Frame:
        """As in `ValueCache`; the states of a compact passage are an entry of their own."""
        numbers, scales = to_rows(value) if isinstance(value, CompactKV) else (value.key_values, value.scales)
        return Frame.from_tensors(
            key,
            self._model,
            numbers,
            scales,
            ratio=value.ratio,
            tokens=value.tokens,
            truncated=value.truncated,
            prefilled=True,
        )

    def count(self, **more: int) -> None:
        """Add to counters, by name."""
        for name, number in more.items():
            add_count(name, number)
        with self._lock:
            for name, number in more.items():
                setattr(self._counters, name, getattr(self._counters, name) + number)

    def stats(self) -> PrefillStats:
        """Counters, and the size in memory."""
        with self._lock:
            counters = replace(self._counters)
        return PrefillStats(counters, self.memory.stats(), self._limit_source, self.bounds.largest())

    def _decode(self, request: BehindPrefix, frame: Frame) -> Prefilled:
        return self._whole(request, frame) if request.reference is None else self._compact(request, frame)

    def _whole(self, request: BehindPrefix, frame: Frame) -> PassageKV:
        layers, heads, width = self._shape
        positions = len(request.prefix) - (-frame.tokens // frame.ratio)
        shape = (2, layers, heads, positions)
        if not frame.prefilled or (frame.rows, frame.width) != (math.prod(shape), width):
            msg = f"{frame.rows} x {frame.width} numbers are not a prefilled passage of {positions} positions"
            raise FrameError(msg)
        tensor, scales = frame.tensors()
        if scales is not None:
            scales = to_device(scales.view(*shape, 1), self._device)
        numbers = to_device(tensor.view(*shape, width), self._device)
        return PassageKV(numbers, scales, frame.tokens, frame.ratio, frame.truncated)

    def _compact(self, request: BehindPrefix, frame: Frame) -> CompactKV:
        layers, heads, width = self._shape
        shape = (2, layers - 1, heads, len(request.prefix))
        numbers, scales = frame.tensors()
        wrong = (frame.rows, frame.width) != (rows_of(shape, width // 2), width // 2)
        if not frame.prefilled or scales is None or wrong:
            msg = f"{frame.rows} x {frame.width} numbers are not a compact passage behind {len(request.prefix)} tokens"
            raise FrameError(msg)
        rest, scales, along = (to_device(part, self._device) for part in from_rows(numbers, scales, shape))
        return CompactKV(rest, scales, along, frame.tokens, frame.ratio, frame.truncated)


class PassageKVSource(CachedSource[BehindPrefix, PassageStates, Prefilled]):
    """Gets keys and values of passages behind a prompt prefix.

    `_room` bounds what all calls hold together; `_lock` guards the prefixes and the key spaces.

    Args:
        loaded: the model.
        settings: memory, storage and batch sizes.
        cache: what keeps keys and values, with `keep="prefilled"`.
        keys: the cache's keys.
        prompts: finds the prefix of an instruction.
        states: what missing ones are made from.
        turns: taken for each batch.

    Attributes:
        decoder: runs the decoder on prefilled passages.
        cached: the values in memory and in the store.
        references: of the compact form and of a first pass.
        is_used: whether keys and values are kept anywhere, or a first pass decides what they are needed of; otherwise
            full prompts are as fast.
    """

    cached: PassageKVCache

    def __init__(
        self,
        loaded: LoadedModel,
        settings: Settings,
        cache: PassageCache,
        keys: KeySpace,
        prompts: Prompts,
        states: StatesSource,
        turns: Turns,
    ) -> None:
        budget = memory_budget(settings.prefill_memory, loaded.device)
        keeps = budget.bytes > 0 or cache.keeps_prefilled
        self.is_used = keeps or settings.refine
        storage = "compact" if cache.keep == "compact" else settings.prefill_storage
        if self.is_used and not keeps:
            storage = "native"  # as the full prompt scores, which would run without a first pass
        self._is_compact = storage == "compact"
        self.decoder = PrefilledDecoder(loaded, settings, turns, storage=storage)
        cached = PassageKVCache(budget, cache, keys, self.decoder.shape, loaded.device)
        super().__init__(
            loaded, cached, turns, "prefill", lambda passage, request: len(request.prefix) + len(passage.states)
        )
        self._group_bytes = _GROUP_BYTES
        if settings.prefill_memory == "auto":
            _tell(budget)
            self._group_bytes = min(_GROUP_BYTES, max(LEAST, budget.bytes))
        self._settings = settings
        self._cache = cache
        self._key_space = keys
        self._prompts = prompts
        self._states = states
        self.references = ReferenceSource(loaded, cache, keys, states, self.decoder, turns)
        self._room = Room(2 * self._group_bytes)
        self._lock = forks.Lock()
        self._prefixes: dict[str, PromptPrefix] = {}
        self._spaces: dict[BehindPrefix, Space] = {}

    def prefix(self, instruction: str) -> PromptPrefix:
        """The tokens that start every prompt under an instruction."""
        with self._lock:
            found = self._prefixes.get(instruction)
        if found is None:
            found = find_prompt_prefix(self._prompts, instruction)
            with self._lock:
                if len(self._prefixes) >= _MOST_INSTRUCTIONS:
                    self._prefixes.clear()
                self._prefixes[instruction] = found
        return found

    def request(self, instruction: str, ratio: int) -> BehindPrefix:
        """What asks for passages under an instruction, at a ratio."""
        prefix = self.prefix(instruction)
        return BehindPrefix(prefix, ratio, self.references.get(prefix, ratio) if self._is_compact else None)

    def find(self, texts: Sequence[str], request: BehindPrefix) -> dict[str, Prefilled]:
        """As in `CachedSource`; compact passages get their states."""
        found = super().find(texts, request)
        bare = {
            text: passage
            for text, passage in found.items()
            if isinstance(passage, CompactKV) and passage.states is None
        }
        if not bare:
            return found
        states = self._states.get(list(bare), request.ratio)
        whole = {}
        for text, passage in bare.items():
            if states[text].tokens == passage.tokens:
                whole[text] = passage.with_states(states[text])
            else:  # one of them is forged; the encoder decides
                del found[text]
        for key, passage in zip(self.keys(list(whole), request), whole.values(), strict=True):
            self.cached.memory.put(key, passage)
        return found | whole

    def in_groups(
        self, texts: Sequence[str], request: BehindPrefix, states: Mapping[str, PassageStates] | None = None
    ) -> Iterator[dict[str, Prefilled]]:
        """Yield what `get` would return in groups that fit in memory: keys and values are much larger than states.

        Args:
            texts: distinct passages that went through `Tokenizer.clean`.
            request: what else they depend on.
            states: those of passages that are not cached, if the caller has them. Others are left out then.

        Yields:
            Keys and values by passage, which are dropped when the next group is asked for.
        """
        at_once = _READ_AT_ONCE if self._cache.keeps("passage_kv") else max(1, len(texts))
        for start in range(0, len(texts), at_once):
            part = texts[start : start + at_once]
            found = self.find(part, request)
            unknown = [text for text in part if text not in found]
            own = self._states.get(unknown, request.ratio) if states is None else states
            left_out = {text for text in unknown if text not in own}
            self.cached.count(misses=-len(left_out))  # nothing was made of them
            part = [text for text in part if text not in left_out]
            for group, size in _groups(part, found, own, request.prefix, self.decoder, self._group_bytes):
                with self._room.of(size):
                    ready = {text: found.pop(text) for text in group if text in found}
                    missing = [text for text in group if text not in ready]
                    for made, _ in self.make(missing, request, [own[text] for text in missing]):
                        ready |= made
                    yield ready
                    ready.clear()

    def encode(self, texts: Sequence[str]) -> None:
        """Prefill what the store lacks, for the default instruction and ratio, if the store keeps such passages."""
        if self._cache.keeps("passage_kv"):
            request = self.request(self._settings.instruction, self._settings.ratio)
            for _ in self.in_groups(list(dict.fromkeys(texts)), request):
                pass

    def bytes_of(self, tokens: int, ratio: int | None = None) -> int:
        """Return the bytes of one passage of so many tokens, for the default instruction and this or the default ratio.

        Of the compact form these are the bytes that it takes beside the encoder states.
        """
        groups = -(-tokens // (ratio or self._settings.ratio))
        return HEADER_BYTES + self.decoder.bytes_of(len(self.prefix(self._settings.instruction)), groups)

    def keys(self, texts: Sequence[str], request: BehindPrefix) -> list[str]:
        """As in `CachedSource`."""
        kind = request.kind(self.decoder.name)
        return self._key_space.prefilled_keys(texts, ratio=request.ratio, prefix=request.prefix.ids, kind=kind)

    def space(self, request: BehindPrefix) -> Space | None:
        """As in `CachedSource`; compact passages have no keys without a reference."""
        if request.reference is None and self._is_compact:
            return None
        with self._lock:
            found = self._spaces.get(request)
        if found is None:
            behind = Behind(request.ratio, request.prefix.ids, request.kind(self.decoder.name))
            found = Space(self._key_space, self._loaded.tokenizer.control, behind)
            with self._lock:
                if len(self._spaces) >= _MOST_INSTRUCTIONS:
                    self._spaces.clear()
                self._spaces[request] = found
        return found

    def _inputs(self, texts: Sequence[str], request: BehindPrefix) -> list[PassageStates]:
        states = self._states.get(texts, request.ratio)
        return [states[text] for text in texts]

    def _batches(self, inputs: Sequence[PassageStates], request: BehindPrefix) -> Iterator[list[int]]:
        return self.decoder.batches(request.prefix, inputs)

    def _run(self, inputs: Sequence[PassageStates], request: BehindPrefix) -> list[Prefilled]:
        return self.decoder.prefiller.prefill(request.prefix, inputs, request.reference)


def _tell(budget: MemoryBudget) -> None:
    """Log what "auto" came to."""
    logger.info("prefilled passages may take %d bytes in memory (%s)", budget.bytes, budget.source)
    if not budget.bytes:
        logger.warning(
            "prefilled passages are not kept in memory (%s): queries on known passages are slower; free memory, raise "
            "the container's limit, or pass prefill_memory as a number of bytes",
            budget.source,
        )


def _groups(
    texts: Sequence[str],
    found: Mapping[str, Prefilled],
    states: Mapping[str, PassageStates],
    prefix: PromptPrefix,
    decoder: PrefilledDecoder,
    most: int,
) -> Iterator[tuple[list[str], int]]:
    """Passages in groups of at most `most` bytes, and those bytes; a single passage may be larger."""
    group: list[str] = []
    size = 0
    for text in texts:
        ready = found.get(text)
        more = ready.nbytes if ready else decoder.bytes_of(len(prefix), len(states[text].states))
        if group and size + more > most:
            yield group, size
            group, size = [], 0
        group.append(text)
        size += more
    if group:
        yield group, size
