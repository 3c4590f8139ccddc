"""`kalm-rag warm`: what it chooses, keeps, prints and refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kalm_rag import KaLMReranker
from kalm_rag.cli import main


def text_of(number: int) -> str:
    return f"passage number{number} of twenty " * 9


@pytest.fixture
def kalm(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path
) -> Callable[..., tuple[int, str, str]]:
    """Run `kalm-rag warm` on 20 passages with a log and a run, in this process."""
    lines = [{"_id": f"p {number}", "text": text_of(number)} for number in range(20)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "first.trec").write_text(
        "".join(f"q{query} Q0 p%20{query + rank} {rank} {9 - rank} x\n" for query in range(4) for rank in range(3))
    )
    asked = [0, 2, 0, 1, 0, 3, 0, 2]
    log = [json.dumps({"id": f"q{query}", "text": f"number{query}", "at": place}) for place, query in enumerate(asked)]
    (tmp_path / "log.jsonl").write_text("\n".join([log[0], "{broken", *log[1:], '{"time": 1}', '{"id": "new"}']))

    def call(*arguments: object, model: object = checkpoint) -> tuple[int, str, str]:
        files = ["--cache", tmp_path / "cache", "--model", model]
        monkeypatch.setattr("sys.argv", ["kalm-rag", "warm", *map(str, [tmp_path, *files, *arguments])])
        monkeypatch.setenv("COLUMNS", "80")
        with pytest.raises(SystemExit) as done:
            main()
        shown = capsys.readouterr()
        return int(done.value.code or 0), shown.out, shown.err

    return call


def test_what_is_asked_for_most_is_kept_within_the_budget(
    kalm: Callable[..., tuple[int, str, str]], checkpoint: Path, tmp_path: Path
) -> None:
    options: list[Any] = ["--queries", tmp_path / "log.jsonl", "--run", tmp_path / "first.trec"]
    code, out, _ = kalm(*options, "--budget", "1GB", "--dry-run", "--json")
    assert code == 0
    whole = json.loads(out)
    assert (whole["lines"], whole["broken"], whole["asked"], whole["chosen"]) == (9, 2, 6, 6)
    assert not (tmp_path / "cache").exists(), "a dry run keeps nothing"
    half = whole["asked_bytes"] // 2
    code, out, err = kalm(*options, "--budget", half, "--json")
    assert code == 0, err
    assert "note: 2 lines of" in err
    assert "left out: line 2 (not JSON), line 10 (neither a text nor an id)" in err
    assert "note: 1 lines of the log ask for queries that the run does not have" in err
    found = json.loads(out)
    assert (found["chosen"], found["new"], found["held"], found["failure"]) == (3, 3, 3, None)
    assert found["chosen_bytes"] <= half < found["chosen_bytes"] + whole["asked_bytes"] / 6 + 100
    assert {row["bytes"] for row in found["table"]} >= {found["chosen_bytes"]}
    with KaLMReranker(checkpoint, cache=tmp_path / "cache") as reranker:
        lacking = set(reranker.unknown([text_of(number) for number in range(20)]))
        # Requests: p 2 has seven, p 1 five, p 0 and p 3 four each, p 4 three, p 5 one.
        assert [number for number in range(20) if text_of(number) not in lacking] == [0, 1, 2]
    code, out, _ = kalm(*options, "--budget", half)
    assert code == 0
    assert "Hit ratio, learned from 4 queries of the log and replayed on the other 4:" in out
    assert "3 known already, 0 to encode." in out
    assert "0 encoded, 3 served from the cache" in out
    assert max(map(len, out.splitlines())) <= 80


def test_the_windows_of_long_passages_are_kept(
    kalm: Callable[..., tuple[int, str, str]], checkpoint: Path, tmp_path: Path
) -> None:
    options: list[Any] = ["--queries", tmp_path / "log.jsonl", "--run", tmp_path / "first.trec", "--budget", "1GB"]
    windows: list[Any] = ["--long-passages", "windows", "--window-tokens", "40", "--window-overlap", "0"]
    code, out, err = kalm(*options, *windows, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["new"] > found["chosen"] == 6
    with KaLMReranker(
        checkpoint, cache=tmp_path / "cache", long_passages="windows", window_tokens=40, window_overlap=0
    ) as reranker:
        assert reranker.unknown([text_of(number) for number in range(6)]) == []


def test_without_a_run_bm25_finds_the_candidates_and_prefilled_passages_cost_more(
    kalm: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    options: list[Any] = ["--queries", tmp_path / "log.jsonl", "--depth", "1", "--budget", "1GB", "--dry-run", "--json"]
    code, out, err = kalm(*options)
    assert code == 0, err
    assert "note: 1 lines of the log have no text, only an id" in err
    states = json.loads(out)
    code, out, _ = kalm(*options, "--keep", "prefilled")
    prefilled = json.loads(out)
    assert prefilled["asked"] == states["asked"] > 1
    assert prefilled["asked_bytes"] > 2 * states["asked_bytes"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "lots"], "it must be a number of bytes above 0, such as 500MB or 20GB, got 'lots'"),
        (["--budget", "0"], "it must be a number of bytes above 0"),
        (["--budget", "-1GB"], "it must be a number of bytes above 0"),
        (["--budget", "10b"], "error: --budget must be the bytes of a passage at least, got 10: "),
        (["--budget", "1GB", "--depth", "0"], "error: --depth must be at least 1, got 0"),
        (["--budget", "1GB", "--queries", "/no/such/log"], "error: no log of queries '/no/such/log'; name a file"),
        (["--budget", "1GB", "--run", "/no/such/run"], "error: no file of candidates '/no/such/run'"),
        (["--budget", "1GB", "--language", "klingon"], "error: --language must be one of auto, none, de, "),
        (["--budget", "1GB", "--limit-gb", "0.00005", "--keep", "prefilled"], "--storage int8, or lower --budget"),
    ],
)
def test_wrong_values_are_refused(
    kalm: Callable[..., tuple[int, str, str]], tmp_path: Path, arguments: list[str], message: str
) -> None:
    code, _, err = kalm("--queries", tmp_path / "log.jsonl", *arguments)
    assert code == 2
    assert message in " ".join(err.replace("│", " ").split())
