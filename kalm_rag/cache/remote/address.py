"""Where a shared tier is: URLs, their schemes, and how they are shown without their credentials."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass, field
from urllib.parse import quote, urlsplit, urlunsplit

from kalm_rag.utils.checks import check_text
from kalm_rag.utils.display import visible_line

USERNAME, PASSWORD = "KALM_RAG_REMOTE_USERNAME", "KALM_RAG_REMOTE_PASSWORD"
"""Environment variables that name the user and the password of a Redis server whose URL holds none."""

_REDIS = {"redis": "redis", "rediss": "rediss", "valkey": "redis", "valkeys": "rediss"}
_OBJECTS = ("s3", "gs", "az", "file")
SCHEMES = (*_REDIS, *_OBJECTS)
_NEEDS = {"redis": ("redis", "redis"), "objects": ("obstore", "objects")}


@dataclass(frozen=True, slots=True)
class Address:
    """The URL of a shared tier.

    Attributes:
        kind: `redis` (which Valkey is too) or `objects`.
        url: with its credentials.
        shown: without them, and without its query, for messages.
        given_credentials: whether the URL that was given holds a user or a password, or a query, which may hold them.
    """

    kind: str
    url: str = field(repr=False)
    shown: str
    given_credentials: bool


def read_address(url: object, name: str = "remote") -> Address:
    """Read a URL; nothing is opened.

    Args:
        url: as a user gave it. `valkey://` is read as `redis://`.
        name: of the argument, for messages.

    Raises:
        TypeError: it is not a string.
        ValueError: the scheme is unknown, or the part after it is missing.
        ImportError: the client of the scheme is not installed.
    """
    text = check_text(name, url).strip()
    scheme = text.partition("://")[0].lower()
    if "://" not in text or scheme not in SCHEMES:
        # The text may hold a password, so only what cannot be one is shown.
        got = f"{scheme}://..." if "://" in text and scheme.isalnum() else "a text without a known scheme"
        msg = (
            f"{name} must be a URL that begins with one of {', '.join(f'{known}://' for known in SCHEMES)}, got {got}; "
            "or give a store of your own"
        )
        raise ValueError(msg)
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError:
        msg = f"{name} must be a URL whose port is a number, got {scheme}://..."
        raise ValueError(msg) from None
    path = parts.path
    if scheme == "file":
        if parts.netloc or len(path) < 2:
            msg = f"{name} must name a folder as file:///absolute/path, got another form of file://"
            raise ValueError(msg)
    elif not host:
        what = "a host, as in redis://host:6379/0" if scheme in _REDIS else f"a bucket, as in {scheme}://bucket/prefix"
        msg = f"{name} must name {what}, got {scheme}:// without one"
        raise ValueError(msg)
    where = host or ""
    if scheme in _OBJECTS and parts.netloc:
        where = parts.netloc.rpartition("@")[2]  # a bucket keeps its letters as they are
    elif port is not None:
        where = f"{where}:{port}"
    shown = visible_line(urlunsplit((scheme, where, path, "", "")))
    kind = "redis" if scheme in _REDIS else "objects"
    module, extra = _NEEDS[kind]
    if importlib.util.find_spec(module) is None:
        msg = f"a shared tier at {scheme}:// needs the package {module}: pip install 'kalm-rag[{extra}]'"
        raise ImportError(msg)
    real = _with_credentials(parts._replace(scheme=_REDIS[scheme]).geturl()) if kind == "redis" else text
    return Address(kind, real, shown, "@" in parts.netloc or bool(parts.query))


def _with_credentials(url: str) -> str:
    """Add what the environment says of a Redis server whose URL names neither user nor password."""
    password, name = os.environ.get(PASSWORD), os.environ.get(USERNAME, "")
    parts = urlsplit(url)
    if not password or "@" in parts.netloc:
        return url
    return urlunsplit(parts._replace(netloc=f"{quote(name, safe='')}:{quote(password, safe='')}@{parts.netloc}"))
