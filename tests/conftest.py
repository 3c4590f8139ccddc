"""Fixtures: everything runs offline on small random checkpoints, and leaves the user's cache alone."""

from __future__ import annotations

import os
import tempfile

# Before anything imports the hub client: no test may reach a network or the user's own files.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["KALM_RAG_CACHE"] = tempfile.mkdtemp(prefix="kalm-rag-tests-")

from pathlib import Path

import pytest

from kalm_rag import KaLMReranker
from kalm_rag.demo_data import load_demo


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
    return KaLMReranker(checkpoint, device="cpu")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print how far the scores are from the reference implementation's, test by test."""
    rows = {
        report.nodeid.split("::")[-1]: max(differences)
        for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed")
        if (differences := [value for name, value in report.user_properties if name == "parity"])
    }
    if rows:
        terminalreporter.section("largest difference from the reference implementation")
        for name, difference in rows.items():
            terminalreporter.write_line(f"{difference:9.1e}  {name}")
