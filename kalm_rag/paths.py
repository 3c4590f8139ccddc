"""Where things are kept on this machine."""

from __future__ import annotations

import os
from pathlib import Path

CACHE_VARIABLE = "KALM_RAG_CACHE"
"""Environment variable that moves everything kalm-rag keeps on disk."""


def default_cache_dir() -> Path:
    """The folder named by `KALM_RAG_CACHE`, else the user's cache folder of this platform."""
    import platformdirs

    named = os.environ.get(CACHE_VARIABLE)
    return Path(named).expanduser() if named else platformdirs.user_cache_path("kalm-rag", appauthor=False)
