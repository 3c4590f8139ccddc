"""`kalm-rag compare`: how far two rankings agree, without judgements."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kalm_rag.cli.options import (
    CacheOption,
    DeviceOption,
    FoldAccentsOption,
    FormatOption,
    IdFieldOption,
    JsonOption,
    LanguageOption,
    MaxLengthOption,
    QueriesOption,
    TextFieldOption,
    whole_number,
)
from kalm_rag.cli.output import console, note_mini, passage_table, print_json, show
from kalm_rag.utils.display import visible, visible_line

if TYPE_CHECKING:
    from kalm_rag.evaluation.agreement import Agreement
    from kalm_rag.evaluation.systems import System
    from kalm_rag.evaluation.unjudged import Run
    from kalm_rag.retrieval.corpus import Corpus

_SHOWN = 10
"""Queries that differ most, in the table."""
_WORDS = {
    "overlap": "overlap of the first {k}",
    "rbo": "rank-biased overlap",
    "tau": "Kendall's tau",
    "same_first": "same first passage",
}


def compare(
    one: Annotated[str, typer.Argument(help="Compare this TREC run, or this setting, such as ratio=4.", metavar="A")],
    other: Annotated[
        str,
        typer.Argument(help="Compare it with this TREC run or setting, such as ratio=32,dtype=int8.", metavar="B"),
    ],
    source: Annotated[
        str | None,
        typer.Option(
            "--source",
            help="Read queries and passages from this BEIR folder, or passages from this file, with --queries.",
            metavar="PATH",
            show_default="none: runs are compared without texts",
        ),
    ] = None,
    queries: QueriesOption = None,
    run: Annotated[
        Path | None,
        typer.Option(
            "--run",
            help="Let settings rerank the candidates of this TREC run.",
            metavar="FILE",
            show_default="candidates that BM25 finds",
        ),
    ] = None,
    depth: Annotated[
        int,
        typer.Option(
            "--depth", help="Let settings rerank this many candidates of each query.", metavar="N", parser=whole_number
        ),
    ] = 50,
    language: LanguageOption = "auto",
    fold_accents: FoldAccentsOption = False,
    k: Annotated[
        int, typer.Option("--k", help="Compare the first so many places.", metavar="N", parser=whole_number)
    ] = 10,
    pairs: Annotated[
        int,
        typer.Option("--pairs", help="Write at most this many pairs to judge.", metavar="N", parser=whole_number),
    ] = 30,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="Write the pairs most worth judging to this new file, to be filled in. It needs --source.",
            metavar="FILE",
            show_default="none",
        ),
    ] = None,
    model: Annotated[
        str,
        typer.Option("--model", "-m", help="Use this model in settings that name none.", metavar="MODEL"),
    ] = "mini",
    max_length: MaxLengthOption = 1024,
    cache: CacheOption = "default",
    device: DeviceOption = None,
    file_format: FormatOption = "auto",
    text_field: TextFieldOption = None,
    id_field: IdFieldOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare two rankings without judgements.

    Each is a TREC run, or a setting of model, ratio, dtype, lora, storage, prefill_storage, window_tokens and
    depth, which is run on what a first stage finds.

    With --out, the pairs most worth judging are written as JSON lines with the texts: replace the null after relevance
    by 0, 1 or higher, and give the file to `kalm-rag eval --qrels`.
    """
    from kalm_rag.evaluation.agreement import compare_runs, worth_judging, write_pairs
    from kalm_rag.evaluation.unjudged import parse_setting
    from kalm_rag.retrieval.corpus import read_unjudged
    from kalm_rag.utils.checks import check_positive

    for name, value in (("depth", depth), ("k", k), ("pairs", pairs), ("max_length", max_length)):
        check_positive(name, value)
    settings = [parse_setting(text, model) for text in (one, other)]
    if source is None and (out is not None or queries is not None or any(settings)):
        msg = "settings, --queries and --out need the texts: name the collection with --source"
        raise ValueError(msg)
    if out is not None and out.exists():
        msg = f"{str(out)!r} exists and may hold judgements; give --out another name, or move that file"
        raise FileExistsError(msg)
    corpus = None if source is None else read_unjudged(source, queries, file_format, text_field, id_field)
    words = {"language": language, "fold_accents": fold_accents}
    sides = _sides((one, other), settings, corpus, run, depth, cache, device, max_length, words)
    for warning in dict.fromkeys(warning for side in sides for warning in side.warnings):
        typer.echo(f"note: {visible(warning)}", err=True)
    found = compare_runs(sides[0].rankings, sides[1].rankings, k)
    chosen = worth_judging(sides[0].rankings, sides[1].rankings, k, pairs)
    if out is not None and corpus is not None and chosen:
        write_pairs(out, chosen, corpus)
    if as_json:
        names = [side.name for side in sides]
        print_json({"runs": names, **found.as_json(), "pairs": [[pair.query, pair.passage] for pair in chosen]})
        return
    _show(found, corpus, [side.name for side in sides])
    if not chosen:
        show(f"The first {k} places of both are equal: no pair needs a judgement.")
    elif out is not None:
        show(f"{len(chosen)} pairs to judge: {visible_line(str(out))}", wrap=False)
        show("Replace each null by 0, 1 or higher; then run kalm-rag eval with --qrels.")


def _sides(
    texts: tuple[str, str],
    settings: list[System | None],
    corpus: Corpus | None,
    run: Path | None,
    depth: int,
    cache: str,
    device: str | None,
    max_length: int,
    words: dict[str, Any],
) -> list[Run]:
    from kalm_rag.evaluation.unjudged import first_stage, rank_all, read_fitted

    found = None
    sides = []
    for text, system in zip(texts, settings, strict=True):
        if system is None or corpus is None:
            sides.append(read_fitted(Path(text), corpus))
            continue
        if found is None:
            note_mini(system.model)
            found = first_stage(corpus, run, depth, **words)
            for warning in found.warnings:
                typer.echo(f"note: {visible(warning)}", err=True)
        sides.append(rank_all(text, system, corpus, found.rankings, cache=cache, device=device, max_length=max_length))
    return sides


def _show(found: Agreement, corpus: Corpus | None, names: list[str]) -> None:
    from rich.table import Table
    from rich.text import Text

    out = console()
    for letter, name in zip("AB", names, strict=True):
        show(f"{letter}: {visible_line(name)}", wrap=False)
    show(f"{len(found.queries)} queries in both.")
    if found.only_one:
        show(f"{found.only_one} queries are in one run only and are left out.")
    table = Table(box=None, pad_edge=False)
    for name, side in (("", "left"), ("mean", "right"), ("95 % interval", "right")):
        table.add_column(name, justify="left" if side == "left" else "right")
    for name, mean in found.means.items():
        low, high = found.intervals[name]
        table.add_row(_WORDS[name].format(k=found.k), f"{mean:.3f}", f"{low:.3f} to {high:.3f}")
    out.print(table)
    rows = [
        (
            f"{query.overlap:.2f}",
            f"{query.rbo:.2f}",
            "" if query.tau is None else f"{query.tau:+.2f}",
            query.query if corpus is None else f"{query.query}: {corpus.queries[query.query]}",
        )
        for query in found.queries[:_SHOWN]
        if query.rbo < 1
    ]
    if rows:
        out.print(
            Text(f"\nThe {len(rows)} queries that differ most:" if len(rows) > 1 else "\nThe query that differs:")
        )
        out.print(passage_table(["overlap", "RBO", "tau", "<query"], rows))
