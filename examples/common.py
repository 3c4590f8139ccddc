"""What the examples share: a model, a cache and a few real passages, so that each runs offline as it is.

The model is `mini`, the demonstration checkpoint inside kalm-rag; set `KALM_MODEL=nano` for the recommended one.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from kalm_rag.demo_data import load_demo

T = TypeVar("T")

CACHE = Path(os.environ.get("KALM_EXAMPLE_CACHE") or tempfile.mkdtemp(prefix="kalm-example-"))
PASSAGES = list(load_demo().passages.values())[:20]
QUESTIONS = list(load_demo().queries.values())[:5]


def model() -> str:
    """The model named by `KALM_MODEL`, or the bundled one."""
    named = os.environ.get("KALM_MODEL", "mini")
    print(
        f"model: {named}" + (", a demonstration checkpoint (KALM_MODEL=nano for a real one)" if named == "mini" else "")
    )
    return named


def timed(label: str, action: Callable[..., T], *arguments: object) -> T:
    """Run something and print how long it took."""
    start = time.perf_counter()
    result = action(*arguments)
    print(f"{label}: {1000 * (time.perf_counter() - start):.0f} ms")
    return result


def show_statuses(statuses: list[str]) -> None:
    """Print what became of the rows of a corpus."""
    print(", ".join(f"{name}: {statuses.count(name)}" for name in ("encoded", "known", "not kept", "failed")))
