"""Finds the key spaces of a model without loading its weights, to forget texts that were cached with it."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from kalm_rag.cache.spaces import Behind, Space, WindowRule, recorded_spaces
from kalm_rag.documents import iter_documents
from kalm_rag.errors import CheckpointError
from kalm_rag.model.checkpoint import Checkpoint, find_checkpoint
from kalm_rag.model.loading import INT8_ENCODER
from kalm_rag.settings import Settings

if TYPE_CHECKING:
    from pathlib import Path

    from kalm_rag.cache import ForgetReport, PassageCache
    from kalm_rag.results import Document
    from kalm_rag.scorer import Scorer
    from kalm_rag.windows.source import WindowSource

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
    rule = WindowRule(*settings.window, settings.max_windows) if settings.splits else None
    found = []
    for max_length in dict.fromkeys((settings.max_length, *max_lengths)):
        for dtype in _DTYPES:
            for storage in _STORAGES:
                keys = key_space(identity, max_length=max_length, dtype=dtype, storage=storage)
                found.append(Space(keys, tokenizer.control, windows=rule))
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


def forget_texts(
    cache: PassageCache,
    texts: Iterable[str],
    scorer: Scorer | None,
    settings: Settings,
    model: str | Path,
    revision: str | None,
    lora: Path | None = None,
) -> ForgetReport:
    """Delete what a cache keeps of texts and of their windows: those of the settings, and those that it has recorded.

    Args:
        cache: the reranker's.
        texts: the passages, whole.
        scorer: as in `own_spaces`.
        settings: as in `own_spaces`.
        model: as in `own_spaces`.
        revision: as in `own_spaces`.
        lora: as in `own_spaces`.

    Raises:
        CheckpointError: the settings split long passages, and windows cannot be found without the tokenizer.
        StoreError: see `PassageCache.forget`.
    """
    spaces = own_spaces(scorer, settings, model, revision, lora)
    recorded = recorded_spaces(cache.store)[0].values()
    windows: WindowFinder | None = None
    if settings.splits or split_alike(recorded, spaces):
        try:
            checkpoint = find_checkpoint(model, revision=revision, local_files_only=True)
        except CheckpointError as error:
            msg = (
                f"the windows of passages cannot be found without the model's tokenizer: nothing is forgotten: {error}"
            )
            raise CheckpointError(msg) from error
        windows = WindowFinder(checkpoint, settings, [*split_alike(recorded, spaces), *spaces])
    report = forget_with_windows(cache, texts, spaces, [] if windows is None else [windows])
    if scorer is not None:
        scorer.windows.clear()
    return report


class WindowFinder:
    """Every window that a model may have made of a passage.

    Args:
        checkpoint: the model's files, of which the tokenizer is loaded.
        settings: say how long passages are split, if they are.
        spaces: key spaces of the model that say so too.

    Attributes:
        spaces: those whose windows are found.
    """

    def __init__(self, checkpoint: Checkpoint, settings: Settings, spaces: Iterable[Space]) -> None:
        from kalm_rag.model.loading import load_tokenizer
        from kalm_rag.windows.source import WindowSource

        # One that breaks nothing: both forms of a text are split.
        self._tokenizer = load_tokenizer(checkpoint, escape=False)
        spaces = list(spaces)
        rules = {space.windows for space in spaces if space.windows is not None}
        if settings.splits:
            rules.add(WindowRule(*settings.window, settings.max_windows))
        self._sources: dict[WindowRule, WindowSource] = {}
        for rule in sorted(rules):
            try:
                self._sources[rule] = WindowSource(self._tokenizer, settings.splitting(*rule))
            except ValueError as error:  # a record is untrusted
                logger.warning("a record of key spaces names windows that cannot be: %s", error)
        self.spaces = [space for space in spaces if space.windows in self._sources]

    def of(self, text: str) -> list[str]:
        """Return the windows of a passage, as it is and with its control tokens broken; none if it was not split."""
        forms = dict.fromkeys((text, self._tokenizer.control.broken(text)))
        found = [source.split([form])[form] for source in self._sources.values() for form in forms]
        return list(dict.fromkeys(part for windows in found if windows.spans is not None for part in windows.texts))


def split_alike(recorded: Iterable[Space], spaces: Iterable[Space]) -> list[Space]:
    """Return the recorded key spaces of split passages whose tokenizer is that of other key spaces."""
    tokenizers = {space.keys.fields["tokenizer"] for space in spaces}
    return [space for space in recorded if space.windows is not None and space.keys.fields["tokenizer"] in tokenizers]


def forget_with_windows(
    cache: PassageCache, texts: Iterable[Document], spaces: Sequence[Space], windows: Sequence[WindowFinder]
) -> ForgetReport:
    """Delete what a cache keeps of texts and of their windows; the report counts the texts that were given.

    Args:
        cache: where from.
        texts: the passages, whole.
        spaces: as in `PassageCache.forget`.
        windows: find the windows.
    """
    count = 0

    def all_texts() -> Iterator[str]:
        nonlocal count
        for passage in iter_documents(texts):
            count += 1
            yield passage.text
            for one in windows:
                yield from one.of(passage.text)

    report = cache.forget(all_texts(), [*spaces, *(space for one in windows for space in one.spaces)])
    return replace(report, texts=count)
