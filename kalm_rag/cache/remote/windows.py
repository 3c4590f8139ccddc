"""Parts of a read or a write that are not too large for one request."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice

_READ_BYTES = 16_000_000
"""Bytes of one answer at most, as far as they can be foreseen: a server serves nobody else meanwhile."""
_FIRST_BYTES = 250_000
"""What a value is taken for until one was seen: a passage of 300 tokens of Nano."""
_MOST_KEYS = 256


class Windows:
    """Divides keys so that the values of each part take a bounded number of bytes, learned from those seen so far."""

    def __init__(self) -> None:
        self._average = float(_FIRST_BYTES)

    def of(self, keys: Sequence[str]) -> Iterator[Sequence[str]]:
        """Yield the keys in parts."""
        place = 0
        while place < len(keys):
            count = max(1, min(_MOST_KEYS, int(_READ_BYTES / self._average)))
            yield keys[place : place + count]
            place += count

    def learn(self, found: Mapping[str, bytes]) -> None:
        """Take in what a part held."""
        if found:
            average = sum(map(len, found.values())) / len(found)
            self._average = max(1.0, average, 0.5 * (self._average + average))


def bytes_of(items: Mapping[str, bytes]) -> int:
    """Return the bytes of all values."""
    return sum(map(len, items.values()))


def by_bytes(items: Mapping[str, bytes], most: int) -> Iterator[dict[str, bytes]]:
    """Yield items in parts of so many bytes at most, each of at least one item."""
    left = iter(items.items())
    first = next(left, None)
    while first is not None:
        part, size = dict([first]), len(first[1])
        first = None
        for key, value in left:
            if size + len(value) > most:
                first = (key, value)
                break
            part[key] = value
            size += len(value)
        yield part


def parts(keys: Sequence[str], count: int) -> Iterator[list[str]]:
    """Yield keys in parts of so many."""
    left = iter(keys)
    while part := list(islice(left, count)):
        yield part
