"""The benchmark scripts run, end with JSON, and what they compute on the side is right."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """Runs a script in this process: to import torch again and again would take most of the time."""

    def call(script: str, *arguments: str) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", [str(FOLDER / script), "--small", *arguments])
        runpy.run_path(sys.argv[0], run_name="__main__")
        found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert found["environment"]["torch"]
        return found

    return call


@pytest.mark.parametrize(
    "script",
    [
        *("warm.py", "memory.py", "compact.py", "encoder.py", "cache.py", "peers.py", "precision.py", "adapters.py"),
        *("eviction.py", "repeats.py"),
    ],
)
def test_script(script: str, tmp_path: Path, run: Callable[..., dict[str, Any]]) -> None:
    if script in ("cache.py", "adapters.py"):
        assert run(script).keys() & {"samples", "samples_ms"}
        return
    written = tmp_path / "out.json"
    assert run(script, "--output", str(written)) == json.loads(written.read_text())
    if script == "warm.py":
        compared = [item for item in json.loads(written.read_text())["results"] if item["dtype"] == "float32"]
        assert all(item["largest_difference"] <= 1e-5 for item in compared)
    if script == "eviction.py":
        found = json.loads(written.read_text())["results"]
        assert {"LRU", "SLRU", "S3-FIFO", "SIEVE"} <= {item["policy"] for item in found}
        for policy in ("SLRU", "S3-FIFO", "SIEVE"):
            ratios = [item["no_scan"] for item in found if item["policy"] == policy]
            assert ratios == sorted(ratios), "more memory, more hits"


def test_startup(run: Callable[..., dict[str, Any]]) -> None:
    assert run("startup.py", "--repeats", "1")["file_bytes"] > 0


def test_paired(run: Callable[..., dict[str, Any]]) -> None:
    root = str(FOLDER.parent)
    assert run("paired.py", root, root)["results"].keys() == {"load", "cold", "warm"}
