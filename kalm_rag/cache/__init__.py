"""The passage cache: content keys, verified frames, stores, and the tiers in front of them."""

from kalm_rag.cache.bytestore import ByteStoreAdapter
from kalm_rag.cache.disk import DiskStore
from kalm_rag.cache.memory import MemoryStore
from kalm_rag.cache.store import CheckReport, Store, StoreError, StoreStats
from kalm_rag.cache.tiers import CacheStats, LevelCounters, LevelStats, PassageCache

__all__ = [
    "ByteStoreAdapter",
    "CacheStats",
    "CheckReport",
    "DiskStore",
    "LevelCounters",
    "LevelStats",
    "MemoryStore",
    "PassageCache",
    "Store",
    "StoreError",
    "StoreStats",
]
