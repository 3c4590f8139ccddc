"""Scores the same pairs by every path that a score can take, so that the paths can be compared.

A path is a precision, and a way from passage to score: the whole prompt on fresh states, prefilled passages made now or
kept in memory, states or prefilled passages read back from disk, each in the model's own numbers, in 8 bits or compact.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kalm_rag.cache import PassageCache
from kalm_rag.cache.passage_cache import Keep
from kalm_rag.demo_data import load_demo
from kalm_rag.model.checkpoint import Checkpoint
from kalm_rag.model.loading import LoadedModel
from kalm_rag.scorer import Scorer
from kalm_rag.scoring.score import Score
from kalm_rag.settings import DEFAULT_INSTRUCTION, Settings

Storage = Literal["native", "int8", "compact"]
Pairs = Sequence[tuple[str, str]]

PAIRS = 20
"""Pairs of query and passage that every path scores."""


_MEMORY = 1_000_000_000
"""Bytes of prefilled passages kept in memory: more than those pairs take, whatever is free."""


@dataclass(frozen=True, slots=True)
class ScorePath:
    """One way from passage to score.

    Attributes:
        name: for people.
        prefilled: whether passages are prefilled; otherwise the whole prompt runs.
        again: whether a second call, which finds everything in memory, is what counts.
        disk: whether another cache wrote the passages to disk before.
        storage: how states or, where `prefilled`, prefilled passages are kept.
    """

    name: str
    prefilled: bool = False
    again: bool = False
    disk: bool = False
    storage: Storage = "native"


PATHS = (
    ScorePath("plain"),
    ScorePath("prefilled", prefilled=True),
    ScorePath("prefilled, from memory", prefilled=True, again=True),
    ScorePath("8-bit prefilled, from memory", prefilled=True, again=True, storage="int8"),
    ScorePath("compact, from memory", prefilled=True, again=True, storage="compact"),
    ScorePath("states, from disk", disk=True),
    ScorePath("8-bit states, from disk", disk=True, storage="int8"),
    ScorePath("prefilled, from disk", prefilled=True, disk=True),
    ScorePath("8-bit prefilled, from disk", prefilled=True, disk=True, storage="int8"),
    ScorePath("compact, from disk", prefilled=True, disk=True, storage="compact"),
)
"""Every path of one precision; the first one is what the others are compared with."""


STOCK = ScorePath("plain, transformers' modules")
"""The plain path with no module of `kalm_rag.model.cpu_kernels`."""


class NotTakenError(RuntimeError):
    """The scores came by another path than the one to check, such as from the encoder instead of the disk."""


def demo_pairs(count: int = PAIRS) -> list[tuple[str, str]]:
    """Return pairs of the bundled corpus: each passage with a question that it answers, and with the next question."""
    corpus = load_demo()
    answers = {
        query: next(name for name, value in judged.items() if value > 0)
        for query, judged in corpus.qrels.items()
        if any(value > 0 for value in judged.values())
    }
    chosen = list(dict.fromkeys(answers.values()))[: count // 2]
    queries = [next(query for query, name in answers.items() if name == passage) for passage in chosen]
    pairs = []
    for place, passage in enumerate(chosen):
        both = (queries[place], queries[(place + 1) % len(queries)])
        pairs += [(corpus.queries[query], corpus.passages[passage]) for query in both]
    return pairs


@contextmanager
def scratch_folder() -> Iterator[Path | None]:
    """Yield an empty folder for the paths that read from disk, or None where none can be made."""
    with ExitStack() as stack:
        try:
            name = stack.enter_context(
                tempfile.TemporaryDirectory(prefix="kalm-rag-doctor-", ignore_cleanup_errors=True)
            )
        except OSError:
            yield None
            return
        yield Path(name)


def take(
    path: ScorePath,
    loaded: LoadedModel,
    checkpoint: Checkpoint,
    pairs: Pairs,
    folder: Path | None,
    instruction: str = DEFAULT_INSTRUCTION,
) -> list[Score]:
    """Score pairs by one path.

    Args:
        path: which.
        loaded: the model, in the path's precision.
        checkpoint: where it came from.
        pairs: queries and passages.
        folder: an empty or earlier used folder for passages of this precision; None where no path uses the disk.
        instruction: what "relevant" means.

    Raises:
        NotTakenError: the scores came by another path.
        KaLMError, ValueError, RuntimeError: the model cannot score that way.
    """
    settings = Settings(
        instruction=instruction,
        prefill_memory=_MEMORY if path.prefilled else 0,
        prefill_storage=path.storage if path.prefilled else "native",
        score_memory=0,  # the second round must not return the first one's scores
    )
    if path.disk and folder is None:
        msg = "no temporary folder can be made; set TMPDIR to a folder that you may write to"
        raise NotTakenError(msg)
    if path.disk:
        with _cache(path, settings, folder) as cache:
            Scorer(loaded, checkpoint, settings, cache).encode([passage for _, passage in pairs])
    with _cache(path, settings, folder) as cache:
        scorer = Scorer(loaded, checkpoint, settings, cache)
        for _ in range(2 if path.again else 1):
            scores = scorer.score(pairs, settings.instruction, settings.ratio)
        _check_taken(path, scorer, cache, len(pairs))
    return scores


def _cache(path: ScorePath, settings: Settings, folder: Path | None) -> PassageCache:
    if not path.disk:
        return PassageCache(None, base_ratio=settings.ratio)
    return PassageCache(
        folder,
        memory=0,
        base_ratio=settings.ratio,
        storage="int8" if path.storage == "int8" and not path.prefilled else "native",
        keep=_keep(path),
    )


def _keep(path: ScorePath) -> Keep:
    if not path.prefilled:
        return "states"
    return "compact" if path.storage == "compact" else "prefilled"


def _check_taken(path: ScorePath, scorer: Scorer, cache: PassageCache, pairs: int) -> None:
    """Make sure that the counters show the path.

    Raises:
        NotTakenError: they show another one.
    """
    counters = scorer.passage_kv.cached.stats().counters
    if path.prefilled and (counters.full_prompts >= pairs or not counters.hits + counters.stored + counters.misses):
        msg = "the whole prompt ran instead: this tokenizer or this release of transformers does not allow a prefix"
        raise NotTakenError(msg)
    if path.again and not counters.hits:
        msg = "no passage was found prefilled in memory"
        raise NotTakenError(msg)
    if path.disk and (cache.stats().encoded or (path.prefilled and not counters.stored)):
        msg = "the passages were not read from disk: the cache did not keep them"
        raise NotTakenError(msg)
