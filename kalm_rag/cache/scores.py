"""Remembers the scores of pairs in this process, so that a pair seen again costs no work of the model."""

from __future__ import annotations

import hashlib
import logging
import struct
import sys
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from kalm_rag.cache.store import StoreStats
from kalm_rag.utils import forks
from kalm_rag.utils.display import Shown

if TYPE_CHECKING:
    from kalm_rag.cache.passage_cache import PassageCache
    from kalm_rag.cache.spaces import Space

logger = logging.getLogger(__name__)

_SCORE = struct.Struct("<d?")
"""A margin, and whether the passage was truncated. A tuple of the two would take twice the bytes."""
_QUERY_BYTES = 200
"""Bytes of an entry of an `OrderedDict` with its key, on average."""


class PairKey(NamedTuple):
    """What a score depends on, besides the model and its settings.

    Attributes:
        prompt: digest of the prompt's token ids and of the ratio.
        passage: digest of the passage: the key of its encoder states.
    """

    prompt: bytes
    passage: bytes


_NO_KEY = PairKey(b"", b"")
_PAIR_BYTES = sum(-(-sys.getsizeof(part) // 16) * 16 for part in (bytes(32), bytes(_SCORE.size)))
"""Bytes of a pair beside its place in a dictionary; Python allocates in steps of 16."""


@dataclass(slots=True, repr=False)
class ScoreCounters(Shown):
    """Counts pairs since the model was loaded.

    Attributes:
        hits: pairs whose score was remembered.
        misses: pairs that the model scored.
    """

    hits: int = 0
    misses: int = 0


@dataclass(frozen=True, slots=True, repr=False)
class ScoreStats(Shown):
    """Counters of the remembered scores, and their size in memory, whose entries are pairs."""

    counters: ScoreCounters
    size: StoreStats

    def _facts(self, *, defaults: bool) -> list[tuple[str, str]]:
        return [*self.counters._facts(defaults=defaults), *self.size._facts(defaults=defaults)]


class ScoreCache:
    """Scores of one loaded model under one group of settings.

    It holds digests and numbers, and no text. The pairs of the query that was not asked for the longest time leave
    first. Safe from any thread: `_lock` guards the scores and the counters.

    Args:
        limit: bytes that it may take; 0 remembers nothing.
        cache: the model's cache of passages: what it forgets is forgotten here.
        space: the key space of the passages' encoder states.
    """

    def __init__(self, limit: int, cache: PassageCache, space: Space) -> None:
        self._limit = limit
        self._cache = cache
        self._space = space
        self._lock = forks.Lock()
        self._counters = ScoreCounters()
        self._queries: OrderedDict[bytes, dict[bytes, bytes]] = OrderedDict()
        self._bytes = 0
        self._evicted = 0
        self._refused = 0
        cache.attach(self)

    def keys(self, prompts: Sequence[Sequence[int]], passages: Sequence[str], ratio: int) -> list[PairKey]:
        """Return the key of each pair.

        Args:
            prompts: token ids of each pair's prompt; the pairs of a query are fastest with one list.
            passages: the passage of each pair, cleaned.
            ratio: of the passages' states.
        """
        if not self._limit:
            return [_NO_KEY] * len(passages)
        unique = list(dict.fromkeys(passages))
        digests = dict(zip(unique, map(bytes.fromhex, self._space.keys.states_keys(unique)), strict=True))
        found: dict[int, bytes] = {}
        for ids in prompts:
            if id(ids) not in found:
                found[id(ids)] = hashlib.sha256(array("q", (ratio, *ids)).tobytes()).digest()
        return [PairKey(found[id(ids)], digests[text]) for ids, text in zip(prompts, passages, strict=True)]

    def get_many(self, keys: Sequence[PairKey]) -> list[tuple[float, bool] | None]:
        """Return the margin of each pair and whether its passage was truncated, or None, and count."""
        if not self._limit:
            return [None] * len(keys)
        with self._lock:
            for prompt in dict.fromkeys(key.prompt for key in keys):
                if prompt in self._queries:
                    self._queries.move_to_end(prompt)
            kept = [self._queries.get(key.prompt, {}).get(key.passage) for key in keys]
            misses = kept.count(None)
            self._counters.hits += len(keys) - misses
            self._counters.misses += misses
        return [None if data is None else _SCORE.unpack(data) for data in kept]

    def put_many(self, scores: Mapping[PairKey, tuple[float, bool]]) -> None:
        """Remember finite margins of pairs, and whether their passages were truncated."""
        if not self._limit or not scores:
            return
        self._cache.use(self._space)  # so that `forget` computes these keys, whatever else is kept
        by_prompt: dict[bytes, dict[bytes, bytes]] = {}
        for key, score in scores.items():
            by_prompt.setdefault(key.prompt, {})[key.passage] = _SCORE.pack(*score)
        for prompt, new in by_prompt.items():
            self._put(prompt, new)

    def _put(self, prompt: bytes, new: dict[bytes, bytes]) -> None:
        with self._lock:
            pairs = {**self._queries.get(prompt, {}), **new}
            size = _size(pairs)
            if size > self._limit:
                if not self._refused:
                    logger.warning(
                        "the scores of the pairs of one query take %d bytes, more than the budget of %d, and are not "
                        "all kept in memory",
                        size,
                        self._limit,
                    )
                self._refused += len(new)
                return
            self._drop(prompt)
            while self._bytes + size > self._limit:
                evicted = self._drop(next(iter(self._queries)))
                if not self._evicted:
                    logger.info(
                        "the scores in memory reached %d bytes; those of the least recently used queries are evicted",
                        self._limit,
                    )
                self._evicted += evicted
            self._queries[prompt] = pairs
            self._bytes += size

    def _drop(self, prompt: bytes) -> int:
        pairs = self._queries.pop(prompt, None)
        if pairs is None:
            return 0
        self._bytes -= _size(pairs)
        return len(pairs)

    def delete(self, keys: Iterable[str]) -> int:
        """Delete the scores of passages, whatever the query; returns how many there were.

        Args:
            keys: keys of the passages' encoder states.
        """
        passages = set(map(bytes.fromhex, keys))
        gone = 0
        with self._lock:
            for prompt, pairs in list(self._queries.items()):
                doomed = pairs.keys() & passages
                if not doomed:
                    continue
                gone += len(doomed)
                self._bytes -= _size(pairs)
                left = {passage: data for passage, data in pairs.items() if passage not in doomed}
                if left:
                    self._queries[prompt] = left
                    self._bytes += _size(left)
                else:
                    del self._queries[prompt]
        return gone

    def clear(self) -> int:
        """Delete everything; returns how many scores there were."""
        with self._lock:
            gone = sum(map(len, self._queries.values()))
            self._queries.clear()
            self._bytes = 0
        return gone

    def stats(self) -> ScoreStats:
        """Return counters and size."""
        with self._lock:
            entries = sum(map(len, self._queries.values()))
            size = StoreStats(entries, self._bytes, self._limit, self._evicted, self._refused)
            return ScoreStats(replace(self._counters), size)


def _size(pairs: dict[bytes, bytes]) -> int:
    """Return the bytes that the pairs of a query take."""
    return _QUERY_BYTES + sys.getsizeof(pairs) + len(pairs) * _PAIR_BYTES
