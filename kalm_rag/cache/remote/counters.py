"""What is counted of a shared tier."""

from __future__ import annotations

from dataclasses import dataclass

from kalm_rag.cache.store import StoreStats
from kalm_rag.utils.breaker import State
from kalm_rag.utils.display import Shown


@dataclass(slots=True, repr=False)
class RemoteCounters(Shown):
    """Counts passages at the shared tier since the cache was made.

    Attributes:
        hits: found and verified.
        misses: not found, those included that were not found a few seconds ago and were not asked for again.
        corrupt: present, but not what was asked for: wrong bytes, a wrong tag, another format.
        read_failed: not read: the tier failed.
        late: not read before the query's deadline.
        left_alone: not asked for, because the tier did not answer the queries before.
        written: kept there.
        write_failed: not kept: the tier failed or refused them.
        dropped: not kept: too many bytes were waiting, or the process ended first.
        promoted: copied from there to the local store.
        bytes_read: of hits.
        bytes_written: of what was kept.
        outages: how often it was left alone after failures.
    """

    hits: int = 0
    misses: int = 0
    corrupt: int = 0
    read_failed: int = 0
    late: int = 0
    left_alone: int = 0
    written: int = 0
    write_failed: int = 0
    dropped: int = 0
    promoted: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    outages: int = 0


@dataclass(frozen=True, slots=True, repr=False)
class RemoteStats(Shown):
    """The shared tier: its counters and its state.

    Attributes:
        counters: what happened there.
        state: `closed` while it answers, `open` while it is left alone, `half-open` while it is tried again.
        pending_bytes: waiting to be written.
        size: of its store, as far as that can tell without listing its entries; None while it does not answer.
    """

    counters: RemoteCounters
    state: State
    pending_bytes: int
    size: StoreStats | None

    def _facts(self, *, defaults: bool) -> list[tuple[str, str]]:
        own: list[tuple[str, str]] = [("state", self.state)] if defaults or self.state != "closed" else []
        if self.pending_bytes or defaults:
            own.append(("pending_bytes", f"{self.pending_bytes:,}"))
        size = [] if self.size is None else self.size._facts(defaults=defaults)
        return [*self.counters._facts(defaults=defaults), *own, *size]
