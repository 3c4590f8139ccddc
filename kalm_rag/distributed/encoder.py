"""The encoder that engines run."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from kalm_rag.cache import DiskStore, PassageCache
from kalm_rag.cache.remote.opening import secret_or_environment
from kalm_rag.distributed.columns import read_columns
from kalm_rag.distributed.outcomes import Encoding, Outcome
from kalm_rag.documents import repair_text
from kalm_rag.model.checkpoint import NAMES
from kalm_rag.reranker import KaLMReranker
from kalm_rag.settings import base_ratio
from kalm_rag.utils import forks
from kalm_rag.utils.checks import check_ratio, check_text
from kalm_rag.utils.display import short_repr, visible_line
from kalm_rag.utils.paths import DEFAULT, passages_dir, user_path

_RESULTS = ("keys", "status", "truncated", "message")

_REPAIRED = "half a surrogate pair was read as U+FFFD"

_running: dict[str, Encoding] = {}
"""The loaded encoder of this process, by the identity of its `PassageEncoder`; at most one."""
_lock = forks.Lock()


class PassageEncoder:
    """Encodes a corpus into a cache, batch by batch: one object for every engine, and for a plain loop.

    Calling it with a batch, a mapping of columns, encodes the passages that the cache lacks, writes them, and returns
    columns that say what became of each row. The encoded passages themselves are never returned: each worker writes
    them to the cache. When a call returns, what it reports as encoded is in the cache, so a worker that is killed loses
    at most the batch that it was encoding, and a job that is run again encodes only what is missing.

    It is pickled as its arguments, credentials included, and loads the model at the first call in a process, once for
    all its copies there. Relative folders are resolved when it is made.

    Columns of a result:
        the ids, under their own name: as given.
        keys: a list for each row, the cache's keys of its encoder states: one, or with `long_passages="windows"` one
            for each window. Empty if the row failed.
        status: `encoded`, now and kept; `known`, the cache held it before, or an earlier row of the batch has the same
            text; `not kept`, the cache, or the shared tier behind it, did not keep it or others of its batch;
            `failed`, the row holds no text, or the model cannot encode it.
        truncated: whether the tail of the passage was not read, as in `RankedPassage`.
        message: why it is `failed` or `not kept`, or that half a surrogate pair was read as U+FFFD; else empty.

    Args:
        model: as in `KaLMReranker`.
        cache: where encoded passages are kept: a folder, or the arguments of `PassageCache` by name, its folder under
            `where`, a shared tier under `remote`. A `PassageCache` gives its arguments. Workers on several machines
            need a tier. Workers keep no passages in memory. Default: the folder that `KALM_RAG_CACHE` names, else the
            user's.
        id_column: the column with the ids of passages, of any type.
        text_column: the column with their texts.
        options: further arguments of `KaLMReranker`, such as `dtype`, `ratio`, `max_length` or `long_passages`. Those
            that change how passages are encoded must be those of the rerankers that read the cache.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it, its value and the rule.
    """

    def __init__(
        self,
        model: str | Path = "nano",
        *,
        cache: str | Path | Mapping[str, Any] | PassageCache = DEFAULT,
        id_column: str = "id",
        text_column: str = "text",
        **options: Any,
    ) -> None:
        self.id_column, self.text_column = check_text("id_column", id_column), check_text("text_column", text_column)
        if id_column in _RESULTS or id_column == text_column:
            msg = f"id_column must differ from text_column and from {', '.join(_RESULTS)}, got {id_column!r}"
            raise ValueError(msg)
        self._model = _absolute_model(model)
        self._options = {"show_progress": False, **options}
        if self._options.get("lora") is not None:
            self._options["lora"] = str(user_path(self._options["lora"], "lora"))
        self._cache_arguments = _cache_arguments(cache, self._options.get("ratio", 4))
        self._identity = uuid.uuid4().hex
        self._make().cache.close()  # a wrong argument shows here, not in a worker

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (type(self), self.__dict__)

    def __repr__(self) -> str:
        # Neither arguments of the cache nor options: they may hold credentials.
        columns = f"id_column={self.id_column!r}, text_column={self.text_column!r}"
        return f"{type(self).__name__}({str(self._model)!r}, {columns})"

    def __call__(self, batch: Any) -> dict[str, list[Any]]:
        """Encode a batch and return what became of each row.

        Args:
            batch: columns by name: a mapping, a pyarrow table or a data frame. Columns may be lists, numpy or pyarrow
                arrays, or series. Further columns are ignored. It is not changed.

        Returns:
            The columns that the class lists, as lists, with a row for each row of the batch.

        Raises:
            TypeError, ValueError: a column is missing or no column. A row that is wrong is `failed` instead.
            CheckpointError: the model cannot be found or used.
            StoreError: the cache reached its limit and gave up passages of this job.
            Exception: the model encodes no passage of the batch.
        """
        ids, values = read_columns(batch, (self.id_column, self.text_column))
        texts: dict[int, str] = {}
        rows: dict[int, Outcome] = {}
        repaired: set[int] = set()
        for place, value in enumerate(values):
            if isinstance(value, str):
                texts[place], changed = repair_text(str(value))  # a string of numpy's becomes Python's own
                repaired |= {place} if changed else set()
            else:
                got = f"got {type(value).__name__}: {short_repr(value)}"
                rows[place] = Outcome("failed", message=f"{self.text_column} must be a string, {got}")
        if texts:
            distinct = list(dict.fromkeys(texts.values()))
            encoding = self._encoding()
            found = dict(zip(distinct, encoding.encode(distinct), strict=True))
            for place, text in texts.items():
                rows[place] = found[text]
                found[text] = found[text].again()
        for place in repaired:
            rows[place] = replace(rows[place], message=rows[place].message or _REPAIRED)
        return self._result(ids, [rows[place] for place in range(len(values))])

    def failed(self, batch: Any, message: str) -> dict[str, list[Any]]:
        """Return what a call returns if no row of a batch can be encoded, for the reason that is given."""
        [ids] = read_columns(batch, (self.id_column,))
        return self._result(ids, [Outcome("failed", message=message)] * len(ids))

    def map_in_pandas(self, frames: Iterable[Any]) -> Iterator[Any]:
        """Encode data frames of pandas one by one and yield a data frame of results for each.

        It is what Spark's `DataFrame.mapInPandas` takes, with `spark_schema()`.
        """
        for frame in frames:
            yield type(frame)(self(frame))

    def spark_schema(self, id_type: str = "string") -> str:
        """Return the schema of the results for Spark.

        Args:
            id_type: Spark's name of the type of the ids.
        """
        name = self.id_column.replace("`", "``")
        return f"`{name}` {id_type}, keys array<string>, status string, truncated boolean, message string"

    @property
    def folder(self) -> Path | None:
        """The folder of one machine that holds everything this encodes; None if the cache is not only that."""
        cache = self._make().cache
        return cache.store.folder if isinstance(cache.store, DiskStore) and cache.remote is None else None

    def close(self) -> None:
        """Free the model that this process loaded for it, and close the cache. A later call loads it again."""
        with _lock:
            encoding = _running.pop(self._identity, None)
        if encoding is not None:
            encoding.close()

    def _result(self, ids: list[Any], rows: list[Outcome]) -> dict[str, list[Any]]:
        return {
            self.id_column: ids,
            "keys": [list(row.keys) for row in rows],
            "status": [row.status for row in rows],
            "truncated": [row.truncated for row in rows],
            "message": [visible_line(row.message) for row in rows],
        }

    def _make(self) -> KaLMReranker:
        return KaLMReranker(self._model, cache=PassageCache(**self._cache_arguments), **self._options)

    def _encoding(self) -> Encoding:
        """Return this process's encoding of this encoder and of its copies; there is one."""
        with _lock:
            found = _running.get(self._identity)
        if found is not None:
            return found
        made = Encoding(self._make())
        with _lock:
            if self._identity not in _running:
                _running.clear()  # a process that begins another job does not need the last one's model any more
                _running[self._identity] = made
            return _running[self._identity]


