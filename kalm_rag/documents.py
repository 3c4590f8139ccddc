"""Checks passages and pairs from users and turns them into text, without modifying them."""

from __future__ import annotations

import io
import logging
from collections.abc import Collection, ItemsView, Iterable, Iterator, KeysView, Mapping, Set
from typing import Any, NamedTuple

from kalm_rag.results import Document
from kalm_rag.utils import forks
from kalm_rag.utils.checks import check_string

logger = logging.getLogger(__name__)


class Passage(NamedTuple):
    """One passage as given, and its text.

    Attributes:
        document: the very object that was given.
        text: its text; where half characters were replaced, the repaired text.
        repaired: whether that happened, see `repair_text`.
    """

    document: Document
    text: str
    repaired: bool


def repair_text(text: str) -> tuple[str, bool]:
    r"""Return the text with lone surrogates replaced, and whether there were any.

    Half a surrogate pair (`"\ud83d"`), as PDF readers and broken JSON leave it, has no UTF-8 form, so no tokenizer can
    read it. Each is replaced by U+FFFD, the replacement character. Any other text is returned as it is.
    """
    if text.isascii():
        return text, False
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace"), True
    return text, False


class RepairCounter:
    """Counts the texts that `repair_text` changed. The first call logs a warning, later ones a debug line."""

    def __init__(self) -> None:
        self.count = 0
        self._lock = forks.Lock()

    def add(self, number: int) -> None:
        """Count that many more."""
        if not number:
            return
        with self._lock:
            level = logging.DEBUG if self.count else logging.WARNING
            self.count += number
        logger.log(
            level,
            "%d texts hold half a surrogate pair, which has no UTF-8 form; it is read as U+FFFD. The results say which",
            number,
        )


def document_text(document: object, where: str) -> str:
    """Return the text of one passage: the string itself, or the value under `"text"` of a mapping.

    Args:
        document: the passage.
        where: its name in messages.

    Raises:
        TypeError: it is neither a string nor a mapping with a string under `"text"`.
    """
    if isinstance(document, Mapping):
        if "text" not in document:
            msg = f"{where} is a mapping without the key 'text'; its keys are {sorted(map(str, document))[:10]}"
            raise TypeError(msg)
        return check_string(f"{where}['text']", document["text"])
    if not isinstance(document, str):
        msg = (
            f"{where} must be a string or a mapping with the key 'text', "
            f"got {type(document).__name__}: {document!r:.80}"
        )
        raise TypeError(msg)
    return document


def iter_documents(documents: object) -> Iterator[Passage]:
    """Yield the passages of any iterable, generators included.

    Raises:
        TypeError: `documents` is one passage instead of a list of them, no iterable at all, or one that iterates over
            something else, such as the column names of a data frame.
    """
    if isinstance(documents, (str, bytes, bytearray)) or (isinstance(documents, Mapping) and "text" in documents):
        msg = (
            f"documents must be a list of passages, got one {type(documents).__name__}; put it into a list: [document]"
        )
        raise TypeError(msg)
    values = _check_iterable(
        documents,
        "documents must be a list of passages",
        mapping="list(documents.values())",
        frame='df["text"]',
        dimensions=1,
    )
    for position, document in enumerate(values):
        text, repaired = repair_text(document_text(document, f"documents[{position}]"))
        yield Passage(document, text, repaired)


def iter_pairs(pairs: object) -> Iterator[tuple[str, str]]:
    """Yield the query and the passage of each pair, as given; rows of a numpy array of strings are pairs too.

    Raises:
        TypeError: `pairs` is not an iterable of pairs; the message names the position and what was found there.
    """
    values = _check_iterable(
        pairs,
        "pairs must be a list of (query, passage) pairs",
        mapping="list(pairs.items())",
        frame='df[["query", "text"]].to_numpy()',
        dimensions=2,
    )
    for position, pair in enumerate(values):
        if isinstance(pair, (str, bytes, Mapping, Set)) or not isinstance(pair, Collection) or len(pair) != 2:
            msg = f"pairs[{position}] must be a (query, passage) pair, got {type(pair).__name__}: {pair!r:.80}"
            raise TypeError(msg)
        query, passage = tuple(pair)  # not by index: to a row of a data frame an index is a label
        yield check_string(f"pairs[{position}][0]", query), document_text(passage, f"pairs[{position}][1]")


def _check_iterable(values: object, rule: str, *, mapping: str, frame: str, dimensions: int) -> Iterable[Any]:
    """Refuse values that iterate over something other than passages, such as a mapping's keys.

    Args:
        values: what was given.
        rule: how the message begins.
        mapping: what to give instead of a mapping.
        frame: what to give instead of a data frame.
        dimensions: that an array of them has at most.
    """
    name = type(values).__name__
    if isinstance(values, Mapping):
        msg = f"{rule}, got a {name}, whose elements are its keys; give {mapping}"
    elif hasattr(values, "columns") and hasattr(values, "__getitem__"):
        msg = f"{rule}, got a {name}, whose elements are its columns; give {frame}"
    elif isinstance(values, Set) and not isinstance(values, (KeysView, ItemsView)):
        msg = f"{rule}, got a {name}, which has no order, so that an index into it means nothing; give a list"
    elif isinstance(values, io.IOBase):
        msg = f"{rule}, got an open file ({name}); read it: [line.rstrip('\\n') for line in file]"
    elif isinstance(values, (str, bytes, bytearray, memoryview)) or not isinstance(values, Iterable):
        msg = f"{rule}, got {name}: {values!r:.80}"
    elif getattr(values, "ndim", dimensions) not in range(1, dimensions + 1):
        msg = f"{rule}, got a {name} of {values.ndim} dimensions; give one of {dimensions}"  # type: ignore[attr-defined]
    else:
        return values
    raise TypeError(msg)
