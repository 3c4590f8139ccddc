"""The passage cache: memory in front of a store, every byte verified, every fault a miss."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

from kalm_rag.cache.disk import DEFAULT_LIMIT, DiskStore
from kalm_rag.cache.frame import FrameError, pack, unpack
from kalm_rag.cache.keys import KeySpace
from kalm_rag.cache.memory import MemoryStore
from kalm_rag.cache.store import Store, StoreStats
from kalm_rag.paths import default_cache_dir
from kalm_rag.pooling import PassageStates
from kalm_rag.settings import check_bytes, check_choice, check_positive

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

Storage = Literal["native", "int8"]

DEFAULT_MEMORY = 256_000_000
"""Bytes of encoded passages kept in memory: about 2,600 passages of 300 tokens of Nano."""

_PENDING_BYTES = 256_000_000
_EMPTY = StoreStats(None, None, None)
R = TypeVar("R")


@dataclass(slots=True)
class LevelCounters:
    """What happened at one level since the cache was made; the unit is the passage.

    Attributes:
        hits: found and verified.
        misses: not there.
        corrupt: there, and not what was asked for: a flipped bit, a swapped value, a wrong tag, another format.
        read_failed: the store failed.
        write_failed: not kept because the store failed.
        bytes_read: of hits.
        bytes_written: of what was kept.
    """

    hits: int = 0
    misses: int = 0
    corrupt: int = 0
    read_failed: int = 0
    write_failed: int = 0
    bytes_read: int = 0
    bytes_written: int = 0


@dataclass(frozen=True, slots=True)
class LevelStats:
    """Counters of a level and the size of its store."""

    counters: LevelCounters
    size: StoreStats


@dataclass(frozen=True, slots=True)
class CacheStats:
    """Both levels.

    Attributes:
        memory: the level in memory.
        store: the level behind it, on disk or elsewhere.
        encoded: passages that had to be encoded.
    """

    memory: LevelStats
    store: LevelStats
    encoded: int


@dataclass(slots=True)
class _Counts:
    memory: LevelCounters = field(default_factory=LevelCounters)
    store: LevelCounters = field(default_factory=LevelCounters)
    encoded: int = 0


class PassageCache:
    """Encoded passages, shared by processes, and never the source of a wrong score.

    Args:
        where: a folder, a `Store`, or None for memory alone. Default: the folder `passages` in the user's cache
            folder (`KALM_RAG_CACHE` moves it).
        memory: bytes kept in memory in front of it; 0 turns that level off.
        limit: bytes a folder may take before the least recently stored passages are evicted.
        base_ratio: the ratio at which states are kept. Multiples are derived exactly; other ratios are encoded anew.
        storage: `native` keeps the numbers as they are; `int8` keeps a quarter (of float32) or half (of bfloat16) of
            the bytes and changes scores a little.
        secret: authenticate entries with this key: what was written without it is a miss. For folders that others can
            write to.
        read_only: write nothing to a folder.

    One instance may be used from any number of threads and survives a fork. What is encoded is written behind:
    `flush()` waits for it, and so does leaving a `with` block, `close()`, or the end of the process.

    Raises:
        ValueError, TypeError: an argument is wrong.
    """

    def __init__(
        self,
        where: str | Path | Store | None = "default",
        *,
        memory: int = DEFAULT_MEMORY,
        limit: int = DEFAULT_LIMIT,
        base_ratio: int = 4,
        storage: Storage = "native",
        secret: str | bytes | None = None,
        read_only: bool = False,
    ) -> None:
        check_bytes("memory", memory)
        check_choice("storage", storage, get_args(Storage))
        check_positive("limit", limit)
        self.base_ratio = check_positive("base_ratio", base_ratio)
        self.storage: Storage = storage
        self.store = _make_store(where, limit, read_only)
        self._secret = secret.encode("utf-8") if isinstance(secret, str) else secret
        if self._secret is not None and len(self._secret) < 16:
            msg = f"secret must have at least 16 bytes, got {len(self._secret)}; use secrets.token_hex(32)"
            raise ValueError(msg)
        self._memory = MemoryStore(memory)
        self._counts = _Counts()
        self._counting = threading.Lock()
        self._pending: dict[Future[None], int] = {}
        self._writer: ThreadPoolExecutor | None = None
        self._writer_pid = 0
        self._faults: set[str] = set()

    def __repr__(self) -> str:
        place = self.store.folder if isinstance(self.store, DiskStore) else self.store
        return f"PassageCache({str(place)!r}, base_ratio={self.base_ratio}, storage={self.storage!r})"

    def lookup(self, space: KeySpace, texts: Iterable[str], ratio: int, dtype: torch.dtype) -> dict[str, PassageStates]:
        """The passages that are known, at `ratio`, in one batch; the rest is left out.

        Args:
            space: keys of the model and its settings.
            texts: passages, cleaned.
            ratio: what the states are needed at.
            dtype: what they are needed in.
        """
        keys = {space.key(text): text for text in texts}
        found: dict[str, PassageStates] = {}
        self._take(self._memory, self._counts.memory, keys, found, ratio, dtype)
        missing = [key for key, text in keys.items() if text not in found]
        if missing and self.store is not None:
            frames = self._take(
                self.store, self._counts.store, {key: keys[key] for key in missing}, found, ratio, dtype
            )
            self._memory.put_many(frames)
        return found

    def _take(
        self,
        store: Store,
        counters: LevelCounters,
        keys: Mapping[str, str],
        found: dict[str, PassageStates],
        ratio: int,
        dtype: torch.dtype,
    ) -> dict[str, bytes]:
        """Read one level into `found`; returns the frames that verified."""
        frames = self._attempt("read", lambda: store.get_many(list(keys)))
        failed = frames is None
        good: dict[str, bytes] = {}
        corrupt = 0
        for key, data in (frames or {}).items():
            try:
                frame = unpack(data, key, self._secret)
                if ratio % frame.ratio == 0:
                    found[keys[key]] = frame.states(dtype).at(ratio)
                    good[key] = data
            except (FrameError, KeyError, TypeError) as error:
                corrupt += 1
                self._fault("corrupt", f"a cached passage does not verify ({error}); it is encoded again")
        with self._counting:
            counters.hits += len(good)
            counters.corrupt += corrupt
            counters.read_failed += len(keys) if failed else 0
            counters.misses += 0 if failed else len(keys) - len(good) - corrupt
            counters.bytes_read += sum(map(len, good.values()))
        return good

    def keep(self, space: KeySpace, passages: Mapping[str, PassageStates]) -> dict[str, PassageStates]:
        """Keep what was just encoded, in memory now and in the store behind the caller's back.

        Returns:
            The passages as a later `lookup` will return them, so that a score does not depend on whether the cache was
            warm: the same states, or with `int8` the rounded ones.
        """
        frames: dict[str, bytes] = {}
        kept = dict(passages)
        for text, passage in passages.items():
            key = space.key(text)
            try:
                frames[key] = pack(key, space.model, passage, int8=self.storage == "int8", secret=self._secret)
            except ValueError as error:
                self._fault("unkept", f"a passage is not kept: {error}")
                continue
            if self.storage == "int8":
                states = passage.states
                kept[text] = unpack(frames[key], key).states(states.dtype)
                kept[text] = replace(kept[text], states=kept[text].states.to(states.device))
        with self._counting:
            self._counts.encoded += len(passages)
        self._memory.put_many(frames)
        if self.store is not None and frames:
            self._submit(frames)
        return kept

    def forget(self, space: KeySpace, texts: Iterable[str]) -> None:
        """Drop passages that turned out to be unusable, and count them as corrupt."""
        keys = [space.key(text) for text in texts]
        self._memory.delete(keys)
        with self._counting:
            self._counts.store.corrupt += len(keys)
        if self.store is not None:
            store = self.store
            self._attempt("delete from", lambda: store.delete(keys))

    def _submit(self, frames: dict[str, bytes]) -> None:
        size = sum(map(len, frames.values()))
        with self._counting:
            if self._writer is None or self._writer_pid != os.getpid():
                self._writer = ThreadPoolExecutor(1, thread_name_prefix="kalm-rag-cache")
                self._writer_pid = os.getpid()
                self._pending = {}
            writer = self._writer
            waiting = list(self._pending) if sum(self._pending.values()) + size > _PENDING_BYTES else []
        for future in waiting:  # the store is slower than the encoder: wait, rather than grow or drop
            future.result()
        future = writer.submit(self._write, frames)
        with self._counting:
            self._pending[future] = size
        future.add_done_callback(self._forget_future)

    def _forget_future(self, future: Future[None]) -> None:
        with self._counting:
            self._pending.pop(future, None)

    def _write(self, frames: dict[str, bytes]) -> None:
        store = self.store
        if store is None:
            return
        kept = self._attempt("write to", lambda: store.put_many(frames))
        with self._counting:
            if kept is None:
                self._counts.store.write_failed += len(frames)
            else:
                self._counts.store.bytes_written += sum(map(len, frames.values())) if kept == len(frames) else 0

    def flush(self) -> None:
        """Wait until everything that was encoded is in the store, or has failed to get there."""
        while True:
            with self._counting:
                waiting = list(self._pending) if self._writer_pid == os.getpid() else []
            if not waiting:
                return
            for future in waiting:
                future.result()
                self._forget_future(future)

    def _attempt(self, what: str, action: Callable[[], R]) -> R | None:
        """Run something on a store. Whatever it raises is a log line and None: a store may be anybody's code."""
        try:
            return action()
        except Exception as error:  # noqa: BLE001
            self._fault(what, f"cannot {what} the passage cache, going on without: {error}")
            return None

    def _fault(self, kind: str, message: str) -> None:
        """Log a fault: the first of its kind as a warning, the rest for those who look for them."""
        level = logging.DEBUG if kind in self._faults else logging.WARNING
        self._faults.add(kind)
        logger.log(level, "%s", message)

    def stats(self) -> CacheStats:
        """Counters and sizes of both levels."""
        store = self.store
        size = _EMPTY if store is None else self._attempt("read", store.stats) or _EMPTY
        with self._counting:
            counts = self._counts
            return CacheStats(
                LevelStats(replace(counts.memory), self._memory.stats()),
                LevelStats(replace(counts.store), size),
                counts.encoded,
            )

    def close(self) -> None:
        """Write what is pending and release the store. A later call opens it again."""
        self.flush()
        with self._counting:
            writer, self._writer = self._writer, None
        if writer is not None and self._writer_pid == os.getpid():
            writer.shutdown()
        self._memory.close()
        if self.store is not None:
            self._attempt("close", self.store.close)

    def __enter__(self) -> PassageCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _make_store(where: Any, limit: int, read_only: bool) -> Store | None:
    if where is None:
        return None
    if isinstance(where, (str, Path)):
        folder = default_cache_dir() / "passages" if where == "default" else Path(where)
        return DiskStore(folder, limit=limit, read_only=read_only)
    if isinstance(where, Store):
        return where
    msg = f"the cache must be a folder, a store or None, got {type(where).__name__}: {where!r:.80}"
    raise TypeError(msg)
