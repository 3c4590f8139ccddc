"""Tunes the decoder to judgements of the user's own; encoded passages stay valid.

The extra `tune` installs what it needs: pip install 'kalm-rag[tune]'.
"""

from __future__ import annotations

from kalm_rag.tuning.export import export_checkpoint
from kalm_rag.tuning.job import tune
from kalm_rag.tuning.judgements import read_judgements
from kalm_rag.tuning.recipe import Recipe
from kalm_rag.tuning.report import Comparison, Tuned

__all__ = ["Comparison", "Recipe", "Tuned", "export_checkpoint", "read_judgements", "tune"]
