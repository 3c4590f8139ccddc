"""Checks passages and pairs from users and turns them into text, without modifying them."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Callable, Collection, ItemsView, Iterable, Iterator, KeysView, Mapping, Set
from typing import Any, NamedTuple, TypeAlias

from kalm_rag.results import D
from kalm_rag.utils import forks
from kalm_rag.utils.checks import check_string
from kalm_rag.utils.framework_texts import framework_text, framework_text_name

logger = logging.getLogger(__name__)


class Passage(NamedTuple):
    """One passage as given, and its text.

    Attributes:
        document: the very object that was given.
        text: its text; where half characters were replaced, the repaired text.
        repaired: whether that happened, see `repair_text`.
        given: the text before that.
    """

    document: Any
    text: str
    repaired: bool
    given: str

    def original_span(self, span: tuple[int, int] | None) -> tuple[int, int] | None:
        """Return where in the given text a part of `text` is; repairing joins the two halves of a character."""
        if span is None or len(self.text) == len(self.given):
            return span
        start, end = span
        for match in _HALVES.finditer(self.given):
            start += match.start() < start
            end += match.start() < end
        return start, end


_HALVES = re.compile("[\ud800-\udbff][\udc00-\udfff]")


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


class TextCounter:
    """Counts texts that are not read as they are. The first call logs a warning, later ones a debug line.

    Args:
        message: the log line, with `%d` for how many.
    """

    def __init__(self, message: str) -> None:
        self.count = 0
        self._message = message
        self._lock = forks.Lock()

    def add(self, number: int) -> None:
        """Count that many more."""
        if not number:
            return
        with self._lock:
            level = logging.DEBUG if self.count else logging.WARNING
            self.count += number
        logger.log(level, self._message, number)


REPAIRED = "%d texts hold half a surrogate pair, which has no UTF-8 form; it is read as U+FFFD. The results say which"
TRUNCATED = (
    "%d texts are longer than the reranker reads (max_length tokens of a passage, or max_windows windows of it, "
    "query_max_length of a query); the rest of them is not read. The results say which"
)
UNKNOWN = (
    "more than half of the tokens of %d texts are unknown to this model, as in a script it was not trained on; scores "
    "of such texts mean little. Use a model that knows the script, such as 'nano'"
)


TextOf: TypeAlias = str | Callable[[D], str]
"""Where the text of a document is: a key of a mapping, an attribute of another object, or a function."""


def document_text(document: Any, where: str, text: TextOf[Any] | None = None) -> str:
    """Return the text of one passage.

    Args:
        document: the passage: a string, a mapping, a document of LangChain, LlamaIndex or Haystack, or anything else
            that `text` finds a text in.
        where: its name in messages.
        text: where the text is. Default: a string itself, `"text"` of a mapping, and of a framework's document the
            text that its adapter ranks.

    Raises:
        TypeError: there is no text.
    """
    if callable(text):
        return check_string(f"text({where})", text(document))
    if isinstance(document, str):
        return document
    if isinstance(document, Mapping):
        key = "text" if text is None else text
        if key not in document:
            keys = sorted(map(str, document))[:10]
            msg = f"{where} is a mapping without the key {key!r}; its keys are {keys}; name another one with text="
            raise TypeError(msg)
        return check_string(f"{where}[{key!r}]", document[key])
    if text is not None:
        if not hasattr(document, text):
            msg = f"{where} has no attribute {text!r}, it is of type {type(document).__name__}: {document!r:.80}"
            raise TypeError(msg)
        return check_string(f"{where}.{text}", getattr(document, text))
    name = framework_text_name(document)
    if name is not None:
        return check_string(f"{where}.{name}", framework_text(document))
    msg = (
        f"{where} must be a string, a mapping with the key 'text' or a document of LangChain, LlamaIndex or Haystack, "
        f"got {type(document).__name__}: {document!r:.80}; for others give text=, a key or a function"
    )
    raise TypeError(msg)


def iter_documents(documents: object, text: TextOf[Any] | None = None) -> Iterator[Passage]:
    """Yield the passages of any iterable, generators included.

    Args:
        documents: the passages.
        text: where the text of each is, see `document_text`.

    Raises:
        TypeError: `documents` is one passage instead of a list of them, no iterable at all, or one that iterates over
            something else, such as the column names of a data frame; or `text` is neither a key nor a function.
    """
    if text is not None and not callable(text):
        check_string("text", text)
    if isinstance(documents, (str, bytes, bytearray)) or _is_one_document(documents, text):
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
        given = document_text(document, f"documents[{position}]", text)
        yield Passage(document, *repair_text(given), given)


def _is_one_document(documents: Any, text: TextOf[Any] | None) -> bool:
    """Whether it is a passage itself; a document of a framework iterates too, over its fields."""
    if isinstance(documents, Mapping):
        return (text if isinstance(text, str) else "text") in documents
    return framework_text_name(documents) is not None


def iter_queries(queries: object) -> Iterator[str]:
    """Yield the queries of any iterable, as given.

    Raises:
        TypeError: `queries` is one query instead of a list of them, or no list of strings; the message names the
            position and what was found there.
    """
    if isinstance(queries, str):
        msg = f"queries must be a list of strings, got one {type(queries).__name__}: {queries!r:.80}; give [query]"
        raise TypeError(msg)
    values = _check_iterable(
        queries,
        "queries must be a list of strings",
        mapping="list(queries.values())",
        frame='df["query"]',
        dimensions=1,
    )
    for position, query in enumerate(values):
        yield check_string(f"queries[{position}]", query)


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
