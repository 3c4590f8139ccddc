"""Keys: the same text under the same weights is the same entry in every process, on every machine."""

from __future__ import annotations

import re

from kalm_rag.identity import ModelIdentity, tagged_digest

FORMAT = 1
"""Version of keys and frames together. It is part of every key, so an old layout is never even looked up."""

KEY_PATTERN = re.compile(r"[0-9a-f]{64}")


def model_mark(identity: ModelIdentity) -> bytes:
    """32 bytes that stand in every entry of a model, so that entries can be told apart without their texts."""
    return tagged_digest(identity.encoder, identity.tokenizer, identity.template).digest()


class KeySpace:
    """The keys of one way to encode.

    Args:
        identity: digests of encoder, tokenizer and template.
        max_length: tokens of a passage that are read.
        dtype: what the encoder computes in, such as `float32`.
        storage: how states are kept, `native` or `int8`.

    The ratio is no part of a key: one encoding serves many ratios, and the frame says at which it is kept.
    """

    def __init__(self, identity: ModelIdentity, *, max_length: int, dtype: str, storage: str) -> None:
        self.model = model_mark(identity)
        fields = {
            "format": str(FORMAT),
            "encoder": identity.encoder,
            "tokenizer": identity.tokenizer,
            "template": identity.template,
            "max_length": str(max_length),
            "dtype": dtype,
            "storage": storage,
        }
        self._prefix = tagged_digest("kalm-rag passage", *(part for field in fields.items() for part in field), "text")

    def key(self, text: str) -> str:
        """64 hexadecimal digits (SHA-256) for one passage."""
        digest = self._prefix.copy()
        data = text.encode("utf-8")
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
        return digest.hexdigest()
