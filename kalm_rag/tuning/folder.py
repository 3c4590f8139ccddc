"""The folder that a tuning writes to."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from kalm_rag.model.lora import CONFIG, WEIGHTS
from kalm_rag.tuning.state import FILE

REPORT = "tuning.json"
CACHE = "cache"
LOCK = ".lock"


def claim(folder: Path, inputs: Iterable[str | Path]) -> None:
    """Make a folder for a tuning, or check that it is an earlier one's.

    Args:
        folder: the folder.
        inputs: what the tuning reads, which must not lie in it.

    Raises:
        ValueError: it is a file, or holds other files or an input.
    """
    place = folder.resolve()
    for given in inputs:
        read = Path(given).resolve()
        if read == place or place in read.parents:
            msg = f"the folder {str(folder)!r} holds the input {str(given)!r}; give another one for the adapter (--out)"
            raise ValueError(msg)
    if folder.exists() and not folder.is_dir():
        msg = f"the place for the adapter {str(folder)!r} is a file; give a folder (--out)"
        raise ValueError(msg)
    folder.mkdir(parents=True, exist_ok=True)
    own = {REPORT, CACHE, LOCK, FILE, CONFIG, WEIGHTS}
    own |= {f".{name}.partial" for name in own}
    others = sorted(path.name for path in folder.iterdir() if path.name not in own)
    if others:
        msg = f"the folder {str(folder)!r} holds other files (it has {others[:5]}); give a new or empty folder (--out)"
        raise ValueError(msg)
