"""Shows the version that the documentation describes in the footer of each page."""

from __future__ import annotations

from typing import Any

from kalm_rag import __version__


def on_config(config: Any) -> Any:
    """Set the footer."""
    config.copyright = f"kalm-rag {__version__}"
    return config
