"""How results and texts look in a terminal and in a notebook.

Everything that is shown is untrusted: a passage, an id or a path may hold markup and control characters.
"""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

from kalm_rag.utils.framework_texts import framework_text

_WIDTH = 60
"""Characters of a text in a `repr`."""
_CELL = 200
"""Characters of a text in a table of a notebook."""

_BIDI = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
HIDDEN = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\t\n"}
"""Characters that `visible` writes out, by their number."""
HIDDEN |= {ord(letter): f"\\u{ord(letter):04x}" for letter in f"{_BIDI}\u2028\u2029\ufeff"}
HIDDEN |= {code: f"\\u{code:04x}" for code in range(0xD800, 0xE000)}  # half characters, which no encoding holds


def visible(text: str) -> str:
    """Make untrusted text safe to show: control and bidirectional characters are written out."""
    return text.translate(HIDDEN)


def visible_line(text: str) -> str:
    """Like `visible`, but line breaks and tabs are written out too."""
    return visible(text).replace("\n", "\\n").replace("\t", "\\t")


def size_text(count: float) -> str:
    """Format bytes in powers of ten."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def duration_text(seconds: float) -> str:
    """Format seconds in the unit that people would use."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def shorten(text: str, width: int) -> str:
    """Cut a text to `width` characters; the last one is then an ellipsis."""
    return text if len(text) <= width else f"{text[: width - 1]}…"


def short_repr(value: object, width: int = _WIDTH) -> str:
    """Like `repr`, with long texts and collections cut: an ellipsis marks what is left out.

    It never raises, whatever the `__repr__` of a foreign object does.

    Args:
        value: what is shown.
        width: characters of a text that are shown.
    """
    if isinstance(value, str):
        written = repr(value[: width + 1])
        return f"{written[0]}{shorten(written[1:-1], width)}{written[0]}"
    if isinstance(value, float):
        return f"{value:.4g}"
    try:
        if isinstance(value, Mapping):
            # Of a passage the text says most; of another mapping, any value says what it holds.
            keys = ["text"] if "text" in value else list(islice(value, 1))
            first = [f"{short_repr(key, width // 2)}: {short_repr(value[key], width * 2 // 3)}" for key in keys]
            return f"{{{_first_of(first, len(value))}}}"
        if isinstance(value, tuple) and len(value) == 2 and all(type(item) is int for item in value):
            return repr(value)  # a place in a text
        if isinstance(value, (list, tuple)) and type(value) in (list, tuple):  # not a named tuple, which has a `repr`
            inside = _first_of([short_repr(item, width // 2) for item in value[:1]], len(value))
            return f"[{inside}]" if isinstance(value, list) else f"({inside}{',' * (len(value) == 1)})"
        return visible_line(shorten(repr(value), width))
    except Exception:  # noqa: BLE001 - a foreign object must not keep the rest from being shown
        return f"<{type(value).__name__}>"


def _first_of(first: list[str], count: int) -> str:
    return ", ".join(first + [f"… {count - 1} more"] * (count > 1))


def shown_document(document: object) -> object:
    """Return what says most of a document: the text of a framework's document, else the document itself."""
    try:
        text = framework_text(document)
    except Exception:  # noqa: BLE001 - a foreign object must not keep the rest from being shown
        text = None
    return text if isinstance(text, str) else document


def text_of(document: object) -> str:
    """Return what a table shows of a document: its text on one line, or a short `repr`."""
    try:
        text = document.get("text") if isinstance(document, Mapping) else shown_document(document)
    except Exception:  # noqa: BLE001 - as above
        text = None
    if not isinstance(text, str):
        return short_repr(document)
    return visible(" ".join(text[: 10 * _CELL].split()))


def html_table(heading: Sequence[str], rows: Iterable[Sequence[str]], caption: str, *, left: int = 1) -> str:
    """Make a small table for a notebook, in the notebook's own colours.

    Args:
        heading: of each column.
        rows: their cells, of untrusted text.
        caption: stands above the table.
        left: the column that holds text; the others hold numbers and stand right.
    """

    def cell(tag: str, place: int, text: str) -> str:
        side = "left" if place == left else "right"
        content = html.escape(shorten(visible(text), _CELL))
        return f'<{tag} style="text-align: {side}">{content}</{tag}>'

    def row(tag: str, cells: Sequence[str]) -> str:
        return f"<tr>{''.join(cell(tag, place, text) for place, text in enumerate(cells))}</tr>"

    # Without these classes a notebook typesets what stands between two dollar signs as a formula.
    return (
        f'<table class="tex2jax_ignore mathjax_ignore"><caption>{html.escape(visible(caption))}</caption>'
        f"<thead>{row('th', heading)}</thead><tbody>{''.join(row('td', cells) for cells in rows)}</tbody></table>"
    )


class Shown:
    """A data class that shows itself as one line in a terminal and as a table in a notebook.

    The line leaves out fields that are None or have their default; the table has all. A field that counts bytes is
    named `bytes`, `limit`, `..._bytes` or `bytes_...`.
    """

    __slots__ = ()

    def _facts(self, *, defaults: bool) -> list[tuple[str, str]]:
        """Return the name and the value of each field that is shown.

        Args:
            defaults: also those that are None or have their default.
        """
        shown = []
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if defaults or (value is not None and (field.default is dataclasses.MISSING or value != field.default)):
                shown.append((field.name, _value_text(field.name, value)))
        return shown

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={text}' for name, text in self._facts(defaults=False))})"

    def _repr_html_(self) -> str:
        rows = [(name.replace("_", " "), text) for name, text in self._facts(defaults=True)]
        return html_table(("", "value"), rows, type(self).__name__, left=0)


def _value_text(name: str, value: Any) -> str:
    if value is None:
        return ""
    counts_bytes = name in ("bytes", "limit") or name.startswith("bytes_") or name.endswith("_bytes")
    return size_text(value) if counts_bytes and isinstance(value, int) else short_repr(value)
