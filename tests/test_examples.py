"""Each example runs offline as it is, is short, and does what it says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "examples"
EXAMPLES = sorted(path.name for path in FOLDER.glob("*.py") if path.name != "common.py")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("examples")


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name: str, cache: Path, checkpoint: Path) -> None:
    assert len((FOLDER / name).read_text().splitlines()) < 60
    environment = {**os.environ, "KALM_EXAMPLE_CACHE": str(cache / name), "KALM_MODEL": str(checkpoint)}
    (cache / name).mkdir()
    done = subprocess.run([sys.executable, str(FOLDER / name)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert " ms" in done.stdout
    if name == "shared_cache.py":
        assert "encoded by Haystack: 0" in done.stdout
    else:
        assert len(re.findall(r"^0\.\d{4}  ", done.stdout, re.MULTILINE)) == 3


def test_without_a_named_model_it_is_the_bundled_one(cache: Path) -> None:
    environment = {**os.environ, "KALM_EXAMPLE_CACHE": str(cache / "bundled")}
    environment.pop("KALM_MODEL", None)
    script = str(FOLDER / "encode_ahead.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "model: mini, a demonstration checkpoint" in done.stdout
