"""Tunes the decoder to judgements of the user's own; encoded passages stay valid.

The extra `tune` installs what it needs: pip install 'kalm-rag[tune]'.
"""

from __future__ import annotations

from kalm_rag.tuning.judgements import read_judgements
from kalm_rag.tuning.recipe import Recipe
from kalm_rag.tuning.report import Comparison, Tuned
from kalm_rag.tuning.tune import tune

__all__ = ["Comparison", "Recipe", "Tuned", "read_judgements", "tune"]
