"""The windows of passages: none where a passage fits into one, or where long passages are truncated."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from kalm_rag.model.prompts import PASSAGE_PREFIX
from kalm_rag.model.tokenization import Tokenizer
from kalm_rag.settings import Settings
from kalm_rag.utils import forks
from kalm_rag.utils.turns import check_stopped
from kalm_rag.windows.splitter import Span, Splitter

_AT_ONCE = 256
"""Passages that are tokenised together, so that other calls can come in between."""
_MOST_REMEMBERED = 1 << 16
"""Windows whose places are remembered: about ten megabytes."""


class Windows(NamedTuple):
    """What the model reads of a passage.

    Attributes:
        texts: the passage, or its windows, which went through `Tokenizer.clean` then.
        spans: where the windows are in the passage as it was given; None if it was not split.
        complete: False if the passage has more windows than may be read.
    """

    texts: tuple[str, ...]
    spans: tuple[Span, ...] | None = None
    complete: bool = True


class WindowSource:
    """Gets the windows of passages.

    It remembers where they are, by a digest of the text. Safe from any thread: `_lock` guards what is remembered.

    Args:
        tokenizer: the checkpoint's.
        settings: whether to split long passages, and how long windows are.

    Raises:
        ValueError: the settings of a window do not fit the tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer, settings: Settings) -> None:
        self._tokenizer = tokenizer
        self._limit, overlap = settings.window
        self._splitter = Splitter(tokenizer, self._limit, overlap, settings.max_windows) if settings.splits else None
        self._lock = forks.Lock()
        self._known: OrderedDict[bytes, tuple[tuple[Span, ...], bool]] = OrderedDict()
        self._remembered = 0

    def split(self, texts: Iterable[str]) -> dict[str, Windows]:
        """Return the windows of each distinct passage.

        Of a passage of megabytes no more is read than its windows hold.
        """
        unique = list(dict.fromkeys(texts))
        if self._splitter is None:
            return {text: Windows((text,)) for text in unique}
        found: dict[str, Windows] = {}
        for start in range(0, len(unique), _AT_ONCE):
            check_stopped()
            part = unique[start : start + _AT_ONCE]
            clean = {text: self._tokenizer.clean(text) for text in part}
            places = self._places(list(dict.fromkeys(clean.values())), self._splitter)
            found |= {text: self._windows(text, clean[text], *places[clean[text]]) for text in part}
        return found

    def expand(self, texts: Sequence[str]) -> list[str]:
        """Return what the model reads of the passages, in their order, cleaned: passages and windows."""
        windows = self.split(texts)
        return [self._tokenizer.clean(part) for text in texts for part in windows[text].texts]

    def incomplete(self, texts: Sequence[str]) -> int:
        """Return how many of the passages have more windows than are read."""
        windows = self.split(texts)
        return sum(not windows[text].complete for text in texts)

    def clear(self) -> None:
        """Forget all places."""
        with self._lock:
            self._known.clear()
            self._remembered = 0

    def _windows(self, text: str, clean: str, spans: tuple[Span, ...], complete: bool) -> Windows:
        if not spans:
            return Windows((text,))
        own = spans if clean == text else tuple(self._tokenizer.original_span(text, span) for span in spans)
        return Windows(tuple(clean[start:end] for start, end in spans), own, complete)

    def _places(self, texts: Sequence[str], splitter: Splitter) -> dict[str, tuple[tuple[Span, ...], bool]]:
        """Return the windows of cleaned texts, none for one that fits, and whether they are all there are."""
        digests = {text: hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest() for text in texts}
        found = {}
        with self._lock:
            for text, digest in digests.items():
                if digest in self._known:
                    self._known.move_to_end(digest)
                    found[text] = self._known[digest]
        new = [text for text in texts if text not in found]
        rows = self._tokenizer.encode_truncated([PASSAGE_PREFIX + text for text in new], self._limit)
        for text, (_, is_longer) in zip(new, rows, strict=True):
            found[text] = splitter.split(text) if is_longer else ((), True)
            self._remember(digests[text], found[text])
        return found

    def _remember(self, digest: bytes, places: tuple[tuple[Span, ...], bool]) -> None:
        with self._lock:
            if digest in self._known:
                return
            self._known[digest] = places
            self._remembered += 1 + len(places[0])
            while self._remembered > _MOST_REMEMBERED:
                _, (spans, _) = self._known.popitem(last=False)
                self._remembered -= 1 + len(spans)
