"""Options of `kalm-rag encode` that divide its work."""

from __future__ import annotations

from typing import Annotated

import typer

from kalm_rag.cli.options import choices, number, whole_number

ShardOption = Annotated[
    str | None,
    typer.Option(
        "--shard",
        help="Take only part k of n of the passages, chosen by their text: for machines that share the work.",
        metavar="K/N",
        show_default="all",
    ),
]
EngineOption = Annotated[
    str | None,
    typer.Option(
        "--engine",
        help="Encode with the workers of this engine: ray.",
        metavar="ENGINE",
        show_default="in this process",
        autocompletion=choices("ray"),
    ),
]
AddressOption = Annotated[
    str | None,
    typer.Option(
        "--address",
        help="Use the engine's cluster at this address.",
        metavar="ADDRESS",
        show_default="RAY_ADDRESS, or a cluster of its own on this machine",
    ),
]
WorkersOption = Annotated[
    int | None,
    typer.Option(
        "--workers",
        help="Let so many workers of the engine encode.",
        metavar="N",
        parser=whole_number,
        show_default="one a GPU, or without GPUs one a machine",
    ),
]
GpusPerWorkerOption = Annotated[
    float | None,
    typer.Option(
        "--gpus-per-worker",
        help="Give each worker so many GPUs, or a share of one.",
        metavar="G",
        parser=number,
        show_default="1 if there are GPUs, else 0",
    ),
]
