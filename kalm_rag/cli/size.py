"""`kalm-rag size`: what a deployment takes."""

from __future__ import annotations

import dataclasses
import math
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from kalm_rag.cli.options import DtypeOption, JsonOption, ModelOption, choices, number, whole_number
from kalm_rag.cli.output import console, note_mini, print_json, show
from kalm_rag.utils.display import duration_text, size_text

if TYPE_CHECKING:
    from kalm_rag.sizing import Costs, Plan, Workload
    from kalm_rag.sizing.bytes import Form

_UNITS = {"": 1, "k": 1_000, "m": 1_000_000, "b": 1_000_000_000}
_UNKNOWN = "not known"


def count(text: str | int) -> int:
    """Read a number such as 50M, 2.5k or 1000, or say what was given instead."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmb]?)", str(text).strip().replace("_", "").lower())
    if match is None:
        msg = f"it must be a number such as 50000, 50k, 50M or 1.5B, got {str(text)!r:.40}"
        raise typer.BadParameter(msg)
    return round(float(match[1]) * _UNITS[match[2]])


def size(
    passages: Annotated[
        int, typer.Option("--passages", help="The corpus has so many passages, such as 50M.", metavar="N", parser=count)
    ],
    tokens: Annotated[
        int,
        typer.Option("--tokens", help="A passage has so many tokens on average.", metavar="N", parser=whole_number),
    ] = 300,
    queries_per_second: Annotated[
        float,
        typer.Option(
            "--queries-per-second", help="So many queries come at the busiest time.", metavar="N", parser=number
        ),
    ] = 10.0,
    candidates: Annotated[
        int, typer.Option("--candidates", help="A query ranks so many passages.", metavar="N", parser=whole_number)
    ] = 50,
    form: Annotated[
        str,
        typer.Option(
            "--form",
            help="Keep passages as states, compact or prefilled.",
            metavar="FORM",
            autocompletion=choices("states", "compact", "prefilled"),
        ),
    ] = "states",
    model: ModelOption = "nano",
    dtype: DtypeOption = None,
    ratio: Annotated[
        int,
        typer.Option("--base-ratio", help="Keep states at this ratio.", metavar="RATIO", parser=whole_number),
    ] = 4,
    int8: Annotated[bool, typer.Option("--int8", help="Keep states in 8 bits.")] = False,
    local_share: Annotated[
        float,
        typer.Option(
            "--local-share",
            help="This share of the candidates is on a replica's own disk or in its memory.",
            metavar="SHARE",
            parser=number,
        ),
    ] = 0.9,
    hours: Annotated[
        float,
        typer.Option("--hours", help="Encode the corpus within so many hours.", metavar="HOURS", parser=number),
    ] = 24.0,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure the model on this machine; this takes a minute or more.")
    ] = False,
    encode_tokens: Annotated[
        float | None,
        typer.Option(
            "--encode-tokens",
            help="A machine encodes so many tokens in a second.",
            metavar="N",
            show_default=False,
            parser=number,
        ),
    ] = None,
    query_ms: Annotated[
        float | None,
        typer.Option(
            "--query-ms", help="A query takes so long on a machine.", metavar="MS", show_default=False, parser=number
        ),
    ] = None,
    joint_ms: Annotated[
        float | None,
        typer.Option(
            "--joint-ms",
            help="A joint cross-encoder takes so long for a query.",
            metavar="MS",
            show_default=False,
            parser=number,
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Size a deployment.

    It shows bytes of each tier, replicas, reads of a shared tier and hours to encode, by the formulas of the
    documentation. What a machine does in a second is measured with --measure, or given.
    """
    from kalm_rag.sizing import Workload, plan
    from kalm_rag.sizing.shapes import shape_of

    workload = Workload(
        passages, tokens, queries_per_second, candidates, form=cast("Form", form),
        dtype=_kept_in(dtype), ratio=ratio, int8=int8, local_share=local_share, hours=hours,
    )  # fmt: skip
    costs = _costs(model, workload, dtype, measure, {"encode": encode_tokens, "query": query_ms, "joint": joint_ms})
    found = plan(workload, shape_of(model), costs)
    if as_json:
        facts = {**dataclasses.asdict(workload), **dataclasses.asdict(found), "costs": dataclasses.asdict(costs)}
        print_json({name: None if value == math.inf else value for name, value in facts.items()})
        return
    _show(workload, found, costs)


