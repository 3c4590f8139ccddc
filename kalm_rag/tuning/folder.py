"""The folder that a tuning writes to."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from kalm_rag.errors import CheckpointError
from kalm_rag.model.json_file import read_json
from kalm_rag.model.lora import CONFIG, WEIGHTS
from kalm_rag.tuning.state import FILE, state_owner
from kalm_rag.utils.paths import make_output_folder

REPORT = "tuning.json"
CACHE = "cache"
LOCK = ".lock"


def claim(folder: Path, inputs: Iterable[str | Path]) -> None:
    """Make a folder for a tuning, or check that it is an earlier one's.

    Args:
        folder: the folder.
        inputs: what the tuning reads, which must not lie in it.

    Raises:
        ValueError: it is a file, or holds an input or files that no tuning wrote.
    """
    make_output_folder(folder, inputs, "the adapter")
    own = {REPORT, CACHE, LOCK, FILE, CONFIG, WEIGHTS}
    own |= {f".{name}.partial" for name in own}
    others = sorted(path.name for path in folder.iterdir() if path.name not in own)
    if others:
        msg = f"the folder {str(folder)!r} holds other files (it has {others[:5]}); give a new or empty folder (--out)"
        raise ValueError(msg)
    check_owner(folder)


def check_owner(folder: Path, owner: str | None = None) -> None:
    """Refuse a folder whose adapter would be overwritten by that of another tuning.

    Args:
        folder: the folder.
        owner: digest of this tuning, see `Progressed`; None while it is not known, to refuse only what no tuning wrote.

    Raises:
        ValueError: it holds an adapter of another tuning, or files whose tuning is not known.
    """
    # The state comes first: a tuning that was killed may have written its adapter, but not its report yet.
    found = state_owner(folder) or _reported_owner(folder / REPORT)
    names = [name for name in (CONFIG, WEIGHTS) if (folder / name).exists()]
    if found is None:
        names += [REPORT] if (folder / REPORT).exists() else []
        if names:
            msg = (
                f"the folder {str(folder)!r} holds {', '.join(names)}, and no {REPORT} names the tuning that wrote it, "
                "so it is not overwritten; give another folder (--out), or delete this one"
            )
            raise ValueError(msg)
    elif names and owner is not None and owner != found:
        msg = (
            f"the folder {str(folder)!r} holds the adapter of the tuning {found[:12]}, and this one is {owner[:12]}: "
            "another model, other judgements or another recipe; give another folder (--out), or delete this one"
        )
        raise ValueError(msg)


def remove_adapter(folder: Path) -> None:
    """Delete the adapter of an earlier call of the same tuning.

    Raises:
        OSError: it cannot be deleted.
    """
    for name in (WEIGHTS, CONFIG):
        (folder / name).unlink(missing_ok=True)


def _reported_owner(path: Path) -> str | None:
    try:
        owner = read_json(path).get("owner")
    except CheckpointError:  # it is missing, damaged, or something else
        return None
    return owner if isinstance(owner, str) and owner else None
