"""Checks arguments: each function returns the value as Python's own type, or raises with the name and the rule."""

from __future__ import annotations

import functools
import logging
import numbers
import sys
from typing import Literal, TypeGuard

logger = logging.getLogger(__name__)

TRAINED_RATIOS = (1, 2, 4, 8, 16, 32)
"""Ratios that the models are trained for (arXiv 2606.22807, section 3)."""

DTYPES = {
    "float32": "float32",
    "fp32": "float32",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float16": "float16",
    "fp16": "float16",
    "int8": "float32",
    "int8-all": "float32",
}
"""Accepted names of a dtype, and what the encoder computes in under that name."""

LARGEST_RATIO = 1 << 20
"""More tokens than any passage has."""


def check_positive(name: str, value: object) -> int:
    """Return `value` as an `int` if it is an integer of at least 1, else raise with the name and the value."""
    return _check_least(name, value, 1)


def check_ratio(name: str, value: object) -> int:
    """Return `value` as a ratio if it is an integer of at least 1, else raise with the name and the value.

    No passage has `LARGEST_RATIO` tokens: a larger ratio pools a passage to one state as well, and becomes that one.
    """
    return min(check_positive(name, value), LARGEST_RATIO)


@functools.cache
def warn_untrained(ratio: int) -> None:
    """Log, once for each ratio, that the models are not trained for it."""
    if ratio not in TRAINED_RATIOS:
        logger.warning(
            "the models are trained for the ratios %s; at ratio %d scores may be worse: measure before relying on them",
            ", ".join(map(str, TRAINED_RATIOS)),
            ratio,
        )


def check_share(name: str, value: object) -> float:
    """Return `value` as a `float` if it is a number between 0 and 1, else raise with the name and the value."""
    if not _is_real(value):
        msg = f"{name} must be a number between 0 and 1, got {value!r}"
        raise TypeError(msg)
    if not 0 <= value <= 1:
        msg = f"{name} must be a number between 0 and 1, got {value!r}"
        raise ValueError(msg)
    return float(value)


def check_finite(name: str, value: object) -> float:
    """Return `value` as a `float` if it is a finite number, else raise with the name and the value."""
    if not _is_real(value):
        msg = f"{name} must be a number, got {value!r:.80}"
        raise TypeError(msg)
    if not abs(value) <= sys.float_info.max:  # so that a whole number too large for a float is refused as well
        msg = f"{name} must be a finite number, got {value!r:.80}"
        raise ValueError(msg)
    return float(value)


def check_bytes(name: str, value: object) -> int:
    """Return `value` as an `int` if it is a number of bytes, 0 included, else raise with the name and the value."""
    if not _is_integer(value) or value < 0:
        msg = f"{name} must be a number of bytes, 0 to keep nothing in memory, got {value!r}"
        raise ValueError(msg)
    return int(value)


def check_count(name: str, value: object) -> int:
    """Return `value` as an `int` if it is an integer of at least 0, else raise with the name and the value."""
    return _check_least(name, value, 0)


def check_budget(name: str, value: object) -> int | Literal["auto"]:
    """Return `value` if it is a number of bytes or "auto", else raise with the name and the value."""
    if isinstance(value, str) and value == "auto":
        return "auto"
    if not _is_integer(value) or value < 0:
        msg = (
            f'{name} must be a number of bytes, 0 to keep nothing in memory, or "auto" for a share of the free memory, '
            f"got {value!r:.80}"
        )
        raise ValueError(msg)
    return int(value)


def _check_least(name: str, value: object, least: int) -> int:
    if not _is_integer(value):
        msg = f"{name} must be an integer, got {value!r} ({type(value).__name__})"
        raise TypeError(msg)
    if value < least:
        msg = f"{name} must be at least {least}, got {value}"
        raise ValueError(msg)
    return int(value)


def _is_integer(value: object) -> TypeGuard[int]:
    """Whether it is an integer of Python, numpy or another library that registers its own; truth values are not."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_real(value: object) -> TypeGuard[float]:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_flag(name: str, value: object) -> bool:
    """Return `value` if it is True or False, else raise with the name and the value."""
    if not isinstance(value, bool):
        msg = f"{name} must be True or False, got {value!r:.80}"
        raise TypeError(msg)
    return value


def check_secret(name: str, value: object) -> bytes | None:
    """Return a secret as bytes, or None if there is none; messages do not show it.

    Raises:
        TypeError: it is neither a string nor bytes.
        ValueError: it has fewer than 16 bytes.
    """
    if value is None:
        return None
    if not isinstance(value, (str, bytes)):
        msg = f"{name} must be a string or bytes, got {type(value).__name__}"
        raise TypeError(msg)
    secret = value.encode("utf-8") if isinstance(value, str) else value
    if len(secret) < 16:
        msg = f"{name} must have at least 16 bytes, got {len(secret)}; use secrets.token_hex(32)"
        raise ValueError(msg)
    return secret


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise with the name and the value if it is none of the choices."""
    if value not in choices:
        msg = f"{name} must be one of {choices}, got {value!r}"
        raise ValueError(msg)


def check_dtype(value: object) -> str:
    """Return the name of the dtype that the encoder computes in, for a name in `DTYPES` or a dtype of torch.

    Raises:
        ValueError: there is no such name.
    """
    name = DTYPES.get(str(value).lower().removeprefix("torch."))
    if name is None:
        msg = f"dtype must be one of {sorted(DTYPES)}, got {value!r}"
        raise ValueError(msg)
    return name


def check_text(name: str, value: object) -> str:
    """Return `value` if it is a string that UTF-8 can hold, else raise with the name and the fault."""
    text = check_string(name, value)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        msg = (
            f"{name} holds a lone surrogate at character {error.start}, which has no UTF-8 form; "
            "clean it with kalm_rag.documents.repair_text"
        )
        raise ValueError(msg) from None
    return text


def check_string(name: str, value: object) -> str:
    """Return `value` if it is a string, else raise with the name and the value."""
    if not isinstance(value, str):
        msg = f"{name} must be a string, got {type(value).__name__}: {value!r:.80}"
        raise TypeError(msg)
    return value
