"""Looks at the settings of the model hub without asking it: offline mode, token, and which releases are on disk."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from kalm_rag.diagnosis.findings import Finding, Level
from kalm_rag.diagnosis.place import try_folder
from kalm_rag.errors import CheckpointError
from kalm_rag.model.checkpoint import ALIASES, MINI, clean_token, find_checkpoint

_TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


@dataclass(frozen=True, slots=True)
class Hub:
    """The hub as this process would use it.

    Attributes:
        offline: whether `HF_HUB_OFFLINE` forbids downloads.
        token: where a token comes from, `none` without one; never the token.
        endpoint: the host that downloads come from.
        folder: where downloads are kept.
        models: short names of the models that are on this disk.
    """

    offline: bool
    token: str
    endpoint: str
    folder: str
    models: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """Return all fields."""
        return asdict(self)


def look_at_hub() -> tuple[Hub, list[Finding]]:
    """Look at the settings; nothing is sent."""
    from huggingface_hub import constants, get_token

    findings = []
    found = get_token()
    named = next((name for name in _TOKEN_VARIABLES if name in os.environ), None)
    source = "none" if found is None else (named or "the file that `hf auth login` wrote")
    try:
        clean_token(found)
    except ValueError as error:
        findings.append(_hub_finding("warning", f"The hub token of {source} cannot be used: {error}."))
    if named is not None and not os.environ[named].strip():
        findings.append(_hub_finding("note", f"{named} is set but blank; unset it, or set it to a token of the hub."))
    local = tuple(name for name in ALIASES if _is_here(name))
    offline = bool(constants.HF_HUB_OFFLINE)
    if offline and not local:
        text = (
            f"HF_HUB_OFFLINE is set and none of {', '.join(ALIASES)} was downloaded: only {MINI} and folders can be "
            "used. Unset it once, or copy a folder from a machine with access."
        )
        findings.append(_hub_finding("note", text))
    folder = Path(constants.HF_HUB_CACHE)
    if not offline:
        try:
            try_folder(folder)
        except OSError as error:
            text = (
                f"Models cannot be downloaded: {folder} cannot be written ({error.strerror or error}). Set HF_HOME to "
                "a folder that you may write to."
            )
            findings.append(_hub_finding("warning", text))
    host = urlsplit(constants.ENDPOINT).hostname or "unknown"  # the rest may hold a password
    return Hub(offline, source, host, str(folder), (MINI, *local)), findings


def _hub_finding(level: Level, text: str) -> Finding:
    return Finding(level, "hub", text)


def _is_here(name: str) -> bool:
    try:
        find_checkpoint(ALIASES[name], local_files_only=True)
    except CheckpointError:
        return False
    return True
