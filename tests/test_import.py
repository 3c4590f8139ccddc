"""Importing the package is cheap, and its surface is small."""

from __future__ import annotations

import subprocess
import sys

import pytest

import kalm_rag

_PROBE = """
import sys
import kalm_rag, kalm_rag.cli
kalm_rag.KaLMReranker("nano"); kalm_rag.RankedPassage
heavy = {"torch", "transformers", "diskcache", "tokenizers", "numpy"} & set(sys.modules)
print(sorted(heavy))
"""


def test_neither_torch_nor_transformers_is_imported() -> None:
    done = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_surface() -> None:
    assert dir(kalm_rag) == kalm_rag.__all__
    for name in kalm_rag.__all__:
        assert getattr(kalm_rag, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = kalm_rag.nothing
