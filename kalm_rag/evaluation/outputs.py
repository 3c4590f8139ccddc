"""Manages an evaluation's folder: only files listed in its manifest are overwritten or deleted."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from kalm_rag.utils.files import replace_file
from kalm_rag.utils.paths import make_output_folder

MANIFEST = "kalm-rag-eval.json"
"""Marks a folder as an evaluation's and lists the files that it wrote, by kind."""

_OLDER_MARK = "candidates.sha256"


def claim(out: Path, inputs: Iterable[str | Path | None] = ()) -> None:
    """Claim a folder for an evaluation; folders with other files are refused.

    Args:
        out: the folder; made if need be.
        inputs: files and folders that the evaluation reads; they must not lie in it.

    Raises:
        ValueError: the folder holds other files, or an input.
    """
    make_output_folder(out, inputs, "results")
    if (out / MANIFEST).is_file() or (out / _OLDER_MARK).is_file():
        return
    others = sorted(path.name for path in out.iterdir() if path.name != ".lock")
    if others:
        msg = (
            f"the folder {str(out)!r} is not empty and holds no evaluation of kalm-rag (it has {others[:5]}); "
            "give a new or empty folder (--out)"
        )
        raise ValueError(msg)
    _write(out, {})


def replace_files(out: Path, kind: str, files: Mapping[str, bytes]) -> list[Path]:
    """Write all files of one kind, and delete those of that kind that were written before and are no longer made.

    Args:
        out: a folder that `claim` accepted.
        kind: which of the evaluation's outputs they are.
        files: content by path, relative to `out`.

    Returns:
        The paths, in the order given.

    Raises:
        FileExistsError: a file is there that the evaluation did not write, or a link leads elsewhere.
    """
    known = _read(out)
    before = known.get(kind, [])
    for name in files:
        if not _is_inside(out, name):
            msg = f"{out / name} leads out of the folder of this evaluation; remove that link, or give another (--out)"
            raise FileExistsError(msg)
        if name not in before and (out / name).exists() and (out / MANIFEST).is_file():
            msg = f"{out / name} was not written by this evaluation; move it, or give another folder (--out)"
            raise FileExistsError(msg)
    # List files before writing them, so that files left by a crash are known.
    _write(out, {**known, kind: sorted({*before, *files})})
    for name, content in files.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        replace_file(out / name, content)
    for name in set(before) - set(files):
        if _is_inside(out, name):
            (out / name).unlink(missing_ok=True)
    _write(out, {**known, kind: list(files)})
    return [out / name for name in files]


def _is_inside(out: Path, name: str) -> bool:
    """Whether a name stays inside the folder: the list may have been edited, and a folder may be a link."""
    path = out / name
    return not Path(name).is_absolute() and out.resolve() in path.resolve().parents and not path.is_dir()


def _read(out: Path) -> dict[str, list[str]]:
    try:
        content = json.loads((out / MANIFEST).read_text("utf-8"))
        return {str(kind): [str(name) for name in names] for kind, names in content["files"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        msg = f"cannot read {out / MANIFEST} ({error!r}); give another folder (--out), or delete this one"
        raise ValueError(msg) from None


def _write(out: Path, files: Mapping[str, list[str]]) -> None:
    what = "an evaluation of kalm-rag; only the files listed here are written over or deleted"
    content = {"what": what, "files": files}
    replace_file(out / MANIFEST, (json.dumps(content, indent=1) + "\n").encode())
