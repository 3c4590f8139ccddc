"""`kalm-rag eval`: quality, cost and compression on the user's own data."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kalm_rag.cli.eval_options import (
    AimOption,
    CalibrateOption,
    CompareOption,
    DepthsOption,
    DtypesOption,
    InstructionsOption,
    LimitQueriesOption,
    LorasOption,
    MetricsOption,
    ModelsOption,
    PrefillStoragesOption,
    RatiosOption,
    RunOption,
    StoragesOption,
    WindowSizesOption,
)
from kalm_rag.cli.eval_tables import show_summary
from kalm_rag.cli.options import (
    DeviceOption,
    FoldAccentsOption,
    FormatOption,
    IdFieldOption,
    JsonOption,
    LanguageOption,
    MaxLengthOption,
    QrelsOption,
    QueriesOption,
    SplitOption,
    TextFieldOption,
    whole_numbers,
)
from kalm_rag.cli.output import note_mini, print_json
from kalm_rag.cli.thresholds import show_thresholds
from kalm_rag.model.checkpoint import MINI
from kalm_rag.utils.display import visible, visible_line

if TYPE_CHECKING:
    from kalm_rag.evaluation import System
    from kalm_rag.evaluation.candidates import Candidates
    from kalm_rag.retrieval.corpus import Corpus


def evaluate(
    source: Annotated[
        str | None,
        typer.Argument(
            help="Read this BEIR folder, or this corpus (JSONL, text, folder) with --queries and --qrels.",
            show_default="the bundled Python FAQ",
        ),
    ] = None,
    queries: QueriesOption = None,
    qrels: QrelsOption = None,
    split: SplitOption = "test",
    run: RunOption = None,
    depth: DepthsOption = "50",
    language: LanguageOption = "auto",
    fold_accents: FoldAccentsOption = False,
    limit_queries: LimitQueriesOption = None,
    model: ModelsOption = None,
    lora: LorasOption = None,
    ratio: RatiosOption = "1,2,4,8,16,32",
    dtype: DtypesOption = None,
    storage: StoragesOption = None,
    prefill_storage: PrefillStoragesOption = None,
    window_tokens: WindowSizesOption = None,
    instruction: InstructionsOption = None,
    metrics: MetricsOption = "nDCG@10,MRR@10,R@10,MAP,R@2000t",
    compare: CompareOption = None,
    calibrate: CalibrateOption = False,
    aim: AimOption = None,
    max_length: MaxLengthOption = 1024,
    out: Annotated[
        str,
        typer.Option(
            "--out", "-o", help="Write the report to this folder; an interrupted run resumes there.", metavar="FOLDER"
        ),
    ] = "kalm-rag-eval",
    cache: Annotated[
        str | None,
        typer.Option(
            "--cache",
            help="Keep encoded passages in this folder.",
            metavar="FOLDER",
            show_default="the folder cache in --out",
        ),
    ] = None,
    device: DeviceOption = None,
    file_format: FormatOption = "auto",
    text_field: TextFieldOption = None,
    id_field: IdFieldOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure what reranking gains on your data.

    Every ratio, precision, form, depth and instruction is measured on what a first stage found: BM25, or a TREC run.
    Each passage is encoded once per model and precision. Finished queries are kept in the folder: the same command
    resumes where an interrupted one stopped.

    With --calibrate, a threshold is chosen on one half of the queries and checked on the other. Its profile is written
    as threshold-profile.json, which `kalm-rag rank --threshold` takes.
    """
    from kalm_rag.evaluation import Experiment, Metrics
    from kalm_rag.evaluation import evaluate as run_experiment
    from kalm_rag.evaluation.compared import parse_compared, read_compared
    from kalm_rag.evaluation.outputs import claim
    from kalm_rag.evaluation.report import check_extras, write_numbers, write_page
    from kalm_rag.evaluation.summary import summarise
    from kalm_rag.evaluation.threshold_report import (
        PROFILE,
        calibrate_system,
        check_calibration,
        threshold_section,
        write_thresholds,
    )
    from kalm_rag.thresholds import Aim
    from kalm_rag.utils.checks import check_positive
    from kalm_rag.utils.paths import user_path

    depths = [check_positive("depth", number) for number in whole_numbers("--depth", depth)]
    max_length = check_positive("max_length", max_length)
    if limit_queries is not None:
        check_positive("limit_queries", limit_queries)
    check_extras()
    if aim is not None and not calibrate:
        msg = f"--aim {aim} says what --calibrate chooses a threshold for; give --calibrate too"
        raise ValueError(msg)
    wanted = Aim.parse("f1" if aim is None else aim)
    report = user_path(out, "--out")
    chosen = Metrics([name.strip() for name in metrics.split(",") if name.strip()])
    ratios = whole_numbers("--ratio", ratio)
    corpus, title = _corpus(source, queries, qrels, split, (file_format, text_field, id_field))
    candidates = _candidates(corpus, run, max(depths), limit_queries, calibrate, (language, fold_accents))
    others = read_compared(compare or [], candidates)
    models = model or [MINI]
    for name in models:
        note_mini(name)
    for warning in candidates.warnings:
        typer.echo(f"note: {visible(warning)}", err=True)
    systems = _systems(
        models,
        ratios,
        lora=[None, *(str(user_path(folder, "--lora")) for folder in lora or [])],
        dtype=dtype or [None],
        instruction=instruction or [None],
        storage=storage or ["native"],
        prefill_storage=prefill_storage or ["native"],
        window_tokens=[None, *([] if window_tokens is None else whole_numbers("--window-tokens", window_tokens))],
        # The candidates are as many as the deepest, which comes first: the page shows the queries of the first system.
        depth=[None, *sorted({number for number in depths if number < max(depths)}, reverse=True)],
    )
    experiment = Experiment(
        corpus,
        candidates,
        systems,
        chosen,
        out=report,
        cache=report / "cache" if cache is None else cache,
        device=device,
        max_length=max_length,
    )
    if calibrate:
        check_calibration(experiment)
    claim(report, [source, queries, qrels, run, *(parse_compared(given)[1] for given in compare or [])])
    try:
        summary = summarise(experiment, *run_experiment(experiment), others)
    except KeyboardInterrupt:
        kept = f"finished queries are kept in {visible_line(str(report))}"
        typer.echo(f"interrupted: {kept}; rerun the same command to resume", err=True)
        sys.exit(130)
    numbers = write_numbers(summary, report)
    found = None
    if calibrate:
        found = calibrate_system(experiment, summary.results[0], summary.encodings[0].digest, wanted)
        numbers += write_thresholds(found, report)
    if as_json:
        print_json(summary.as_json() | ({} if found is None else {"thresholds": found.as_json()}))
    else:
        show_summary(summary, title, candidates.warnings)
    written = write_page(summary, report, title, "" if found is None else threshold_section(found))
    if not as_json:
        typer.echo(f"Report: {visible_line(str(written[0]))}")
        typer.echo(f"with {len(written) + len(numbers) - 1} files of runs, plots and numbers beside it.")
    if found is not None and found.profile is None:
        raise ValueError(found.failure)
    if found is not None and not as_json:
        show_thresholds(found, report / PROFILE)


