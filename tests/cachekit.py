"""What the cache tests share: frames whose content is known, and child processes that use a store without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from rawframes import key_of, value_of

from kalm_rag.cache import PassageCache, Store
from kalm_rag.cache.frame import pack
from kalm_rag.cache.keys import KeySpace
from kalm_rag.identity import ModelIdentity
from kalm_rag.pooling import PassageStates

__all__ = ["finish", "frames", "key_of", "lookup", "passage", "same", "space", "spawn", "texts", "value_of"]

IDENTITY = ModelIdentity(encoder="e" * 64, tokenizer="a" * 64, template="b" * 64)


def space(storage: str = "native", **changes: Any) -> KeySpace:
    options = {"max_length": 1024, "dtype": "float32", "storage": storage, **changes}
    return KeySpace(options.pop("identity", IDENTITY), **options)


def passage(seed: int, tokens: int = 40, width: int = 16, ratio: int = 4) -> PassageStates:
    generator = torch.Generator().manual_seed(seed)
    return PassageStates(torch.randn(-(-tokens // ratio), width, generator=generator), tokens, ratio, seed % 2 == 1)


def frames(count: int, **sizes: int) -> dict[str, bytes]:
    keys = space()
    return {(key := keys.key(f"text {seed}")): pack(key, keys.model, passage(seed, **sizes)) for seed in range(count)}


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
    found = cache.lookup(space(), texts(count), 4, torch.float32, sizes.get("width", 16))
    right = sum(same(states, passage(int(text.split()[1]), **sizes)) for text, states in found.items())
    return right, len(found) - right, cache


CHILD = f"""
import hashlib, json, os, random, signal, sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
from kalm_rag.cache.disk import DiskStore
from rawframes import key_of, value_of
"""


def spawn(code: str, *arguments: object) -> subprocess.Popen[str]:
    """A child process that runs `code` after the common preamble."""
    command = [sys.executable, "-c", CHILD + code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(child: subprocess.Popen[str]) -> Any:
    """The JSON that a child prints last."""
    out, err = child.communicate(timeout=300)
    assert child.returncode == 0, err
    return json.loads(out.splitlines()[-1])
