"""Reads passages and queries from files: text, JSON, tables, folders, and the BEIR layout."""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kalm_rag.documents import REPAIRED, TextCounter, repair_text
from kalm_rag.retrieval.judgements import parse_judgements
from kalm_rag.utils.display import Shown

_TEXT_KEYS = ("text", "contents", "content", "passage")
_NOT_IN_IDS = re.compile(r"[\t\r\n\v\f\ud800-\udfff]")
FORMATS = ("auto", "jsonl", "json", "csv", "tsv", "parquet", "text")
"""What `read_passages` reads."""

_ENDINGS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
_NO_TEXT = (b"%PDF", b"PK\x03\x04", b"\x1f\x8b", b"PAR1", b"\x89PNG", b"\xfd7zXZ", b"(\xb5/\xfd")
_ID_KEYS = ("_id", "id", "docid", "doc_id")


@dataclass(frozen=True, slots=True)
class Record:
    """One passage of a corpus: its id (None if the file has none) and the text that is ranked."""

    id: str | None
    text: str


@dataclass(frozen=True, slots=True, repr=False)
class Corpus(Shown):
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
    source: str | Path,
    queries: str | Path | None = None,
    qrels: str | Path | None = None,
    split: str = "test",
    file_format: str = "auto",
    text_field: str | None = None,
    id_field: str | None = None,
) -> Corpus:
    """Read a test collection.

    Args:
        source: a folder in BEIR layout (`corpus.jsonl`, `queries.jsonl`, and `qrels.tsv` or `qrels/<split>.tsv`), or
            anything `read_passages` takes, with `queries` and `qrels` given.
        queries: a `.jsonl` file, or one query a line as `id<tab>text`. Default: the folder's.
        qrels: judgements, see `read_qrels`. Default: the folder's.
        split: which judgements of a BEIR folder.
        file_format: of the passages, as in `read_passages`; so are the following.
        text_field: where a passage has its text.
        id_field: where it has its id.

    Raises:
        FileNotFoundError: one of the files is missing; the message names it.
        ValueError: a line cannot be read, an id is missing or occurs twice, or there is no passage or no query; the
            message names file and line.
    """
    found = read_unjudged(source, queries, file_format, text_field, id_field)
    return Corpus(found.passages, found.queries, read_qrels(_qrels_file(Path(source), qrels, split)))


def read_unjudged(
    source: str | Path,
    queries: str | Path | None = None,
    file_format: str = "auto",
    text_field: str | None = None,
    id_field: str | None = None,
) -> Corpus:
    """Read a collection without its judgements; arguments and errors are those of `read_beir`."""
    passages = _by_id(read_passages(source, file_format, text_field, id_field), str(source), "passage")
    query_file = Path(queries) if queries is not None else Path(source) / "queries.jsonl"
    if not query_file.is_file():
        msg = f"no file of queries {str(query_file)!r}; name one (--queries), or give a folder that holds queries.jsonl"
        raise FileNotFoundError(msg)
    return Corpus(passages, _by_id(_read_queries(query_file), str(query_file), "query"), {})


def _qrels_file(folder: Path, given: str | Path | None, split: str) -> Path:
    tried = [Path(given)] if given is not None else [folder / "qrels" / f"{split}.tsv", folder / "qrels.tsv"]
    for file in tried:
        if file.is_file():
            return file
    msg = f"no judgements: looked for {', '.join(map(str, tried))}; name a file (--qrels)"
    raise FileNotFoundError(msg)


def _by_id(records: Iterable[Record], where: str, what: str) -> dict[str, str]:
    found: dict[str, str] = {}
    repaired = 0
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
        found[record.id], changed = repair_text(record.text)
        repaired += changed
    TextCounter(REPAIRED).add(repaired)
    if not found:
        msg = f"{where} holds no {what}; there is nothing to evaluate"
        raise ValueError(msg)
    return found


def _read_queries(path: Path) -> Iterator[Record]:
    if path.suffix.lower() in _ENDINGS and path.suffix.lower() != ".tsv":
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
    """Read judgements: BEIR's three columns with a heading (query-id, corpus-id, score), TREC's four, or JSON lines.

    JSON lines are what `kalm-rag compare` writes to be filled in: objects with `query_id`, `passage_id`, `relevance`.
    Those whose relevance is still null are left out, and a warning says how many.

    Returns:
        Query id to the relevance of passage ids.

    Raises:
        ValueError: a line is none of these, a pair is judged twice and differently, or none is judged; the message
            names file and line.
    """
    return parse_judgements(text_lines(path), str(path))


