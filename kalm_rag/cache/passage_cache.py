"""The passage cache: memory in front of a store. Every byte is verified, and every fault is a miss."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

from kalm_rag.cache.disk import DiskStore
from kalm_rag.cache.forgetting import ForgetReport, Forgetter, Level
from kalm_rag.cache.frame import Frame, FrameError
from kalm_rag.cache.memory import MemoryStore
from kalm_rag.cache.spaces import Kind, Space, record, records_of
from kalm_rag.cache.store import Store, StoreStats, add
from kalm_rag.cache.writer import WriteBehind
from kalm_rag.utils import forks
from kalm_rag.utils.checks import check_bytes, check_choice, check_positive, check_ratio, check_secret
from kalm_rag.utils.display import Shown, html_table
from kalm_rag.utils.paths import DEFAULT, passages_dir, user_path

if TYPE_CHECKING:
    from kalm_rag.results import Document

logger = logging.getLogger(__name__)

Storage = Literal["native", "int8"]
Keep = Literal["states", "prefilled", "compact"]

DEFAULT_MEMORY = 256_000_000
"""Bytes of encoded passages kept in memory: about 2,600 passages of 300 tokens of Nano."""

_PENDING_BYTES = 256_000_000
_EMPTY = StoreStats(None, None, None)
R = TypeVar("R")
T = TypeVar("T")


@dataclass(slots=True, repr=False)
class LevelCounters(Shown):
    """Counts passages at one level since the cache was made.

    Attributes:
        hits: found and verified.
        misses: not found.
        corrupt: present, but not what was asked for: a flipped bit, a swapped value, a wrong tag, another format.
        read_failed: the store failed.
        write_failed: not kept: the store failed, is read-only, or refused them.
        bytes_read: of hits.
        bytes_written: of what was kept; estimated when a store accepted only part of a batch.
    """

    hits: int = 0
    misses: int = 0
    corrupt: int = 0
    read_failed: int = 0
    write_failed: int = 0
    bytes_read: int = 0
    bytes_written: int = 0


@dataclass(frozen=True, slots=True, repr=False)
class LevelStats(Shown):
    """Counters of a level and the size of its store."""

    counters: LevelCounters
    size: StoreStats

    def _facts(self, *, defaults: bool) -> list[tuple[str, str]]:
        return [*self.counters._facts(defaults=defaults), *self.size._facts(defaults=defaults)]


@dataclass(frozen=True, slots=True, repr=False)
class CacheStats(Shown):
    """Both levels.

    Attributes:
        memory: the level in memory.
        store: the level behind it, on disk or elsewhere.
        prefilled: prefilled passages in that store; its size is part of the store's.
        encoded: passages that had to be encoded.
        unrecorded: key spaces that could not be recorded in the store: other processes cannot find their entries by
            text to forget them.
    """

    memory: LevelStats
    store: LevelStats
    prefilled: LevelCounters
    encoded: int
    unrecorded: int = 0

    def _levels(self, *, defaults: bool) -> dict[str, dict[str, str]]:
        levels = {"memory": self.memory, "store": self.store, "prefilled": self.prefilled}
        return {name: dict(level._facts(defaults=defaults)) for name, level in levels.items()}

    def __repr__(self) -> str:
        unrecorded = f", unrecorded={self.unrecorded}" if self.unrecorded else ""
        lines = [f"CacheStats(encoded={self.encoded}{unrecorded}"]
        for name, facts in self._levels(defaults=False).items():
            lines.append(f"  {name}: {', '.join(f'{fact}={text}' for fact, text in facts.items()) or 'nothing yet'}")
        return ",\n".join(lines) + ")"

    def _repr_html_(self) -> str:
        levels = self._levels(defaults=True)
        names = list(levels["memory"])
        rows = [(name.replace("_", " "), *(level.get(name, "") for level in levels.values())) for name in names]
        caption = f"CacheStats: {self.encoded} passages encoded"
        if self.unrecorded:
            caption += f", {self.unrecorded} key spaces not recorded"
        return html_table(("", *levels), rows, caption, left=0)


@dataclass(slots=True)
class _Counts:
    memory: LevelCounters = field(default_factory=LevelCounters)
    store: LevelCounters = field(default_factory=LevelCounters)
    prefilled: LevelCounters = field(default_factory=LevelCounters)
    encoded: int = 0


class PassageCache:
    """Caches encoded passages between processes, and never causes a wrong score.

    Args:
        where: a folder, a `Store`, or None to keep passages in memory only. `~` and variables in a folder are
            expanded. Default: the folder that `KALM_RAG_CACHE` names, else `passages` in the user's cache folder; a
            user without a home folder gets memory only, and a line in the log.
        memory: bytes kept in memory in front of it; 0 turns that level off.
        limit: bytes a folder may take before the least recently stored passages are evicted. It is kept in the folder:
            None leaves it as it is, 10 GB for a new one.
        base_ratio: the ratio at which states are kept. Multiples are derived exactly; other ratios are encoded again.
        keep: `states`; or to keep prefilled passages in the store too, for deployments on a CPU, where reading them
            beats computing them by far: `compact` at about three times the bytes of bfloat16 states (0.3 MB for 300
            tokens of Nano) and scores that change a little, or `prefilled` at about 25 times (2.4 MB in bfloat16).
        storage: `native` keeps the numbers as they are; `int8` keeps a quarter (of float32) or half (of bfloat16) of
            the bytes and changes scores a little.
        secret: authenticate entries with this key: what was written without it is a miss. For folders that others can
            write to.
        read_only: write nothing to a folder.

    One instance may be used from any number of threads, and in a forked process. `_lock` guards the counters and
    `_faults`; the memory level, the pending writes and the store have their own locks.

    Encoded passages are written asynchronously: `flush()` waits for it, and so does leaving a `with` block, `close()`,
    or the end of the process. A fork waits for the running write; the parent does the pending ones.

    A pickle holds the arguments, so that another process opens the same folder: no passages, but the secret, if there
    is one. Copies in the same process are the cache itself.

    Raises:
        ValueError, TypeError: an argument is wrong.
    """

    def __init__(
        self,
        where: str | Path | Store | None = DEFAULT,
        *,
        memory: int = DEFAULT_MEMORY,
        limit: int | None = None,
        base_ratio: int = 4,
        keep: Keep = "states",
        storage: Storage = "native",
        secret: str | bytes | None = None,
        read_only: bool = False,
    ) -> None:
        memory = check_bytes("memory", memory)
        check_choice("storage", storage, get_args(Storage))
        check_choice("keep", keep, get_args(Keep))
        if limit is not None:
            limit = check_positive("limit", limit)
        self.base_ratio = check_ratio("base_ratio", base_ratio)
        self.storage: Storage = storage
        self.keep: Keep = keep
        self.store = _make_store(where, limit, read_only)
        self._has_records = records_of(self.store) is not None
        self._secret = check_secret("secret", secret)
        self._arguments = {
            "where": where,
            "memory": memory,
            "limit": limit,
            "base_ratio": self.base_ratio,
            "keep": keep,
            "storage": storage,
            "secret": secret,
            "read_only": read_only,
        }
        if isinstance(self.store, DiskStore):
            self.store.place.authenticated = self._secret is not None
        self._memory = MemoryStore(memory)
        self._writer = WriteBehind(_PENDING_BYTES)
        self._lock = forks.Lock()
        self._counts = _Counts()
        self._faults: set[str] = set()
        self._forgetter = Forgetter(self._memory, self.flush)
        forks.watch(self)
        if hasattr(self.store, "after_fork_in_child"):
            forks.watch(self.store)

    def __copy__(self) -> PassageCache:
        """Return the cache itself."""
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> PassageCache:
        """Return the cache itself: copies of its owners share it."""
        return self

    def __getstate__(self) -> dict[str, Any]:
        return self._arguments

    def __setstate__(self, arguments: dict[str, Any]) -> None:
        PassageCache.__init__(self, **arguments)

    def after_fork_in_child(self) -> None:
        """Drop a store that another thread was using during the fork: its locks are held forever."""
        if forks.is_broken() and self.store is not None:
            self.store = None
            logger.warning("the process was forked during a write to the passage cache: the child continues without it")

    def __repr__(self) -> str:
        place = self.store.folder if isinstance(self.store, DiskStore) else self.store
        kept = f"base_ratio={self.base_ratio}, keep={self.keep!r}, storage={self.storage!r}"
        return f"PassageCache({str(place)!r}, {kept})"

    @property
    def keeps_prefilled(self) -> bool:
        """Whether the store keeps prefilled passages, in whatever form."""
        return self.keep != "states"

    def get_many(self, kind: Kind, keys: Sequence[str], decode: Callable[[Frame], T | None]) -> dict[str, T]:
        """Return what is cached under the keys, in one batch; missing keys are left out.

        Memory is asked first, and hits in the store are copied into it. Every fault is a miss, a log line and a
        counter.

        Args:
            kind: what the keys are of.
            keys: of `KeySpace`.
            decode: turns a verified frame into a value. It returns None for a frame that cannot serve this call (a
                miss) and raises `FrameError` for an unexpected one (counted as corrupt).
        """
        if kind == "passage_kv":
            return self._read(self.store, self._counts.prefilled, keys, decode)[0] if self.keeps(kind) else {}
        found, _ = self._read(self._memory, self._counts.memory, keys, decode)
        stored, data = self._read(self.store, self._counts.store, [key for key in keys if key not in found], decode)
        self._memory.put_many(data)
        return found | stored

    def recall(self, keys: Sequence[str], decode: Callable[[Frame], T | None]) -> dict[str, T]:
        """Return states in memory without counting, for keys that `get_many` just missed."""
        return self._read(self._memory, LevelCounters(), keys, decode)[0]

    def keeps(self, kind: Kind) -> bool:
        """Whether the store keeps values of this kind."""
        return self.store is not None and (kind == "states" or self.keeps_prefilled)

    def get_or_add(self, key: str, make: Callable[[], Frame], decode: Callable[[Frame], T]) -> T:
        """Return what the store holds under a key, or what is made now and added, unless another process was first.

        Args:
            key: the key.
            make: makes the frame; called at most once.
            decode: turns a verified frame into a value; raises `FrameError` for an unexpected one, which is replaced.
        """
        found = self._verified(key, decode)
        if found is not None:
            return found
        made, store = make(), self.store
        if store is not None:
            self._attempt("write to", lambda: add(store, key, made.to_bytes(self._secret)))
            found = self._verified(key, decode)
        return decode(made) if found is None else found

    def _verified(self, key: str, decode: Callable[[Frame], T]) -> T | None:
        store = self.store
        answer = None if store is None else self._attempt("read", lambda: store.get_many([key]))
        try:
            return decode(Frame.from_bytes(answer[key], key, self._secret)) if answer else None
        except FrameError as error:
            self.report("corrupt", f"an entry of the cache does not verify ({error}); it is made again")
            self.discard([key])
            return None

    def seal(self, frames: Mapping[str, Frame]) -> dict[str, bytes]:
        """Turn frames into bytes, with this cache's secret."""
        return {key: frame.to_bytes(self._secret) for key, frame in frames.items()}

    def put_in_memory(self, sealed: Mapping[str, bytes], encoded: int) -> None:
        """Keep newly encoded states in memory; this never waits.

        Args:
            sealed: what `seal` made.
            encoded: how many passages were encoded, kept or not.
        """
        with self._lock:
            self._counts.encoded += encoded
        self._memory.put_many(sealed)

    def put_in_store(self, kind: Kind, sealed: Mapping[str, bytes]) -> None:
        """Store the result of `seal` asynchronously; waits while too many bytes are pending."""
        if sealed and self.keeps(kind):
            counters = self._counts.store if kind == "states" else self._counts.prefilled
            self._writer.submit(sum(map(len, sealed.values())), partial(self._write, sealed, counters))

    def discard(self, keys: list[str]) -> None:
        """Delete entries that turned out to be unusable, and count them as corrupt; a failing store is logged."""
        self._forgetter.delete_in_memory(keys)
        self._forgetter.delete_scores(keys)
        store = self.store
        if store is None:
            return
        dropped = self._attempt("delete from", lambda: store.delete(keys)) or 0
        with self._lock:
            self._counts.store.corrupt += dropped

    def delete(self, keys: Iterable[str]) -> int:
        """Delete entries by key at every level, pending writes included.

        All remembered scores in this process are deleted too: any of them may come from such an entry.

        Args:
            keys: keys of entries, each 64 hexadecimal digits, as the store's `keys()` lists them.

        Returns:
            How many entries went, at all levels together, scores not counted. A key without an entry is no error.

        Raises:
            ValueError: a key is not one; nothing was deleted then.
            StoreError: the store is read-only, failed, or does not delete.
        """
        return self._forgetter.delete(self.store, keys)

    def forget(self, texts: Iterable[Document], spaces: Iterable[Space] = ()) -> ForgetReport:
        """Delete what is kept of texts: states and prefilled passages in memory and store, and scores in memory.

        No model is loaded. The texts are searched under every model and setting whose key space the store has recorded,
        or that this process has used. Writes that are pending are finished first, and passages that wait to be encoded
        in the background of this process are given up. A ranking that runs at the same time may store a text again, and
        other processes keep what they have in memory: forget a text after it has left what is ranked.

        Args:
            texts: passages as `KaLMReranker.rank` takes them. Any iterable; a generator is consumed in windows.
            spaces: further key spaces to search, such as those of `kalm_rag.forget.spaces_of`.

        Raises:
            TypeError: a text is wrong; the message names its position. The texts before it may be forgotten.
            StoreError: the store is read-only, failed, or does not delete.
        """
        return self._forgetter.forget(self.store, texts, spaces)

    def use(self, space: Space, *, kept: bool = False) -> None:
        """Remember that this process uses a key space, so that `forget` searches it.

        Args:
            space: the key space.
            kept: the store holds entries of it, or is about to. It is recorded there, asynchronously and once; a
                failure is a log line and a counter.
        """
        book = self._forgetter.book
        book.use(space)
        if not (kept and self._has_records and self.keeps(space.kind)):
            return
        if isinstance(self.store, DiskStore) and not self.store.records.holds(space.id):
            book.lost(space)
        if book.begin(space):
            self._writer.submit(0, partial(self._record, space))

    def attach(self, level: Level) -> None:
        """Let `forget` and `delete` reach what a reranker holds in memory."""
        self._forgetter.attach(level)

    def _record(self, space: Space) -> None:
        try:
            with forks.native():
                kept = record(self.store, [space])
        except Exception as error:  # noqa: BLE001 - a store may be anybody's code
            self._forgetter.book.end(space, failed=True)
            self.report(
                "record", f"cannot record a key space: other processes cannot find its entries by text ({error})"
            )
        else:
            self._forgetter.book.end(space, again=not kept)

    def report(self, kind: str, message: str) -> None:
        """Log a fault: the first of its kind as a warning, later ones at `DEBUG`."""
        with self._lock:
            level = logging.DEBUG if kind in self._faults else logging.WARNING
            self._faults.add(kind)
        logger.log(level, "%s", message)

    def _read(
        self,
        store: Store | None,
        counters: LevelCounters,
        keys: Sequence[str],
        decode: Callable[[Frame], T | None],
    ) -> tuple[dict[str, T], dict[str, bytes]]:
        """Read, verify and count at one level; return the values and their bytes."""
        if not keys or store is None:
            return {}, {}

        def read() -> dict[str, bytes]:
            answer = store.get_many(keys)
            return {key: answer[key] for key in keys if key in answer}

        answer = self._attempt("read", read)
        failed = answer is None
        found: dict[str, T] = {}
        good: dict[str, bytes] = {}
        corrupt = 0
        for key, data in (answer or {}).items():
            try:
                value = decode(Frame.from_bytes(data, key, self._secret))
            except Exception as error:  # noqa: BLE001 - bytes that no reader foresaw are as wrong as any others
                corrupt += 1
                self.report("corrupt", f"a cached passage does not verify ({error}); it is computed again")
                continue
            if value is not None:
                found[key], good[key] = value, data
        with self._lock:
            counters.hits += len(good)
            counters.corrupt += corrupt
            counters.read_failed += len(keys) if failed else 0
            counters.misses += 0 if failed else len(keys) - len(good) - corrupt
            counters.bytes_read += sum(map(len, good.values()))
        return found, good

    def _write(self, sealed: Mapping[str, bytes], counters: LevelCounters) -> None:
        store = self.store
        if store is None:
            return
        kept = self._attempt("write to", lambda: store.put_many(sealed))
        with self._lock:
            counters.write_failed += len(sealed) - (kept or 0)
            if kept:
                counters.bytes_written += sum(map(len, sealed.values())) * kept // len(sealed)

    def flush(self) -> None:
        """Wait until every pending write has succeeded or failed."""
        self._writer.flush()

    def _attempt(self, what: str, action: Callable[[], R]) -> R | None:
        """Run something on a store, which may be anybody's code: log any exception and return None."""
        try:
            with forks.native():
                return action()
        except Exception as error:  # noqa: BLE001
            self.report(what, f"cannot {what} the passage cache, continuing without it: {error}")
            return None

    def stats(self) -> CacheStats:
        """Return counters and sizes of both levels."""
        store = self.store
        size = _EMPTY if store is None else self._attempt("read", store.stats) or _EMPTY
        memory = self._memory.stats()
        unrecorded = self._forgetter.unrecorded(store)
        with self._lock:
            counts = self._counts
            return CacheStats(
                LevelStats(replace(counts.memory), memory),
                LevelStats(replace(counts.store), size),
                replace(counts.prefilled),
                counts.encoded,
                unrecorded,
            )

    def close(self) -> None:
        """Finish pending writes and release the store. A later call opens it again."""
        self._writer.close()
        self._memory.close()
        if self.store is not None:
            self._attempt("close", self.store.close)

    def __enter__(self) -> PassageCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _make_store(where: Any, limit: int | None, read_only: bool) -> Store | None:
    if where is None:
        return None
    if isinstance(where, (str, Path)):
        folder = passages_dir() if where == DEFAULT else user_path(where, "cache")
        return None if folder is None else DiskStore(folder, limit=limit, read_only=read_only)
    if isinstance(where, Store):
        return where
    msg = f"the cache must be a folder, a store or None, got {type(where).__name__}: {where!r:.80}"
    raise TypeError(msg)
