"""Gives the package its addresses, and a README whose links lead somewhere outside of a clone.

In the repository, README.md links to files beside it. A package index shows it alone, so each such link becomes an
address: of the documentation for a page in docs/, else of the file in the repository at this version's tag.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

LINK = re.compile(r"\]\((?!\w+:|#)([^)]+)\)")


def absolute(target: str, repository: str, documentation: str, version: str) -> str:
    """The address of a file of the repository, named by its path and perhaps a #section."""
    path, mark, section = target.partition("#")
    if path.startswith("docs/") and path.endswith(".md"):
        page = f"/{path.removeprefix('docs/').removesuffix('.md')}/".removesuffix("index/")
        return f"{documentation}{page}{mark}{section}"
    return f"{repository}/blob/v{version}/{target}"


class AddressHook(MetadataHookInterface):
    """Fills in `readme` and `urls`."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Read the two addresses from the hook's settings in pyproject.toml, the one place that holds them."""
        repository, documentation = self.config["repository"], self.config["documentation"]
        places = (repository, documentation, metadata["version"])
        text = (Path(self.root) / "README.md").read_text("utf-8")
        text = LINK.sub(lambda link: f"]({absolute(link[1], *places)})", text)
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
        metadata["urls"] = {
            "Documentation": f"{documentation}/",
            "Repository": repository,
            "Issues": f"{repository}/issues",
            "Changelog": absolute("CHANGELOG.md", *places),
        }
