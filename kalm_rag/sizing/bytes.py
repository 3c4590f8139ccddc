"""Bytes of entries, and what a store takes to keep them.

The formulas follow the formats: the frame (`kalm_rag.cache.frame`), SQLite's table and index pages
(https://www.sqlite.org/fileformat2.html, sections 1.6 and 2.3.3), blocks of a file system, and the size classes of
jemalloc, with which Redis allocates (https://jemalloc.net/jemalloc.3.html, "SIZE CLASSES").
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from kalm_rag.cache.frame import HEADER_BYTES, payload_bytes
from kalm_rag.model.compact import rows_of
from kalm_rag.sizing.shapes import Shape

Form = Literal["states", "compact", "prefilled"]
FORMS = get_args(Form)

TAG_BYTES = 32
"""Of an entry's tag, with a secret."""
_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}

FILE_BYTES = 256 * 1024
"""Values of so many bytes are files of their own, smaller ones are in the database."""
_BLOCK = 4096
_PAGE, _USABLE_LOSS = 4096, 35
_ROW_BYTES = 100
"""Of a row beside its value: key, times, counters, and their types."""
_KEY_ENTRY = 76
"""Of an index entry by key, with the cell's own bytes; keys come in random order, so pages are about 69 % full."""
_RANDOM_FILL = 0.69
_TIME_ENTRIES = 26
"""Of the two index entries by time; they come in order, so pages are full."""
_REDIS_ENTRY = 190
"""Of a key in Redis beside its value: the key itself, its place in the table, two headers (`MEMORY USAGE`)."""


@dataclass(frozen=True, slots=True)
class EntryBytes:
    """Bytes of one passage's entries.

    Attributes:
        states: of its encoder states.
        prefilled: of its prefilled form beside them; 0 if none is kept.
    """

    states: int
    prefilled: int

    @property
    def values(self) -> tuple[int, ...]:
        """Bytes of each entry."""
        return tuple(size for size in (self.states, self.prefilled) if size)

    @property
    def total(self) -> int:
        """Bytes of all entries of the passage."""
        return sum(self.values)


def entry_bytes(
    shape: Shape,
    tokens: float,
    *,
    form: Form = "states",
    dtype: str = "bfloat16",
    ratio: int = 4,
    int8: bool = False,
    secret: bool = False,
) -> EntryBytes:
    """Return the bytes of the entries of a passage of so many tokens.

    Args:
        shape: of the model.
        tokens: of the passage, its prefix included.
        form: what the store keeps.
        dtype: what the model computes in.
        ratio: at which states are kept.
        int8: states in 8 bits.
        secret: entries carry a tag.
    """
    count = max(1, round(tokens))
    tag = TAG_BYTES if secret else 0
    states = payload_bytes(count, ratio, shape.width, "int8" if int8 else dtype) + tag
    prefilled = 0
    if form == "compact":
        half = shape.head_width // 2
        rows = rows_of((2, shape.layers - 1, shape.kv_heads, shape.prefix), half)
        prefilled = HEADER_BYTES + rows * (half + 4) + tag
    elif form == "prefilled":
        positions = shape.prefix + -(-count // ratio)
        numbers = 2 * shape.layers * shape.kv_heads * positions * shape.head_width
        prefilled = HEADER_BYTES + numbers * _SIZES[dtype] + tag
    return EntryBytes(states, prefilled)


def folder_bytes(values: tuple[int, ...], entries: int) -> int:
    """Return what a cache's folder takes on disk, its write-ahead log apart.

    Args:
        values: bytes of each entry of a passage.
        entries: how many passages.
    """
    rows = len(values) * entries
    total = rows * (_KEY_ENTRY / _RANDOM_FILL + _TIME_ENTRIES)
    for value in values:
        inside = value if value < FILE_BYTES else 40  # the name of its file
        total += entries * _table_bytes(_ROW_BYTES + inside)
        if value >= FILE_BYTES:
            total += entries * _BLOCK * math.ceil(value / _BLOCK)
    return round(total)


def redis_bytes(values: tuple[int, ...], entries: int) -> int:
    """Return what Redis or Valkey takes in memory, the server's own megabyte apart; arguments as `folder_bytes`."""
    return entries * sum(_size_class(value + 10) + _REDIS_ENTRY for value in values)


def _table_bytes(row: int) -> float:
    """Return the bytes that a row takes in a table of SQLite, with its share of the page that it shares with others."""
    most = _PAGE - _USABLE_LOSS
    if row <= most:
        local, overflow = row, 0
    else:
        least = (_PAGE - 12) * 32 // 255 - 23
        local = least + (row - least) % (_PAGE - 4)
        local = local if local <= most else least
        overflow = math.ceil((row - local) / (_PAGE - 4))
    in_a_page = max(1, (_PAGE - 8) // (local + 10))
    return overflow * _PAGE + _PAGE / in_a_page


def _size_class(size: int) -> int:
    """Return what jemalloc takes for so many bytes: four classes between a power of two and the next."""
    if size <= 128:
        return -(-size // 16) * 16
    step = 1 << max(4, (size - 1).bit_length() - 3)
    return -(-size // step) * step
