"""What is learned from a log of queries."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from pathlib import Path

import pytest

from kalm_rag.retrieval.corpus import Record
from kalm_rag.retrieval.traffic import (
    LoggedQuery,
    QueryLog,
    plan_warming,
    read_query_log,
    requests_of_bm25,
    requests_of_run,
)

TEXTS = {"a": "apples grow", "b c": "pears grow", "d": "apples grow", "e": "cars drive"}
PASSAGES = [Record(*item) for item in TEXTS.items()]


def log_of(*names: str) -> QueryLog:
    return QueryLog(tuple(LoggedQuery(None, name) for name in names), 0, ())


def test_a_log_of_texts_ids_and_both(tmp_path: Path) -> None:
    lines = ['{"text": "one", "id": "q 1", "time": 5}', '"two"', "", '{"qid": 3}', '{"query": "four", "id": null}']
    (tmp_path / "log").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    log = read_query_log(tmp_path / "log")
    expected = [LoggedQuery("one", "q 1"), LoggedQuery("two", None), LoggedQuery(None, "3"), LoggedQuery("four", None)]
    assert (list(log.queries), log.broken, log.named) == (expected, 0, ())


def test_broken_lines_are_counted_and_the_first_named(tmp_path: Path) -> None:
    broken = [b"{", b"7", b'{"text": 5}', b"\xff\xfe", b'{"text": " ", "id": true}', b"[" * 100_000, b"null"]
    (tmp_path / "log").write_bytes(b"\n".join([b'"fine"', *broken, b'"fine"']))
    log = read_query_log(tmp_path / "log")
    assert (len(log.queries), log.broken) == (2, 7)
    assert log.named == (
        "line 2 (not JSON)",
        "line 3 (neither an object nor a text, but int)",
        "line 4 (neither a text nor an id)",
        "line 5 (not UTF-8 text)",
        "line 6 (neither a text nor an id)",
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no query; it is empty"),
        (b"\n \n", "holds no query; it is empty"),
        (
            b"{\n7\n",
            r"each of its 2 lines is broken: line 1 \(not JSON\), line 2 .*\. A line of a log is a JSON",
        ),
    ],
)
def test_a_log_without_a_query_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "log").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_query_log(tmp_path / "log")
    with pytest.raises(FileNotFoundError, match="no log of queries .*--queries"):
        read_query_log(tmp_path)


def test_requests_of_a_run() -> None:
    run = {"q 1": [("a", 3.0), ("b%20c", 2.0), ("d", 1.0), ("e", 0.5)], "q2": [("e", 1.0), ("gone", 0.5)]}
    found = requests_of_run(log_of("q 1", "q2", "new", "q 1"), run, iter(PASSAGES), 3)
    assert found.asked == [["a", "b%20c"], ["e"], ["a", "b%20c"]], "equal texts are one passage, the depth is kept"
    assert found.passages == {"a": "apples grow", "b%20c": "pears grow", "e": "cars drive"}
    assert found.notes == [
        "1 lines of the log ask for queries that the run does not have; they are left out",
        "1 passages of the run are not in the corpus; they are left out",
    ]
    assert requests_of_run(log_of("q2"), run, PASSAGES, 1).notes == []


def test_log_run_and_corpus_must_belong_together() -> None:
    run = {"q1": [("a", 1.0)]}
    with pytest.raises(ValueError, match="candidates for none of the 1 different .* example 'q1'; .*'q9'"):
        requests_of_run(log_of("q9"), run, PASSAGES, 5)
    with pytest.raises(ValueError, match="none of the 1 passages .*for example 'a'.* the passages have no ids"):
        requests_of_run(log_of("q1"), run, [Record(None, "apples grow")], 5)
    with pytest.raises(ValueError, match="the id 'a' occurs twice"):
        requests_of_run(log_of("q1"), run, [*PASSAGES, Record("a", "other")], 5)
    with pytest.raises(ValueError, match="depth must be at least 1, got 0"):
        requests_of_run(log_of("q1"), run, PASSAGES, 0)


def test_requests_of_bm25() -> None:
    queries = [LoggedQuery("who grow pears", "1"), LoggedQuery(None, "2"), LoggedQuery("zebra", None)]
    found = requests_of_bm25(QueryLog(tuple(queries), 0, ()), PASSAGES, 9)
    assert [[found.passages[key] for key in keys] for keys in found.asked] == [["pears grow", "apples grow"]]
    assert len(found.passages) == 2
    assert found.notes == [
        "1 lines of the log have no text, only an id; they are left out (--run takes ids)",
        "1 lines of the log ask for queries that share no word with any passage",
    ]
    with pytest.raises(ValueError, match=r"names its queries by id only.*give a run"):
        requests_of_bm25(log_of("1"), PASSAGES, 9)
    with pytest.raises(ValueError, match="BM25 finds no passage for any of the 1 different queries"):
        requests_of_bm25(QueryLog((LoggedQuery("zebra", None),), 0, ()), PASSAGES, 9)


def test_most_asked_first_until_the_budget_is_filled() -> None:
    asked = [["a", "b"], ["a", "c"], ["a", "b", "d"], ["c", "e"]]
    sizes = {"a": 10, "b": 9, "c": 5, "d": 3, "e": 2}
    plan = plan_warming(asked, sizes, 24)
    assert (plan.keys, plan.bytes, plan.asked, plan.asked_bytes) == (["a", "c", "b"], 24, 5, 29)
    assert plan_warming(asked, sizes, 23).keys == ["a", "c"]
    assert plan_warming(asked, sizes, 1000).keys == ["a", "c", "b", "e", "d"]
    # Had one of its requests not been counted, a would still be kept, but b and c only if passages asked for once are.
    assert plan_warming(asked, sizes, 24).expected == pytest.approx(3 / 9)
    assert plan_warming(asked, sizes, 1000).expected == pytest.approx(7 / 9), "d and e were asked for once"


def test_the_expectation_is_replayed_on_the_second_half() -> None:
    asked = [["a", "b"], ["a"], ["c"], ["a", "c", "d"]]
    plan = plan_warming(asked, dict.fromkeys("abcd", 10), 30)
    rows = {row.bytes: (row.passages, row.expected, row.replayed) for row in plan.table}
    share = pytest.approx(2 / 3)
    assert rows == {10: (1, share, 0.25), 20: (2, share, 0.25), 30: (2, share, 0.25)}
    assert plan_warming([["a"]], {"a": 10}, 30).table[0].replayed is None


def test_what_is_expected_of_steady_traffic_comes_true() -> None:
    """On average of a few logs."""
    differences: dict[int, list[float]] = {}
    for seed in range(6):
        draw = random.Random(seed)
        lists = [[str(draw.randrange(3000)) for _ in range(10)] for _ in range(600)]
        asked = draw.choices(lists, [1 / rank for rank in range(1, 601)], k=2000)
        plan = plan_warming(asked, {str(number): 1 + number % 7 for number in range(3000)}, 10**9)
        shares = [row.replayed or 0.0 for row in plan.table]
        assert shares == sorted(shares)
        assert 0 < shares[0] < 0.5 < shares[-1] < 1
        for row, share in zip(plan.table[:-1], shares[:-1], strict=True):
            differences.setdefault(row.bytes, []).append(share - row.expected)
    assert {100, 200, 500, 1000, 2000, 5000} <= differences.keys()
    for found in differences.values():
        assert abs(sum(found) / len(found)) < 0.03


def test_traffic_that_never_repeats_promises_nothing() -> None:
    asked = [[str(2 * number), str(2 * number + 1)] for number in range(100)]
    plan = plan_warming(asked, Counter({str(number): 5 for number in range(200)}), 10**6)
    assert (plan.expected, {row.expected for row in plan.table}, {row.replayed for row in plan.table}) == (0, {0}, {0})


@pytest.mark.parametrize(
    ("asked", "budget", "message"),
    [
        (
            [["a"]],
            9,
            "budget must be the bytes of a passage at least, got 9: 10 bytes, those of the one asked",
        ),
        ([], 9, "budget must be the bytes of a passage at least, got 9: no passage is asked for"),
        ([["a"]], 0, "budget must be at least 1, got 0"),
    ],
)
def test_a_budget_for_nothing_is_refused(asked: list[list[str]], budget: int, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        plan_warming(asked, {"a": 10}, budget)


def test_nothing_given_is_changed(tmp_path: Path) -> None:
    asked, sizes = [["a", "b"], ["b"]], {"a": 1, "b": 2}
    before = json.dumps([asked, sizes])
    plan_warming(asked, sizes, 10)
    assert json.dumps([asked, sizes]) == before
