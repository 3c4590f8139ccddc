"""Makes the shared tier that the arguments of a `PassageCache` ask for."""

from __future__ import annotations

import hashlib
import os
import re
from typing import Any, get_args

from kalm_rag.cache.remote.address import read_address
from kalm_rag.cache.remote.tier import RemoteMode, RemoteTier
from kalm_rag.cache.store import Store
from kalm_rag.utils.checks import check_choice, check_finite, check_flag, check_text

SECRET = "KALM_RAG_CACHE_SECRET"
"""Environment variable with the secret that entries are authenticated with, where none is given."""

DEFAULT_NAMESPACE = "default"

_NAMESPACE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def secret_or_environment(secret: str | bytes | None) -> str | bytes | None:
    """Return the secret as given, or the one that the environment holds; an empty variable is none."""
    return (os.environ.get(SECRET) or None) if secret is None else secret


def check_namespace(name: str, value: object) -> str:
    """Return a namespace if it may be part of a key, else raise with the name and the rule."""
    text = check_text(name, value)
    if not _NAMESPACE.fullmatch(text) or ".." in text:
        msg = (
            f"{name} must be 1 to 64 letters, digits, '.', '_' or '-', beginning with a letter or a digit, got "
            f"{text!r:.80}"
        )
        raise ValueError(msg)
    return text


def check_timeout(name: str, value: object) -> float | None:
    """Return milliseconds as seconds, or None for none, else raise with the name and the rule."""
    if value is None:
        return None
    milliseconds = check_finite(name, value)
    if milliseconds <= 0:
        msg = f"{name} must be above 0 milliseconds, got {value!r:.80}; leave it out for what the reads are worth"
        raise ValueError(msg)
    return milliseconds / 1000


def open_tier(
    remote: Any,
    *,
    mode: object,
    timeout_ms: object,
    namespace: object,
    secret: bytes | None,
    unauthenticated: object,
) -> RemoteTier | None:
    """Return the tier, or None if there is none; nothing is connected yet.

    Args:
        remote: a URL, a store, or None.
        mode: `read` or `read-write`.
        timeout_ms: of a query's reads together, or None.
        namespace: separates tenants: others do not look under its keys.
        secret: of the entries' tags.
        unauthenticated: share without a secret.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it and the rule.
        ImportError: the client of the URL's scheme is not installed.
    """
    check_choice("remote_mode", mode, get_args(RemoteMode))
    name = check_namespace("namespace", namespace)
    timeout = check_timeout("remote_timeout_ms", timeout_ms)
    open_to_all = check_flag("unauthenticated", unauthenticated)
    if remote is None:
        return None
    if secret is None and not open_to_all:
        msg = (
            "a remote needs a secret: whoever can write to it could change scores. Give every machine the same one "
            f"(secret=..., or {SECRET} in the environment; make it with secrets.token_hex(32)), or pass "
            "unauthenticated=True if everybody who can write there is trusted"
        )
        raise ValueError(msg)
    if isinstance(remote, Store):
        if name != DEFAULT_NAMESPACE:
            msg = (
                f"namespace={name!r} goes with a URL, got a {type(remote).__name__}: give the store a prefix of its own"
            )
            raise ValueError(msg)
        shown = f"a {type(remote).__name__}"
        return RemoteTier(remote, shown, mode=_mode(mode), timeout=timeout)
    address = read_address(remote)
    place = f"kalm-rag/{name}/{_fingerprint(secret)}"
    store: Store
    if address.kind == "redis":
        from kalm_rag.cache.remote.redis_store import RedisStore

        store = RedisStore(address.url, place.replace("/", ":") + ":")
    else:
        from kalm_rag.cache.remote.object_store import ObjectStore

        store = ObjectStore(address.url, place)
    return RemoteTier(store, address.shown, mode=_mode(mode), timeout=timeout)


def _mode(mode: object) -> RemoteMode:
    return "read" if mode == "read" else "read-write"


def _fingerprint(secret: bytes | None) -> str:
    """Return what keeps entries under different secrets apart; the secret cannot be read from it."""
    if secret is None:
        return "open"
    return hashlib.blake2b(hashlib.blake2b(secret).digest(), digest_size=8, person=b"kalm-rag place").hexdigest()
