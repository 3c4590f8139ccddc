"""The adapters' tests run on a small random checkpoint, offline, with a cache of their own."""

from __future__ import annotations

import os
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["KALM_RAG_CACHE"] = tempfile.mkdtemp(prefix="kalm-rag-tests-")

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random checkpoint."""
    from kalm_rag.testing import build_checkpoint

    return build_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def options(checkpoint: Path, tmp_path: Path) -> dict[str, Any]:
    """Arguments of an adapter that runs the small checkpoint; Haystack's tests have their own for its device."""
    return {"model": checkpoint, "cache": tmp_path / "cache", "device": "cpu"}


@pytest.fixture
def nano() -> str:
    """The name of the released model, where its weights are in the local hub cache."""
    from kalm_rag import KaLMReranker
    from kalm_rag.errors import CheckpointError

    try:
        KaLMReranker("nano", local_files_only=True).checkpoint()
    except CheckpointError:
        pytest.skip("the weights of `nano` (KaLM-Reranker-V1-Nano-R2) are not in the local hub cache")
    return "nano"
