"""Keys: the same text under the same weights has the same key in every process, on every machine."""

from __future__ import annotations

import re
from collections.abc import Sequence

from kalm_rag.utils.digests import extended, tagged_digest

FORMAT = 1
"""Version of keys and frames together. It is part of every key, so an old layout is never even looked up."""

KEY_PATTERN = re.compile(r"[0-9a-f]{64}")


class KeySpace:
    """The keys of one way to encode.

    The ratio is not part of the key of encoder states: one encoding serves many ratios, and the frame says at which it
    is kept.

    Args:
        model: 32 bytes that stand for the model in every frame.
        encoder: digest of the encoder's weights and configuration.
        tokenizer: digest of the tokenizer.
        template: digest of the text around a passage.
        decoder: digest of the decoder's weights and configuration.
        max_length: tokens of a passage that are read.
        dtype: what the encoder computes in, such as `float32`.
        storage: how states are kept, `native` or `int8`.

    Attributes:
        model: as given.
        fields: the other arguments by name.
    """

    def __init__(
        self,
        *,
        model: bytes,
        encoder: str,
        tokenizer: str,
        template: str,
        decoder: str,
        max_length: int,
        dtype: str,
        storage: str,
    ) -> None:
        self.model = model
        fields: dict[str, str | int] = {
            "encoder": encoder,
            "tokenizer": tokenizer,
            "template": template,
            "max_length": max_length,
            "dtype": dtype,
            "storage": storage,
        }
        self.fields = {**fields, "decoder": decoder}
        flat = ["format", str(FORMAT), *(str(part) for field in fields.items() for part in field)]
        self._states = tagged_digest("kalm-rag passage", *flat, "text")
        self._prefilled = tagged_digest("kalm-rag prefilled", *flat, "decoder", decoder)

    def states_keys(self, texts: Sequence[str]) -> list[str]:
        """64 hexadecimal digits (SHA-256) for the encoder states of each passage."""
        return [extended(self._states, text).hexdigest() for text in texts]

    def prefilled_keys(self, texts: Sequence[str], *, ratio: int, prefix: Sequence[int], kind: str) -> list[str]:
        """64 hexadecimal digits (SHA-256) for the keys and values of each passage.

        Args:
            texts: the passages.
            ratio: of the states that were prefilled from.
            prefix: token ids of the prompt's prefix, which stand for instruction and system prompt.
            kind: what the keys and values are kept in.
        """
        shared = extended(self._prefilled, str(ratio), ",".join(map(str, prefix)), kind)
        return [extended(shared, text).hexdigest() for text in texts]

    def reference_key(self, *, ratio: int, prefix: Sequence[int], precision: str, texts: Sequence[str]) -> str:
        """64 hexadecimal digits (SHA-256) for the reference of compact passages.

        It does not depend on `max_length` and storage, which its short texts never meet.

        Args:
            ratio: of the states that it is made from.
            prefix: token ids of the prompt's prefix.
            precision: what it is computed in.
            texts: what it is made from.
        """
        names = ("encoder", "tokenizer", "template", "dtype", "decoder")
        flat = ["format", str(FORMAT), *(str(part) for name in names for part in (name, self.fields[name]))]
        shared = tagged_digest("kalm-rag reference", *flat, str(ratio), ",".join(map(str, prefix)), precision)
        return extended(shared, *texts).hexdigest()