def _systems(models: Sequence[str], ratios: Sequence[int], **settings: Sequence[Any]) -> list[System]:
    """Return every combination, the ratio changing fastest."""
    from kalm_rag.evaluation import System

    names = list(settings)
    found = [
        System(model, ratio, **dict(zip(names, values, strict=True)))
        for model in models
        for values in product(*settings.values())
        for ratio in ratios
    ]
    for system in found:
        system.check()
    return found


def _corpus(
    source: str | None, queries: Path | None, qrels: Path | None, split: str, how: tuple[str, str | None, str | None]
) -> tuple[Corpus, str]:
    from kalm_rag.demo_data import load_demo
    from kalm_rag.retrieval.corpus import read_beir

    if source is None:
        if queries is not None or qrels is not None:
            msg = "--queries and --qrels belong to a corpus: name it as the first argument"
            raise ValueError(msg)
        return load_demo(), "The Python 3.11 FAQ"
    return read_beir(source, queries, qrels, split, *how), Path(source).resolve().name


def _candidates(
    corpus: Corpus, run: Path | None, depth: int, most: int | None, unanswered: bool, words: tuple[str, bool]
) -> Candidates:
    from kalm_rag.evaluation import bm25_candidates, run_candidates

    if run is not None:
        return run_candidates(corpus, run, depth, most, unanswered=unanswered)
    language, fold_accents = words
    return bm25_candidates(corpus, depth, most, language=language, fold_accents=fold_accents, unanswered=unanswered)
