"""API keys: from the environment or a file that may change while the server runs."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import threading
from collections.abc import Iterable
from pathlib import Path

logger = logging.getLogger(__name__)

VARIABLE = "KALM_RAG_API_KEY"
_LEAST = 16
"""Characters of a key: fewer can be guessed."""


class Keys:
    """The keys that open the server; none leaves it open.

    A file is read again when it changes: one key a line, empty lines and those that begin with # do not count. If it
    cannot be read then, the keys that were read last stay valid, and the log says so.

    Args:
        given: keys, such as those of the environment variable.
        file: holds further keys.

    Raises:
        OSError: the file cannot be read.
        ValueError: a key is shorter than 16 characters, or the file has none.
    """

    def __init__(self, given: Iterable[str] = (), file: Path | None = None) -> None:
        self._given = _digests(given, VARIABLE)
        self._file = file
        self._lock = threading.Lock()  # of the next two
        self._mark: tuple[int, int, int] | None = None
        self._read: tuple[bytes, ...] = ()
        if file is not None:
            self._mark, self._read = _read(file)

    @classmethod
    def from_environment(cls, file: Path | None = None) -> Keys:
        """Take the keys in `KALM_RAG_API_KEY`, separated by commas, and those of a file."""
        return cls([key for key in os.environ.get(VARIABLE, "").split(",") if key.strip()], file)

    @property
    def required(self) -> bool:
        """Whether a client needs a key."""
        return bool(self._given) or self._file is not None

    def admits(self, authorization: str | None) -> bool:
        """Whether a header `Authorization: Bearer KEY` holds one of the keys, in a time that does not depend on it."""
        scheme, _, key = (authorization or "").partition(" ")
        asked = _digest(key.strip())
        known = [hmac.compare_digest(asked, one) for one in (*self._given, *self.of_file())]
        return scheme.lower() == "bearer" and any(known)

    def of_file(self) -> tuple[bytes, ...]:
        """Return the digests of the file's keys, read again if it has changed."""
        if self._file is None:
            return ()
        with self._lock:
            try:
                if _mark(self._file) != self._mark:
                    self._mark, self._read = _read(self._file)
                    logger.info("the API keys were read again: %d keys", len(self._read))
            except (OSError, ValueError) as error:
                logger.warning("the file of API keys cannot be read, the last keys stay valid: %s", error)
            return self._read


def _mark(file: Path) -> tuple[int, int, int]:
    stat = file.stat()
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


def _read(file: Path) -> tuple[tuple[int, int, int], tuple[bytes, ...]]:
    mark = _mark(file)
    lines = [line.strip() for line in file.read_text("utf-8").splitlines()]
    found = _digests([line for line in lines if line and not line.startswith("#")], str(file))
    if not found:
        msg = f"{file} holds no API key: write one a line, such as the output of `openssl rand -hex 32`"
        raise ValueError(msg)
    return mark, found


def _digests(keys: Iterable[str], where: str) -> tuple[bytes, ...]:
    found = [key.strip() for key in keys]
    short = [len(key) for key in found if len(key) < _LEAST]
    if short:
        msg = (
            f"an API key must have at least {_LEAST} characters, got one of {short[0]} in {where}: use the output of "
            "`openssl rand -hex 32`"
        )
        raise ValueError(msg)
    return tuple(_digest(key) for key in found)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
