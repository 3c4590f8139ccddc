"""Encoding a corpus with many workers, on an engine that runs them: Ray Data, Spark, Daft, or none."""

from __future__ import annotations

from kalm_rag.distributed.encoder import PassageEncoder
from kalm_rag.distributed.shards import Shard

__all__ = ["PassageEncoder", "Shard"]
