"""What is asked of a shared tier on purpose, and waited for: unlike a query's reads, it fails with a message."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

from kalm_rag.cache.remote.tier import RemoteTier
from kalm_rag.cache.remote.windows import parts
from kalm_rag.cache.spaces import Space, recorded_spaces
from kalm_rag.cache.store import StoreError

_AT_ONCE = 256


def missing(tier: RemoteTier, keys: Sequence[str]) -> list[str]:
    """Return the keys without a value, asking without reading values where the store can.

    Raises:
        StoreError: the tier does not answer, or refuses.
    """
    store = tier.link.store
    contains: Callable[[Sequence[str]], Iterable[str]] = getattr(store, "contains", store.get_many)
    left: list[str] = []
    for part in parts(keys, _AT_ONCE):
        held = set(tier.link.waited(partial(contains, part)))
        left += [key for key in part if key not in held]
    return left


def check_can_delete(tier: RemoteTier | None) -> None:
    """Refuse to delete where a tier is only read.

    Raises:
        StoreError: it is.
    """
    if tier is not None and not tier.writes:
        msg = (
            f"the shared tier at {tier.shown} is only read here (remote_mode='read'), so nothing can be deleted from "
            "it: delete with remote_mode='read-write'"
        )
        raise StoreError(msg)


def delete_shared(tier: RemoteTier | None, keys: Sequence[str]) -> int:
    """Delete entries; returns how many existed.

    Raises:
        StoreError: the tier does not answer, refuses, or still holds some of them.
    """
    if tier is None or not keys:
        return 0
    check_can_delete(tier)
    gone = 0
    for part in parts(keys, _AT_ONCE):
        gone += tier.link.waited(partial(tier.link.store.delete, part))
    left = missing(tier, keys)
    if len(left) < len(keys):
        msg = (
            f"the shared tier at {tier.shown} still holds {len(keys) - len(left)} of {len(keys)} deleted entries: "
            "something stores them again at this moment. Stop what ranks these texts, on every machine"
        )
        raise StoreError(msg)
    return gone


def shared_spaces(tier: RemoteTier | None) -> tuple[dict[str, Space], int]:
    """Return the key spaces that a tier has recorded, and how many records could not be read.

    Raises:
        StoreError: the tier does not answer, or refuses.
    """
    return ({}, 0) if tier is None else tier.link.waited(lambda: recorded_spaces(tier.link.store))
