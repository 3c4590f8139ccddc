"""Where a server is, and how it is asked: checked once when it is made."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Literal, get_args
from urllib.parse import urlsplit

from kalm_rag.utils.checks import check_choice, check_count, check_finite, check_text

OnFailure = Literal["raise", "keep-order"]

KEY = "KALM_RAG_API_KEY"
"""Environment variable of the key; `kalm-rag serve` reads its keys from the same one, separated by commas."""

DEFAULT_TIMEOUT = 60.0
DEFAULT_RETRIES = 3


@dataclass(frozen=True, slots=True)
class Server:
    """A server of `kalm-rag serve`, and how it is asked. The fields are the arguments of `RerankerClient`.

    Raises:
        TypeError, ValueError: a field is wrong; the message names it and the rule.
    """

    url: str
    api_key: str | None = field(default=None, repr=False)
    timeout: float = DEFAULT_TIMEOUT
    retries: int = DEFAULT_RETRIES
    on_failure: OnFailure = "raise"

    def __post_init__(self) -> None:
        object.__setattr__(self, "url", check_url("server", self.url))
        object.__setattr__(self, "timeout", check_seconds("timeout", self.timeout))
        object.__setattr__(self, "retries", check_count("retries", self.retries))
        check_choice("on_failure", self.on_failure, get_args(OnFailure))
        check_key("api_key", self.api_key)

    @property
    def keeps_order(self) -> bool:
        """Whether a ranking keeps the order of its passages while the server is away."""
        return self.on_failure == "keep-order"

    @property
    def key(self) -> str | None:
        """The key that was given, else the first one in the environment variable."""
        if self.api_key is not None:
            return self.api_key
        given = os.environ.get(KEY, "").split(",")[0].strip()
        return check_key(KEY, given) if given else None


def check_url(name: str, value: object) -> str:
    """Return the address of a server without a slash at its end.

    Raises:
        TypeError: it is not a string.
        ValueError: it is not an address, or holds a credential, a query or a fragment.
    """
    text = check_text(name, value).strip()
    try:
        parts = urlsplit(text)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_address = False
    # The text is not shown: it may hold a password.
    if not is_address or not text.isascii() or not text.isprintable() or " " in text:
        msg = f"{name} must be an address such as http://127.0.0.1:8000, got another text of {len(text)} characters"
        raise ValueError(msg)
    if "@" in parts.netloc or parts.query or parts.fragment:
        msg = (
            f"{name} must be an address without a user, a password or a query, such as {parts.scheme}://"
            f"{parts.hostname}; give the key as api_key, or in the environment variable {KEY}"
        )
        raise ValueError(msg)
    return text.rstrip("/")


def check_key(name: str, value: object) -> str | None:
    """Return a key that fits into a header. Messages do not show it.

    Raises:
        TypeError: it is neither a string nor None.
        ValueError: it is empty, or holds something else than visible ASCII characters.
    """
    if value is None:
        return None
    if not isinstance(value, str):
        msg = f"{name} must be a string or None, got {type(value).__name__}"
        raise TypeError(msg)
    if not value or not all("!" <= character <= "~" for character in value):
        msg = f"{name} must be a key of visible ASCII characters without spaces, got {len(value)} characters"
        raise ValueError(msg)
    return value


def check_seconds(name: str, value: object) -> float:
    """Return a number of seconds above 0.

    Raises:
        TypeError, ValueError: it is none.
    """
    seconds = check_finite(name, value)
    if seconds <= 0:
        msg = f"{name} must be above 0 seconds, got {value!r:.80}"
        raise ValueError(msg)
    return seconds
