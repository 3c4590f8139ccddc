"""Keys, and valid frames that follow from them, made without torch so that child processes start fast."""

from __future__ import annotations

import hashlib

from kalm_rag.cache import frame


def key_of(number: int) -> str:
    return hashlib.sha256(f"key {number}".encode()).hexdigest()


def value_of(key: str, size: int, version: str = "") -> bytes:
    """A frame of one vector, of `size` bytes rounded down to what a frame can have; a version has its own numbers."""
    width = max(1, (size - frame.HEADER_BYTES) // 4)
    payload = (hashlib.sha256(f"{key}{version}".encode()).digest() * (width // 8 + 1))[: 4 * width]
    head = frame._HEAD.pack(frame._MAGIC, 1, 1, 0, 1, 1, 1, width, len(payload), bytes(32), bytes.fromhex(key))
    return head + frame._checksum(head, payload) + payload
