"""Reranks a first stage's candidates: encodes each passage once, and saves every query when it is done."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from kalm_rag._version import __version__
from kalm_rag.cache import PassageCache
from kalm_rag.evaluation.candidates import Candidates
from kalm_rag.evaluation.journal import Journal, Record
from kalm_rag.evaluation.metrics import Metrics, means, p_value
from kalm_rag.evaluation.outputs import claim
from kalm_rag.evaluation.ranking import rank_candidates
from kalm_rag.evaluation.systems import System
from kalm_rag.evaluation.timing import LengthTiming, time_lengths
from kalm_rag.evaluation.trec import Ranking
from kalm_rag.model.checkpoint import find_checkpoint
from kalm_rag.model.identity import identify
from kalm_rag.reranker import KaLMReranker
from kalm_rag.retrieval.corpus import Corpus
from kalm_rag.utils.checks import check_positive
from kalm_rag.utils.display import Shown
from kalm_rag.utils.progress import Progress

_AT_ONCE = 512
"""Passages whose tokens are counted together."""


@dataclass(slots=True, repr=False)
class SystemResult(Shown):
    """The result of one system.

    Attributes:
        system: the system.
        rankings: query id to `(passage id, margin)`, best first.
        per_query: metric to query id to value.
        means: metric to mean over the queries.
        p: two-sided p-value of the first metric's difference to the first stage, not corrected; see `Entry.p_holm`.
        milliseconds: time of each query's `rank` call, its passages encoded before.
        encoded_again: passages that had to be encoded while ranking, because no cache could hold them.
        truncated_queries: queries longer than the model reads.
        passage_bytes: mean bytes of one encoded passage at this ratio.
        prefilled_bytes: mean bytes of one passage in memory after a query met it, in the system's form.
        kept: queries that an earlier start had finished, maybe on another day or machine; their times are of then.
        unanswered: as `rankings`, of the candidates' `unanswered`, which nothing else here counts.
    """

    system: System
    rankings: dict[str, list[tuple[str, float]]]
    per_query: dict[str, dict[str, float]]
    means: dict[str, float]
    p: float
    milliseconds: list[float]
    encoded_again: int
    truncated_queries: int
    passage_bytes: float
    kept: int = 0
    unanswered: dict[str, list[tuple[str, float]]] = field(default_factory=dict)
    prefilled_bytes: float = 0.0


@dataclass(slots=True, repr=False)
class Encoding(Shown):
    """The cost of encoding the candidates with one model in one precision.

    Attributes:
        model: as in `System`.
        dtype: as in `System`.
        passages: distinct passages among the candidates.
        new: those that no cache held.
        truncated: those longer than `max_length` tokens.
        seconds: for the new ones, loading of the model excluded.
        lengths: time by passage length; see `time_lengths`.
        ratio: at which that was timed.
        precision: what really computed, such as float32 products where bfloat16 was asked for.
        device: where.
        digest: of the model's content, decoder and adapter included.
        lora: as in `System`.
        storage: as in `System`.
        prefill_storage: as in `System`.
        window_tokens: as in `System`.
    """

    model: str
    dtype: str | None
    passages: int
    new: int
    truncated: int
    seconds: float
    lengths: list[LengthTiming] = field(default_factory=list)
    ratio: int = 1
    precision: str = ""
    device: str = ""
    digest: str = ""
    lora: str | None = None
    storage: str = "native"
    prefill_storage: str = "native"
    window_tokens: int | None = None

    @property
    def name(self) -> str:
        """As `System.name`."""
        return System(self.model, lora=self.lora).name


@dataclass(slots=True)
class Experiment:
    """Everything that decides the results.

    Attributes:
        corpus: the collection.
        candidates: what the first stage found.
        systems: what to compare.
        metrics: what to measure.
        out: folder that keeps finished queries, so that an interrupted run can resume; None keeps nothing.
        cache: where encoded passages are kept, as in `PassageCache`; None keeps them in memory.
        device: as in `KaLMReranker`.
        max_length: as in `KaLMReranker`.
        lengths: groups of passages to time by length; 0 times none.
        show_progress: as in `KaLMReranker`.
        local_files_only: as in `KaLMReranker`.
        tokens: passage id to tokens, for metrics of a token budget such as `R@2000t`: counted by the first model's
            tokenizer for all systems, whole passages without prefix. `evaluate` fills it in if a metric needs it.
    """

    corpus: Corpus
    candidates: Candidates
    systems: Sequence[System]
    metrics: Metrics
    out: Path | None = None
    cache: str | Path | None = "default"
    device: str | None = None
    max_length: int = 1024
    lengths: int = 5
    show_progress: bool | None = None
    local_files_only: bool = False
    tokens: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.systems:
            msg = "systems must name at least one reranker, got none"
            raise ValueError(msg)
        if not self.candidates.rankings:
            msg = "candidates must hold at least one query, got none; there is nothing to evaluate"
            raise ValueError(msg)
        for system in self.systems:
            check_positive("ratio", system.ratio)
            system.check()
        if len(set(self.systems)) < len(self.systems):
            msg = (
                "systems must differ, but one is named twice; drop the repeated model, precision, ratio or instruction"
            )
            raise ValueError(msg)

    def per_query(self, rankings: Mapping[str, Ranking]) -> dict[str, dict[str, float]]:
        """Return each metric of each judged query; see `Metrics.per_query`."""
        return self.metrics.per_query(rankings, self.candidates.qrels, self.tokens)


def count_tokens(experiment: Experiment) -> None:
    """Count the tokens of all candidates, if a metric has a token budget and they are not counted yet."""
    if not experiment.metrics.needs_tokens or experiment.tokens:
        return
    from kalm_rag.model.loading import load_tokenizer

    first = experiment.systems[0]
    found = find_checkpoint(first.model, local_files_only=experiment.local_files_only)
    tokenizer = load_tokenizer(found, escape=True)
    names = _needed(experiment)
    for start in range(0, len(names), _AT_ONCE):
        part = names[start : start + _AT_ONCE]
        rows = tokenizer.encode([experiment.corpus.passages[name] for name in part])
        experiment.tokens |= {name: len(ids) for name, ids in zip(part, rows, strict=True)}


def evaluate(
    experiment: Experiment, finished: Callable[[SystemResult], None] | None = None
) -> tuple[list[SystemResult], list[Encoding]]:
    """Rerank the candidates with every system.

    Systems of one model in one precision share one encoding of each passage, and one loaded model if they have the same
    adapter: states are kept at the ratio that divides all of theirs, which gives the others exactly.

    Args:
        experiment: what to do.
        finished: called with each result as soon as it is ready.

    Returns:
        A result per system in the order of `experiment.systems`, and what encoding took per model and precision.

    Raises:
        CheckpointError, ScoringError: as `KaLMReranker.rank`.
        ValueError: `out` holds results of something else.
    """
    if experiment.out is None:
        return _evaluate(experiment, finished)
    with _claimed(experiment.out, candidates_digest(experiment)):
        return _evaluate(experiment, finished)


@contextlib.contextmanager
def _claimed(out: Path, digest: str) -> Iterator[None]:
    """Lock a folder that belongs to these candidates, or to none yet."""
    from filelock import FileLock, Timeout

    claim(out)
    try:
        with FileLock(out / ".lock", timeout=0):
            owner = out / "candidates.sha256"
            if owner.is_file() and owner.read_text("ascii", "replace").strip() != digest:
                msg = (
                    f"{str(out)!r} holds an evaluation of other queries or candidates (another collection, depth or "
                    "first stage); give another folder (--out), or delete this one"
                )
                raise ValueError(msg)
            owner.write_text(digest + "\n", "ascii")
            yield
    except Timeout:
        msg = f"another process is evaluating into {str(out)!r}; wait for it, or give another folder (--out)"
        raise ValueError(msg) from None


def _evaluate(
    experiment: Experiment, finished: Callable[[SystemResult], None] | None
) -> tuple[list[SystemResult], list[Encoding]]:
    results: dict[System, SystemResult] = {}
    encodings = []
    count_tokens(experiment)
    base = experiment.per_query(experiment.candidates.rankings)
    ordered = sorted(experiment.systems, key=_share)
    groups = [list(group) for _, group in groupby(ordered, key=_share)]
    # Refuse whatever can be refused before loading or encoding anything.
    marks = {(system.model, system.lora): "" for system in ordered}
    for model, lora in marks:
        marks[model, lora] = _mark(model, lora, local_files_only=experiment.local_files_only)
    journals = {system: _journal(experiment, system, marks[system.model, system.lora]) for system in ordered}
    texts = [experiment.corpus.passages[name] for name in _needed(experiment)]
    # Adapters do not change encodings, so all of a model find what the first of them encoded.
    ratios: dict[tuple[str, str | None], int] = {}
    for system in ordered:
        share = system.model, system.dtype
        ratios[share] = math.gcd(ratios.get(share, 0), system.ratio)
    for systems in groups:
        first = systems[0]
        with (
            PassageCache(experiment.cache, base_ratio=ratios[first.model, first.dtype], storage=first.storage) as cache,
            _reranker(experiment, first, cache) as reranker,
        ):
            encodings.append(_encode(reranker, texts, first))
            encodings[-1].digest = marks[first.model, first.lora]
            tokens = reranker.estimate(texts).tokens
            for system in systems:
                results[system] = _run(experiment, reranker, system, base, journals[system], tokens)
                if finished is not None:
                    finished(results[system])
            if experiment.lengths:
                encodings[-1].ratio = first.ratio
                encodings[-1].lengths = time_lengths(reranker, experiment, texts, tokens, first.ratio)
    return [results[system] for system in experiment.systems], encodings


def _share(system: System) -> tuple[str, ...]:
    """What systems must have in common to use one loaded model."""
    windows = str(system.window_tokens or "")
    return system.model, system.dtype or "", system.lora or "", system.storage, system.prefill_storage, windows


def _reranker(experiment: Experiment, system: System, cache: PassageCache) -> KaLMReranker:
    return KaLMReranker(
        system.model,
        lora=system.lora,
        dtype=system.dtype,
        device=experiment.device,
        max_length=experiment.max_length,
        cache=cache,
        prefill_storage=system.prefill_storage,
        long_passages=system.long_passages,
        window_tokens=system.window_tokens,
        score_memory=0,  # times and paths are compared
        show_progress=experiment.show_progress,
        local_files_only=experiment.local_files_only,
    )


def _mark(model: str, lora: str | None, *, local_files_only: bool) -> str:
    """Return a digest of a model's content, its adapter included."""
    return identify(find_checkpoint(model, local_files_only=local_files_only, lora=lora)).mark


