"""Gives the documentation its addresses, and shows in the footer of each page which version it describes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from kalm_rag import __version__

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT = Path(__file__).parent.parent / "pyproject.toml"


def on_config(config: Any) -> Any:
    """Set the addresses, which pyproject.toml holds, and the footer."""
    addresses = tomllib.loads(PROJECT.read_text("utf-8"))["tool"]["hatch"]["metadata"]["hooks"]["custom"]
    config.site_url = f"{addresses['documentation']}/"
    config.repo_url = addresses["repository"]
    config.copyright = f"kalm-rag {__version__}"
    return config
