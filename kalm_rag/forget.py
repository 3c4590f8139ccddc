"""Finds the key spaces of a model without loading its weights, to forget texts that were cached with it."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from kalm_rag.cache.spaces import Behind, Space
from kalm_rag.errors import CheckpointError
from kalm_rag.model.checkpoint import Checkpoint, find_checkpoint
from kalm_rag.model.loading import INT8_ENCODER
from kalm_rag.settings import Settings

if TYPE_CHECKING:
    from pathlib import Path

    from kalm_rag.scorer import Scorer

logger = logging.getLogger(__name__)

RATIOS = (1, 2, 4, 8, 16, 32)
"""The ratios that the models are trained for."""

_DTYPES = ("float32", "bfloat16", "float16", INT8_ENCODER)
_STORAGES = ("native", "int8")


def spaces_of(
    checkpoint: Checkpoint,
    settings: Settings | None = None,
    *,
    max_lengths: Iterable[int] = (),
    ratios: Sequence[int] = RATIOS,
) -> list[Space]:
    """Return the key spaces that entries of a checkpoint may be in, for `PassageCache.forget`.

    They are those of every dtype and storage. Only the tokenizer is loaded; the digest of the weights is remembered, or
    computed by reading them once.

    Args:
        checkpoint: the model's files, see `kalm_rag.model.checkpoint.find_checkpoint`.
        settings: names `max_length`, instruction and system prompt, default those of `KaLMReranker`.
        max_lengths: further values of `max_length`.
        ratios: the ratios of prefilled passages.

    Raises:
        CheckpointError: its files cannot be read.
    """
    from kalm_rag.model.identity import identify
    from kalm_rag.model.loading import load_tokenizer
    from kalm_rag.model.prefill import precision_names
    from kalm_rag.model.prefiller import find_prompt_prefix
    from kalm_rag.model.prompts import Prompts
    from kalm_rag.states import key_space

    settings = settings or Settings()
    identity = identify(checkpoint)
    tokenizer = load_tokenizer(checkpoint, escape=settings.control_tokens == "escape")
    prompts = Prompts(tokenizer, settings, sys.maxsize)  # nothing runs these prompts, so they may have any length
    prefix = find_prompt_prefix(prompts, settings.instruction).ids
    found = []
    for max_length in dict.fromkeys((settings.max_length, *max_lengths)):
        for dtype in _DTYPES:
            for storage in _STORAGES:
                keys = key_space(identity, max_length=max_length, dtype=dtype, storage=storage)
                found.append(Space(keys, tokenizer.control))
                behind = (Behind(ratio, prefix, kind) for ratio in ratios for kind in precision_names(dtype))
                found += [Space(keys, tokenizer.control, one) for one in behind]
    return found


def own_spaces(
    scorer: Scorer | None, settings: Settings, model: str | Path, revision: str | None, lora: Path | None = None
) -> list[Space]:
    """Return the key spaces of a reranker's model and settings, without loading or downloading the model.

    Entries that a version without records wrote are found in these.

    Args:
        scorer: the reranker's, if it is loaded.
        settings: the reranker's.
        model: as the reranker was given it.
        revision: as the reranker was given it.
        lora: as the reranker was given it.
    """
    if scorer is not None:
        return scorer.spaces()
    try:
        checkpoint = find_checkpoint(model, revision=revision, local_files_only=True, lora=lora)
        return spaces_of(checkpoint, settings, ratios=(settings.ratio,))
    except CheckpointError as error:
        if lora is not None:  # encoder states do not depend on it
            logger.warning("the adapter is not here, so only the recorded key spaces of it are searched: %s", error)
            return own_spaces(None, settings, model, revision)
        logger.warning("the model is not here, so only the recorded key spaces are searched: %s", error)
        return []
