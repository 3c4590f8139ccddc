"""Finds the package's folders, and reads paths from users."""

from __future__ import annotations

import functools
import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path

logger = logging.getLogger(__name__)

CACHE_VARIABLE = "KALM_RAG_CACHE"
"""Environment variable that names the cache folder, as `cache=` and `--cache` do."""

DEFAULT = "default"
"""What `cache=` and `--cache` are where nobody named a folder: `passages_dir()`."""

MANIFEST = "kalm-rag-cache.json"
"""The file that marks a folder as ours; without it, a folder with a database is somebody else's and is left alone."""

DIGESTS = "digests.json"
"""The file that remembers the digests of checkpoints, see `kalm_rag.model.identity`."""

_VARIABLE = re.compile(r"\$(?:(\w+)|\{([^}]*)\})", re.ASCII)


def user_path(value: str | Path, name: str) -> Path:
    """Return the absolute path that a user means; `~` and variables are expanded once.

    An absolute `Path` is returned unchanged, so that paths are not expanded twice.

    Args:
        value: what the user gave.
        name: the argument or variable it was given as, for messages.

    Raises:
        ValueError: it is empty, or names a variable or a home folder that does not exist.
        TypeError: it is neither a string nor a `Path`.
    """
    if not isinstance(value, (str, Path)):
        msg = f"{name} must be a path, got {type(value).__name__}: {value!r:.80}"
        raise TypeError(msg)
    if isinstance(value, Path) and value.is_absolute():
        return value
    text = str(value)
    if not text.strip() or "\0" in text:
        msg = (
            f"{name} must be a path, got {text!r}; leave it out for the default, or write '.' for the working directory"
        )
        raise ValueError(msg)
    unset = [found for groups in _VARIABLE.findall(text) if (found := "".join(groups)) not in os.environ]
    if unset:
        msg = f"{name}={text!r} names the variable {unset[0]}, which is not set; set it, or write the path in full"
        raise ValueError(msg)
    expanded = os.path.expandvars(text)
    if not expanded.strip():
        msg = f"{name}={text!r} expands to nothing; set the variable, or write the path in full"
        raise ValueError(msg)
    # A tilde that comes out of a variable is a home folder too, as `KALM_RAG_CACHE=~/x` in a Dockerfile means it.
    try:
        return Path(expanded).expanduser().absolute()
    except RuntimeError:
        msg = f"{name}={text!r} names a home folder that this machine does not know; write the path in full"
        raise ValueError(msg) from None


def passages_dir() -> Path | None:
    """Return the default folder of encoded passages: `KALM_RAG_CACHE`, else one in the user's cache folder.

    None, with a line in the log, if this user has no home folder.
    """
    named = _named_dir()
    if named is not None:
        # An earlier meaning of the variable: caches made then are still found.
        below = named / "passages"
        return below if _holds(below, MANIFEST) and not _holds(named, MANIFEST) else named
    own = _own_dir()
    if own is None:
        _say_homeless()
    return None if own is None else own / "passages"


def make_output_folder(folder: Path, inputs: Iterable[str | Path | None], purpose: str) -> None:
    """Make a folder for what a command writes; what it holds is for the caller to check.

    Args:
        folder: the folder.
        inputs: files and folders that the command reads, or None; they must not lie in it.
        purpose: what it is for, for messages.

    Raises:
        ValueError: it is a file, or holds an input.
    """
    place = folder.resolve()
    for given in inputs:
        read = None if given is None else Path(given).resolve()
        if read is not None and (read == place or place in read.parents):
            msg = (
                f"the folder {str(folder)!r} holds the input {str(given)!r}; give another folder for {purpose} (--out)"
            )
            raise ValueError(msg)
    if folder.exists() and not folder.is_dir():
        msg = f"the place for {purpose} {str(folder)!r} is a file; give a folder (--out)"
        raise ValueError(msg)
    folder.mkdir(parents=True, exist_ok=True)


def digests_file() -> Path | None:
    """Return the file that remembers checkpoint digests, or None if this user has no home folder."""
    folder = _named_dir() or _own_dir()
    return None if folder is None else folder / DIGESTS


def _named_dir() -> Path | None:
    named = os.environ.get(CACHE_VARIABLE)
    return None if named is None else user_path(named, CACHE_VARIABLE)


def _own_dir() -> Path | None:
    """Return this user's cache folder; None without a home folder."""
    import platformdirs

    try:
        found = platformdirs.user_cache_path("kalm-rag", appauthor=False)
    except (RuntimeError, KeyError, OSError):
        return None
    return found if found.is_absolute() else None  # without a home, a "~" is left at its beginning


def _holds(folder: Path, name: str) -> bool:
    try:
        return (folder / name).is_file()
    except OSError:
        return False


@functools.cache
def _say_homeless() -> None:
    logger.warning(
        "this user has no home folder, so encoded passages are kept in memory only; set %s to a folder to keep them",
        CACHE_VARIABLE,
    )
