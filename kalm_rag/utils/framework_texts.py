"""The texts of other libraries' documents, which are recognised by a name: the core imports no framework.

They are the texts that the adapters rank by default, so that both find each other's encoded passages.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_TEXTS: dict[str, Callable[[Any], Any]] = {
    "page_content": lambda document: document.page_content,  # LangChain
    "get_content": lambda node: node.get_content(metadata_mode="embed"),  # LlamaIndex, nodes with a score as well
    "content": lambda document: "" if document.content is None else document.content,  # Haystack
}


def framework_text_name(document: object) -> str | None:
    """Return the name that tells where a document's text is, or None if it is of no framework."""
    if isinstance(document, type):  # a class has these names too, but no text
        return None
    return next((name for name in _TEXTS if hasattr(document, name)), None)


def framework_text(document: object) -> Any:
    """Return what a document has for a text, or None if it is of no framework."""
    name = framework_text_name(document)
    return None if name is None else _TEXTS[name](document)
