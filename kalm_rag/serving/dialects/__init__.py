"""How the clients of other rerankers speak; each module is a dialect."""

from __future__ import annotations

import re
from typing import Any

from kalm_rag.serving.dialects.base import Dialect
from kalm_rag.serving.dialects.documents import COHERE, VLLM
from kalm_rag.serving.dialects.infinity import INFINITY
from kalm_rag.serving.dialects.nvidia import NVIDIA
from kalm_rag.serving.dialects.score import SCORE
from kalm_rag.serving.dialects.tei import TEI

DIALECTS = (COHERE, VLLM, TEI, INFINITY, NVIDIA, SCORE)

__all__ = ["DIALECTS", "Dialect", "dialect_of", "dialect_of_bytes"]

_NAMES = re.compile(rb'"(texts|documents)"\s*:')
_BY_PATH: dict[str, list[Dialect]] = {}
for _dialect in DIALECTS:
    for _path in _dialect.paths:
        _BY_PATH.setdefault(_path, []).append(_dialect)


def dialect_of(path: str, body: Any = None) -> Dialect | None:
    """Return the dialect of a request; on `/rerank`, `texts` instead of `documents` is TEI's.

    Args:
        path: of the request.
        body: its content, as far as it could be read.
    """
    found = _BY_PATH.get(path)
    if found is None:
        return None
    if TEI in found and isinstance(body, dict) and body.get("texts") is not None and body.get("documents") is None:
        return TEI
    return found[0]


def dialect_of_bytes(path: str, body: bytes) -> Dialect | None:
    """Return the dialect of a request whose body is not parsed: quotes inside of JSON's strings are escaped."""
    return dialect_of(path, {name.decode(): "" for name in _NAMES.findall(body)})
