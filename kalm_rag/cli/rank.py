"""`kalm-rag rank`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, cast

import typer

from kalm_rag.cli.options import (
    CacheOption,
    DeviceOption,
    DtypeOption,
    FormatOption,
    IdFieldOption,
    InstructionOption,
    JsonOption,
    LongPassagesOption,
    LoraOption,
    MaxWindowsOption,
    ModelOption,
    RevisionOption,
    TextFieldOption,
    WindowOverlapOption,
    WindowTokensOption,
    whole_number,
)
from kalm_rag.cli.output import console, note_mini, passage_table, print_json

if TYPE_CHECKING:
    from kalm_rag.settings import LongPassages


def rank(
    query: Annotated[str, typer.Argument(help="Order the passages for this query.")],
    passages: Annotated[
        str, typer.Argument(help="Read the passages from this file or folder, or from standard input (-).")
    ] = "-",
    model: ModelOption = "nano",
    top_k: Annotated[
        int | None,
        typer.Option(
            "--top-k",
            "-k",
            help="Show this many passages.",
            metavar="N",
            parser=whole_number,
            show_default="all",
        ),
    ] = None,
    instruction: InstructionOption = None,
    ratio: Annotated[
        int,
        typer.Option(
            "--ratio",
            "-r",
            help="Compress each passage this many times: 1, 2, 4, 8, 16 or 32.",
            metavar="N",
            parser=whole_number,
        ),
    ] = 4,
    threshold: Annotated[
        str | None,
        typer.Option(
            "--threshold",
            help="Leave out passages whose score is lower than this number between 0 and 1, or than the threshold in "
            "this profile, which `kalm-rag eval --calibrate` wrote.",
            metavar="SCORE|FILE",
        ),
    ] = None,
    calibrated: Annotated[
        bool,
        typer.Option("--calibrated", help="Show the scores that the profile in --threshold was fitted to."),
    ] = False,
    refine: Annotated[
        bool,
        typer.Option("--refine", help="Rank in two passes, which is faster where only encoder states are cached."),
    ] = False,
    long_passages: LongPassagesOption = "truncate",
    window_tokens: WindowTokensOption = None,
    window_overlap: WindowOverlapOption = None,
    max_windows: MaxWindowsOption = 64,
    cache: CacheOption = "default",
    revision: RevisionOption = None,
    lora: LoraOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    file_format: FormatOption = "auto",
    text_field: TextFieldOption = None,
    id_field: IdFieldOption = None,
    as_json: JsonOption = False,
) -> None:
    """Order passages by how they answer a query."""
    from kalm_rag.reranker import KaLMReranker
    from kalm_rag.retrieval.corpus import read_passages

    note_mini(model)
    limit = _threshold(threshold)
    if refine and top_k is None and threshold is None:
        typer.echo("note: --refine changes nothing without --top-k or --threshold", err=True)
    records = list(read_passages(passages, file_format, text_field, id_field))
    with KaLMReranker(
        model,
        revision=revision,
        lora=lora,
        device=device,
        dtype=dtype,
        ratio=ratio,
        cache=cache,
        refine=refine,
        long_passages=cast("LongPassages", long_passages),
        window_tokens=window_tokens,
        window_overlap=window_overlap,
        max_windows=max_windows,
    ) as reranker:
        ranking = reranker.rank(
            query,
            [record.text for record in records],
            top_k,
            instruction,
            threshold=limit,
            calibrated=calibrated,
        )
    if as_json:
        print_json(
            [
                {
                    "index": hit.index,
                    "id": records[hit.index].id,
                    "score": hit.score,
                    "margin": hit.margin,
                    "text": hit.document,
                    "passage_truncated": hit.passage_truncated,
                    "query_truncated": hit.query_truncated,
                    "passage_repaired": hit.passage_repaired,
                    "query_repaired": hit.query_repaired,
                    "exact": hit.exact,
                    "span": hit.span,
                }
                for hit in ranking
            ]
        )
        return
    rows = []
    for place, hit in enumerate(ranking, start=1):
        record = records[hit.index]
        label = record.id if record.id is not None else str(hit.index)
        text = record.text if hit.span is None else record.text[slice(*hit.span)]
        rows.append([str(place), f"{hit.score:.4f}", label, "yes" if hit.passage_truncated else "", text])
    out = console()
    out.print(passage_table(["rank", "score", "<id", "<cut", "<passage"], rows))
    repaired = sum(hit.passage_repaired for hit in ranking)
    if repaired:
        out.print(f"{repaired} passages hold half a surrogate pair, which was read as U+FFFD.")
    near = sum(not hit.exact for hit in ranking)
    if near:
        out.print(f"{near} scores far above the threshold are approximate. With --top-k, all that are shown are exact.")
    if ranking and ranking[0].query_truncated:
        out.print(f"The query is longer than {reranker.settings.query_max_length} tokens; its tail was not read.")


def _threshold(given: str | None) -> float | str | None:
    """Return what `--threshold` names: a number, or else the path of a profile."""
    if given is None:
        return None
    try:
        return float(given)
    except ValueError:
        return given
