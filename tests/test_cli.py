"""The command line, as a process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


def run(*arguments: str, stdin: str = "", columns: str = "80") -> subprocess.CompletedProcess[str]:
    import os

    return subprocess.run(
        [sys.executable, "-m", "kalm_rag", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": columns},
    )


def test_rank_from_jsonl_as_json(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "passages.jsonl"
    file.write_text("\n".join(json.dumps({"_id": name, "text": f"about {name}"}) for name in "abc"))
    done = run("rank", "query", str(file), "--model", str(checkpoint), "--json", "--top-k", "2")
    assert done.returncode == 0, done.stderr
    hits = json.loads(done.stdout)
    assert len(hits) == 2
    assert hits[0]["margin"] >= hits[1]["margin"]
    assert hits[0]["id"] == "abc"[hits[0]["index"]]
    assert done.stderr == ""


def test_rank_from_standard_input_in_a_table(checkpoint: Path) -> None:
    done = run("rank", "query", "--model", str(checkpoint), stdin="first [red]passage[/red]\nsecond " + "long " * 80)
    assert done.returncode == 0, done.stderr
    assert "first [red]passage[/red]" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_demo_says_that_its_model_is_untrained_and_fits_80_columns() -> None:
    done = run("demo")
    assert done.returncode == 0, done.stderr
    assert "UNTRAINED" in done.stdout
    assert "reranking" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_info(checkpoint: Path) -> None:
    facts = json.loads(run("info", "--model", str(checkpoint), "--json").stdout)
    assert {"python", "torch", "transformers", "device", "cache", "model_digest"} <= facts.keys()
    assert facts["model_digest"] in run("info", "--model", str(checkpoint)).stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rank", "q", "/no/such/file"], "no file or folder '/no/such/file'"),
        (["rank", "q", "--model", "/no/such/model"], "no folder '/no/such/model' here"),
        (["rank", "q", "--model", "MODEL", "--top-k", "0"], "top_k must be at least 1, got 0"),
        (["rank", "q", "--model", "MODEL", "--ratio", "0"], "ratio must be at least 1, got 0"),
        (["rank", "q", "--model", "MODEL", "--device", "warp"], "device='warp' is no device"),
        (["info", "--model", "nano"], "could not get 'KaLM-Embedding/KaLM-Reranker-V1-Nano-R2' from the hub"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(checkpoint: Path, arguments: list[str], message: str) -> None:
    arguments = [str(checkpoint) if argument == "MODEL" else argument for argument in arguments]
    done = run(*arguments, stdin="passage\n")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    traced = run("--debug", *arguments, stdin="passage\n")
    assert "Traceback" in traced.stderr


def test_help_and_version() -> None:
    from kalm_rag import __version__

    assert run("--version").stdout.strip() == f"kalm-rag {__version__}"
    assert {"rank", "demo", "info"} <= set(run("--help").stdout.split())
    assert run("rank").returncode == 2
