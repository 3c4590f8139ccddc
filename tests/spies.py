"""What tests that watch a model have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def passages_in(kwargs: Mapping[str, Any]) -> int:
    """How many passages an encoder's forward got: side by side on a CPU, else a row each."""
    return len(kwargs["packing"].lengths) if "packing" in kwargs else len(kwargs["input_ids"])
