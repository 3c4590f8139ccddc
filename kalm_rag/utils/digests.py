"""Digests of several parts without collisions between different splits."""

from __future__ import annotations

import hashlib


def tagged_digest(*parts: str | bytes) -> hashlib._Hash:
    """Return a SHA-256 over length-prefixed parts: different lists never give the same bytes."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8") if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest


def extended(digest: hashlib._Hash, *parts: str) -> hashlib._Hash:
    """Return a copy of a digest with more length-prefixed parts; the original is unchanged."""
    copy = digest.copy()
    for part in parts:
        data = part.encode("utf-8")
        copy.update(len(data).to_bytes(8, "little"))
        copy.update(data)
    return copy