def _journal(experiment: Experiment, system: System, mark: str) -> Journal:
    """Open the journal of a system's finished queries and check that it fits."""
    path = None if experiment.out is None else experiment.out / "systems" / f"{system.slug}.jsonl"
    journal = Journal(
        path,
        {
            "kalm_rag": __version__,
            "model": mark,
            "dtype": system.dtype,
            "device": experiment.device,
            "instruction": system.instruction,
            "ratio": system.ratio,
            "max_length": experiment.max_length,
            # None where it is the default, so that journals written before these settings existed still fit.
            **system.changed(),
        },
    )
    journal.check()
    return journal


def candidates_digest(experiment: Experiment) -> str:
    """SHA-256 of queries and candidates, ids and texts."""
    corpus, content = experiment.corpus, hashlib.sha256()
    for query, ranking in experiment.candidates.every_ranking().items():
        texts = [corpus.passages[name] for name, _ in ranking]
        content.update(json.dumps([query, corpus.queries[query], [name for name, _ in ranking], texts]).encode())
    return content.hexdigest()


def data_digests(experiment: Experiment) -> dict[str, str]:
    """Return SHA-256 digests of what went in: passages, queries, judgements, and the candidates."""
    corpus = experiment.corpus
    parts: dict[str, Mapping[str, object]] = {
        "passages": corpus.passages,
        "queries": corpus.queries,
        "judgements": corpus.qrels,
    }
    found = {}
    for name, part in parts.items():
        content = hashlib.sha256()
        for key, value in part.items():
            content.update(json.dumps([key, value]).encode())
        found[name] = content.hexdigest()
    return found | {"candidates": candidates_digest(experiment)}


