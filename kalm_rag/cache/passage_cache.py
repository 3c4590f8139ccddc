"""The passage cache: memory in front of a store, and a shared tier behind it.

Every byte is verified, and every fault is a miss.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

from kalm_rag.cache.agreement import OneValue, share
from kalm_rag.cache.disk import DiskStore
from kalm_rag.cache.forgetting import ForgetReport, Forgetter, Level
from kalm_rag.cache.frame import Frame, NoTagError
from kalm_rag.cache.local import open_store
from kalm_rag.cache.memory import MemoryStore
from kalm_rag.cache.recorder import Recorder
from kalm_rag.cache.remote.opening import DEFAULT_NAMESPACE, open_tier, secret_or_environment
from kalm_rag.cache.remote.patience import MOST_SECONDS, seconds_for
from kalm_rag.cache.remote.tier import RemoteMode
from kalm_rag.cache.spaces import Kind, Space
from kalm_rag.cache.stats import CacheStats, Counts, LevelCounters, LevelStats
from kalm_rag.cache.store import Store, StoreStats
from kalm_rag.cache.writer import WriteBehind
from kalm_rag.utils import forks
from kalm_rag.utils.checks import check_bytes, check_choice, check_flag, check_positive, check_ratio, check_secret
from kalm_rag.utils.paths import DEFAULT
from kalm_rag.utils.recording import add_count, add_sources

if TYPE_CHECKING:
    from kalm_rag.results import Document

logger = logging.getLogger(__name__)

Storage = Literal["native", "int8"]
Keep = Literal["states", "prefilled", "compact"]

DEFAULT_MEMORY = 256_000_000
"""Bytes of encoded passages kept in memory: about 2,600 passages of 300 tokens of Nano."""

_PENDING_BYTES = 256_000_000
_CLOSING_SECONDS = 10.0
_EMPTY = StoreStats(None, None, None)
R = TypeVar("R")
T = TypeVar("T")


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
            write to, and for a shared tier. Default: what `KALM_RAG_CACHE_SECRET` holds, if anything.
        read_only: write nothing to a folder.
        remote: a tier that several machines share, behind the folder: `redis://host:6379/0` or `rediss://` (Redis or
            Valkey), `s3://bucket/prefix`, `gs://`, `az://`, `file:///folder`, or a `Store`. What it holds is verified,
            used, and copied to the folder in the background; what is encoded here is written to it behind the query.
            It needs a `secret`.
        remote_mode: `read-write`, or `read` to use it and write nothing to it.
        remote_timeout_ms: milliseconds that all reads of a query may wait for it together. Default: what encoding the
            missing passages is predicted to take, between 100 ms and 2 s, and never beyond `budget_ms`.
        remote_prefilled: with `keep="prefilled"`, share the prefilled passages as well, which are large. Encoder states
            and the compact form are always shared.
        namespace: separates tenants that share a `remote`: none looks under another's keys.
        unauthenticated: share without a `secret`, where everybody who can write to the `remote` is trusted.

    Attributes:
        store: the store, None for memory only.
        remote: the shared tier, None without one.
        base_ratio: as given.
        keep: as given.
        storage: as given.
        secret: the secret as bytes, None without one.

    One instance may be used from any number of threads, and in a forked process. `_lock` guards the counters and
    `_faults`; the memory level, the pending writes and the store have their own locks.

    Encoded passages are written asynchronously: `flush()` waits for it, and so does leaving a `with` block, `close()`,
    or the end of the process, for a shared tier at most 10 seconds each. A fork waits for the running write; the parent
    does the pending ones.

    A pickle holds the arguments, so that another process opens the same folder: no passages, but the secret and the
    credentials of a `remote`, if they are among the arguments. Copies in the same process are the cache itself.

    Raises:
        ValueError, TypeError: an argument is wrong.
        ImportError: the client of a `remote` is not installed.
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
        remote: str | Store | None = None,
        remote_mode: RemoteMode = "read-write",
        remote_timeout_ms: float | None = None,
        remote_prefilled: bool = False,
        namespace: str = DEFAULT_NAMESPACE,
        unauthenticated: bool = False,
    ) -> None:
        memory = check_bytes("memory", memory)
        check_choice("storage", storage, get_args(Storage))
        check_choice("keep", keep, get_args(Keep))
        if limit is not None:
            limit = check_positive("limit", limit)
        self.base_ratio = check_ratio("base_ratio", base_ratio)
        self.storage: Storage = storage
        self.keep: Keep = keep
        self.store = open_store(where, limit, read_only)
        self.secret = check_secret("secret", secret_or_environment(secret))
        self._remote_prefilled = check_flag("remote_prefilled", remote_prefilled)
        self.remote = open_tier(
            remote,
            mode=remote_mode,
            timeout_ms=remote_timeout_ms,
            namespace=namespace,
            secret=self.secret,
            unauthenticated=unauthenticated,
        )
        self._arguments = {
            "where": where,
            "memory": memory,
            "limit": limit,
            "base_ratio": self.base_ratio,
            "keep": keep,
            "storage": storage,
            "secret": secret,
            "read_only": read_only,
            "remote": remote,
            "remote_mode": remote_mode,
            "remote_timeout_ms": remote_timeout_ms,
            "remote_prefilled": remote_prefilled,
            "namespace": namespace,
            "unauthenticated": unauthenticated,
        }
        if isinstance(self.store, DiskStore):
            self.store.place.authenticated = self.secret is not None
        self._memory = MemoryStore(memory)
        self._writer = WriteBehind(_PENDING_BYTES)
        self._lock = forks.Lock()
        self._counts = Counts()
        self._faults: set[str] = set()
        self._forgetter = Forgetter(self._memory, self.flush)
        self._recorder = Recorder(self._forgetter.book, self._writer, self.report)
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
        shared = "" if self.remote is None else f", remote={self.remote.shown!r}"
        return f"PassageCache({str(place)!r}, {kept}{shared})"

    @property
    def keeps_prefilled(self) -> bool:
        """Whether the store keeps prefilled passages, in whatever form."""
        return self.keep != "states"

    def get_many(
        self,
        kind: Kind,
        keys: Sequence[str],
        decode: Callable[[Frame], T | None],
        patience: Callable[[Sequence[str]], tuple[float, float]] | None = None,
    ) -> dict[str, T]:
        """Return what is cached under the keys, in one batch for each level; missing keys are left out.

        Memory is asked first, then the store, whose hits are copied into memory, then the shared tier, whose hits are
        copied into both. Every fault is a miss, a log line and a counter.

        Args:
            kind: what the keys are of.
            keys: of `KeySpace`.
            decode: turns a verified frame into a value. It returns None for a frame that cannot serve this call (a
                miss) and raises `FrameError` for an unexpected one (counted as corrupt).
            patience: tells of keys that are missing so far how many seconds computing their values would take, and how
                many the call has left; the shared tier gets no longer. Without it, it gets 2 seconds.
        """
        found: dict[str, T] = {}
        counters = self._counts.prefilled
        if kind == "states":
            found, _ = self._read(self._memory.get_many, self._counts.memory, keys, decode)
            counters = self._counts.store
        missing = [key for key in keys if key not in found]
        stored: dict[str, T] = {}
        data: dict[str, bytes] = {}
        store = self.store
        if store is not None and self._keeps_here(kind):
            stored, data = self._read(store.get_many, counters, missing, decode)
        shared, more = self._read_remote(kind, [key for key in missing if key not in stored], decode, patience)
        if kind == "states":
            self._memory.put_many(data | more)
        add_sources(memory=found, store=stored, remote=shared)
        return found | stored | shared

    def _read_remote(
        self,
        kind: Kind,
        keys: Sequence[str],
        decode: Callable[[Frame], T | None],
        patience: Callable[[Sequence[str]], tuple[float, float]] | None,
    ) -> tuple[dict[str, T], dict[str, bytes]]:
        """Read and verify at the shared tier, and copy to the store what is sound."""
        remote = self.remote
        if remote is None or not keys or not self._shares(kind):
            return {}, {}
        predicted, most = (MOST_SECONDS, MOST_SECONDS) if patience is None else patience(keys)
        seconds = seconds_for(predicted, remote.timeout, most)
        own = LevelCounters()  # of hits and damage; what was missing, the tier counts itself
        found, data = self._read(lambda asked: remote.get_many(asked, seconds), own, keys, decode)
        remote.count(hits=own.hits, corrupt=own.corrupt, bytes_read=own.bytes_read)
        add_count("remote", len(found))
        if data and self._keeps_here(kind):
            counters = self._counts.store if kind == "states" else self._counts.prefilled
            if self._writer.offer(sum(map(len, data.values())), partial(self._write, data, counters)):
                remote.count(promoted=len(data))
        return found, data

    def recall(self, keys: Sequence[str], decode: Callable[[Frame], T | None]) -> dict[str, T]:
        """Return states in memory without counting, for keys that `get_many` just missed."""
        return self._read(self._memory.get_many, LevelCounters(), keys, decode)[0]

    def keeps(self, kind: Kind) -> bool:
        """Whether the store or the shared tier keeps values of this kind."""
        return self._keeps_here(kind) or self._shares(kind)

    def _keeps_here(self, kind: Kind) -> bool:
        return self.store is not None and (kind == "states" or self.keeps_prefilled)

    def _shares(self, kind: Kind) -> bool:
        large = kind == "passage_kv" and self.keep != "compact"
        return self.remote is not None and (not large or (self.keeps_prefilled and self._remote_prefilled))

    def get_or_add(self, key: str, make: Callable[[], Frame], decode: Callable[[Frame], T]) -> T:
        """Return what the store holds under a key, or what is made now and added, unless another process was first.

        What the shared tier holds comes before it, so that all machines use the same: what this store holds is offered
        to the tier, and replaced if the tier holds another one.

        Args:
            key: the key.
            make: makes the frame; called at most once.
            decode: turns a verified frame into a value; raises `FrameError` for an unexpected one, which is replaced.
        """
        return OneValue(self, key, decode).get_or_add(make)

    def seal(self, frames: Mapping[str, Frame]) -> dict[str, bytes]:
        """Turn frames into bytes, with this cache's secret."""
        return {key: frame.to_bytes(self.secret) for key, frame in frames.items()}

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
            if self._keeps_here(kind):
                self._writer.submit(sum(map(len, sealed.values())), partial(self._write, sealed, counters))
            if self.remote is not None and self._shares(kind):
                self.remote.put_many(sealed)

    def discard(self, keys: list[str], *, shared: bool = True) -> None:
        """Delete entries that turned out to be unusable, and count them as corrupt; a failing store is logged.

        Args:
            keys: of entries.
            shared: in the shared tier too, in the background.
        """
        self._forgetter.delete_in_memory(keys)
        self._forgetter.delete_scores(keys)
        if self.remote is not None and shared:
            self.remote.later(partial(self.remote.link.store.delete, keys))
        store = self.store
        if store is None:
            return
        dropped = self.attempt("delete from", lambda: store.delete(keys)) or 0
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
        return self._forgetter.delete(self.store, self.remote, keys)

    def forget(self, texts: Iterable[Document], spaces: Iterable[Space] = ()) -> ForgetReport:
        """Delete what is kept of texts: states and prefilled passages in memory and store, and scores in memory.

        No model is loaded. The texts are searched under every model and setting whose key space the store has recorded,
        or that this process has used. Writes that are pending are finished first, and passages that wait to be encoded
        in the background of this process are given up. A ranking that runs at the same time may store a text again, and
        other processes keep what they have in memory, and other machines what they have on their disks, even if this
        one forgets it in the tier that they share: forget a text after it has left what is ranked, on each machine.

        Args:
            texts: passages as `KaLMReranker.rank` takes them. Any iterable; a generator is consumed in windows.
            spaces: further key spaces to search, such as those of `kalm_rag.forget.spaces_of`.

        Raises:
            TypeError: a text is wrong; the message names its position. The texts before it may be forgotten.
            StoreError: the store is read-only, failed, or does not delete.
        """
        return self._forgetter.forget(self.store, self.remote, texts, spaces)

    def use(self, space: Space, *, kept: bool = False) -> None:
        """Remember that this process uses a key space, so that `forget` searches it.

        Args:
            space: the key space.
            kept: the store holds entries of it, or is about to. It is recorded there, asynchronously and once; a
                failure is a log line and a counter.
        """
        here, there = kept and self._keeps_here(space.kind), kept and self._shares(space.kind)
        self._recorder.use(self.store if here else None, self.remote if there else None, space)

    def attach(self, level: Level) -> None:
        """Let `forget` and `delete` reach what a reranker holds in memory."""
        self._forgetter.attach(level)

    def report(self, kind: str, message: str) -> None:
        """Log a fault: the first of its kind as a warning, later ones at `DEBUG`."""
        with self._lock:
            level = logging.DEBUG if kind in self._faults else logging.WARNING
            self._faults.add(kind)
        logger.log(level, "%s", message)

    def _read(
        self,
        get_many: Callable[[Sequence[str]], Mapping[str, bytes]],
        counters: LevelCounters,
        keys: Sequence[str],
        decode: Callable[[Frame], T | None],
    ) -> tuple[dict[str, T], dict[str, bytes]]:
        """Read, verify and count at one level; return the values and their bytes."""
        if not keys:
            return {}, {}

        def read() -> dict[str, bytes]:
            answer = get_many(keys)
            return {key: answer[key] for key in keys if key in answer}

        answer = self.attempt("read", read)
        failed = answer is None
        found: dict[str, T] = {}
        good: dict[str, bytes] = {}
        corrupt = 0
        for key, data in (answer or {}).items():
            try:
                value = decode(Frame.from_bytes(data, key, self.secret))
            except Exception as error:  # noqa: BLE001 - bytes that no reader foresaw are as wrong as any others
                corrupt += 1
                kind = "untagged" if isinstance(error, NoTagError) else "corrupt"
                self.report(kind, f"a cached passage does not verify ({error}); it is computed again")
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
        kept = self.attempt("write to", lambda: store.put_many(sealed))
        with self._lock:
            counters.write_failed += len(sealed) - (kept or 0)
            if kept:
                counters.bytes_written += sum(map(len, sealed.values())) * kept // len(sealed)

    def flush(self, timeout: float = 10.0) -> bool:
        """Wait until every pending write has succeeded or failed.

        Args:
            timeout: seconds to wait at most for the shared tier. What is left then is still written, as long as this
                process runs; writes to the store are waited for in any case.

        Returns:
            Whether nothing is left.
        """
        self._writer.flush()
        return self.remote is None or self.remote.flush(timeout)

    def share(self, kind: Kind, keys: Sequence[str]) -> int:
        """Write to the shared tier what it lacks and the store holds, and wait for it.

        Args:
            kind: what the keys are of.
            keys: of `KeySpace`.

        Returns:
            How many of the keys the tier does not hold at the end; 0 without a tier, or where it is only read.

        Raises:
            StoreError: it does not answer, or refuses.
        """
        remote = self.remote
        if remote is None or not remote.writes or not self._shares(kind):
            return 0
        return share(self, remote, keys)

    def attempt(self, what: str, action: Callable[[], R]) -> R | None:
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
        size = _EMPTY if store is None else self.attempt("read", store.stats) or _EMPTY
        memory = self._memory.stats()
        unrecorded = self._forgetter.unrecorded(store) + self._recorder.unrecorded_there
        shared = None if self.remote is None else self.remote.stats()
        with self._lock:
            counts = self._counts
            return CacheStats(
                LevelStats(replace(counts.memory), memory),
                LevelStats(replace(counts.store), size),
                replace(counts.prefilled),
                counts.encoded,
                unrecorded,
                shared,
            )

    def close(self) -> None:
        """Finish pending writes and release the store. A later call opens it again.

        A shared tier gets ten seconds; what is left then is given up, logged and counted as dropped.
        """
        self._writer.close()
        if self.remote is not None:
            self.remote.close(_CLOSING_SECONDS)
        self._memory.close()
        if self.store is not None:
            self.attempt("close", self.store.close)

    def __enter__(self) -> PassageCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
