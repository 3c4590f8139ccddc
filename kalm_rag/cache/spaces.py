"""Key spaces: what a store needs to know to find a text again.

A key is a digest, so nobody can read from it which text it belongs to. To forget a text, its keys are computed once
more in every key space that was ever used. A `Space` is one of them: the fields of its keys, and how text is cleaned.
Each is kept as a record beside the entries. A record is untrusted: it is verified, and the worst that a forged one can
do is to make an entry a miss.
"""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

from kalm_rag.cache.keys import FORMAT, KeySpace
from kalm_rag.utils import forks
from kalm_rag.utils.control_tokens import ControlTokens

Kind = Literal["states", "passage_kv"]
"""What a cache holds: encoder states, or keys and values of prefilled passages."""

LARGEST_RECORD = 1 << 20
"""Bytes of a record, compressed or not. A tokenizer with six thousand control tokens takes a tenth of it."""

_MAGIC = b"KaLMkeys"
_HEAD = len(_MAGIC) + 32
_DIGEST = re.compile(r"[0-9a-f]{64}")
_MOST_USED = 1024


class SpaceError(ValueError):
    """Bytes that are not a record of a key space; the message says what does not fit."""


@dataclass(frozen=True, slots=True)
class Behind:
    """What the keys of prefilled passages hold besides the fields of a `KeySpace`.

    Attributes:
        ratio: of the states that were prefilled from.
        prefix: token ids of the prompt's prefix, which stand for instruction and system prompt.
        kind: what the keys and values are kept in.
    """

    ratio: int
    prefix: tuple[int, ...]
    kind: str


class WindowRule(NamedTuple):
    """How long passages were split before they became entries.

    Attributes:
        tokens: of a window at most.
        overlap: tokens that a window repeats of the one before, at most.
        most: windows of a passage.
    """

    tokens: int
    overlap: int
    most: int


