"""Keeps finished queries of one system, one per line, so that an interrupted evaluation can resume."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any


@dataclass(frozen=True, slots=True)
class Record:
    """One finished query: its id, `(passage id, margin)` best first, the seconds it took, and whether it was cut."""

    query: str
    ranking: list[tuple[str, float]]
    seconds: float
    truncated: bool = False


class Journal:
    """A file of records after a header line that identifies them.

    Args:
        path: the file; None keeps records only in memory.
        fingerprint: what the records depend on.

    Raises:
        ValueError: the file holds records of something else.
    """

    def __init__(self, path: Path | None, fingerprint: Mapping[str, object]) -> None:
        self._path = path
        self._fingerprint = dict(fingerprint)
        self._records: dict[str, Record] = {}
        self._file: IO[str] | None = None

    def __enter__(self) -> Journal:
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self.check()
            # Rewritten without a torn last line, and replaced as a whole, so that a crash loses nothing.
            partial = self._path.with_name(f".{self._path.name}.partial")
            with partial.open("w", encoding="utf-8") as file:
                file.write(json.dumps(self._fingerprint) + "\n")
                file.writelines(_line(record) for record in self._records.values())
            os.replace(partial, self._path)
            self._file = self._path.open("a", encoding="utf-8")
        return self

    def check(self) -> None:
        """Read the file.

        Raises:
            ValueError: it holds records of something else, or is damaged.
        """
        if self._path is not None and self._path.is_file():
            self._read(self._path)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def _read(self, path: Path) -> None:
        try:
            lines = path.read_text(encoding="utf-8").split("\n")
            found = json.loads(lines[0])
            # The process ended while it wrote what follows the last line feed.
            records = [_record(json.loads(line)) for line in lines[1:-1]]
        except (KeyError, TypeError, ValueError) as error:
            msg = f"cannot read {path} ({type(error).__name__}: {error}); delete it to start this system again"
            raise ValueError(msg) from None
        changed = [name for name, value in self._fingerprint.items() if found.get(name) != value]
        if changed:
            msg = (
                f"{path} holds results of another evaluation (it differs in {', '.join(changed)}); "
                "give another folder (--out), or delete this file to start it again"
            )
            raise ValueError(msg)
        self._records = {record.query: record for record in records}

    def __contains__(self, query: object) -> bool:
        return query in self._records

    def add(self, record: Record) -> None:
        """Write a record to disk immediately."""
        self._records[record.query] = record
        if self._file is not None:
            self._file.write(_line(record))
            self._file.flush()

    def records(self, queries: Iterable[str]) -> list[Record]:
        """The records of `queries`, in that order."""
        return [self._records[query] for query in queries]


def _record(value: dict[str, Any]) -> Record:
    ranking = [(str(passage), float(margin)) for passage, margin in value["ranking"]]
    return Record(str(value["query"]), ranking, float(value["seconds"]), bool(value["truncated"]))


def _line(record: Record) -> str:
    return json.dumps(asdict(record)) + "\n"
