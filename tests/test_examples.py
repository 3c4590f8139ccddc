"""Each example runs offline as it is, is short, and does what it says."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent.parent / "examples"
EXAMPLES = sorted(path.name for path in FOLDER.glob("*.py") if path.name != "common.py")
ENGINES = {
    f"encode_with_{name}.py": package for name, package in [("ray", "ray"), ("daft", "daft"), ("spark", "pyspark")]
}
"""What an example of a distributed encoding needs; Spark is in an environment of its own (`make test-spark`)."""


def is_here(name: str) -> bool:
    return importlib.util.find_spec(ENGINES.get(name, "kalm_rag")) is not None


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("examples")


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, cache: Path, checkpoint: Path) -> Iterator[dict[str, Future[Any]]]:
    """The selected examples, two at a time: most of their time is the start of a process."""

    def run(name: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "KALM_EXAMPLE_CACHE": str(cache / name), "KALM_MODEL": str(checkpoint)}
        environment["RAY_worker_niceness"] = "0"  # else its workers wait for every other process of the machine
        (cache / name).mkdir()
        return subprocess.run([sys.executable, str(FOLDER / name)], capture_output=True, text=True, env=environment)

    selected = {item.name for item in request.session.items}
    with ThreadPoolExecutor(2) as pool:
        yield {
            name: pool.submit(run, name) for name in EXAMPLES if f"test_example[{name}]" in selected and is_here(name)
        }


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name: str, runs: dict[str, Future[Any]]) -> None:
    assert len((FOLDER / name).read_text().splitlines()) < 60
    if not is_here(name):
        pytest.skip(f"{ENGINES[name]} is not installed")
    done = runs[name].result()
    assert done.returncode == 0, done.stderr[-2000:]
    assert " ms" in done.stdout
    if name == "shared_cache.py":
        assert "encoded by Haystack: 0" in done.stdout
    elif name in ENGINES:
        assert re.search(r"^encoded: 20, known: 0, not kept: 0, failed: 1$", done.stdout, re.MULTILINE)
        assert "passages encoded by this process: 0" in done.stdout
        assert len(re.findall(r"^0\.\d{4}  ", done.stdout, re.MULTILINE)) == 3
    else:
        assert len(re.findall(r"^0\.\d{4}  ", done.stdout, re.MULTILINE)) == 3


def test_without_a_named_model_it_is_the_bundled_one(cache: Path) -> None:
    environment = {**os.environ, "KALM_EXAMPLE_CACHE": str(cache / "bundled")}
    environment.pop("KALM_MODEL", None)
    script = str(FOLDER / "encode_ahead.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "model: mini, a demonstration checkpoint" in done.stdout
