"""What users hand in as passages, checked and turned into text. Nothing here is ever modified."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from kalm_rag.results import Document
from kalm_rag.settings import check_text


def document_text(document: object, position: int, name: str = "documents") -> str:
    """The text of one passage: the string itself, or the value under `"text"` of a mapping.

    Raises:
        TypeError: it is neither a string nor a mapping with a string under `"text"`.
        ValueError: the text holds a lone surrogate, which no tokenizer can read.
    """
    where = f"{name}[{position}]"
    if isinstance(document, Mapping):
        if "text" not in document:
            msg = f"{where} is a mapping without the key 'text'; its keys are {sorted(map(str, document))[:10]}"
            raise TypeError(msg)
        return check_text(f"{where}['text']", document["text"])
    if not isinstance(document, str):
        msg = (
            f"{where} must be a string or a mapping with the key 'text', "
            f"got {type(document).__name__}: {document!r:.80}"
        )
        raise TypeError(msg)
    return check_text(where, document)


def iter_documents(documents: object) -> Iterator[tuple[Document, str]]:
    """Yield `(document, text)` of any iterable of passages, generators included.

    Raises:
        TypeError: `documents` is one passage instead of a list of them, or no iterable at all.
    """
    if isinstance(documents, (str, bytes, Mapping)):
        msg = (
            f"documents must be a list of passages, got one {type(documents).__name__}; put it into a list: [document]"
        )
        raise TypeError(msg)
    if not isinstance(documents, Iterable):
        msg = f"documents must be an iterable of passages, got {type(documents).__name__}"
        raise TypeError(msg)
    for position, document in enumerate(documents):
        yield document, document_text(document, position)
