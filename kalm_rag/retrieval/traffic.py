"""What a log of queries says about the passages that will be asked for, and which of them to keep in so many bytes."""

from __future__ import annotations

import json
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from pathlib import Path

from kalm_rag.documents import repair_text
from kalm_rag.retrieval.bm25 import BM25
from kalm_rag.retrieval.corpus import Record, quoted
from kalm_rag.retrieval.segment import AUTO
from kalm_rag.utils.checks import check_positive
from kalm_rag.utils.display import Shown, shorten
from kalm_rag.utils.progress import Progress

_TEXT_KEYS = ("text", "query", "question", "q")
_ID_KEYS = ("_id", "id", "query_id", "qid")
_NAMED = 5
"""Broken lines that are named."""
_ROWS = 8
"""Rows of the table at most."""


@dataclass(frozen=True, slots=True)
class LoggedQuery:
    """A query of a log: its text, its id, or both."""

    text: str | None
    id: str | None


@dataclass(frozen=True, slots=True, repr=False)
class QueryLog(Shown):
    """A log of queries, in the order in which they were asked.

    Attributes:
        queries: one for each line that could be read.
        broken: how many lines could not.
        named: the first of those with their line numbers and what is wrong with them.
    """

    queries: tuple[LoggedQuery, ...]
    broken: int
    named: tuple[str, ...]


@dataclass(frozen=True, slots=True, repr=False)
class Requests(Shown):
    """Which passages the queries of a log ask for.

    Attributes:
        asked: for each query, in the order of the log, the keys of its candidates, each once.
        passages: key to text of every passage that is asked for. Passages of equal text have one key, since a cache
            keeps them once.
        notes: sentences about what was left out, each with its count.
    """

    asked: list[list[str]]
    passages: dict[str, str]
    notes: list[str]


@dataclass(frozen=True, slots=True)
class Expectation:
    """What so many bytes are expected to bring.

    Attributes:
        bytes: of the passages that are kept.
        passages: how many these are, chosen by the first half of the log.
        expected: share of the first half's requests that would find their passage if their query had not been counted.
        replayed: share of the second half's requests that find their passage; None if there is no second half.
    """

    bytes: int
    passages: int
    expected: float
    replayed: float | None


@dataclass(frozen=True, slots=True, repr=False)
class WarmPlan(Shown):
    """Which passages to keep.

    Attributes:
        keys: of the passages to keep, those asked for most first. Of those asked for equally often, smaller ones are
            first.
        bytes: what they take.
        asked: how many passages the log asks for.
        asked_bytes: what those take.
        expected: share of the log's requests that would find their passage if their query had not been counted.
        table: what fewer bytes bring, checked by the second half of the log.
    """

    keys: list[str]
    bytes: int
    asked: int
    asked_bytes: int
    expected: float
    table: list[Expectation]


def read_query_log(path: str | Path) -> QueryLog:
    """Read a log: JSON lines, each an object with the query's text, its id or both, or a text; others are left out.

    Text stands under `text`, `query`, `question` or `q`, the id under `_id`, `id`, `query_id` or `qid`. The order of
    the lines is the order in time; anything else in them, such as a timestamp, is not read.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no line can be read; the message names the first ones.
    """
    path = Path(path)
    if not path.is_file():
        msg = f"no log of queries {str(path)!r}; name a file of JSON lines (--queries)"
        raise FileNotFoundError(msg)
    same: dict[LoggedQuery, LoggedQuery] = {}
    queries: list[LoggedQuery] = []
    named: list[str] = []
    broken = 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                query = _logged(line)
            except ValueError as error:
                broken += 1
                if len(named) < _NAMED:
                    named.append(f"line {number} ({shorten(str(error), 60)})")
                continue
            queries.append(same.setdefault(query, query))
    if not queries:
        why = f"each of its {broken} lines is broken: {', '.join(named)}" if broken else "it is empty"
        msg = f"{path} holds no query; {why}. A line of a log is a JSON object with the query's text or id"
        raise ValueError(msg)
    return QueryLog(tuple(queries), broken, tuple(named))


def _logged(line: bytes) -> LoggedQuery:
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        msg = "not UTF-8 text"
        raise ValueError(msg) from None
    except (ValueError, RecursionError):
        msg = "not JSON"
        raise ValueError(msg) from None
    if isinstance(value, str):
        value = {"text": value}
    if not isinstance(value, dict):
        msg = f"neither an object nor a text, but {type(value).__name__}"
        raise ValueError(msg)
    text = next((value[key] for key in _TEXT_KEYS if value.get(key) is not None), None)
    identifier = next((value[key] for key in _ID_KEYS if value.get(key) is not None), None)
    text = repair_text(text)[0] if isinstance(text, str) and text.strip() else None
    is_id = isinstance(identifier, (str, int)) and not isinstance(identifier, bool) and str(identifier).strip()
    if text is None and not is_id:
        msg = "neither a text nor an id"
        raise ValueError(msg)
    return LoggedQuery(text, str(identifier).strip() if is_id else None)


