"""What a machine and the shared tier must hold alike: one value that all use, and a corpus that was encoded for all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Generic, TypeVar

from kalm_rag.cache.frame import Frame, FrameError
from kalm_rag.cache.remote.maintenance import delete_shared, missing
from kalm_rag.cache.remote.patience import MOST_SECONDS
from kalm_rag.cache.remote.tier import RemoteTier
from kalm_rag.cache.remote.windows import parts
from kalm_rag.cache.store import add

if TYPE_CHECKING:
    from kalm_rag.cache.passage_cache import PassageCache

T = TypeVar("T")

_AT_ONCE, _SHARING_SECONDS = 256, 60.0


class OneValue(Generic[T]):
    """A value that all processes must share, such as the reference of compact passages.

    Args:
        cache: whose store and shared tier keep it.
        key: its key.
        decode: turns a verified frame into it; raises `FrameError` for an unexpected one, which is replaced.
    """

    def __init__(self, cache: PassageCache, key: str, decode: Callable[[Frame], T]) -> None:
        self._cache = cache
        self._key = key
        self._decode = decode

    def get_or_add(self, make: Callable[[], Frame]) -> T:
        """Return it from the shared tier, else from the store, else as it is made now and added.

        What the store holds is offered to the tier, and replaced if the tier holds another one.
        """
        cache, remote = self._cache, self._cache.remote
        kept, theirs = self._here(), self._there()
        made: tuple[T, bytes] | None = None
        if kept is None and theirs is None:
            frame = make()
            made = self._decode(frame), frame.to_bytes(cache.secret)
        offered = kept or made
        if theirs is None and offered is not None and remote is not None:
            remote.add(self._key, offered[1], MOST_SECONDS)
            theirs = self._there()
        shared = theirs or made
        if kept is not None and theirs is not None and kept[1] != theirs[1]:
            cache.report("replaced", "this cache's own reference gives way to the one of the shared tier")
            self._drop_here()
            kept = None
        if kept is None and shared is not None:
            store = cache.store
            if store is not None:
                cache.attempt("write to", lambda: add(store, self._key, shared[1]))
                kept = self._here()
        if theirs is not None:
            return theirs[0]
        found = kept or made
        return self._decode(make()) if found is None else found[0]

    def _here(self) -> tuple[T, bytes] | None:
        """Return what the store holds, and its bytes."""
        store = self._cache.store
        answer = None if store is None else self._cache.attempt("read", lambda: store.get_many([self._key]))
        return self._verified(answer[self._key], self._drop_here) if answer else None

    def _there(self) -> tuple[T, bytes] | None:
        """Return what the shared tier holds, and its bytes."""
        remote = self._cache.remote
        data = None if remote is None else remote.get(self._key, MOST_SECONDS)
        return None if data is None else self._verified(data, self._drop_there)

    def _drop_here(self) -> None:
        self._cache.discard([self._key], shared=False)

    def _drop_there(self) -> None:
        self._cache.attempt("delete from", lambda: delete_shared(self._cache.remote, [self._key]))

    def _verified(self, data: bytes, drop: Callable[[], object]) -> tuple[T, bytes] | None:
        try:
            return self._decode(Frame.from_bytes(data, self._key, self._cache.secret)), data
        except FrameError as error:
            self._cache.report("corrupt", f"an entry of the cache does not verify ({error}); it is made again")
            drop()
            return None


def share(cache: PassageCache, remote: RemoteTier, keys: Sequence[str]) -> int:
    """Write to a shared tier what it lacks and the cache's store holds; returns how many keys it lacks at the end.

    Raises:
        StoreError: it does not answer, or refuses.
    """
    store = cache.store
    for part in parts(keys, _AT_ONCE):
        lacking = missing(remote, part)
        held = {} if store is None else cache.attempt("read", partial(store.get_many, lacking)) or {}
        remote.put_many({key: data for key, data in held.items() if _is_sound(key, data, cache.secret)})
        remote.flush(_SHARING_SECONDS)
    return len(missing(remote, keys))


def _is_sound(key: str, data: bytes, secret: bytes | None) -> bool:
    try:
        Frame.from_bytes(data, key, secret)
    except FrameError:
        return False
    return True
