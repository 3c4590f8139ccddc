"""The fenced blocks of a page, and `python pagekit.py PAGE`, which runs them in the working folder from top to bottom.

Sybil finds the blocks, gives the Python of a page one namespace and the page's line numbers, and reads skip marks:
`<!-- skip: next "installs packages" -->`. A process runs one page: each page is read by somebody who starts there.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import SkipTest

from sybil import Document, Example
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.abstract import AbstractCodeBlockParser
from sybil.parsers.markdown import SkipParser
from sybil.parsers.markdown.lexers import FencedCodeBlockLexer, RawFencedCodeBlockLexer


@dataclass(frozen=True)
class Block:
    """A fenced block; `skipped` is the reason of the mark before it."""

    line: int
    language: str
    skipped: str | None


def shell(example: Example) -> None:
    """Run a block as a shell does that stops at the first error."""
    print(example.parsed, flush=True)
    subprocess.run(["bash", "-euo", "pipefail", "-c", str(example.parsed)], check=True, stdin=subprocess.DEVNULL)


def read(page: Path) -> Document:
    """The blocks of a page that run, and its skip marks. Code in a comment, which no reader sees, does not count."""
    lexer = [FencedCodeBlockLexer(".+", mapping={"language": "arguments", "source": "source"})]
    parsers = [AbstractCodeBlockParser(lexer, language, run) for language, run in RUN.items()]
    document = Document.parse(str(page), *parsers, SkipParser())
    document.namespace["__name__"] = "__main__"
    return document


def blocks(page: Path) -> list[Block]:
    """Every fenced block of a page, whatever stands behind the fence."""
    document = Document.parse(str(page), RawFencedCodeBlockLexer(re.compile(r"(?P<language>[^\n]*)\n")), SkipParser())
    found, reason = [], None
    for example in document.examples():
        if isinstance(example.parsed, tuple):
            action, quoted = example.parsed
            assert action == "next", f"{page}:{example.line}: a skip mark is for the next block, got {action!r}"
            assert quoted, f"{page}:{example.line}: a skip mark says why"
            reason = ast.literal_eval(quoted)
        else:
            found.append(Block(example.line, example.region.lexemes["language"].strip(), reason))
            reason = None
    return found


def run(page: Path) -> int:
    """Run a page; the number of blocks that ran."""
    count = 0
    for example in read(page).examples():
        print(f"--- {page}:{example.line}", flush=True)
        try:
            example.evaluate()
            count += not isinstance(example.parsed, tuple)
        except SkipTest as reason:
            print(f"skipped: {reason}", flush=True)
    return count


RUN = {"python": PythonEvaluator(), "bash": shell}

if __name__ == "__main__":
    print(f"{run(Path(sys.argv[1]))} blocks ran")
