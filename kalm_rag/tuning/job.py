"""Tunes a model on judgements, and measures what that gained."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kalm_rag.cache import PassageCache
from kalm_rag.errors import MissingExtraError
from kalm_rag.evaluation.candidates import Candidates, bm25_candidates
from kalm_rag.evaluation.experiment import Experiment
from kalm_rag.evaluation.metrics import Metrics
from kalm_rag.evaluation.systems import System
from kalm_rag.model.checkpoint import find_checkpoint
from kalm_rag.model.identity import identify
from kalm_rag.reranker import KaLMReranker
from kalm_rag.retrieval.corpus import Corpus
from kalm_rag.retrieval.segment import AUTO, check_language
from kalm_rag.settings import DEFAULT_INSTRUCTION, Settings, base_ratio
from kalm_rag.tuning.adapter import insert_adapter, save_adapter
from kalm_rag.tuning.folder import CACHE, LOCK, REPORT, check_owner, claim, remove_adapter
from kalm_rag.tuning.judgements import Example, check_held_out, make_examples, notes_on, read_judgements, split_queries
from kalm_rag.tuning.recipe import Recipe
from kalm_rag.tuning.report import METRIC, Tuned, compare
from kalm_rag.tuning.state import FILE
from kalm_rag.utils.checks import check_choice, check_positive, check_text
from kalm_rag.utils.digests import tagged_digest
from kalm_rag.utils.display import duration_text
from kalm_rag.utils.files import replace_file
from kalm_rag.utils.paths import DEFAULT, passages_dir, user_path

if TYPE_CHECKING:
    from kalm_rag.tuning.task import DecoderTask

logger = logging.getLogger(__name__)

DTYPES = ("float32", "bfloat16")
"""What the model may be in; the adapter itself is trained in float32."""

_PACKAGES = {"peft": "peft", "bm25s": "bm25s", "ir_measures": "ir-measures", "scipy": "scipy", "filelock": "filelock"}


@dataclass(frozen=True, slots=True)
class _Job:
    """What is tuned, and with what."""

    model: str
    folder: Path
    device: str | None
    dtype: str | None
    settings: Settings
    cache: str | Path
    recipe: Recipe
    language: str
    fold_accents: bool
    show_progress: bool | None
    say: Callable[[str], None]

    def open_cache(self) -> PassageCache:
        """Open the cache of encoded passages."""
        return PassageCache(self.cache, base_ratio=base_ratio(math.gcd(*self.recipe.ratios)))


def tune(
    source: str | Path | Corpus,
    out: str | Path,
    *,
    model: str | Path = "nano",
    revision: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    max_length: int = 1024,
    instruction: str | None = None,
    cache: str | Path | None = DEFAULT,
    queries: str | Path | None = None,
    qrels: str | Path | None = None,
    split: str = "train",
    recipe: Recipe | None = None,
    by_passages: bool = False,
    held_out: Collection[str] = (),
    language: str = AUTO,
    fold_accents: bool = False,
    show_progress: bool | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    announce: Callable[[str], None] | None = None,
) -> Tuned:
    """Train a low-rank adapter of the decoder on judgements, and compare before and after on held-out queries.

    The encoder is not touched: passages are encoded once, those in the cache are not encoded again, and the cache stays
    valid. If it is interrupted, the same call resumes.

    Args:
        source: a BEIR folder, a file of JSON lines with `query`, `positive` and `negatives`, or a `Corpus`.
        out: folder for the adapter and `tuning.json`, the report; new, empty, or of an earlier call with the same
            model, judgements and recipe. Another adapter is not overwritten.
        model: as in `KaLMReranker`.
        revision: as in `KaLMReranker`.
        device: as in `KaLMReranker`.
        dtype: `float32` or `bfloat16`; the adapter itself is trained in float32. Default: as in `KaLMReranker`.
        max_length: tokens of a passage that are read.
        instruction: what "relevant" means. Default: the model cards'.
        cache: folder of encoded passages. Default: as in `KaLMReranker`; None for one in `out`.
        queries: file of queries, see `read_judgements`.
        qrels: file of judgements, see `read_judgements`.
        split: which judgements of a BEIR folder, see `read_judgements`.
        recipe: how to train.
        by_passages: keep queries that share relevant passages together, so that no part of the split has those of
            another one.
        held_out: ids of the queries that measure the result. Default: a share of all, see `Recipe`. With `by_passages`,
            queries that share relevant passages with them are left out of training.
        language: whose stop words BM25 leaves out when it finds negatives, see `bm25_candidates`.
        fold_accents: whether BM25 reads letters without their accents.
        show_progress: as in `KaLMReranker`.
        token: as in `KaLMReranker`.
        local_files_only: as in `KaLMReranker`.
        announce: is told in sentences what is done and how long it takes. Default: the log.

    Raises:
        MissingExtraError: the extra `tune` is not installed.
        FileNotFoundError, ValueError, TypeError: an argument or the judgements are wrong; the message says how.
        CheckpointError: the model cannot be found or used.
        OSError: adapter or report cannot be written. Where there was room for it, the next call finds what was trained.
    """
    _check_packages()
    from filelock import FileLock, Timeout

    folder = user_path(out, "out")
    if dtype is not None:
        check_choice("dtype", dtype, DTYPES)
    check_language(language)
    task = DEFAULT_INSTRUCTION if instruction is None else check_text("instruction", instruction)
    settings = Settings(max_length=check_positive("max_length", max_length), instruction=task, prefill_memory=0)
    corpus = source if isinstance(source, Corpus) else read_judgements(source, queries, qrels, split)
    held_out = check_held_out(corpus.qrels, held_out)
    claim(folder, [given for given in (source, queries, qrels) if isinstance(given, (str, Path))])
    checkpoint = find_checkpoint(model, revision=revision, token=token, local_files_only=local_files_only)
    if cache is None or (cache == DEFAULT and passages_dir() is None):
        cache = folder / CACHE
    job = _Job(
        str(checkpoint.folder),
        folder,
        device,
        dtype,
        settings,
        cache,
        recipe or Recipe(),
        language,
        fold_accents,
        show_progress,
        announce or logger.info,
    )
    try:
        with FileLock(folder / LOCK, timeout=0):
            return _tune(job, corpus, str(model), by_passages=by_passages, held_out=held_out)
    except Timeout:
        msg = f"another process is tuning into {str(folder)!r}; wait for it, or give another folder (--out)"
        raise ValueError(msg) from None


def _tune(job: _Job, corpus: Corpus, name: str, *, by_passages: bool, held_out: Collection[str]) -> Tuned:
    recipe = job.recipe
    candidates = bm25_candidates(
        corpus,
        recipe.depth,
        show_progress=job.show_progress,
        language=job.language,
        fold_accents=job.fold_accents,
    )
    usable = [query for query in held_out if query in candidates.qrels]
    if held_out and not usable:
        msg = f"none of the {len(held_out)} queries of held_out has a relevant passage; hold out others"
        raise ValueError(msg)
    parts = split_queries(candidates.qrels, recipe, by_passages=by_passages, held_out=usable)
    warnings = notes_on(corpus, candidates, parts)
    examples, lost = make_examples(corpus, candidates, parts.train, recipe)
    warnings += [f"of the queries that train, {text}" for text in lost]
    validation, lost = make_examples(corpus, candidates, parts.validation, recipe)
    warnings += [f"of the queries that decide when to stop, {text}" for text in lost]
    for warning in warnings:
        job.say(f"note: {warning}")
    measuring = Candidates(
        candidates.name,
        {query: candidates.rankings[query] for query in parts.test},
        {query: candidates.qrels[query] for query in parts.test},
        (),
    )
    measured = [corpus.passages[found] for ranking in measuring.rankings.values() for found, _ in ranking]
    encoded = _encode(job, [*_texts(examples), *_texts(validation), *measured])
    counts = len(parts.train), len(parts.validation), len(parts.test)
    tuned = _train(job, examples, validation, counts, name)
    tuned.encoded += encoded
    tuned.warnings = warnings
    if tuned.folder is not None:
        ratios = list(dict.fromkeys((recipe.ratios[0], max(recipe.ratios))))
        systems = [System(job.model, ratio, job.dtype, job.settings.instruction) for ratio in ratios]
        text = " and ".join(map(str, ratios))
        job.say(f"Comparing before and after on {counts[2]} held-out queries, at ratio {text}.")
        experiment = Experiment(
            corpus,
            measuring,
            systems,
            Metrics([METRIC]),
            cache=job.cache,
            device=job.device,
            max_length=job.settings.max_length,
            lengths=0,
            show_progress=job.show_progress,
            local_files_only=True,
        )
        tuned.comparisons = compare(experiment, [replace(one, lora=str(tuned.folder)) for one in systems])
    report = {**tuned.as_json(), "model": name, "recipe": asdict(recipe)}
    try:
        if tuned.folder is None:
            remove_adapter(job.folder)
        replace_file(job.folder / REPORT, (json.dumps(report, indent=1) + "\n").encode())
        (job.folder / FILE).unlink(missing_ok=True)
    except OSError as error:
        msg = (
            f"cannot write the report to {str(job.folder / REPORT)!r} ({error}): make room there and rerun; "
            f"{'the adapter is complete' if tuned.folder else 'no step made the model better, so there is no adapter'}"
        )
        raise OSError(error.errno, msg) from error
    return tuned


def _check_packages() -> None:
    for module, package in _PACKAGES.items():
        if importlib.util.find_spec(module) is None:
            raise MissingExtraError(package, "tune")


def _texts(examples: Iterable[Example]) -> list[str]:
    return [text for one in examples for text in (*one.positives, *one.judged, *one.found)]


def _encode(job: _Job, texts: Sequence[str]) -> int:
    """Encode what the cache lacks, with the fast modules; return how many passages that were."""
    texts = list(dict.fromkeys(texts))
    with (
        job.open_cache() as cache,
        KaLMReranker(
            job.model,
            device=job.device,
            dtype=job.dtype,
            max_length=job.settings.max_length,
            cache=cache,
            show_progress=job.show_progress,
        ) as reranker,
    ):
        report = reranker.encode(texts)
    job.say(f"{len(texts)} passages: {report.new} encoded now, {len(texts) - report.new} served from the cache.")
    return report.new


def _train(
    job: _Job, examples: Sequence[Example], validation: Sequence[Example], counts: tuple[int, int, int], name: str
) -> Tuned:
    """Train, and write the best adapter; the model's memory is free again when this returns."""
    from kalm_rag.model.loading import load_model, resolve_device
    from kalm_rag.model.prompts import Prompts
    from kalm_rag.states import StatesSource, key_space
    from kalm_rag.tuning.task import DecoderTask
    from kalm_rag.tuning.trainer import Trainer
    from kalm_rag.utils.turns import Turns

    settings, recipe = job.settings, job.recipe
    checkpoint = find_checkpoint(job.model)
    identity = identify(checkpoint)
    loaded = load_model(checkpoint, settings=settings, device=resolve_device(job.device), dtype=job.dtype, fast=False)
    dtype = loaded.encoder_precision
    with job.open_cache() as cache:
        keys = key_space(identity, max_length=settings.max_length, dtype=dtype, storage=cache.storage)
        prompts = Prompts(loaded.tokenizer, settings, loaded.model.config.decoder.max_position_embeddings)
        states = StatesSource(loaded, settings, cache, keys, prompts, Turns())
        owner = _digest([identity.decoder, identity.tokenizer, dtype, asdict(settings), asdict(recipe)])
        owner = _digest([owner, *(asdict(one) for one in (*examples, *validation))])
        check_owner(job.folder, owner)
        matrices = insert_adapter(loaded.model, recipe)
        task = DecoderTask(loaded, states, prompts, examples, validation, recipe, matrices, owner)
        trainer = Trainer(task, job.folder)
        estimate = _announce_time(job, task, trainer.progressed.step)
        trainer.run(job.show_progress)
        encoded = cache.stats().encoded
    done = trainer.progressed
    if done.best_step:
        try:
            save_adapter(job.folder, trainer.best, recipe, name, (identity.encoder, identity.decoder))
        except OSError as error:
            msg = (
                f"cannot write the adapter to {str(job.folder)!r} ({error}): make room there and rerun; what was "
                f"trained is {'kept' if trainer.is_kept else 'lost, because it could not be written either'}"
            )
            raise OSError(error.errno, msg) from error
    return Tuned(
        job.folder if done.best_step else None,
        [],
        done.step,
        done.best_step,
        done.losses,
        done.validation,
        done.ended,
        counts,
        encoded,
        estimate,
        done.seconds,
        owner=owner,
    )


def _announce_time(job: _Job, task: DecoderTask, done: int) -> float:
    step = task.time_step()
    estimate = task.estimate(step, done)
    resumed = f", resuming after step {done}" if done else ""
    job.say(
        f"Training takes about {duration_text(estimate)} at most: {task.steps - done} steps of {step:.2g} s"
        f"{resumed}, and measurements between them that may stop it sooner."
    )
    return estimate


def _digest(parts: list[Any]) -> str:
    return tagged_digest(*(json.dumps(part, sort_keys=True) for part in parts)).hexdigest()