@dataclass(frozen=True, slots=True)
class Space:
    """One key space.

    Attributes:
        keys: the keys of its model and settings.
        control: what cleaning breaks in a text.
        behind: for prefilled passages; None for encoder states.
        windows: how long passages were split, if they were. The keys do not depend on it: a window has the key of its
            text. It says that the text of a whole passage does not find all its entries.
        id: digest of all of it, 64 hexadecimal digits.
    """

    keys: KeySpace
    control: ControlTokens
    behind: Behind | None = None
    windows: WindowRule | None = None
    id: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "id", hashlib.sha256(self._json()).hexdigest())

    @property
    def kind(self) -> Kind:
        """What its entries are."""
        return "states" if self.behind is None else "passage_kv"

    def keys_of(self, texts: Iterable[str]) -> list[str]:
        """Return every key that the texts can have here: as they are, and with their control tokens broken.

        Which of the two a reranker uses is not part of its keys: see `control_tokens` of `KaLMReranker`.
        """
        both = list(dict.fromkeys(form for text in texts for form in (text, self.control.broken(text))))
        if self.behind is None:
            return self.keys.states_keys(both)
        behind = self.behind
        return self.keys.prefilled_keys(both, ratio=behind.ratio, prefix=behind.prefix, kind=behind.kind)

    def to_bytes(self) -> bytes:
        """Return the record.

        Raises:
            SpaceError: it is larger than a record may be.
        """
        text = self._json()
        data = _MAGIC + hashlib.sha256(text).digest() + zlib.compress(text)
        if max(len(text), len(data)) > LARGEST_RECORD:
            msg = f"a key space of {len(text):,} bytes is larger than the {LARGEST_RECORD:,} bytes of a record"
            raise SpaceError(msg)
        return data

    @classmethod
    def from_bytes(cls, data: bytes) -> Space:
        """Verify a record.

        Raises:
            SpaceError: anything at all does not fit.
        """
        if len(data) > LARGEST_RECORD or data[: len(_MAGIC)] != _MAGIC:
            msg = "not a record of a key space"
            raise SpaceError(msg)
        try:
            expander = zlib.decompressobj()
            text = expander.decompress(data[_HEAD:], LARGEST_RECORD)
            if not expander.eof or hashlib.sha256(text).digest() != data[len(_MAGIC) : _HEAD]:
                msg = "wrong checksum"
                raise SpaceError(msg)
            return _space_of(json.loads(text))
        except SpaceError:
            raise
        except (zlib.error, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            msg = f"not a record of a key space ({type(error).__name__}: {error})"
            raise SpaceError(msg) from error

    def _json(self) -> bytes:
        behind = self.behind
        content: dict[str, Any] = {
            "format": FORMAT,
            "model": self.keys.model.hex(),
            "fields": self.keys.fields,
            "control": self.control.tokens,
            "prefilled": None if behind is None else [behind.ratio, behind.prefix, behind.kind],
        }
        if self.windows is not None:  # else the record is as it was before there were windows
            content["windows"] = list(self.windows)
        return json.dumps(content, sort_keys=True, separators=(",", ":")).encode("ascii")


def _space_of(content: Any) -> Space:
    if content["format"] != FORMAT:
        msg = f"format version {content['format']!r}; this version of kalm-rag reads {FORMAT}"
        raise SpaceError(msg)
    fields = content["fields"]
    digests = [content["model"], *(fields[name] for name in ("encoder", "tokenizer", "template", "decoder"))]
    words = [fields["dtype"], fields["storage"], *content["control"]]
    numbers = [fields["max_length"]]
    behind = None
    if content["prefilled"] is not None:
        ratio, prefix, kind = content["prefilled"]
        words.append(kind)
        numbers += [ratio, *prefix]
        behind = Behind(ratio, tuple(prefix), kind)
    windows = None if content.get("windows") is None else WindowRule(*content["windows"])
    numbers += windows or ()
    if (
        not all(isinstance(digest, str) and (_DIGEST.fullmatch(digest) or digest == "") for digest in digests)
        or not all(isinstance(word, str) for word in words)
        or not all(type(number) is int and number >= 0 for number in numbers)
    ):
        msg = "a record whose fields have other types than a key space has"
        raise SpaceError(msg)
    control = _control_tokens(tuple(content["control"]))
    return Space(KeySpace(model=bytes.fromhex(content["model"]), **fields), control, behind, windows)


@lru_cache(maxsize=16)
def _control_tokens(tokens: tuple[str, ...]) -> ControlTokens:
    """Return the control tokens of a record; the records of a folder mostly share them, and there may be thousands."""
    return ControlTokens(tokens)


@runtime_checkable
class Records(Protocol):
    """Keeps records of key spaces. A store offers it as its attribute `records`, if it can.

    `keys()` of the store does not list the records.
    """

    def read(self) -> tuple[list[bytes], int]:
        """Return the records, and how many of them could not be read."""
        ...

    def write(self, name: str, data: bytes) -> bool:
        """Keep a record, unless it is kept already.

        Args:
            name: 64 hexadecimal digits.
            data: the record.

        Returns:
            Whether it is kept; False if nothing may be written.
        """
        ...


def records_of(store: object) -> Records | None:
    """Return what a store keeps records in, or None if it has no place for them."""
    records = getattr(store, "records", None)
    return records if isinstance(records, Records) else None


def recorded_spaces(store: object) -> tuple[dict[str, Space], int]:
    """Return the key spaces that a store has recorded, by id, and how many records could not be read.

    Where there is no room for another record, one more counts: some key space may be without.
    """
    records = records_of(store)
    if records is None:
        return {}, 0
    found: dict[str, Space] = {}
    kept, unreadable = records.read()
    if not unreadable and len(kept) >= getattr(records, "most", len(kept) + 1):
        unreadable = 1
    for data in kept:
        try:
            space = Space.from_bytes(data)
        except SpaceError:
            unreadable += 1
        else:
            found[space.id] = space
    return found, unreadable


def record(store: object, spaces: Iterable[Space]) -> int:
    """Record key spaces in a store; returns how many it keeps."""
    records = records_of(store)
    return 0 if records is None else sum(records.write(space.id, space.to_bytes()) for space in spaces)


class SpaceBook:
    """The key spaces that this process has used, and which of them are recorded. Safe from any thread.

    Attributes:
        overflowed: whether there were too many to remember all of them.
    """

    def __init__(self) -> None:
        self.overflowed = False
        self._used: OrderedDict[str, Space] = OrderedDict()
        self._recorded: set[str] = set()  # or being recorded
        self._kept: set[str] = set()
        self._failed: set[str] = set()
        self._lock = forks.Lock()  # of all of the above

    def use(self, space: Space) -> None:
        """Remember a key space; the one that was not used for the longest time makes room."""
        with self._lock:
            self._used[space.id] = space
            self._used.move_to_end(space.id)
            if len(self._used) > _MOST_USED:
                gone, _ = self._used.popitem(last=False)
                self._recorded.discard(gone)
                self._kept.discard(gone)
                self.overflowed = True

    def lost(self, space: Space) -> None:
        """Note that a store has lost the record of a key space, so that it is recorded again."""
        with self._lock:
            if space.id in self._kept:
                self._kept.discard(space.id)
                self._recorded.discard(space.id)

    def begin(self, space: Space) -> bool:
        """Return whether a key space is still to be recorded; whoever asks does so, and says how it went."""
        with self._lock:
            if space.id in self._recorded:
                return False
            self._recorded.add(space.id)
            return True

    def end(self, space: Space, *, failed: bool = False, again: bool = False) -> None:
        """Note how recording went.

        Args:
            space: the key space.
            failed: it is not recorded, though its entries are kept.
            again: it is to be tried at its next use.
        """
        with self._lock:
            if failed or again:
                self._recorded.discard(space.id)
            else:
                self._kept.add(space.id)
            (self._failed.add if failed else self._failed.discard)(space.id)

    def used(self) -> dict[str, Space]:
        """Return the key spaces by id."""
        with self._lock:
            return dict(self._used)

    @property
    def unrecorded(self) -> int:
        """How many key spaces could not be recorded."""
        with self._lock:
            return len(self._failed)


def distinct(*groups: Iterable[Space]) -> Sequence[Space]:
    """Return key spaces of several groups, each once."""
    return list({space.id: space for group in groups for space in group}.values())
