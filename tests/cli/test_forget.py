"""`kalm-rag cache forget` and `kalm-rag cache prune`, as processes."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kalm_rag import KaLMReranker, PassageCache
from kalm_rag.cache import DiskStore
from kalm_rag.cache.records import RECORDS
from kalm_rag.testing import build_checkpoint

TEXTS = ["first passage", "second passage <end_of_turn>", "third passage"]


def run(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kalm_rag", "cache", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "200"},
    )


@pytest.fixture
def folder(checkpoint: Path, tmp_path: Path) -> Path:
    """A cache that holds states and prefilled passages of three texts."""
    with KaLMReranker(checkpoint, device="cpu", cache=PassageCache(tmp_path / "store", keep="prefilled")) as reranker:
        reranker.encode(TEXTS)
        reranker.cache.close()
    return tmp_path / "store"


def entries(folder: Path) -> int:
    return len(list(DiskStore(folder).keys()))


def test_texts_of_a_file_are_forgotten_and_counted(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "gone.jsonl"
    file.write_text("\n".join(json.dumps({"id": text, "body": text}) for text in [*TEXTS[:2], TEXTS[0]]))
    done = run("forget", str(file), "--cache", str(folder), "--text-field", "body")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ("3 texts read, 4 entries deleted (2 states, 2 prefilled), 2 key spaces searched")
    assert entries(folder) == 2
    again = run("forget", str(file), "--cache", str(folder), "--text-field", "body", "--json")
    facts = json.loads(again.stdout)
    assert (again.returncode, facts["store"], facts["unsearchable"]) == (0, {"states": 0, "prefilled": 0}, {})


def test_texts_of_standard_input_that_were_never_seen(folder: Path) -> None:
    done = run("forget", "-", "--cache", str(folder), stdin="never seen\nnor this\n")
    assert (done.returncode, done.stderr) == (0, "")
    assert "2 texts read, nothing is kept of them" in done.stdout
    assert entries(folder) == 6


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("image.txt", b"\x89PNG\r\n\x1a\n\0\0", "not text"),
        ("half.jsonl", b'{"text": "first passage"}\n{"text": \n', "half.jsonl, line 2"),
        ("none.txt", None, "no file or folder"),
    ],
)
def test_a_file_that_cannot_be_read_forgets_nothing(
    folder: Path, tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    done = run("forget", str(tmp_path / name), "--cache", str(folder))
    assert done.returncode == 2
    assert message in done.stderr
    assert entries(folder) == 6


def test_entries_older_than_the_records_are_named_and_found_by_their_model(folder: Path, checkpoint: Path) -> None:
    shutil.rmtree(folder / RECORDS)
    at, stdin = ("-", "--cache", str(folder)), "\n".join(TEXTS[:2])
    done = run("forget", *at, stdin=stdin)
    assert done.returncode == 1
    assert "6 entries are in key spaces that are not recorded" in done.stdout
    assert "cache clear --model" in done.stdout
    assert done.stdout.rstrip().endswith(": 6 entries")
    named = run("forget", *at, "--model", str(checkpoint), "--json", stdin=stdin)
    found = json.loads(named.stdout)
    assert (found["store"], found["unsearchable"]) == ({"states": 2, "prefilled": 2}, {})
    assert (named.returncode, found["older"]) == (1, 2), "nobody knows under which settings the last text was kept"
    last = run("forget", *at, "--model", str(checkpoint), stdin=TEXTS[2])
    assert last.returncode == 0, last.stdout


def test_what_an_earlier_version_kept_under_another_instruction_is_not_denied(checkpoint: Path, tmp_path: Path) -> None:
    cache = PassageCache(tmp_path, keep="prefilled")
    KaLMReranker(checkpoint, device="cpu", cache=cache, instruction="Find it.").rank("query", TEXTS[:1])
    cache.close()
    shutil.rmtree(tmp_path / RECORDS)
    past = time.time() - 3600
    with sqlite3.connect(tmp_path / "cache.db") as connection:
        connection.execute("UPDATE Cache SET store_time = ?", (past,))
    KaLMReranker(checkpoint, device="cpu", cache=PassageCache(tmp_path, keep="prefilled")).encode(TEXTS[1:2])
    done = run("forget", "-", "--cache", str(tmp_path), "--model", str(checkpoint), stdin=TEXTS[0])
    assert done.returncode == 1
    assert "1 entry left that are older than the cache's records" in done.stdout.replace("\n", " ")


def test_check_finds_and_removes_a_damaged_record_and_clear_removes_all(folder: Path) -> None:
    records = sorted((folder / RECORDS).iterdir())
    records[0].write_bytes(b"damaged")
    old = time.time() - 3600
    os.utime(records[0], (old, old))
    assert run("check", "--cache", str(folder)).returncode == 1
    assert "1 orphan files" in run("check", "--cache", str(folder), "--fix").stdout
    assert sorted((folder / RECORDS).iterdir()) == records[1:]
    assert run("check", "--cache", str(folder)).returncode == 0
    assert run("clear", "--cache", str(folder), "--yes").returncode == 0
    assert list((folder / RECORDS).iterdir()) == []


def test_another_max_length_of_a_named_model(checkpoint: Path, tmp_path: Path) -> None:
    with KaLMReranker(checkpoint, device="cpu", cache=PassageCache(tmp_path), max_length=50) as reranker:
        reranker.encode(TEXTS)
        reranker.cache.close()
    shutil.rmtree(tmp_path / RECORDS)
    at = ("forget", "-", "--cache", str(tmp_path), "--json")
    wrong = run(*at, "--max-length", "50", stdin=TEXTS[0])
    assert wrong.returncode == 2
    assert "--max-length goes with --model" in wrong.stderr
    done = run(*at, "--model", str(checkpoint), "--max-length", "50", stdin=TEXTS[0])
    assert json.loads(done.stdout)["store"]["states"] == 1


def test_a_damaged_record_is_said_and_fails(folder: Path) -> None:
    for file in (folder / RECORDS).iterdir():
        file.write_bytes(b"damaged")
    done = run("forget", "-", "--cache", str(folder), stdin=TEXTS[0])
    assert done.returncode == 1
    assert "2 records of key spaces cannot be read" in done.stdout


@pytest.mark.parametrize("command", [("forget", "-"), ("prune", "--keep-model", "mini")])
def test_where_no_cache_is(command: tuple[str, ...], tmp_path: Path) -> None:
    done = run(*command, "--cache", str(tmp_path / "none"), stdin="x")
    assert done.returncode == 2
    assert "no cache exists" in done.stderr
    assert not (tmp_path / "none").exists()


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_checkpoint(tmp_path_factory.mktemp("models") / "other", seed=7)


def test_prune_asks_and_deletes_what_replaced_models_left(folder: Path, checkpoint: Path, other: Path) -> None:
    with KaLMReranker(other, device="cpu", cache=PassageCache(folder)) as reranker:
        reranker.encode(TEXTS)
        reranker.cache.close()
    (folder / "notes.txt").write_text("mine")
    at = ("prune", "--cache", str(folder), "--keep-model", str(other))
    shown = run(*at, "--dry-run")
    assert (shown.returncode, entries(folder)) == (0, 9)
    assert "6 passages would be deleted" in shown.stdout
    refused = run(*at, stdin="n\n")
    assert (refused.returncode, entries(folder)) == (1, 9)
    assert "Delete 6 passages of other models" in refused.stderr
    both = run(*at, "--keep-model", str(checkpoint), "--yes")
    assert both.stdout.strip() == "0 passages deleted"
    done = run(*at, "--yes", "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert (facts["deleted"], list(facts["found"].values()), entries(folder)) == (6, [6], 3)
    assert (folder / "notes.txt").read_text() == "mine"
    with KaLMReranker(other, device="cpu", cache=PassageCache(folder)) as reranker:
        assert reranker.encode(TEXTS).known == 3


def test_prune_needs_a_model_and_a_revision_needs_only_one(folder: Path) -> None:
    assert run("prune", "--cache", str(folder), "--yes").returncode == 2
    done = run("prune", "--cache", str(folder), "--keep-model", "mini", "--keep-model", "nano", "--revision", "x")
    assert done.returncode == 2
    assert "--revision goes with exactly one model" in done.stderr
    assert entries(folder) == 6
