"""What a passage cache tells of its levels: counters and sizes."""

from __future__ import annotations

from dataclasses import dataclass, field

from kalm_rag.cache.remote.counters import RemoteStats
from kalm_rag.cache.store import StoreStats
from kalm_rag.utils.display import Shown, html_table


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
    """All levels.

    Attributes:
        memory: the level in memory.
        store: the level behind it, on disk or elsewhere.
        prefilled: prefilled passages in that store; its size is part of the store's.
        encoded: passages that had to be encoded.
        remote: the tier that several machines share, None without one.
        unrecorded: key spaces that could not be recorded in the store: other processes cannot find their entries by
            text to forget them.
    """

    memory: LevelStats
    store: LevelStats
    prefilled: LevelCounters
    encoded: int
    unrecorded: int = 0
    remote: RemoteStats | None = None

    def _levels(self, *, defaults: bool) -> dict[str, dict[str, str]]:
        levels: dict[str, LevelStats | LevelCounters | RemoteStats] = {
            "memory": self.memory,
            "store": self.store,
            "prefilled": self.prefilled,
        }
        if self.remote is not None:
            levels["remote"] = self.remote
        return {name: dict(level._facts(defaults=defaults)) for name, level in levels.items()}

    def __repr__(self) -> str:
        unrecorded = f", unrecorded={self.unrecorded}" if self.unrecorded else ""
        lines = [f"CacheStats(encoded={self.encoded}{unrecorded}"]
        for name, facts in self._levels(defaults=False).items():
            lines.append(f"  {name}: {', '.join(f'{fact}={text}' for fact, text in facts.items()) or 'nothing yet'}")
        return ",\n".join(lines) + ")"

    def _repr_html_(self) -> str:
        levels = self._levels(defaults=True)
        names = list(dict.fromkeys(name for level in levels.values() for name in level))
        rows = [(name.replace("_", " "), *(level.get(name, "") for level in levels.values())) for name in names]
        caption = f"CacheStats: {self.encoded} passages encoded"
        if self.unrecorded:
            caption += f", {self.unrecorded} key spaces not recorded"
        return html_table(("", *levels), rows, caption, left=0)


@dataclass(slots=True)
class Counts:
    """The counters of a cache."""

    memory: LevelCounters = field(default_factory=LevelCounters)
    store: LevelCounters = field(default_factory=LevelCounters)
    prefilled: LevelCounters = field(default_factory=LevelCounters)
    encoded: int = 0