def requests_of_run(
    log: QueryLog, run: Mapping[str, Sequence[tuple[str, float]]], passages: Iterable[Record], depth: int
) -> Requests:
    """Look up in a run which passages the queries of a log ask for.

    Args:
        log: queries; those with an id are looked up by it, others by their text.
        run: query to its candidates, best first, as `kalm_rag.evaluation.read_run` returns them.
        passages: the corpus; only those that are asked for are held in memory.
        depth: candidates of a query that are reranked.

    Raises:
        ValueError: log, run and corpus do not belong together; or an id occurs twice with different texts.
    """
    check_positive("depth", depth)
    names = {query: query.id or query.text or "" for query in set(log.queries)}
    rankings = {quoted(name): [quoted(passage) for passage, _ in ranking[:depth]] for name, ranking in run.items()}
    found = {query: rankings.get(quoted(name), []) for query, name in names.items()}
    if not any(found.values()):
        msg = (
            f"the run has candidates for none of the {len(names)} different queries of the log (it has {len(run)}, for "
            f"example {next(iter(run), None)!r}; the log, for example, {names[log.queries[0]]!r})"
        )
        raise ValueError(msg)
    wanted = set(chain.from_iterable(found.values()))
    texts: dict[str, str] = {}
    keys: dict[str, str] = {}  # of a passage's id; the first id of equal texts is the key of all
    first: dict[str, str] = {}
    for record in passages:
        name = quoted(record.id or "")
        if name not in wanted:
            continue
        text, _ = repair_text(record.text)
        if name in keys and texts[keys[name]] != text:
            msg = f"the id {record.id!r} occurs twice in the corpus, with different texts; ids must be unique"
            raise ValueError(msg)
        keys[name] = first.setdefault(text, name)
        texts[keys[name]] = text
    if not texts:
        msg = (
            f"none of the {len(wanted)} passages that the run names for the log's queries is in the corpus (for "
            f"example {min(wanted)!r}): it is a run of another corpus, or the passages have no ids (--id-field)"
        )
        raise ValueError(msg)
    notes = []
    without = sum(not found[query] for query in log.queries)
    if without:
        notes.append(f"{without} lines of the log ask for queries that the run does not have; they are left out")
    if lost := len(wanted) - len(keys):
        notes.append(f"{lost} passages of the run are not in the corpus; they are left out")
    asked = {
        query: list(dict.fromkeys(keys[name] for name in ranking if name in keys)) for query, ranking in found.items()
    }
    return Requests([asked[query] for query in log.queries if asked[query]], texts, notes)


def requests_of_bm25(
    log: QueryLog,
    passages: Iterable[Record],
    depth: int,
    *,
    language: str = AUTO,
    fold_accents: bool = False,
    show_progress: bool | None = None,
) -> Requests:
    """Let BM25 find which passages the queries of a log ask for.

    Args:
        log: queries; those without a text are left out.
        passages: the corpus, which is held in memory.
        depth: candidates of a query that are reranked.
        language: see `BM25`.
        fold_accents: see `BM25`.
        show_progress: as in `KaLMReranker`.

    Raises:
        MissingExtraError: `bm25s` is not installed.
        ValueError: no query has a text, or none shares a word with a passage.
    """
    check_positive("depth", depth)
    distinct_texts = dict.fromkeys(repair_text(record.text)[0] for record in passages)
    texts = {str(number): text for number, text in enumerate(distinct_texts)}
    index = BM25(texts, language=language, fold_accents=fold_accents)
    queries = [query.text for query in log.queries if query.text is not None]
    if not queries:
        msg = "the log names its queries by id only, so that BM25 has no text to search with; give a run (--run)"
        raise ValueError(msg)
    distinct = list(dict.fromkeys(queries))
    found: dict[str, list[str]] = {}
    with Progress(len(distinct), "BM25", unit="query", show=show_progress) as progress:
        for text in distinct:
            found[text] = [name for name, _ in index.search(text, depth)]
            progress.advance(1)
    if not any(found.values()):
        msg = f"BM25 finds no passage for any of the {len(distinct)} different queries; give a run (--run)"
        raise ValueError(msg)
    notes = []
    if nameless := len(log.queries) - len(queries):
        notes.append(f"{nameless} lines of the log have no text, only an id; they are left out (--run takes ids)")
    if without := sum(not found[text] for text in queries):
        notes.append(f"{without} lines of the log ask for queries that share no word with any passage")
    wanted = set(chain.from_iterable(found.values()))
    kept = {key: text for key, text in texts.items() if key in wanted}
    return Requests([found[text] for text in queries if found[text]], kept, notes)


