"""Takes out of a report what does not belong into a public place: tokens, passwords, and the user's name in paths."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

_PASSWORD = re.compile(r"(?<=://)[^/\s@]+@")
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{8,}")


def scrubber() -> Callable[[Any], Any]:
    """Return a function that cleans a JSON value: strings anywhere in it are rewritten, all else stays.

    The home folder becomes `~`, the hub's token and passwords in addresses become `***`.
    """
    secrets = [text for text in _tokens() if len(text) >= 4]
    homes = [home for home in _homes() if len(Path(home).parts) > 1]
    patterns = [re.compile(rf"{re.escape(home)}(?![\w.-])") for home in homes]

    def clean(text: str) -> str:
        for secret in secrets:
            text = text.replace(secret, "***")
        text = _TOKEN.sub("***", _PASSWORD.sub("***@", text))
        for pattern in patterns:
            text = pattern.sub("~", text)
        return text

    def scrub(value: Any) -> Any:
        if isinstance(value, str):
            return clean(value)
        if isinstance(value, dict):
            return {scrub(key): scrub(inner) for key, inner in value.items()}
        return [scrub(inner) for inner in value] if isinstance(value, (list, tuple)) else value

    return scrub


def _tokens() -> list[str]:
    found = [os.environ.get(name) for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")]
    with contextlib.suppress(ImportError):
        from huggingface_hub import get_token

        found.append(get_token())
    return [token.strip() for token in found if token and token.strip()]


def _homes() -> list[str]:
    """Return the user's home folder as it is named, and as links lead to it; the longest first."""
    try:
        home = Path.home()
    except RuntimeError:
        return []
    return sorted({str(home), os.path.realpath(home)}, key=len, reverse=True)
