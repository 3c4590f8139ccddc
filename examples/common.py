"""What the examples share: a model, a cache and a few real passages, so that each runs offline as it is.

Set `KALM_MODEL=nano` for a real order; by default a small model with random weights is built, whose order means
nothing.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from kalm_rag.demo_data import load_demo
from kalm_rag.testing import build_checkpoint

T = TypeVar("T")

CACHE = Path(os.environ.get("KALM_EXAMPLE_CACHE") or tempfile.mkdtemp(prefix="kalm-example-"))
PASSAGES = list(load_demo().passages.values())[:20]
QUESTIONS = list(load_demo().queries.values())[:5]


def model() -> str:
    """The model named by `KALM_MODEL`, or an untrained one."""
    named = os.environ.get("KALM_MODEL")
    if named:
        return named
    print("model: UNTRAINED, random weights; its order means nothing (KALM_MODEL=nano for a real one)")
    folder = CACHE / "untrained"
    return str(folder if folder.is_dir() else build_checkpoint(folder))


def timed(label: str, action: Callable[..., T], *arguments: object) -> T:
    """Run something and print how long it took."""
    start = time.perf_counter()
    result = action(*arguments)
    print(f"{label}: {1000 * (time.perf_counter() - start):.0f} ms")
    return result