def plan_warming(asked: Sequence[Sequence[str]], bytes_of: Mapping[str, int], budget: int) -> WarmPlan:
    """Choose what to keep: the passages asked for most, until the budget is filled.

    Args:
        asked: the candidates of each query, in the order of time, as in `Requests`.
        bytes_of: what each candidate takes.
        budget: bytes.

    Raises:
        ValueError: nothing is asked for, or the budget does not hold the passage that is asked for most.
    """
    check_positive("budget", budget)
    asked = [names for names in asked if names]
    whole = _Demand(asked, bytes_of)
    count = whole.fitting(budget)
    if not count:
        first = f"{whole.ends[1]} bytes, those of the one asked for most" if whole.order else "no passage is asked for"
        msg = f"budget must be the bytes of a passage at least, got {budget}: {first}"
        raise ValueError(msg)
    middle = (len(asked) + 1) // 2
    half, rest = _Demand(asked[:middle], bytes_of), _Demand(asked[middle:], bytes_of)
    table = []
    for size in _steps(whole.ends[count], half.ends[1]):
        kept = half.order[: half.fitting(size)]
        replayed = sum(rest.counts[name] for name in kept) / rest.requests if rest.requests else None
        table.append(Expectation(size, len(kept), half.expected(size), replayed))
    return WarmPlan(
        whole.order[:count], whole.ends[count], len(whole.order), whole.ends[-1], whole.expected(budget), table
    )


class _Demand:
    """How often passages are asked for.

    Attributes:
        counts: requests for each passage.
        requests: all of them.
        order: the passages in the order in which they are kept.
        ends: bytes of the first 0, 1, 2, ... of them.
    """

    def __init__(self, asked: Iterable[Sequence[str]], bytes_of: Mapping[str, int]) -> None:
        lists = Counter(tuple(dict.fromkeys(names)) for names in asked)
        self.counts: Counter[str] = Counter()
        for names, times in lists.items():
            for name in names:
                self.counts[name] += times
        self.requests = self.counts.total()
        self._keys = {name: (-count, bytes_of[name], place) for place, (name, count) in enumerate(self.counts.items())}
        self.order = sorted(self.counts, key=self._keys.__getitem__)
        self._sorted = [self._keys[name] for name in self.order]
        self.ends = [0, *accumulate(size for _, size, _ in self._sorted)]
        self._needs = sorted(self._needed(lists))
        self._reached = [0, *accumulate(times for _, times in self._needs)]

    def fitting(self, budget: int) -> int:
        """How many passages fit, the first ones."""
        return bisect_right(self.ends, budget) - 1

    def expected(self, budget: int) -> float:
        """Share of requests that would find their passage in so many bytes, had their query not been counted.

        Counted as it is, a passage asked for once would answer the very request that put it there.
        """
        if not self.requests:
            return 0.0
        return self._reached[bisect_right(self._needs, (budget, self.requests))] / self.requests

    def _needed(self, lists: Mapping[tuple[str, ...], int]) -> Iterator[tuple[int, int]]:
        """Yield the bytes from which requests find their passage had their query been asked once less, and how many."""
        for names, times in lists.items():
            own = sorted(self._keys[name] for name in names)
            less = sorted((count + 1, size, place) for count, size, place in own)
            own_ends = [0, *accumulate(size for _, size, _ in own)]
            less_ends = accumulate(size for _, size, _ in less)
            for key, end in zip(less, less_ends, strict=True):
                if key[0] == 0:  # nobody else asked for it, nor for what follows
                    break
                others = self.ends[bisect_left(self._sorted, key)] - own_ends[bisect_left(own, key)]
                yield others + end, times


def _steps(most: int, least: int) -> list[int]:
    """Sizes of 1, 2 and 5 times a power of ten between two others, the largest few of them, and `most` itself."""
    found = [most]
    for exponent in reversed(range(len(str(most)))):
        found += [size for size in (5 * 10**exponent, 2 * 10**exponent, 10**exponent) if least <= size < most]
    return sorted(found[:_ROWS])
