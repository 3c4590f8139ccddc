"""Reads passages and queries from files: JSON lines, plain text, folders, and the BEIR layout."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

_TEXT_KEYS = ("text", "contents", "content", "passage")
_NOT_IN_IDS = re.compile(r"[\t\r\n\v\f\ud800-\udfff]")
_MOST_RELEVANT = 1000
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


def read_beir(
    source: str | Path, queries: str | Path | None = None, qrels: str | Path | None = None, split: str = "test"
) -> Corpus:
    """Read a test collection.

    Args:
        source: a folder in BEIR layout (`corpus.jsonl`, `queries.jsonl`, and `qrels.tsv` or `qrels/<split>.tsv`), or
            anything `read_passages` takes, with `queries` and `qrels` given.
        queries: a `.jsonl` file, or one query a line as `id<tab>text`. Default: the folder's.
        qrels: judgements, see `read_qrels`. Default: the folder's.
        split: which judgements of a BEIR folder.

    Raises:
        FileNotFoundError: one of the files is missing; the message names it.
        ValueError: a line cannot be read, an id is missing or occurs twice, or there is no passage or no query; the
            message names file and line.
    """
    folder = Path(source)
    passages = _by_id(read_passages(source), str(source), "passage")
    query_file = Path(queries) if queries is not None else folder / "queries.jsonl"
    if not query_file.is_file():
        msg = f"no file of queries {str(query_file)!r}; name one (--queries), or give a folder that holds queries.jsonl"
        raise FileNotFoundError(msg)
    known = _by_id(_read_queries(query_file), str(query_file), "query")
    return Corpus(passages, known, read_qrels(_qrels_file(folder, qrels, split)))


def _qrels_file(folder: Path, given: str | Path | None, split: str) -> Path:
    tried = [Path(given)] if given is not None else [folder / "qrels" / f"{split}.tsv", folder / "qrels.tsv"]
    for file in tried:
        if file.is_file():
            return file
    msg = f"no judgements: looked for {', '.join(map(str, tried))}; name a file (--qrels)"
    raise FileNotFoundError(msg)


def _by_id(records: Iterable[Record], where: str, what: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for number, record in enumerate(records, start=1):
        if not record.id:
            msg = f"{where}: {what} {number} has no id; each needs one under {' or '.join(_ID_KEYS)}"
            raise ValueError(msg)
        if record.id != record.id.strip() or _NOT_IN_IDS.search(record.id):
            msg = (
                f"{where}: the id {record.id!r} of {what} {number} begins or ends with a space or holds a tab, a line "
                "break or half a character; files of judgements and runs cannot name it"
            )
            raise ValueError(msg)
        if record.id in found:
            msg = f"{where}: the id {record.id!r} of {what} {number} occurs before; ids must be unique"
            raise ValueError(msg)
        found[record.id] = record.text
    if not found:
        msg = f"{where} holds no {what}; there is nothing to evaluate"
        raise ValueError(msg)
    return found


def _read_queries(path: Path) -> Iterator[Record]:
    if path.suffix in {".jsonl", ".ndjson"}:
        yield from read_passages(path)
        return
    for number, line in text_lines(path):
        if line.strip():
            identifier, tab, text = line.rstrip("\r\n").partition("\t")
            if not tab:
                msg = f"{path}, line {number}: expected id<tab>query, got {line.strip()[:60]!r}"
                raise ValueError(msg)
            yield Record(identifier.strip(), text)


def read_qrels(path: str | Path) -> dict[str, dict[str, int]]:
    """Read judgements: BEIR's three columns with a heading (query-id, corpus-id, score), or TREC's four.

    Returns:
        Query id to the relevance of passage ids.

    Raises:
        ValueError: a line is neither, or a pair is judged twice and differently; the message names file and line.
    """
    found: dict[str, dict[str, int]] = {}
    for number, line in text_lines(path):
        columns = line.strip().split("\t") if "\t" in line else line.split()
        if not columns or (number == 1 and columns[-1] == "score"):
            continue
        try:
            query, passage, relevance = columns if len(columns) == 3 else [columns[0], *columns[2:]]
            value = int(relevance)
            if abs(value) > _MOST_RELEVANT:
                raise ValueError
        except ValueError:
            msg = (
                f"{path}, line {number}: expected query-id, corpus-id and an integer score within {_MOST_RELEVANT} of "
                f"0 (or TREC's query-id, iteration, corpus-id, relevance), got {line.strip()[:80]!r}"
            )
            raise ValueError(msg) from None
        if found.setdefault(query, {}).setdefault(passage, value) != value:
            msg = f"{path}, line {number}: {query!r} and {passage!r} are judged before, and differently"
            raise ValueError(msg)
    if not found:
        msg = f"{path} holds no judgement; there is nothing to evaluate"
        raise ValueError(msg)
    return found


def text_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 file with their numbers, from 1.

    Raises:
        ValueError: the file is not UTF-8; the message names it.
    """
    number = 0
    with Path(path).open(encoding="utf-8-sig") as lines:
        try:
            for number, line in enumerate(lines, start=1):
                yield number, line
        except UnicodeDecodeError as error:
            msg = f"{path}, after line {number}: not UTF-8 text ({error.reason})"
            raise ValueError(msg) from None


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
            yield Record(file.relative_to(path).as_posix(), _read_text(file))
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
