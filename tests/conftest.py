"""Fixtures: everything runs offline on small random checkpoints, and leaves the user's cache alone."""

from __future__ import annotations

import os
import tempfile

# Before anything imports the hub client: no test may reach a network or the user's own files.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["KALM_RAG_CACHE"] = tempfile.mkdtemp(prefix="kalm-rag-tests-")

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from kalm_rag import KaLMReranker
from kalm_rag.demo_data import load_demo
from kalm_rag.utils import computing

# Clients of the server run in environments of their own, where `make test-clients` collects them.
collect_ignore = ["clients"]
pytest.register_assert_rewrite("storekit")
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")
# Tests run with one thread of torch; users have more, and then another thread computes than the one that calls.
computing._LEAST_THREADS = 1


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint with a vision tower, in float32."""
    from kalm_rag.testing import build_checkpoint

    return build_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def passages() -> list[str]:
    """Real passages of 5 to 400 words."""
    return list(load_demo().passages.values())


@pytest.fixture(scope="session")
def queries() -> list[str]:
    return list(load_demo().queries.values())


@pytest.fixture
def reranker(checkpoint: Path) -> KaLMReranker:
    """One that keeps passages in memory alone."""
    return KaLMReranker(checkpoint, device="cpu", cache=None)


@pytest.fixture
def scale(request: pytest.FixtureRequest) -> int:
    """How many times more faults to inject than by default."""
    return int(request.config.getoption("--faults"))


@pytest.fixture
def fast_path() -> Iterator[Path]:
    """A folder where a sync costs nothing, if there is one, for tests that do not depend on syncs."""
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="kalm-rag-tests-", dir=place) as name:
        yield Path(name)


@pytest.fixture
def tally(record_property: Callable[[str, object], None]) -> Callable[[str, int, int], None]:
    """Count violations and trials for the table of faults; fail on any violation, and where nothing was tried."""

    def record(what: str, violations: int, trials: int) -> None:
        record_property("faults", (what, violations, trials))
        assert trials > 0, f"{what}: nothing was tried"
        assert violations == 0, f"{what}: {violations} violations in {trials} trials"

    return record


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--faults", default=1, type=int, help="how many times more faults to inject (`make faults`: 85)")
    parser.addoption("--bodies", default=300, type=int, help="how many malformed bodies to send (`make soak`: 10000)")
    parser.addoption("--ray-serve", action="store_true", help="run the server on Ray Serve (`make test-ray-serve`)")
    parser.addoption("--scripts", action="store_true", help="run slow benchmarks too (`make test-scripts`)")
    parser.addoption("--soak", default=0, type=float, help="minutes of mixed load on a server (`make soak`: 30)")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print how far scores are from the reference implementation's, and what the fault tests counted."""
    reports = terminalreporter.getreports("passed") + terminalreporter.getreports("failed")

    def values(name: str) -> list[tuple[str, list[Any]]]:
        found = [(report, [value for key, value in report.user_properties if key == name]) for report in reports]
        return [(report.nodeid.split("::")[-1], kept) for report, kept in found if kept]

    if parity := values("parity"):
        terminalreporter.section("largest difference from the reference implementation")
        for test, differences in parity:
            terminalreporter.write_line(f"{max(differences):9.1e}  {test}")
    if faults := values("faults"):
        terminalreporter.section("faults: violations / trials")
        for _, rows in faults:
            for what, violations, trials in rows:
                terminalreporter.write_line(f"{violations:5} / {trials:<7} {what}")
