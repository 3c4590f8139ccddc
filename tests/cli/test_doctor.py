"""`kalm-rag doctor`, as a process and in this one: exit status, width, JSON, and that it leaves no trace."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kalm_rag.cache import DiskStore


def kalm(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kalm_rag", "doctor", *map(str, arguments)]
    variables = {**os.environ, "COLUMNS": "80", "HF_TOKEN": "hf_abcdefghijkl", **environment}
    return subprocess.run(command, capture_output=True, text=True, env=variables, check=False)


def test_it_tells_everything_in_80_columns_and_creates_nothing(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    done = kalm(HOME=str(home), XDG_CACHE_HOME=str(home / ".cache"), KALM_RAG_CACHE=str(home / "cache"))
    assert done.returncode == 0, done.stderr
    assert list(home.iterdir()) == []
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert not any(line.endswith(" ") for line in lines)
    for word in (
        "features",
        "torch uses",
        "before a model is loaded (auto: ",
        "the fastest here",
        "installed",
        "~/cache",
        "no cache yet",
        "limit",
    ):
        assert word in done.stdout
    assert "hf_abcdefghijkl" not in done.stdout + done.stderr
    assert lines[-1].startswith("Usable")


def test_a_broken_cache_is_status_1_and_valid_json(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    done = kalm("--json", "--cache", tmp_path / "file" / "cache", HOME=str(tmp_path))
    assert done.returncode == 1, done.stderr
    found = json.loads(done.stdout)
    assert found["usable"] is False
    assert [finding["area"] for finding in found["findings"] if finding["level"] == "error"] == ["cache"]
    assert found["cache"]["folder"] == "~/file/cache"
    assert found["precision"]["fastest"] in found["precision"]["feed_forward_network"]
    assert {"cpu", "features", "threads", "memory_limit", "environment"} <= found["machine"].keys()
    assert found["prefill_memory"]["bytes"] >= 0
    assert found["prefill_memory"]["source"].startswith("auto: ")
    assert {"python", "torch", "transformers", "kalm-rag"} <= found["versions"].keys()
    assert str(tmp_path) not in done.stdout
    assert "hf_abcdefghijkl" not in done.stdout


def test_a_model_that_cannot_be_had_is_told_with_all_the_rest() -> None:
    done = kalm("--model", "owner/no-such-model", "--json")
    assert done.returncode == 1, done.stderr
    found = json.loads(done.stdout)
    assert found["model"] is None
    (finding,) = [finding for finding in found["findings"] if finding["area"] == "model"]
    assert "could not get 'owner/no-such-model'" in finding["text"]


def test_a_card_without_an_example_is_refused() -> None:
    done = kalm("--model", "mini", "--card", "owner/x")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: --card must be a release whose model card")


def run_here(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run the command in this process, where parts of it can be replaced; return its exit status."""
    from kalm_rag.cli import main

    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", ["kalm-rag", "doctor", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


@pytest.fixture
def float32_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from kalm_rag.diagnosis import verify
    from kalm_rag.diagnosis.paths import demo_pairs

    monkeypatch.setattr(verify, "PRECISIONS", ("float32",))
    monkeypatch.setattr(verify, "demo_pairs", lambda: [(query, text[:160]) for query, text in demo_pairs(6)])


@pytest.mark.usefixtures("float32_alone")
def test_a_model_is_verified_and_the_cache_left_alone(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_here(monkeypatch, "--model", str(checkpoint), "--cache", str(tmp_path / "cache")) == 0
    shown = capsys.readouterr().out
    assert "11 of 11 agree within their tolerance" in shown
    assert "agrees: P(yes) of mteb's implementation" in shown
    assert "publishes no example" in " ".join(shown.split())
    assert max(map(len, shown.splitlines())) <= 80
    assert not (tmp_path / "cache").exists()


@pytest.mark.usefixtures("float32_alone")
def test_a_wrong_path_is_status_1_and_named(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from kalm_rag.diagnosis import verify
    from kalm_rag.model.prefill import PrefilledDecoder

    margins = PrefilledDecoder.margins

    def wrong(self: Any, *args: Any) -> list[float]:
        return [value + 1.0 for value in margins(self, *args)]

    monkeypatch.setattr(PrefilledDecoder, "margins", wrong)
    monkeypatch.setattr(verify, "why_no_reference", lambda: "not asked")
    assert run_here(monkeypatch, "--model", str(checkpoint)) == 1
    shown = capsys.readouterr().out
    assert "  prefilled, from disk          1.0e+00" in shown
    assert "differs" in shown
    assert "Not usable as it is: 7 errors." in shown


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_a_package_that_cannot_be_imported_is_status_1(
    options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "kalm_rag.diagnosis.doctor", None)
    assert run_here(monkeypatch, *options) == 1
    shown = capsys.readouterr().out
    text = json.loads(shown)["findings"][0]["text"] if options else " ".join(shown.split())
    assert "cannot be imported (ModuleNotFoundError" in text
    assert "pip install --force-reinstall kalm-rag" in text


def test_a_cache_in_use_is_measured(tmp_path: Path, checkpoint: Path) -> None:
    from rawframes import key_of, value_of

    with_entry = DiskStore(tmp_path / "cache", limit=123_000_000)
    with_entry.put_many({key_of(1): value_of(key_of(1), 400)})
    with_entry.close()
    found = json.loads(kalm("--json", "--cache", tmp_path / "cache").stdout)["cache"]
    assert (found["exists"], found["writable"], found["entries"], found["limit"]) == (True, True, 1, 123_000_000)
