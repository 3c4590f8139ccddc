"""What work costs on a machine: measured here, or given."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kalm_rag.sizing.plan import Workload

_ENCODED, _QUERIES = 12, 7
_WORDS = ("the", "cache", "keeps", "what", "was", "encoded", "so", "that", "another", "query", "need", "not", "wait")


@dataclass(frozen=True, slots=True)
class Costs:
    """What one machine does; None where nobody knows.

    Attributes:
        encode_tokens: tokens of passages that it encodes in a second.
        query_seconds: of a query over the workload's candidates, whose entries are on its disk.
        read_seconds: of reading those entries, which is part of a query.
        joint_seconds: of a query over them by a joint cross-encoder, which reads each candidate with the query.
        source: where the numbers come from, for people.
    """

    encode_tokens: float | None = None
    query_seconds: float | None = None
    read_seconds: float | None = None
    joint_seconds: float | None = None
    source: str = "given"


def measure_costs(model: str, workload: Workload, folder: Path, dtype: str | None = None) -> Costs:
    """Measure a model on this machine, on passages of the workload's length.

    A joint cross-encoder is taken to cost what encoding query and passage together costs: one of the same size.

    Args:
        model: as in `KaLMReranker`, on this machine.
        workload: how long passages and queries are, and in which form passages are kept.
        folder: an empty folder for the passages.
        dtype: as in `KaLMReranker`.

    Raises:
        CheckpointError: the model is not on this machine.
    """
    from kalm_rag.cache import PassageCache
    from kalm_rag.reranker import KaLMReranker
    from kalm_rag.utils.machine import this_machine

    def opened() -> KaLMReranker:
        cache = PassageCache(folder, keep=workload.form, memory=0, base_ratio=workload.ratio)
        return KaLMReranker(
            model, dtype=dtype, cache=cache, prefill_memory=0 if workload.form != "states" else "auto",
            ratio=workload.ratio, max_length=max(64, workload.tokens), score_memory=0, local_files_only=True,
        )  # fmt: skip

    first = opened()
    text = _text_of(lambda text: first.estimate([text]).tokens[0], workload.tokens)
    passages = [f"{number} {text}" for number in range(max(_ENCODED, workload.candidates))]
    seconds = first.scorer.states.time_encoding(passages[:_ENCODED])
    tokens = sum(first.estimate(passages[:_ENCODED]).tokens)
    first.encode(passages, show_progress=False)
    first.close()
    first.cache.close()
    taken = []
    query = " ".join(_WORDS[:8])
    second = opened()
    second.load(encoder=False)
    for number in range(_QUERIES):
        if workload.form == "states":  # what is prefilled in memory is not on disk
            second.scorer.passage_kv.cached.memory.clear()
        began = time.perf_counter()
        second.rank(f"{query} {number}", passages[: workload.candidates])
        taken.append(time.perf_counter() - began)
    second.close()
    store = second.cache.store
    reads = []
    keys = [] if store is None else list(store.keys())[: workload.candidates * (2 if workload.form == "compact" else 1)]
    for _ in range(_QUERIES):
        began = time.perf_counter()
        if store is not None:
            store.get_many(keys)
        reads.append(time.perf_counter() - began)
    second.cache.close()
    rate = tokens / seconds
    joint = workload.candidates * (workload.tokens + workload.query_tokens) / rate
    source = f"measured here ({model}, {' '.join(this_machine().features)})"
    return Costs(rate, median(taken[1:]), median(reads[1:]), joint, source)


def _text_of(count: Callable[[str], int], tokens: int) -> str:
    """Return a text of about so many tokens."""
    each = max(1.0, count(" ".join(_WORDS * 8)) / (8 * len(_WORDS)))
    words = max(1, round((tokens - 4) / each))
    return " ".join(_WORDS[place % len(_WORDS)] for place in range(words))
