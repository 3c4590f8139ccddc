"""A threshold profile for tests, and the content of its file."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from kalm_rag.settings import DEFAULT_INSTRUCTION, DEFAULT_SYSTEM_PROMPT
from kalm_rag.thresholds import Figure, Figures, Scope, ThresholdProfile

FIT = ((-6.0, 0.0), (-1.0, 0.1), (-0.5, 0.1), (2.0, 0.75), (3.0, 1.0))


def make_profile(model: str = "0123456789ab" * 2, margin: float = 0.25, **scope: Any) -> ThresholdProfile:
    """A profile for a model's digest; `scope` overrides ratio, instruction and system prompt."""
    given = {"ratio": 4, "instruction": DEFAULT_INSTRUCTION, "system_prompt": DEFAULT_SYSTEM_PROMPT, **scope}
    half = Figure(0.5, 0.4, 0.6)
    figures = Figures(20, 3, half, half, half, Figure(3.0, 2.5, 3.5), half, None)
    return ThresholdProfile(
        Scope(model, **given), "tiny", "recall=0.95", margin, figures, figures, FIT, ("few queries",), "2026", "1"
    )


def sealed(content: dict[str, Any]) -> str:
    """The content of a file with a digest that fits, whatever it holds."""
    rest = {name: value for name, value in content.items() if name != "digest"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return json.dumps({**rest, "digest": hashlib.sha256(text.encode()).hexdigest()})
