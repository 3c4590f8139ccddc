"""The benchmark scripts run, end with JSON, and what they compute on the side is right."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"


def run(script: str, *arguments: str) -> dict[str, object]:
    command = [sys.executable, str(FOLDER / script), "--small", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    assert found["environment"]["torch"]
    return found


@pytest.mark.parametrize("script", ["warm.py", "memory.py", "cache.py", "peers.py", "precision.py", "adapters.py"])
def test_script(script: str, tmp_path: Path) -> None:
    if script in ("cache.py", "adapters.py"):
        assert run(script).keys() & {"samples", "samples_ms"}
        return
    written = tmp_path / "out.json"
    assert run(script, "--output", str(written)) == json.loads(written.read_text())
    if script == "warm.py":
        compared = [item for item in json.loads(written.read_text())["results"] if item["dtype"] == "float32"]
        assert all(item["largest_difference"] <= 1e-5 for item in compared)


def test_startup() -> None:
    assert run("startup.py", "--repeats", "1")["file_bytes"] > 0
