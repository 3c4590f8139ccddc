"""Checks a store before work whose result it must keep."""

from __future__ import annotations

import shutil
import uuid
from hashlib import sha256

from kalm_rag.cache.disk import DiskStore
from kalm_rag.cache.frame import probe_frame
from kalm_rag.cache.store import Store, StoreError
from kalm_rag.utils.display import size_text


def check_writable(store: Store) -> None:
    """Write, read and delete one small entry.

    Raises:
        StoreError: the store does not keep it.
    """
    key = sha256(f"kalm-rag probe {uuid.uuid4()}".encode()).hexdigest()
    value = probe_frame(key).to_bytes()
    where = store.folder if isinstance(store, DiskStore) else store
    kept = store.put_many({key: value})
    if isinstance(store, DiskStore) and store.read_only:
        msg = f"the cache in {where} is read-only, so it would keep nothing; give a folder that you may write to"
        raise StoreError(msg)
    found = store.get_many([key])
    store.delete([key])
    if kept != 1 or found != {key: value}:
        msg = f"the cache in {where} does not keep what is written to it: a test entry was written and not found again"
        raise StoreError(msg)


ENCODE_LESS = "use a coarser --base-ratio or --storage int8, or encode fewer passages"


def check_room(store: Store, needed: int, new: int, otherwise: str = ENCODE_LESS) -> None:
    """Refuse a corpus that a store cannot hold.

    Args:
        store: where the entries are to be kept.
        needed: bytes of all of them.
        new: bytes of those that are not there yet.
        otherwise: what a user can do besides raising the limit.

    Raises:
        StoreError: they take more than the store's limit, or more than the disk has left.
    """
    limit = store.stats().limit
    if limit is not None and needed > limit:
        msg = (
            f"the passages take about {size_text(needed)}, more than the limit of the cache, {size_text(limit)}: the "
            f"first ones would leave before the last ones are kept. Raise the limit "
            f"(--limit-gb {1.2 * needed / 1e9:.3g}), {otherwise}"
        )
        raise StoreError(msg)
    if isinstance(store, DiskStore):
        free = shutil.disk_usage(store.folder).free
        if new > free:
            msg = (
                f"the new passages take about {size_text(new)}, and the disk of {store.folder} has {size_text(free)} "
                "left: free some space, or name another folder (--cache)"
            )
            raise StoreError(msg)
