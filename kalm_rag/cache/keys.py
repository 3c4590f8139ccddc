"""Keys: the same text under the same weights is the same entry in every process, on every machine."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

from kalm_rag.identity import ModelIdentity, tagged_digest

FORMAT = 1
"""Version of keys and frames together. It is part of every key, so an old layout is never even looked up."""

KEY_PATTERN = re.compile(r"[0-9a-f]{64}")


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
        self.model = identity.mark
        fields = {
            "format": str(FORMAT),
            "encoder": identity.encoder,
            "tokenizer": identity.tokenizer,
            "template": identity.template,
            "max_length": str(max_length),
            "dtype": dtype,
            "storage": storage,
        }
        flat = [part for field in fields.items() for part in field]
        self._prefix = tagged_digest("kalm-rag passage", *flat, "text")
        self._prefilled = tagged_digest("kalm-rag prefilled", *flat, "decoder", identity.decoder)

    def key(self, text: str) -> str:
        """64 hexadecimal digits (SHA-256) for the states of one passage."""
        return _with(self._prefix, text).hexdigest()

    def prefilled_keys(self, texts: Sequence[str], *, ratio: int, beginning: Sequence[int], kind: str) -> list[str]:
        """64 hexadecimal digits for each prefilled passage.

        Args:
            texts: the passages.
            ratio: of the states that were prefilled from.
            beginning: token ids of the prompt's beginning, which stand for instruction and system prompt.
            kind: what the keys and values are kept in.
        """
        prefix = _with(self._prefilled, str(ratio), ",".join(map(str, beginning)), kind)
        return [_with(prefix, text).hexdigest() for text in texts]


def _with(prefix: hashlib._Hash, *parts: str) -> hashlib._Hash:
    """A copy of a digest, fed with more tagged parts."""
    digest = prefix.copy()
    for part in parts:
        data = part.encode("utf-8")
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest
