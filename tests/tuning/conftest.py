"""One small tuning that the tests share."""

from __future__ import annotations

from pathlib import Path

import pytest
from tunekit import RECIPE, small_corpus

from kalm_rag.tuning import Tuned, tune


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tuning") / "cache"


@pytest.fixture(scope="session")
def tuned(checkpoint: Path, cache: Path) -> Tuned:
    """The first tuning into the cache."""
    return tune(small_corpus(), cache.parent / "tuned", model=checkpoint, cache=cache, recipe=RECIPE, device="cpu")
