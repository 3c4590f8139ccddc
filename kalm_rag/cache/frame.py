"""Frames: one encoded or prefilled passage as bytes that prove what they are.

No store detects a flipped bit, a short file or a swapped value by itself, so every value carries what is needed to tell
and is verified at every read. Layout, little-endian:

| bytes | field |
|---|---|
| 8 | magic `KaLMpsg` and a zero |
| 2, 1, 1 | format version, dtype code, flags (1: truncated, 2: a tag follows, 4: a prefilled passage) |
| 4 x 4 | ratio, true token count, rows, width |
| 8 | payload length |
| 32 | model: SHA-256 of its identity |
| 32 | key echo |
| 16 | XXH3-128 of everything above and the payload |
| ... | payload: rows x width numbers; with int8, then one float32 scale per row |
| 32 | if flagged, keyed BLAKE2b of everything before |

The checksum finds accidents. It is no protection against somebody who can write to the store; the tag is.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kalm_rag.cache.keys import FORMAT
from kalm_rag.pooling import PassageStates

if TYPE_CHECKING:
    import torch

_MAGIC = b"KaLMpsg\0"
_HEAD = struct.Struct("<8sHBB4IQ32s32s")
_CHECKSUM = 16
_TAG = 32
HEADER_BYTES = _HEAD.size + _CHECKSUM
"""Bytes in front of the payload."""

_FLAGS_AT = struct.calcsize("<8sHB")
_TRUNCATED, _TAGGED, _PREFILLED = 1, 2, 4
_CODES = {"float32": 1, "bfloat16": 2, "float16": 3, "int8": 4}
_NAMES = {code: name for name, code in _CODES.items()}
_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}


class FrameError(ValueError):
    """Bytes that are not the frame that was asked for; the message says what does not fit."""


@dataclass(frozen=True, slots=True)
class Frame:
    """A verified frame, its payload not yet made into a tensor."""

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

    def states(self, dtype: torch.dtype) -> PassageStates:
        """The states as a tensor of its own, shape `(rows, width)`, in `dtype`.

        Raises:
            FrameError: this is a prefilled passage.
        """
        if self.prefilled:
            msg = "a prefilled passage under the key of states"
            raise FrameError(msg)
        tensor, scales = self.tensors()
        if scales is not None:
            tensor = tensor.float() * scales
        return PassageStates(tensor.to(dtype), self.tokens, self.ratio, self.truncated)

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The numbers, shape `(rows, width)`, and with int8 the scales, float32 of shape `(rows, 1)`."""
        import torch

        kept = self.payload[: self.rows * self.width * _SIZES[self.dtype]]
        tensor = torch.frombuffer(bytearray(kept), dtype=getattr(torch, self.dtype)).view(self.rows, self.width)
        if self.dtype != "int8":
            return tensor, None
        return tensor, torch.frombuffer(bytearray(self.payload[len(kept) :]), dtype=torch.float32)[:, None]


def pack(key: str, model: bytes, passage: PassageStates, *, int8: bool = False, secret: bytes | None = None) -> bytes:
    """Frame the states of one passage.

    Args:
        key: its key.
        model: digest of the model's identity, 32 bytes.
        passage: its states, on any device.
        int8: keep one byte per number and one scale per vector: a vector's largest number becomes 127.
        secret: also authenticate the frame.

    Raises:
        ValueError: the states hold NaN or infinity, which must not be kept.
    """
    tensor, scales = passage.states, None
    if int8:
        tensor, scales = quantise(tensor.detach().cpu())
    sizes = (passage.ratio, passage.tokens)
    return pack_tensor(key, model, tensor, scales, sizes=sizes, truncated=passage.truncated, secret=secret)


def probe_frame(key: str) -> bytes:
    """The smallest valid frame, for finding out whether a store keeps what it is given."""
    payload = bytes(_SIZES["float32"])
    head = _HEAD.pack(_MAGIC, FORMAT, _CODES["float32"], 0, 1, 1, 1, 1, len(payload), bytes(32), bytes.fromhex(key))
    return b"".join((head, _checksum(head, payload), payload))


def reseal(data: bytes, key: str, secret: bytes) -> bytes:
    """A frame with a tag of `secret` in place of the one that it has, if any.

    Raises:
        FrameError: it does not verify.
    """
    unpack(data, key)
    flags = data[_FLAGS_AT]
    body = bytearray(data[: len(data) - _TAG] if flags & _TAGGED else data)
    body[_FLAGS_AT] = flags | _TAGGED
    body[_HEAD.size : HEADER_BYTES] = _checksum(bytes(body[: _HEAD.size]), bytes(body[HEADER_BYTES:]))
    return bytes(body) + _tag(bytes(body), secret)


def quantise(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Int8 numbers, and one float32 scale per vector of the last dimension, which is kept with size 1."""
    import torch

    scales = tensor.float().abs().amax(dim=-1, keepdim=True) / 127
    return torch.round(tensor.float() / scales.clamp(min=1e-30)).to(torch.int8), scales


def pack_tensor(
    key: str,
    model: bytes,
    tensor: torch.Tensor,
    scales: torch.Tensor | None,
    *,
    sizes: tuple[int, int],
    truncated: bool,
    prefilled: bool = False,
    secret: bytes | None = None,
) -> bytes:
    """Frame the numbers of one passage, vectors in the last dimension; `sizes` are its ratio and its token count.

    Raises:
        ValueError: there is NaN or infinity among them, which must not be kept.
    """
    import torch

    tensor = tensor.detach().cpu().contiguous()
    if not bool(torch.isfinite(tensor if scales is None else scales).all()):
        msg = "numbers with NaN or infinity are not kept"
        raise ValueError(msg)
    width = tensor.shape[-1]
    payload = _raw(tensor) + (b"" if scales is None else _raw(scales.detach().cpu()))
    name = str(tensor.dtype).removeprefix("torch.")
    flags = (_TRUNCATED if truncated else 0) | (_TAGGED if secret else 0) | (_PREFILLED if prefilled else 0)
    numbers = (*sizes, tensor.numel() // width, width, len(payload))
    head = _HEAD.pack(_MAGIC, FORMAT, _CODES[name], flags, *numbers, model, bytes.fromhex(key))
    frame = b"".join((head, _checksum(head, payload), payload))
    return frame + _tag(frame, secret) if secret else frame


def unpack(data: bytes, key: str, secret: bytes | None = None) -> Frame:
    """Verify a frame and read its header.

    Args:
        data: what a store returned.
        key: the key it was asked for.
        secret: demand a valid tag.

    Raises:
        FrameError: anything at all does not fit.
    """
    view = memoryview(data)
    if len(view) < HEADER_BYTES:
        msg = f"{len(view)} bytes are too short for a frame"
        raise FrameError(msg)
    head = view[: _HEAD.size]
    magic, version, code, flags, ratio, tokens, rows, width, length, model, echo = _HEAD.unpack(head)
    if magic != _MAGIC:
        msg = "not a frame"
        raise FrameError(msg)
    if version != FORMAT:
        msg = f"format version {version}; this version of kalm-rag reads {FORMAT}"
        raise FrameError(msg)
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
        msg = "wrong tag" if flags & _TAGGED else "no tag"
        raise FrameError(msg)
    return Frame(key, model, name, ratio, tokens, rows, width, bool(flags & _TRUNCATED), prefilled, payload)


def payload_bytes(tokens: int, ratio: int, width: int, dtype: str) -> int:
    """Bytes of a frame without tag, for estimates."""
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