def text_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 file with their numbers, from 1.

    Raises:
        ValueError: a line is not UTF-8; the message names file and line.
    """
    with Path(path).open("rb") as lines:
        yield from decoded_lines(lines, str(path))


def decoded_lines(lines: Iterable[bytes], where: str) -> Iterator[tuple[int, str]]:
    """Decode lines of UTF-8, without a byte order mark, whatever the locale says; line numbers count from 1.

    Raises:
        ValueError: a line is not UTF-8, or the whole looks like no text; the message names the line.
    """
    for number, line in enumerate(lines, start=1):
        if number == 1:
            _refuse_binary(line, where)
        try:
            yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            msg = f"{where}, line {number}: not UTF-8 text ({error.reason} at byte {error.start} of the line)"
            raise ValueError(msg) from None


def _refuse_binary(start: bytes, where: str) -> None:
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        msg = f"{where} is UTF-16 text; convert it to UTF-8 (iconv -f UTF-16 -t UTF-8)"
        raise ValueError(msg)
    if b"\0" in start or start.startswith(_NO_TEXT):
        msg = (
            f"{where} is not text: it begins with {start[:8]!r}; give text, JSON lines, JSON, CSV or Parquet, and "
            "unpack or convert anything else first"
        )
        raise ValueError(msg)


def read_passages(
    source: str | Path, file_format: str = "auto", text_field: str | None = None, id_field: str | None = None
) -> Iterator[Record]:
    """Yield the passages of a file, a folder or standard input (`-`), one at a time.

    Args:
        source: a file, a folder or `-`. A folder is a BEIR folder if it holds `corpus.jsonl`; else each `.txt` and
            `.md` file below it is a passage.
        file_format: one of `FORMATS`. `auto` goes by the name's ending, in any case: `.jsonl` and `.ndjson` (a JSON
            string or object a line), `.json` (an array of them), `.csv` and `.tsv` (with a heading), `.parquet`; any
            other file holds one passage a line. Standard input is JSON if its first line begins an array of objects
            or strings, JSON lines if it is a JSON object or string, else one passage a line.
        text_field: where an object or a row has its text. Default: the first of `text`, `contents`, `content`,
            `passage`.
        id_field: where it has its id. Default: the first of `_id`, `id`, `docid`, `doc_id`, if there is one.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: a line cannot be read, and the message names file and line; or a Parquet file without `pyarrow`.
    """
    if file_format not in FORMATS:
        msg = f"file_format must be one of {', '.join(FORMATS)}, got {file_format!r}"
        raise ValueError(msg)
    fields = Fields(text_field, id_field)
    if not str(source):
        msg = "the source of the passages is empty; name a file or a folder, or - for standard input"
        raise ValueError(msg)
    if str(source) == "-":
        yield from _parse(sys.stdin.buffer, "standard input", file_format, fields)
        return
    path = Path(source)
    if path.is_dir():
        yield from _read_folder(path, file_format, fields)
        return
    if not path.is_file():
        msg = f"no file or folder {str(path)!r}; give a file, a folder, or - for standard input"
        raise FileNotFoundError(msg)
    kind = _ENDINGS.get(path.suffix.lower(), "text") if file_format == "auto" else file_format
    if kind == "parquet":
        yield from _read_parquet(path, fields)
        return
    with path.open("rb") as lines:
        yield from _parse(lines, str(path), kind, fields)


def _read_folder(path: Path, file_format: str, fields: Fields) -> Iterator[Record]:
    if (path / "corpus.jsonl").is_file():
        yield from read_passages(path / "corpus.jsonl", file_format, fields.text, fields.id)
        return
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in {".txt", ".md"} and file.is_file())
    if not files:
        msg = f"the folder {str(path)!r} holds neither corpus.jsonl nor any .txt or .md file"
        raise FileNotFoundError(msg)
    for file in files:
        text = "".join(line for _, line in text_lines(file))
        yield Record(file.relative_to(path).as_posix(), text.replace("\r\n", "\n").replace("\r", "\n"))


def _parse(lines: Iterable[bytes], where: str, kind: str, fields: Fields) -> Iterator[Record]:
    if kind == "parquet":
        msg = f"{where}: Parquet is read from a file, not from standard input"
        raise ValueError(msg)
    numbered = decoded_lines(lines, where)
    if kind == "json":
        yield from _parse_array("".join(line for _, line in numbered), where, fields)
    elif kind in ("csv", "tsv"):
        yield from _parse_table((line for _, line in numbered), where, "," if kind == "csv" else "\t", fields)
    else:
        for number, line in numbered:
            if not line.strip():
                continue
            if kind == "auto":
                kind = "json" if _begins_array(line) else "jsonl" if _is_json(line) else "text"
            if kind == "json":
                rest = "".join(line for _, line in numbered)
                yield from _parse_array(line + rest, f"{where} (--format text takes it as lines)", fields)
                return
            if kind == "jsonl":
                yield _parse_json(line, f"{where}, line {number}", fields)
            else:
                yield Record(None, line.rstrip("\r\n"))


def _begins_array(line: str) -> bool:
    """Whether a line begins an array of objects or strings; text may begin with a bracket too."""
    text = line.strip()
    return text == "[" or text.replace(" ", "").startswith(("[{", '["'))


def _is_json(line: str) -> bool:
    """Whether a line is meant as JSON: it begins like an object, or is a whole string."""
    text = line.strip()
    if text.startswith('"'):
        try:
            return isinstance(json.loads(text), str)
        except ValueError:
            return False
    return text.startswith("{")


def _parse_json(line: str, where: str, fields: Fields) -> Record:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        msg = f"{where}: not JSON ({error}); a .jsonl file holds one JSON string or object a line"
        raise ValueError(msg) from None
    return fields.record(value, where)


def _parse_array(text: str, where: str, fields: Fields) -> Iterator[Record]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        msg = f"{where}: not JSON ({error})"
        raise ValueError(msg) from None
    if not isinstance(values, list):
        msg = (
            f"{where}: expected an array of strings or objects, got {type(values).__name__}; "
            "one object a line is the format jsonl"
        )
        raise ValueError(msg)
    for number, value in enumerate(values, start=1):
        yield fields.record(value, f"{where}, item {number}")


def _parse_table(lines: Iterator[str], where: str, delimiter: str, fields: Fields) -> Iterator[Record]:
    rows = csv.DictReader(lines, delimiter=delimiter, strict=True)
    try:
        for row in rows:
            if None in row or None in row.values():
                msg = f"{where}, line {rows.line_num}: {len(rows.fieldnames or ())} columns are expected, as in line 1"
                raise ValueError(msg)
            yield fields.record(row, f"{where}, line {rows.line_num}")
    except csv.Error as error:
        # The reader counts the line that it fails at; `rows` only counts lines that were read.
        line = rows.reader.line_num
        msg = f"{where}, line {line}: cannot be read as a table ({error}); JSON lines take text of any length"
        raise ValueError(msg) from None


def _read_parquet(path: Path, fields: Fields) -> Iterator[Record]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        msg = f"{path} is Parquet, which needs the package pyarrow: pip install pyarrow, or convert it to JSON lines"
        raise ValueError(msg) from None
    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=512):
            for row in batch.to_pylist():
                number += 1
                yield fields.record(row, f"{path}, row {number}")
    except (ArrowException, OSError) as error:
        msg = f"{path} cannot be read as Parquet ({error})"
        raise ValueError(msg) from None


@dataclass(frozen=True, slots=True)
class Fields:
    """Where an object or a row has its text and its id; None for the usual names."""

    text: str | None = None
    id: str | None = None

    def record(self, value: object, where: str) -> Record:
        """The passage in a JSON value or a row.

        Raises:
            ValueError: it holds none; the message begins with `where`.
        """
        if isinstance(value, str):
            return Record(None, value)
        if not isinstance(value, dict):
            msg = f"{where}: expected a string or an object, got {type(value).__name__}"
            raise ValueError(msg)
        names = _TEXT_KEYS if self.text is None else (self.text,)
        text = _first(value, names)
        if not isinstance(text, str):
            msg = (
                f"{where}: no text under {' or '.join(names)}; its fields are {sorted(map(str, value))[:10]}: "
                "name the right one (--text-field)"
            )
            raise ValueError(msg)
        identifier = _first(value, _ID_KEYS if self.id is None else (self.id,))
        if self.id is not None and identifier is None:
            msg = f"{where}: no id under {self.id}; its fields are {sorted(map(str, value))[:10]}"
            raise ValueError(msg)
        title = value.get("title") if self.text is None else None
        return Record(None if identifier is None else str(identifier), passage_text(title, text))


def passage_text(title: object, text: str) -> str:
    """Title and text joined by a space, as BEIR and mteb join them for every model."""
    return f"{title} {text}".strip() if isinstance(title, str) and title else text


def quoted(identifier: str) -> str:
    """Quote an id for a run file: spaces become `%20`, because tools split lines at spaces."""
    return identifier.replace("%", "%25").replace(" ", "%20") if " " in identifier else identifier


def _first(value: Mapping[str, Any], keys: Iterable[str]) -> Any:
    return next((value[key] for key in keys if key in value), None)