def _kept_in(dtype: str | None) -> str:
    from kalm_rag.utils.checks import check_dtype

    return "bfloat16" if dtype is None else check_dtype(dtype)


def _costs(model: str, workload: Workload, dtype: str | None, measure: bool, given: dict[str, float | None]) -> Costs:
    from kalm_rag.sizing import Costs, measure_costs
    from kalm_rag.sizing.plan import check_above

    names = {"encode": "encode_tokens", "query": "query_ms", "joint": "joint_ms"}
    known = {name: None if value is None else check_above(names[name], value) for name, value in given.items()}
    costs = Costs()
    if measure:
        note_mini(model)
        with tempfile.TemporaryDirectory() as folder:
            costs = measure_costs(model, workload, Path(folder), dtype or "bfloat16")
    query, joint = (None if known[name] is None else cast("float", known[name]) / 1000 for name in ("query", "joint"))
    return dataclasses.replace(
        costs,
        encode_tokens=known["encode"] or costs.encode_tokens,
        query_seconds=query or costs.query_seconds,
        joint_seconds=joint or costs.joint_seconds,
    )


def _show(workload: Workload, found: Plan, costs: Costs) -> None:
    show(
        f"{workload.passages:,} passages of {workload.tokens} tokens as {workload.form} in {workload.dtype}: "
        f"{size_text(found.entry_bytes)} each, in {found.entries} {'entry' if found.entries == 1 else 'entries'}"
    )
    from kalm_rag.sizing.plan import BUSY

    read = size_text(found.read_bytes_per_second)
    rows = [
        ("whole corpus on a local disk", size_text(found.folder_bytes)),
        ("in Redis or Valkey, in memory", size_text(found.redis_bytes)),
        ("in an object store", size_text(found.object_bytes)),
        ("reads of a shared tier", f"{found.reads_per_second:,.0f} entries/s, {read}/s"),
        ("  of what S3 answers", _share(found.object_share)),
        ("  Redis servers for them (10 Gbit/s)", str(found.redis_servers)),
        ("reading a query's candidates from disk", _milliseconds(found.read_seconds)),
        ("a query", _milliseconds(costs.query_seconds)),
        ("replicas", _or_unknown(found.replicas)),
        ("encoding on one machine", _hours(found.encode_machine_hours)),
        (f"  machines to do it in {workload.hours:g} h", _or_unknown(found.encode_machines)),
        ("a query of a joint cross-encoder", _milliseconds(costs.joint_seconds)),
        ("  its replicas", _or_unknown(found.joint_replicas)),
        ("  encoding ahead pays from", _queries(found.break_even_queries)),
    ]
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column()
    table.add_column(justify="right")
    for row in rows:
        table.add_row(*row)
    console().print(table)
    if any(value is None for value in (costs.encode_tokens, costs.query_seconds, costs.joint_seconds)):
        show(
            "What is not known depends on the machine: measure it with --measure, or give --encode-tokens, --query-ms "
            "and --joint-ms."
        )
    else:
        show(f"Times: {costs.source}.")
    show(
        f"{workload.local_share:.0%} of the candidates are taken to be local, replicas to be busy {BUSY:.0%} of the "
        "time."
    )


def _share(share: float) -> str:
    return "less than 0.1%" if 0 < share < 0.001 else f"{share:.1%}"


def _or_unknown(value: Any) -> str:
    return _UNKNOWN if value is None else f"{value:,}"


def _milliseconds(seconds: float | None) -> str:
    return _UNKNOWN if seconds is None else f"{1000 * seconds:,.1f} ms"


def _hours(hours: float | None) -> str:
    return _UNKNOWN if hours is None else duration_text(3600 * hours)


def _queries(queries: float | None) -> str:
    if queries is None:
        return _UNKNOWN
    return "never: it is faster" if math.isinf(queries) else f"{queries:,.0f} queries"
