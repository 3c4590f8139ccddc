"""The passage cache: content keys, verified frames, stores, and a level in memory in front of them."""

from kalm_rag.cache.bytestore import ByteStoreAdapter
from kalm_rag.cache.disk import DiskStore
from kalm_rag.cache.forgetting import ForgetReport, Forgotten
from kalm_rag.cache.memory import MemoryStore
from kalm_rag.cache.passage_cache import PassageCache
from kalm_rag.cache.stats import CacheStats, LevelCounters, LevelStats
from kalm_rag.cache.store import CheckReport, RefusedError, Store, StoreError, StoreStats

__all__ = [
    "ByteStoreAdapter",
    "CacheStats",
    "CheckReport",
    "DiskStore",
    "ForgetReport",
    "Forgotten",
    "LevelCounters",
    "LevelStats",
    "MemoryStore",
    "PassageCache",
    "RefusedError",
    "Store",
    "StoreError",
    "StoreStats",
]
