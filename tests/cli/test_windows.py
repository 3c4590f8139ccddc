"""Windows of long passages on the command line: encode, rank and forget."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from kalm_rag.cache import DiskStore
from kalm_rag.cli import app

ANSWER = "To sort a list in place, call its method sort: names.sort()."
FILLER = "The museum opens at nine. Visitors leave their coats at the door. " * 40
TEXTS = [FILLER + ANSWER, FILLER, "A short passage."]
OPTIONS = ["--model", "mini", "--long-passages", "windows", "--window-tokens", "96"]


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    file = tmp_path / "corpus.jsonl"
    file.write_text("\n".join(json.dumps({"id": f"p{place}", "text": text}) for place, text in enumerate(TEXTS)))
    return str(file)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False, env={"COLUMNS": "200"})


def test_encoded_windows_are_ranked_shown_and_forgotten(corpus: str, tmp_path: Path) -> None:
    cache = ["--cache", str(tmp_path / "cache")]
    estimate = json.loads(run("encode", corpus, "--dry-run", "--json", *OPTIONS, *cache).stdout)
    assert estimate["mean_tokens"] > 300, "of all windows of a passage together"
    done = json.loads(run("encode", corpus, "--json", *OPTIONS, *cache).stdout)
    assert (done["held"], done["passages"], done["truncated"], done["failure"]) == (3, 3, 0, None)
    assert done["new"] == done["cache_entries"] > 3
    again = run("encode", corpus, *OPTIONS, *cache)
    assert again.exit_code == 0
    assert "0 windows encoded" in again.stdout
    ranked = ["rank", "How do I sort a list in place?", corpus, *OPTIONS, *cache]
    first = json.loads(run(*ranked, "--json", "--top-k", "1").stdout)[0]
    assert first["id"] == "p0"
    assert ANSWER in TEXTS[0][slice(*first["span"])]
    table = run(*ranked, "--top-k", "1").stdout
    assert "p0" in table
    assert len(list(DiskStore(tmp_path / "cache").keys())) == done["cache_entries"]
    by_text = run("cache", "forget", corpus, *cache)
    assert by_text.exit_code == 1
    assert "Windows of long passages are kept too, in 1 way to split them" in by_text.stdout
    by_model = run("cache", "forget", corpus, "--model", "mini", *cache)
    assert (by_model.exit_code, "3 texts read" in by_model.stdout) == (0, True)
    assert list(DiskStore(tmp_path / "cache").keys()) == []


def test_more_windows_than_are_read(corpus: str, tmp_path: Path) -> None:
    done = run("encode", corpus, *OPTIONS, "--max-windows", "2", "--cache", str(tmp_path / "cache"))
    assert "2 are longer than 2 windows; their tails were not read (--max-windows)" in done.stdout
