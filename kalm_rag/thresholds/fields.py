"""Checks the fields of a JSON file that anybody may have written."""

from __future__ import annotations

from typing import Any

from kalm_rag.utils.checks import check_text

_MOST_TEXT = 100_000


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of its fields; refuse one that occurs twice, of which JSON readers keep either."""
    found = dict(pairs)
    if len(found) < len(pairs):
        msg = "a field occurs twice"
        raise ValueError(msg)
    return found


def json_object(value: object, name: str, names: list[str] | None) -> dict[str, Any]:
    """Return an object that has exactly these fields, or any if they are None; else raise with its name."""
    if not isinstance(value, dict):
        msg = f"{name} must be an object, got {type(value).__name__}"
        raise TypeError(msg)
    if names is not None and value.keys() != set(names):
        wrong = sorted(value.keys() ^ set(names))
        msg = f"{name} must have the fields {', '.join(names)}; missing or unknown: {', '.join(wrong)[:200]}"
        raise ValueError(msg)
    return value


def json_list(name: str, value: object, least: int, most: int) -> list[Any]:
    """Return a list of so many items, else raise with its name."""
    if not isinstance(value, list) or not least <= len(value) <= most:
        got = len(value) if isinstance(value, list) else type(value).__name__
        msg = f"{name} must be a list of {least} to {most} items, got {got}"
        raise ValueError(msg)
    return value


def json_text(name: str, value: object) -> str:
    """Return a text that UTF-8 can hold, else raise with its name."""
    text = check_text(name, value)
    if len(text) > _MOST_TEXT:
        msg = f"{name} must have at most {_MOST_TEXT} characters, got {len(text)}"
        raise ValueError(msg)
    return text


def json_number(name: str, value: object, low: float = -1e6, high: float = 1e6) -> float:
    """Return a number in a range, which NaN is not, else raise with its name."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        msg = f"{name} must be a number between {low:g} and {high:g}, got {value!r:.80}"
        raise ValueError(msg)
    return float(value)


def json_count(name: str, value: object) -> int:
    """Return a whole number of at least 0, else raise with its name."""
    if type(value) is not int or value < 0:
        msg = f"{name} must be a whole number of at least 0, got {value!r:.80}"
        raise ValueError(msg)
    return value
