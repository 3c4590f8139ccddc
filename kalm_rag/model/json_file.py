"""Reads the JSON files of checkpoints and adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kalm_rag.errors import CheckpointError

_LARGEST = 64_000_000


def read_json(file: Path, advice: str = "download the checkpoint again") -> dict[str, Any]:
    """Read a JSON object from a file.

    Args:
        file: the file.
        advice: the way out, for the message.

    Raises:
        CheckpointError: it is not readable, not JSON, not an object, or too large or nested too deeply to be one.
    """
    try:
        size = file.stat().st_size
        if size > _LARGEST:
            msg = f"{size} bytes, at most {_LARGEST} are expected"
            raise ValueError(msg)
        content = json.loads(file.read_text("utf-8"))
        if not isinstance(content, dict):
            msg = f"expected an object, got {type(content).__name__}"
            raise TypeError(msg)
    except (OSError, ValueError, TypeError, RecursionError, MemoryError) as error:
        why = "it is nested too deeply" if isinstance(error, RecursionError) else error
        msg = f"cannot read {str(file)!r} ({why}); {advice}"
        raise CheckpointError(msg) from error
    return content
