"""What the framework adapters share: arguments, options, loaded models, and what they hand on of a result."""

from __future__ import annotations

from kalm_rag.adapters.arguments import (
    CacheLike,
    check_arguments,
    check_cache,
    check_server,
    serialisable_cache,
    serialisable_threshold,
)
from kalm_rag.adapters.hits import HIT_KEYS, hit_metadata
from kalm_rag.adapters.options import Options, OptionsLike
from kalm_rag.adapters.shared import AnyReranker, SharedHandle, shared_reranker
from kalm_rag.latency.tracing import trace_attributes

__all__ = [
    "HIT_KEYS",
    "AnyReranker",
    "CacheLike",
    "Options",
    "OptionsLike",
    "SharedHandle",
    "check_arguments",
    "check_cache",
    "check_server",
    "hit_metadata",
    "serialisable_cache",
    "serialisable_threshold",
    "shared_reranker",
    "trace_attributes",
]
