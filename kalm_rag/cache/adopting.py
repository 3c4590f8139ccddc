"""Authenticates entries that a folder kept before it had a secret."""

from __future__ import annotations

from dataclasses import dataclass

from kalm_rag.cache.disk import DiskStore
from kalm_rag.cache.forgetting import check_can_delete
from kalm_rag.cache.frame import HEADER_BYTES, Frame, FrameError
from kalm_rag.cache.store import StoreError
from kalm_rag.cache.transfer import verified_frames
from kalm_rag.utils.display import Shown

_BATCH_BYTES = 32_000_000


@dataclass(frozen=True, slots=True, repr=False)
class AdoptReport(Shown):
    """What `adopt` did.

    Attributes:
        adopted: entries that got a tag.
        known: entries that had this secret's tag already.
        other: entries with a tag of another secret, which were left as they are and stay misses.
        damaged: entries that do not verify, which were left as they are.
    """

    adopted: int = 0
    known: int = 0
    other: int = 0
    damaged: int = 0


def adopt(store: DiskStore, secret: bytes) -> AdoptReport:
    """Tag the entries of a folder that have no tag. Do this only if nobody else could write to the folder so far.

    Other processes may use the folder meanwhile. If interrupted, call it again.

    Raises:
        StoreError: the folder is read-only, or failed.
    """
    check_can_delete(store)
    adopted = known = other = damaged = 0
    batch: dict[str, bytes] = {}
    for frame, data in verified_frames(store):
        if frame is None:
            damaged += 1
        elif len(data) == HEADER_BYTES + len(frame.payload):
            batch[frame.key] = frame.to_bytes(secret)
            if sum(map(len, batch.values())) >= _BATCH_BYTES:
                adopted, batch = adopted + _put(store, batch), {}
        elif _is_of(secret, frame.key, data):
            known += 1
        else:
            other += 1
    adopted += _put(store, batch)
    return AdoptReport(adopted, known, other, damaged)


def _put(store: DiskStore, batch: dict[str, bytes]) -> int:
    # What was forgotten since it was read must not come back.
    held = store.get_many(list(batch))
    kept = store.put_many({key: data for key, data in batch.items() if key in held})
    if kept != len(held):
        msg = f"the cache in {store.folder} kept {kept} of {len(held)} entries; run it again once there is room"
        raise StoreError(msg)
    return kept


def _is_of(secret: bytes, key: str, data: bytes) -> bool:
    try:
        Frame.from_bytes(data, key, secret)
    except FrameError:
        return False
    return True
