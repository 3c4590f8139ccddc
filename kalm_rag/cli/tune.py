"""`kalm-rag tune`: adapt a model to judgements of the user's own."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from kalm_rag.cli.options import (
    CacheOption,
    DeviceOption,
    FoldAccentsOption,
    InstructionOption,
    JsonOption,
    LanguageOption,
    MaxLengthOption,
    ModelOption,
    QrelsOption,
    QueriesOption,
    RevisionOption,
    SplitOption,
    choices,
    number,
    whole_number,
    whole_numbers,
)
from kalm_rag.cli.output import console, note_mini, print_json, show
from kalm_rag.utils.display import duration_text, visible, visible_line

if TYPE_CHECKING:
    from kalm_rag.tuning import Tuned


def tune(
    source: Annotated[
        str | None,
        typer.Argument(
            help="Read judgements from this BEIR folder, from JSON lines with query, positive and negatives, or from "
            "this corpus with --queries and --qrels.",
            show_default="none, with --export",
        ),
    ] = None,
    out: Annotated[
        str, typer.Option("--out", "-o", help="Write the adapter to this folder.", metavar="FOLDER")
    ] = "kalm-rag-tuned",
    export: Annotated[
        str | None,
        typer.Option(
            "--export",
            help="Also write model and adapter as one checkpoint to this folder; without a source, do only that.",
            metavar="FOLDER",
            show_default="none",
        ),
    ] = None,
    model: ModelOption = "nano",
    queries: QueriesOption = None,
    qrels: QrelsOption = None,
    split: SplitOption = "train",
    ratio: Annotated[
        str,
        typer.Option(
            "--ratio", help="Train at these compression ratios; half of the time at the first one.", metavar="N,N"
        ),
    ] = "4,8,16,32",
    list_size: Annotated[
        int,
        typer.Option(
            "--list-size",
            help="Compare each relevant passage with this many passages, itself included; 8 to 16 is usual.",
            metavar="N",
            parser=whole_number,
        ),
    ] = 8,
    epochs: Annotated[
        int,
        typer.Option("--epochs", help="Pass over the queries this often at most.", metavar="N", parser=whole_number),
    ] = 2,
    rate: Annotated[
        float, typer.Option("--rate", help="Let the learning rate rise to this.", metavar="RATE", parser=number)
    ] = 1.0e-3,
    rank: Annotated[
        int, typer.Option("--rank", help="Give the adapter's matrices this rank.", metavar="N", parser=whole_number)
    ] = 16,
    seed: Annotated[
        int, typer.Option("--seed", help="Split and draw with this seed.", metavar="N", parser=whole_number)
    ] = 0,
    by_passages: Annotated[
        bool, typer.Option("--by-passages", help="Keep queries that share relevant passages in the same part.")
    ] = False,
    language: LanguageOption = "auto",
    fold_accents: FoldAccentsOption = False,
    instruction: InstructionOption = None,
    max_length: MaxLengthOption = 1024,
    cache: CacheOption = "default",
    revision: RevisionOption = None,
    device: DeviceOption = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            help="Keep the model in this precision while training: float32 or bfloat16.",
            metavar="DTYPE",
            show_default="bfloat16 on CUDA, else float32",
            autocompletion=choices("float32", "bfloat16"),
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Adapt a model to judgements of your own.

    An adapter of the decoder is trained; encoded passages stay valid, and those in the cache are not encoded again. It
    ends with a comparison on queries that were held out. If interrupted, rerun the same command to resume.

    The exit status is 1 if no step made the model better; then tuning.json is written, but no adapter.
    """
    from kalm_rag.tuning import Recipe, export_checkpoint
    from kalm_rag.tuning import tune as run_tuning
    from kalm_rag.tuning.export import check_target

    if source is None and export is None:
        msg = "name the judgements: a BEIR folder, or a file of JSON lines with query, positive and negatives"
        raise ValueError(msg)
    if export is not None:
        check_target(export, out)  # before hours of training
    note_mini(model)
    if source is not None:
        try:
            tuned = run_tuning(
                source,
                out,
                model=model,
                revision=revision,
                device=device,
                dtype=dtype,
                max_length=max_length,
                instruction=instruction,
                cache=cache,
                queries=queries,
                qrels=qrels,
                split=split,
                recipe=Recipe(
                    ratios=whole_numbers("--ratio", ratio),
                    list_size=list_size,
                    epochs=epochs,
                    rate=rate,
                    rank=rank,
                    alpha=2 * rank,
                    seed=seed,
                ),
                by_passages=by_passages,
                language=language,
                fold_accents=fold_accents,
                announce=lambda text: typer.echo(visible(text), err=True),
            )
        except KeyboardInterrupt:
            typer.echo(f"interrupted: rerun the same command to resume in {visible_line(out)}", err=True)
            sys.exit(130)
        if as_json:
            print_json(tuned.as_json())
        else:
            _show(tuned, model, out)
        if tuned.folder is None:
            sys.exit(1)
    if export is not None:
        written = export_checkpoint(model, out, export, revision=revision)
        typer.echo(f"Checkpoint: {visible_line(str(written))}", err=as_json)


def _show(tuned: Tuned, model: str, out: str) -> None:
    from rich.measure import Measurement
    from rich.table import Table
    from rich.text import Text

    show(f"Training: {duration_text(tuned.seconds)}, {tuned.steps} steps. It ended because {tuned.ended}.")
    if tuned.folder is None:
        show("No step made the model better on the validation queries: no adapter was written, only tuning.json.")
        return
    train, validation, test = tuned.queries
    show(
        f"The adapter is that of step {tuned.best_step}. Queries: {train} trained it, {validation} decided when to "
        f"stop, {test} measure it:"
    )
    heading, rows = tuned.columns()
    table = Table(box=None, pad_edge=False)
    for name in heading:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    screen = console()
    # Numbers are never cut: a table that is too wide for the terminal runs over its edge.
    screen.width = max(screen.width, Measurement.get(screen, screen.options.update(width=10_000), table).maximum)
    screen.print(table)
    show("nDCG@10 of held-out queries. Interval: paired bootstrap of the change; p: paired randomisation test.")
    if any(one.verdict == "within the noise" for one in tuned.comparisons):
        show("A change within the noise is no evidence that tuning helped: judge more queries to see a smaller gain.")
    show(
        f'Use it: KaLMReranker("{visible_line(model)}", lora="{visible_line(out)}"), or --lora.',
        wrap=False,
    )