def _restored(kind: type[PassageEncoder], state: dict[str, Any]) -> PassageEncoder:
    made = kind.__new__(kind)
    made.__dict__.update(state)
    return made


def _absolute_model(model: Any) -> Any:
    """Return a model as workers in another folder find it."""
    is_folder = isinstance(model, (str, Path)) and str(model) not in NAMES and Path(model).is_dir()
    return str(Path(model).absolute()) if is_folder or isinstance(model, Path) else model


def _cache_arguments(cache: object, ratio: Any) -> dict[str, Any]:
    """Return the arguments of `PassageCache` that every worker is given."""
    if isinstance(cache, PassageCache):
        given = dict(cache.__getstate__())
    elif isinstance(cache, Mapping):
        given = {str(name): value for name, value in cache.items()}
    elif isinstance(cache, (str, Path)):
        given = {"where": cache}
    else:
        msg = (
            "cache must be a folder, a mapping of arguments of PassageCache or a PassageCache, got "
            f"{type(cache).__name__}: {short_repr(cache)}; encoded passages must be kept where others find them"
        )
        raise TypeError(msg)
    given = {"where": DEFAULT, "base_ratio": base_ratio(1 if ratio is None else check_ratio("ratio", ratio)), **given}
    given["memory"] = 0
    given["secret"] = secret_or_environment(given.get("secret"))  # workers may have another environment
    where = given["where"]
    if given.get("remote") is None:
        # Workers may run in another folder and with another environment.
        if isinstance(where, (str, Path)):
            given["where"] = passages_dir() if where == DEFAULT else user_path(where, "cache")
        if given["where"] is None:
            msg = "the cache must keep what workers encode, got where=None, which keeps nothing: name a folder"
            raise ValueError(msg)
    elif isinstance(where, (str, Path)) and where != DEFAULT:
        given["where"] = user_path(where, "cache")
    return given
