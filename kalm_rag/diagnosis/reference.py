"""Scores pairs with the reference implementation in the package `mteb`."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Iterator, Sequence

from kalm_rag.model.checkpoint import Checkpoint

_MODULE = "mteb.models.model_implementations.kalm_reranker"
_BATCH = 4


def why_no_reference() -> str:
    """Return why the reference implementation cannot be asked; empty if it can."""
    if importlib.util.find_spec("mteb") is None:
        return "mteb is not installed; pip install 'kalm-rag[mteb]'"
    try:
        found = importlib.util.find_spec(_MODULE)
    except (ImportError, OSError, ValueError, AttributeError, RuntimeError):  # it imports mteb, which may be broken
        found = None
    return "" if found is not None else "the installed mteb has no KaLM wrapper; pip install --upgrade mteb"


def reference_scores(checkpoint: Checkpoint, pairs: Sequence[tuple[str, str]], device: str) -> list[float]:
    """Return `P(yes)` of each pair by the reference implementation in float32.

    The checkpoint was checked to be safetensors of an architecture that transformers includes, so no remote code runs.
    """
    wrapper_class = importlib.import_module(_MODULE).KaLMRerankerWrapper
    with _quiet():
        wrapper = wrapper_class(
            str(checkpoint.folder), device=device, dtype="float32", trust_remote_code=False, use_safetensors=True
        )
    scores: list[float] = []
    for start in range(0, len(pairs), _BATCH):
        part = list(pairs[start : start + _BATCH])
        # Its public method takes the data loaders of an mteb task; this is what that method calls for each batch.
        scores += wrapper._predict_batch(part, [wrapper.instruction] * len(part))
    return scores


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from drawing a bar, and from listing a vision tower that a text reranker has no use for."""
    from transformers.utils import logging as transformers_logging

    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
