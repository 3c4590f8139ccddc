"""Frames: one encoded or prefilled passage as bytes that can be verified.

No store detects a flipped bit, a short file or a swapped value by itself, so every value carries what is needed to tell
and is verified at every read. Layout, little-endian:

| bytes | field |
|---|---|
| 8 | magic `KaLMpsg` and a zero |
| 2, 1, 1 | format version, dtype code, flags (1: truncated, 2: a tag follows, 4: a prefilled passage, 8: a reference) |
| 4 x 4 | ratio, true token count, rows, width |
| 8 | payload length |
| 32 | model: SHA-256 of its identity |
| 32 | key echo |
| 16 | XXH3-128 of everything above and the payload |
| ... | payload: rows x width numbers; with int8, then one float32 scale per row |
| 32 | if flagged, keyed BLAKE2b of everything before |

The checksum finds accidents. It does not protect against somebody who can write to the store; the tag does.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kalm_rag.cache.keys import FORMAT

if TYPE_CHECKING:
    import torch

_MAGIC = b"KaLMpsg\0"
_HEAD = struct.Struct("<8sHBB4IQ32s32s")
_CHECKSUM = 16
_TAG = 32
HEADER_BYTES = _HEAD.size + _CHECKSUM
"""Bytes in front of the payload."""

_TRUNCATED, _TAGGED, _PREFILLED, _REFERENCE = 1, 2, 4, 8
_CODES = {"float32": 1, "bfloat16": 2, "float16": 3, "int8": 4}
_NAMES = {code: name for name, code in _CODES.items()}
_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}


class FrameError(ValueError):
    """Bytes that are not the frame that was asked for; the message says what does not fit."""


class NoTagError(FrameError):
    """A frame without a tag where one is demanded: it was kept before there was a secret, or by somebody without it."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One cached passage: its description, and its numbers as bytes.

    Attributes:
        key: its key, 64 hexadecimal digits.
        model: digest of the model's identity, 32 bytes.
        dtype: of the numbers.
        ratio: tokens averaged into one state.
        tokens: tokens of the passage that the encoder read.
        rows: vectors.
        width: numbers in each vector.
        truncated: whether the passage was longer than `max_length` tokens.
        prefilled: whether it holds keys and values, not encoder states.
        payload: the numbers; with int8, then the scales.
        reference: whether it is what compact passages are kept against; then it is of no passage.
    """

    key: str
    model: bytes
    dtype: str
    ratio: int
    tokens: int
    rows: int
    width: int
    truncated: bool
    prefilled: bool
    payload: memoryview
    reference: bool = False

    @classmethod
    def from_tensors(
        cls,
        key: str,
        model: bytes,
        tensor: torch.Tensor,
        scales: torch.Tensor | None = None,
        *,
        ratio: int,
        tokens: int,
        truncated: bool,
        prefilled: bool = False,
        reference: bool = False,
    ) -> Frame:
        """Make a frame of a tensor of vectors on any device.

        Args:
            key: its key.
            model: digest of the model's identity, 32 bytes.
            tensor: vectors in the last dimension.
            scales: with int8, one float32 for each vector.
            ratio: as the attribute.
            tokens: as the attribute.
            truncated: as the attribute.
            prefilled: as the attribute.
            reference: as the attribute.

        Raises:
            ValueError: there is NaN or infinity among the numbers, which must not be kept.
        """
        import torch

        tensor = tensor.detach().cpu().contiguous()
        if not bool(torch.isfinite(tensor if scales is None else scales).all()):
            msg = "numbers with NaN or infinity are not kept"
            raise ValueError(msg)
        width = tensor.shape[-1]
        payload = _raw(tensor) + (b"" if scales is None else _raw(scales.detach().cpu()))
        dtype = str(tensor.dtype).removeprefix("torch.")
        rows = tensor.numel() // width
        return cls(key, model, dtype, ratio, tokens, rows, width, truncated, prefilled, memoryview(payload), reference)

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The numbers, shape `(rows, width)`, and with int8 the scales, float32 of shape `(rows, 1)`."""
        import torch

        size = self.rows * self.width * _SIZES[self.dtype]
        numbers = bytearray(self.payload[:size])
        tensor = torch.frombuffer(numbers, dtype=getattr(torch, self.dtype)).view(self.rows, self.width)
        if self.dtype != "int8":
            return tensor, None
        return tensor, torch.frombuffer(bytearray(self.payload[size:]), dtype=torch.float32)[:, None]

    def to_bytes(self, secret: bytes | None = None) -> bytes:
        """Return the bytes for a store.

        Args:
            secret: also authenticate the frame with this key.
        """
        flags = (_TRUNCATED if self.truncated else 0) | (_TAGGED if secret else 0)
        flags |= (_PREFILLED if self.prefilled else 0) | (_REFERENCE if self.reference else 0)
        numbers = (self.ratio, self.tokens, self.rows, self.width, len(self.payload))
        digests = (self.model, bytes.fromhex(self.key))
        head = _HEAD.pack(_MAGIC, FORMAT, _CODES[self.dtype], flags, *numbers, *digests)
        frame = b"".join((head, _checksum(head, self.payload), self.payload))
        return frame + _tag(frame, secret) if secret else frame

    @classmethod
    def from_bytes(cls, data: bytes, key: str, secret: bytes | None = None) -> Frame:
        """Verify bytes that a store returned.

        Args:
            data: the bytes.
            key: the key that was asked for.
            secret: demand a valid tag.

        Raises:
            FrameError: anything at all does not fit.
        """
        view = memoryview(data)
        head = view[: _HEAD.size]
        code, flags, ratio, tokens, rows, width, length, model, echo = _unpacked(view)
        end = HEADER_BYTES + length
        if len(view) != end + (_TAG if flags & _TAGGED else 0):
            msg = f"{len(view)} bytes where the header says {end}"
            raise FrameError(msg)
        payload = view[HEADER_BYTES:end]
        if not hmac.compare_digest(view[_HEAD.size : HEADER_BYTES], _checksum(head, payload)):
            msg = "wrong checksum"
            raise FrameError(msg)
        if echo.hex() != key:
            msg = "frame of another key"
            raise FrameError(msg)
        name = _NAMES.get(code)
        expected = None if name is None else rows * width * _SIZES[name] + (4 * rows if name == "int8" else 0)
        prefilled = bool(flags & _PREFILLED)
        sound = ratio > 0 and tokens > 0 and (prefilled or rows == -(-tokens // ratio))
        if name is None or expected != length or not sound:
            msg = f"impossible header: dtype code {code}, {rows} x {width}, {tokens} tokens at ratio {ratio}"
            raise FrameError(msg)
        if secret and not (flags & _TAGGED and hmac.compare_digest(view[end:], _tag(view[:end], secret))):
            if not flags & _TAGGED:
                msg = "no tag: kept without a secret; `kalm-rag cache adopt` authenticates what a folder kept before"
                raise NoTagError(msg)
            msg = "wrong tag: kept with another secret"
            raise FrameError(msg)
        truncated, reference = bool(flags & _TRUNCATED), bool(flags & _REFERENCE)
        return cls(key, model, name, ratio, tokens, rows, width, truncated, prefilled, payload, reference)


@dataclass(frozen=True, slots=True)
class Head:
    """What an entry says of itself before its numbers. No checksum covers it alone; `Frame` verifies the whole.

    Attributes:
        model: as of `Frame`.
        dtype: as of `Frame`.
        ratio: as of `Frame`.
        tokens: as of `Frame`.
        prefilled: as of `Frame`.
        reference: as of `Frame`.
    """

    model: bytes
    dtype: str
    ratio: int
    tokens: int
    prefilled: bool
    reference: bool

    @classmethod
    def from_bytes(cls, data: bytes, key: str) -> Head:
        """Read the head of an entry.

        Args:
            data: its first bytes, `HEADER_BYTES` or more.
            key: its key.

        Raises:
            FrameError: it is not the head of a frame of this format under this key.
        """
        code, flags, ratio, tokens, _, _, _, model, echo = _unpacked(memoryview(data))
        if echo.hex() != key or code not in _NAMES:
            msg = "frame of another key, or of an unknown dtype"
            raise FrameError(msg)
        return cls(model, _NAMES[code], ratio, tokens, bool(flags & _PREFILLED), bool(flags & _REFERENCE))


def _unpacked(view: memoryview) -> tuple[int, int, int, int, int, int, int, bytes, bytes]:
    """Return the fields of a frame's head after its format version."""
    if len(view) < HEADER_BYTES:
        msg = f"{len(view)} bytes are too short for a frame"
        raise FrameError(msg)
    magic, version, *fields = _HEAD.unpack(view[: _HEAD.size])
    if magic != _MAGIC:
        msg = "not a frame"
        raise FrameError(msg)
    if version != FORMAT:
        msg = f"format version {version}; this version of kalm-rag reads {FORMAT}"
        raise FrameError(msg)
    code, flags, ratio, tokens, rows, width, length, model, echo = fields
    return code, flags, ratio, tokens, rows, width, length, model, echo


def probe_frame(key: str) -> Frame:
    """The smallest valid frame, to find out whether a store keeps what it is given."""
    return Frame(key, bytes(32), "float32", 1, 1, 1, 1, False, False, memoryview(bytes(_SIZES["float32"])))


def payload_bytes(tokens: int, ratio: int, width: int, dtype: str) -> int:
    """Bytes of a frame of encoder states without a tag, for estimates.

    Args:
        tokens: of the passage.
        ratio: tokens averaged into one state.
        width: numbers in each state.
        dtype: what the numbers are kept in, such as `float32` or `int8`.
    """
    rows = -(-tokens // ratio)
    return HEADER_BYTES + rows * width * _SIZES[dtype] + (4 * rows if dtype == "int8" else 0)


def _raw(tensor: torch.Tensor) -> bytes:
    import torch

    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def _checksum(head: bytes | memoryview, payload: bytes | memoryview) -> bytes:
    import xxhash

    digest = xxhash.xxh3_128(head)
    digest.update(payload)
    return bytes(digest.digest())


def _tag(frame: bytes | memoryview, secret: bytes) -> bytes:
    # Secrets of any length: BLAKE2b itself takes up to 64 bytes.
    return hashlib.blake2b(frame, key=hashlib.blake2b(secret).digest(), digest_size=_TAG).digest()