def _encode(reranker: KaLMReranker, texts: Sequence[str], system: System) -> Encoding:
    _ = reranker.scorer  # loads the model
    began = time.perf_counter()
    report = reranker.encode(texts)
    seconds = time.perf_counter() - began
    loaded = reranker.scorer.loaded
    return Encoding(
        system.model,
        system.dtype,
        len(texts),
        report.new,
        report.truncated,
        seconds,
        precision=loaded.precision,
        device=str(loaded.device),
        lora=system.lora,
        storage=system.storage,
        prefill_storage=system.prefill_storage,
        window_tokens=system.window_tokens,
    )


def _needed(experiment: Experiment) -> list[str]:
    every = experiment.candidates.every_ranking()
    return list(dict.fromkeys(name for ranking in every.values() for name, _ in ranking))


def _run(
    experiment: Experiment,
    reranker: KaLMReranker,
    system: System,
    base: Mapping[str, Mapping[str, float]],
    journal: Journal,
    tokens: Sequence[int],
) -> SystemResult:
    candidates, corpus = experiment.candidates, experiment.corpus
    before = reranker.cache.stats().encoded
    label = f"{system.name} r{system.ratio}"
    kept, every = 0, candidates.every_ranking()
    with journal, Progress(len(every), label, unit="query", show=experiment.show_progress) as progress:
        for query, ranking in every.items():
            if query in journal:
                kept += query in candidates.rankings
            else:
                began = time.perf_counter()
                ordered, truncated = rank_candidates(reranker, system, corpus, query, ranking)
                journal.add(Record(query, ordered, time.perf_counter() - began, truncated))
            progress.advance(1)
        records = journal.records(candidates.rankings)
        others = journal.records(candidates.unanswered)
    rankings = {record.query: record.ranking for record in records}
    per_query = experiment.per_query(rankings)
    first = experiment.metrics.names[0]
    return SystemResult(
        system,
        rankings,
        per_query,
        means(per_query),
        p_value(per_query[first], base[first]),
        [1000 * record.seconds for record in records if record.ranking],
        reranker.cache.stats().encoded - before,
        sum(record.truncated for record in records),
        _mean(reranker.scorer.states.bytes_of(length, system.ratio) for length in tokens),
        kept,
        {record.query: record.ranking for record in others},
        _mean(_prefilled_bytes(reranker, length, system) for length in tokens),
    )


def _prefilled_bytes(reranker: KaLMReranker, tokens: int, system: System) -> int:
    """Return what a query's passage takes in memory. The compact form needs the encoder states as well."""
    scorer = reranker.scorer
    states = scorer.states.bytes_of(tokens, system.ratio) if system.prefill_storage == "compact" else 0
    return states + scorer.passage_kv.bytes_of(tokens, system.ratio)


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / max(1, len(found))
