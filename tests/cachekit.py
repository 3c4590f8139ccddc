"""What the cache tests share: frames whose content is known, and child processes that use a store without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rawframes import key_of, value_of

from kalm_rag.cache import PassageCache, Store
from kalm_rag.cache.frame import Frame, FrameError
from kalm_rag.cache.keys import KeySpace
from kalm_rag.model.identity import ModelIdentity
from kalm_rag.model.pooling import PassageStates
from kalm_rag.states import from_frame, rounded, to_frame

__all__ = [
    "LOCKER",
    "DictByteStore",
    "finish",
    "frames",
    "get",
    "key_of",
    "lookup",
    "pack",
    "passage",
    "put",
    "reseal",
    "same",
    "space",
    "spawn",
    "texts",
    "unpack",
    "value_of",
]

IDENTITY = ModelIdentity(encoder="e" * 64, tokenizer="a" * 64, template="b" * 64)


class DictByteStore:
    """The shape of `langchain_core.stores.InMemoryByteStore`."""

    def __init__(self) -> None:
        self.items: dict[str, bytes] = {"other-data": b"x"}

    def mget(self, keys: Sequence[str]) -> list[bytes | None]:
        return [self.items.get(key) for key in keys]

    def mset(self, key_value_pairs: Sequence[tuple[str, bytes]]) -> None:
        self.items.update(key_value_pairs)

    def mdelete(self, keys: Sequence[str]) -> None:
        for key in keys:
            self.items.pop(key, None)

    def yield_keys(self, *, prefix: str | None = None) -> Iterator[str]:
        yield from [key for key in self.items if key.startswith(prefix or "")]


def space(storage: str = "native", **changes: Any) -> KeySpace:
    options = {"max_length": 1024, "dtype": "float32", "storage": storage, **changes}
    identity = options.pop("identity", IDENTITY)
    parts = {name: getattr(identity, name) for name in ("encoder", "tokenizer", "template", "decoder")}
    return KeySpace(model=identity.digest, **parts, **options)


def pack(key: str, model: bytes, states: PassageStates, *, int8: bool = False, secret: bytes | None = None) -> bytes:
    return to_frame(key, model, states, int8=int8).to_bytes(secret)


def unpack(data: bytes, key: str, secret: bytes | None = None) -> Frame:
    return Frame.from_bytes(data, key, secret)


def reseal(data: bytes, key: str, secret: bytes) -> bytes:
    return Frame.from_bytes(data, key).to_bytes(secret)


def put(cache: PassageCache, passages: dict[str, PassageStates]) -> dict[str, PassageStates]:
    """Keep passages as a `StatesSource` does; returns them as they will be read."""
    keys, int8 = space(), cache.storage == "int8"
    frames = {}
    for text, states in passages.items():
        [key] = keys.states_keys([text])
        frames[key] = to_frame(key, keys.model, states, int8=int8)
    sealed = cache.seal(frames)
    cache.put_in_memory(sealed, encoded=len(passages))
    cache.put_in_store("states", sealed)
    return {text: rounded(states) if int8 else states for text, states in passages.items()}


def get(cache: PassageCache, texts: list[str], width: int = 16) -> dict[str, PassageStates]:
    """What a `StatesSource` would find, at ratio 4 in float32."""

    def decode(frame: Frame) -> PassageStates:
        if frame.width != width:
            msg = "another width"
            raise FrameError(msg)
        return from_frame(frame, torch.float32).at(4)

    keys = dict(zip(space().states_keys(texts), texts, strict=True))
    return {keys[key]: states for key, states in cache.get_many("states", list(keys), decode).items()}


def passage(seed: int, tokens: int = 40, width: int = 16, ratio: int = 4) -> PassageStates:
    generator = torch.Generator().manual_seed(seed)
    return PassageStates(torch.randn(-(-tokens // ratio), width, generator=generator), tokens, ratio, seed % 2 == 1)


def frames(count: int, **sizes: int) -> dict[str, bytes]:
    keys = space()
    named = enumerate(keys.states_keys(texts(count)))
    return {key: pack(key, keys.model, passage(seed, **sizes)) for seed, key in named}


def texts(count: int) -> list[str]:
    return [f"text {seed}" for seed in range(count)]


def same(left: PassageStates, right: PassageStates) -> bool:
    return torch.equal(left.states, right.states) and (left.tokens, left.ratio, left.truncated) == (
        right.tokens,
        right.ratio,
        right.truncated,
    )


def lookup(store: Store, count: int, **sizes: int) -> tuple[int, int, PassageCache]:
    """Look up `text 0 ...` through a cache: how many are right, how many are wrong."""
    cache = PassageCache(store, memory=0)
    found = get(cache, texts(count), sizes.get("width", 16))
    right = sum(same(states, passage(int(text.split()[1]), **sizes)) for text, states in found.items())
    return right, len(found) - right, cache


CHILD = f"""
import hashlib, json, os, random, signal, sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
from kalm_rag.cache.disk import DiskStore
from rawframes import key_of, value_of
"""


LOCKER = """
import sqlite3
connection = sqlite3.connect(sys.argv[1] + "/cache.db", isolation_level=None)
connection.execute("BEGIN EXCLUSIVE")
print("locked", flush=True)
sys.stdin.read()
"""
"""A child process that holds the write lock of a folder until it is told to end."""


def spawn(code: str, *arguments: object) -> subprocess.Popen[str]:
    """A child process that runs `code` after the common preamble."""
    command = [sys.executable, "-c", CHILD + code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(child: subprocess.Popen[str]) -> Any:
    """The JSON that a child prints last."""
    out, err = child.communicate(timeout=300)
    assert child.returncode == 0, err
    return json.loads(out.splitlines()[-1])
