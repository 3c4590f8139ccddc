"""Keys and frames: golden vectors, and every way in which bytes can be wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cachekit import IDENTITY, pack, passage, same, space, unpack
from hypothesis import given
from hypothesis import strategies as st

from kalm_rag.cache.frame import HEADER_BYTES, FrameError, payload_bytes
from kalm_rag.model.identity import ModelIdentity
from kalm_rag.model.pooling import PassageStates
from kalm_rag.states import from_frame

GOLDEN_KEYS = {
    "": "563a8192d002028fda9c4a22109902579d22a29c3b8731e8b0c362f2069087bc",
    "a passage": "457d46439c3d9cd971b92f8db074f81bb3320738e7ce93ea8a934de902e6a7bb",
    "北京 🦜 \n": "e83b6d99afe6f61aa5eccf13bb2f2a4ad7ff5d0518c3a5862b7173d7933c6e1a",
}
GOLDEN_FRAME = (
    "4b614c4d7073670001000101040000000700000002000000030000001800000000000000f46ea248bf236492a156c94c"
    "0e2d739ddc9ee256b4d2035b47dfacc9c5587b2c457d46439c3d9cd971b92f8db074f81bb3320738e7ce93ea8a934de9"
    "02e6a7bbe02d3b230b6df2f08904dab90491cf80000000000000803e0000003f0000403f0000803f0000a03f"
)
KEY = space().states_keys(["a passage"])[0]
MODEL = space().model


def golden_passage() -> PassageStates:
    return PassageStates(torch.arange(6, dtype=torch.float32).view(2, 3) / 4, 7, 4, truncated=True)


def test_golden_keys() -> None:
    """A key may never change: it would orphan every cache in the world."""
    assert {text: space().states_keys([text])[0] for text in GOLDEN_KEYS} == GOLDEN_KEYS


def test_golden_frame() -> None:
    assert pack(KEY, MODEL, golden_passage()).hex() == GOLDEN_FRAME
    assert same(from_frame(unpack(bytes.fromhex(GOLDEN_FRAME), KEY), torch.float32), golden_passage())


def test_keys_are_the_same_in_every_process() -> None:
    setup = f"import sys; sys.path.insert(0, {str(Path(__file__).parent.parent)!r}); from cachekit import space"
    code = f"{setup}; print(*space().states_keys(['a passage']))"
    for seed in ("0", "1", "random"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PATH": ""},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == KEY


def test_every_field_enters_the_key() -> None:
    keys = {
        KEY,
        space(identity=ModelIdentity("f" * 64, "a" * 64, "b" * 64)).states_keys(["a passage"])[0],
        space(identity=ModelIdentity("e" * 64, "b" * 64, "b" * 64)).states_keys(["a passage"])[0],
        space(identity=ModelIdentity("e" * 64, "a" * 64, "a" * 64)).states_keys(["a passage"])[0],
        space(max_length=1023).states_keys(["a passage"])[0],
        space(dtype="bfloat16").states_keys(["a passage"])[0],
        space(storage="int8").states_keys(["a passage"])[0],
        space().states_keys(["a passage "])[0],
    }
    assert len(keys) == 8
    assert space(identity=IDENTITY).states_keys(["a passage"])[0] == KEY


@given(st.tuples(st.text(), st.text()), st.tuples(st.text(), st.text()))
def test_fields_cannot_run_into_each_other(left: tuple[str, str], right: tuple[str, str]) -> None:
    keys = [space(identity=ModelIdentity(a, b, "t"), dtype="d").states_keys(["x"])[0] for a, b in (left, right)]
    assert (keys[0] == keys[1]) == (left == right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(tokens=st.integers(1, 50), ratio=st.sampled_from([1, 2, 4]))
def test_round_trip(dtype: torch.dtype, tokens: int, ratio: int) -> None:
    states = passage(tokens, tokens=tokens, ratio=ratio)
    states = PassageStates(states.states.to(dtype), tokens, ratio, states.truncated)
    data = pack(KEY, MODEL, states)
    assert same(from_frame(unpack(data, KEY), dtype), states)
    assert len(data) == payload_bytes(tokens, ratio, 16, str(dtype).removeprefix("torch."))


def test_int8_keeps_each_number_within_half_a_step() -> None:
    states = passage(3, tokens=200)
    found = from_frame(unpack(pack(KEY, MODEL, states, int8=True), KEY), torch.float32)
    step = states.states.abs().amax(dim=1, keepdim=True) / 127
    assert bool(((found.states - states.states).abs() <= step * 0.5001).all())
    zero = PassageStates(torch.zeros(2, 4), 8, 4, truncated=False)
    assert same(from_frame(unpack(pack(KEY, MODEL, zero, int8=True), KEY), torch.float32), zero)


@pytest.mark.parametrize("secret", [None, b"0123456789abcdef"])
def test_every_single_bit_matters(secret: bytes | None) -> None:
    data = pack(KEY, MODEL, golden_passage(), secret=secret)
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << (bit % 8)
        with pytest.raises(FrameError):
            unpack(bytes(flipped), KEY, secret)


def test_every_truncation_and_extension_is_found() -> None:
    data = pack(KEY, MODEL, golden_passage())
    for length in range(len(data)):
        with pytest.raises(FrameError):
            unpack(data[:length], KEY)
    with pytest.raises(FrameError, match="bytes where the header says"):
        unpack(data + b"\0", KEY)


def test_a_frame_of_another_key_is_refused() -> None:
    with pytest.raises(FrameError, match="frame of another key"):
        unpack(pack(KEY, MODEL, golden_passage()), space().states_keys(["another"])[0])


@given(st.binary(max_size=400))
def test_no_bytes_crash_the_reader(data: bytes) -> None:
    with pytest.raises(FrameError):
        unpack(data, KEY)


def forge(**changes: int) -> bytes:
    """A frame with a valid checksum around an impossible header."""
    from kalm_rag.cache import frame as module

    fields = {"code": 1, "flags": 0, "ratio": 4, "tokens": 7, "rows": 2, "width": 3, "length": 24, **changes}
    head = module._HEAD.pack(
        module._MAGIC,
        1,
        fields["code"],
        fields["flags"],
        fields["ratio"],
        fields["tokens"],
        fields["rows"],
        fields["width"],
        fields["length"],
        MODEL,
        bytes.fromhex(KEY),
    )
    payload = bytes(24)
    return head + module._checksum(head, payload) + payload


@pytest.mark.parametrize(
    "changes",
    [
        {"rows": 2**31, "width": 2**31},  # asks for 16 exabytes
        {"rows": 0},
        {"width": 4},
        {"ratio": 0},
        {"tokens": 0},
        {"tokens": 9},
        {"code": 9},
        {"code": 4},
        {"length": 2**60},
    ],
)
def test_forged_headers_are_refused_before_anything_is_allocated(changes: dict[str, int]) -> None:
    assert unpack(forge(), KEY)
    with pytest.raises(FrameError):
        unpack(forge(**changes), KEY)


def test_secret() -> None:
    secret, other = b"0123456789abcdef", b"fedcba9876543210"
    tagged = pack(KEY, MODEL, golden_passage(), secret=secret)
    assert unpack(tagged, KEY, secret)
    assert unpack(tagged, KEY), "a reader without a secret trusts the folder"
    with pytest.raises(FrameError, match="wrong tag"):
        unpack(tagged, KEY, other)
    with pytest.raises(FrameError, match="no tag"):
        unpack(pack(KEY, MODEL, golden_passage()), KEY, secret)


def test_states_with_nan_are_not_kept() -> None:
    bad = PassageStates(torch.tensor([[1.0, float("nan")]]), 3, 4, truncated=False)
    with pytest.raises(ValueError, match="NaN or infinity"):
        pack(KEY, MODEL, bad)


def test_header_size_is_documented() -> None:
    assert HEADER_BYTES == 8 + 4 + 16 + 8 + 32 + 32 + 16
