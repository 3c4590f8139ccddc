"""Reads passages and queries from files: JSON lines, plain text, folders, and the BEIR layout."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

_TEXT_KEYS = ("text", "contents", "content", "passage")
_ID_KEYS = ("_id", "id", "docid", "doc_id")


@dataclass(frozen=True, slots=True)
class Record:
    """One passage of a corpus: its id (None if the file has none) and the text that is ranked."""

    id: str | None
    text: str


@dataclass(frozen=True, slots=True)
class Corpus:
    """A test collection in memory.

    Attributes:
        passages: id to text.
        queries: id to text.
        qrels: query id to the relevance of passage ids.
    """

    passages: dict[str, str]
    queries: dict[str, str]
    qrels: dict[str, dict[str, int]]


def read_beir(folder: str | Path) -> Corpus:
    """Read `corpus.jsonl`, `queries.jsonl` and `qrels.tsv` (or `qrels/test.tsv`).

    Raises:
        FileNotFoundError: one of the files is missing.
        ValueError: a line cannot be read; the message names file and line.
    """
    folder = Path(folder)
    qrels_file = folder / "qrels.tsv"
    if not qrels_file.is_file():
        qrels_file = folder / "qrels" / "test.tsv"
    passages = {str(record.id): record.text for record in read_passages(folder / "corpus.jsonl")}
    queries = {str(record.id): record.text for record in read_passages(folder / "queries.jsonl")}
    qrels: dict[str, dict[str, int]] = {}
    with qrels_file.open(encoding="utf-8", newline="") as file:
        for number, row in enumerate(csv.reader(file, delimiter="\t"), start=1):
            if number == 1 and row and row[-1] == "score":
                continue
            try:
                query, passage, score = row
                qrels.setdefault(query, {})[passage] = int(score)
            except ValueError:
                msg = f"{qrels_file}, line {number}: expected query-id, corpus-id and an integer score, got {row}"
                raise ValueError(msg) from None
    return Corpus(passages, queries, qrels)


def read_passages(source: str | Path) -> Iterator[Record]:
    """Yield the passages of a file, a folder or standard input (`-`), one at a time.

    A `.jsonl` file holds one JSON string or object a line; any other file holds one passage a line; a folder is a BEIR
    folder if it holds `corpus.jsonl`, else each `.txt` and `.md` file below it is a passage.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: a line is not readable; the message names file and line.
    """
    if str(source) == "-":
        yield from parse_lines(sys.stdin, "standard input", json_lines=None)
        return
    path = Path(source)
    if path.is_dir():
        if (path / "corpus.jsonl").is_file():
            yield from read_passages(path / "corpus.jsonl")
            return
        files = sorted(file for file in path.rglob("*") if file.suffix in {".txt", ".md"} and file.is_file())
        if not files:
            msg = f"the folder {str(path)!r} holds neither corpus.jsonl nor any .txt or .md file"
            raise FileNotFoundError(msg)
        for file in files:
            yield Record(str(file.relative_to(path)), _read_text(file))
        return
    if not path.is_file():
        msg = f"no file or folder {str(path)!r}; give a .jsonl or text file, a folder, or - for standard input"
        raise FileNotFoundError(msg)
    with path.open(encoding="utf-8-sig") as lines:
        yield from parse_lines(lines, str(path), json_lines=path.suffix in {".jsonl", ".ndjson"})


def _read_text(file: Path) -> str:
    try:
        return file.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        msg = f"{file} is not UTF-8 text ({error.reason} at byte {error.start})"
        raise ValueError(msg) from None


def parse_lines(lines: Iterable[str] | IO[str], where: str, *, json_lines: bool | None) -> Iterator[Record]:
    """Parse passages, one a line; blank lines are skipped.

    Args:
        lines: the lines.
        where: what they are called in messages.
        json_lines: True for JSON lines, False for plain text, None to take JSON lines if the first line is an object.
    """
    number = 0
    try:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            if json_lines is None:
                json_lines = line.lstrip().startswith("{")
            yield (_parse_json(line, f"{where}, line {number}") if json_lines else Record(None, line.rstrip("\r\n")))
    except UnicodeDecodeError as error:
        msg = f"{where}, after line {number}: not UTF-8 text ({error.reason})"
        raise ValueError(msg) from None


def _parse_json(line: str, where: str) -> Record:
    try:
        value = json.loads(line)
    except ValueError as error:
        msg = f"{where}: not JSON ({error}); a .jsonl file holds one JSON string or object a line"
        raise ValueError(msg) from None
    if isinstance(value, str):
        return Record(None, value)
    if not isinstance(value, dict):
        msg = f"{where}: expected a JSON string or object, got {type(value).__name__}"
        raise ValueError(msg)
    text = _first(value, _TEXT_KEYS)
    if not isinstance(text, str):
        msg = f"{where}: no text under any of {', '.join(_TEXT_KEYS)}; its keys are {sorted(value)[:10]}"
        raise ValueError(msg)
    identifier = _first(value, _ID_KEYS)
    return Record(None if identifier is None else str(identifier), passage_text(value.get("title"), text))


def passage_text(title: object, text: str) -> str:
    """Title and text joined by a space, as BEIR and mteb join them for every model."""
    return f"{title} {text}".strip() if isinstance(title, str) and title else text


def _first(value: Mapping[str, Any], keys: Iterable[str]) -> Any:
    return next((value[key] for key in keys if key in value), None)
