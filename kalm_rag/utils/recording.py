"""Where a call's time went and where its passages came from, recorded by whatever does the work."""

from __future__ import annotations

import contextlib
import contextvars
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator

_current: contextvars.ContextVar[Recording | None] = contextvars.ContextVar("kalm_rag_recording", default=None)
_sources: contextvars.ContextVar[dict[str, str] | None] = contextvars.ContextVar("kalm_rag_sources", default=None)


class Recording:
    """What one call took; it runs in one thread.

    Attributes:
        seconds: by kind of work.
        counts: passages by where they came from.
    """

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.counts: Counter[str] = Counter()


@contextlib.contextmanager
def recording() -> Iterator[Recording]:
    """Record what happens inside, in this context."""
    found = Recording()
    token = _current.set(found)
    began = time.monotonic()
    try:
        yield found
    finally:
        found.seconds["total"] = time.monotonic() - began
        _current.reset(token)


def add_seconds(kind: str, seconds: float) -> None:
    """Add time to the call of this context, if one is recorded."""
    found = _current.get()
    if found is not None:
        found.seconds[kind] += seconds


def add_count(kind: str, count: int) -> None:
    """Add passages to the call of this context, if one is recorded."""
    found = _current.get()
    if found is not None:
        found.counts[kind] += count


@contextlib.contextmanager
def recording_sources() -> Iterator[dict[str, str]]:
    """Record where each passage comes from that is used inside, in this context.

    Yields:
        By text, and by other names that are used inside: `remembered` (the score was), `memory`, `store`, `remote` (the
        tier that machines share) or `encoded`.
    """
    found: dict[str, str] = {}
    token = _sources.set(found)
    try:
        yield found
    finally:
        _sources.reset(token)


def add_sources(**names: Iterable[str]) -> None:
    """Record the names of passages by source, if that is recorded; what was recorded first stays."""
    found = _sources.get()
    if found is not None:
        for source, own in names.items():
            for name in own:
                found.setdefault(name, source)


def rename_sources(names: Iterable[tuple[str, str]]) -> None:
    """Record what is known under the first name of each pair under the second one too."""
    found = _sources.get()
    if found is not None:
        for old, new in names:
            if old in found:
                found.setdefault(new, found[old])


@contextlib.contextmanager
def timed(kind: str) -> Iterator[None]:
    """Add the time inside to the call of this context."""
    began = time.monotonic()
    try:
        yield
    finally:
        add_seconds(kind, time.monotonic() - began)
