"""Options of `kalm-rag eval` that no other command has."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kalm_rag.cli.options import choices, complete_dtype, whole_number

RunOption = Annotated[
    Path | None,
    typer.Option(
        "--run",
        help="Rerank the candidates of this TREC run.",
        metavar="FILE",
        show_default="candidates that BM25 finds",
    ),
]
DepthsOption = Annotated[
    str,
    typer.Option(
        "--depth",
        help="Rerank this many candidates of each query. Of several numbers with commas, each is measured.",
        metavar="N,N",
    ),
]
LimitQueriesOption = Annotated[
    int | None,
    typer.Option(
        "--limit-queries",
        help="Use only the first so many judged queries.",
        metavar="N",
        parser=whole_number,
        show_default="all",
    ),
]
ModelsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--model",
        "-m",
        help="Measure this model: mini, nano, small, large, a folder, or a hub id. May be repeated.",
        metavar="MODEL",
        show_default="mini",
        autocompletion=choices("nano", "small", "large", "mini"),
    ),
]
LorasOption = Annotated[
    list[str] | None,
    typer.Option(
        "--lora",
        help="Also measure the model with this adapter, a folder that `kalm-rag tune` wrote. May be repeated.",
        metavar="FOLDER",
        show_default="none",
    ),
]
RatiosOption = Annotated[
    str, typer.Option("--ratio", help="Measure these compression ratios, separated by commas.", metavar="N,N")
]
DtypesOption = Annotated[
    list[str] | None,
    typer.Option(
        "--dtype",
        help="Measure this precision: float32, bfloat16, float16, or int8 or int8-all on a CPU. May be repeated.",
        metavar="DTYPE",
        show_default="the device's",
        autocompletion=complete_dtype,
    ),
]
StoragesOption = Annotated[
    list[str] | None,
    typer.Option(
        "--storage",
        help="Measure passages that are cached in this form: native or int8. May be repeated.",
        metavar="FORM",
        show_default="native",
        autocompletion=choices("native", "int8"),
    ),
]
PrefillStoragesOption = Annotated[
    list[str] | None,
    typer.Option(
        "--prefill-storage",
        help="Measure passages that are prefilled in this form: native, int8 or compact. May be repeated.",
        metavar="FORM",
        show_default="native",
        autocompletion=choices("native", "int8", "compact"),
    ),
]
WindowSizesOption = Annotated[
    str | None,
    typer.Option(
        "--window-tokens",
        help="Also measure long passages in windows of at most this many tokens. Of several numbers with commas, "
        "each is measured.",
        metavar="N,N",
        show_default="none: long passages are truncated",
    ),
]
InstructionsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--instruction",
        help="Measure this text, which tells the model what makes a passage relevant. May be repeated.",
        metavar="TEXT",
        show_default="the model's",
    ),
]
MetricsOption = Annotated[
    str,
    typer.Option(
        "--metrics",
        help="Compute these metrics, separated by commas; the first is tested and plotted.",
        metavar="NAME,NAME",
    ),
]
CompareOption = Annotated[
    list[str] | None,
    typer.Option(
        "--compare",
        help="Add the order of another reranker, its TREC run, and after a comma its milliseconds per query if you "
        "know them. May be repeated.",
        metavar="NAME=FILE[,MS]",
        show_default="none",
    ),
]
CalibrateOption = Annotated[
    bool, typer.Option("--calibrate", help="Choose a score threshold too, and write its profile.")
]
AimOption = Annotated[
    str | None,
    typer.Option(
        "--aim",
        help="Choose the threshold for this: recall=SHARE, precision=SHARE or f1.",
        metavar="AIM",
        show_default="f1",
    ),
]
