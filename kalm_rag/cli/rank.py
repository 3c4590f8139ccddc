"""`kalm-rag rank`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, cast

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
    RatioOption,
    RevisionOption,
    TextFieldOption,
    WindowOverlapOption,
    WindowTokensOption,
    choices,
    number,
    whole_number,
)
from kalm_rag.cli.output import console, note_mini, passage_table, print_json
from kalm_rag.cli.remote import (
    NamespaceOption,
    RemoteModeOption,
    RemoteOption,
    RemoteTimeoutOption,
    SecretFileOption,
    UnauthenticatedOption,
    shared_tier,
)
from kalm_rag.results import RankedPassage

if TYPE_CHECKING:
    from kalm_rag.results import PartialRanking, Ranking, UnscoredPassage
    from kalm_rag.retrieval.corpus import Record
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
    ratio: RatioOption = 4,
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
    budget_ms: Annotated[
        float | None,
        typer.Option(
            "--budget-ms",
            help="Rank for this many milliseconds: cached passages first, others while time lasts. Loading the model "
            "does not count. What is not reached is listed last, without a score, and encoded for ten seconds at most "
            "before the command ends.",
            metavar="MS",
            parser=number,
            show_default="all passages are ranked",
        ),
    ] = None,
    on_unknown: Annotated[
        str | None,
        typer.Option(
            "--on-unknown",
            help="Do this with passages that are not cached: wait encodes them, under --budget-ms while time lasts; "
            "skip lists them last, without a score.",
            metavar="WAY",
            show_default="wait",
            autocompletion=choices("wait", "skip"),
        ),
    ] = None,
    long_passages: LongPassagesOption = "truncate",
    window_tokens: WindowTokensOption = None,
    window_overlap: WindowOverlapOption = None,
    max_windows: MaxWindowsOption = 64,
    cache: CacheOption = "default",
    remote: RemoteOption = None,
    remote_mode: RemoteModeOption = "read-write",
    namespace: NamespaceOption = "default",
    secret_file: SecretFileOption = None,
    unauthenticated: UnauthenticatedOption = False,
    remote_timeout_ms: RemoteTimeoutOption = None,
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
    from kalm_rag.cache import PassageCache
    from kalm_rag.latency.limit import limit_of
    from kalm_rag.reranker import KaLMReranker
    from kalm_rag.retrieval.corpus import read_passages
    from kalm_rag.settings import base_ratio

    limit_of(budget_ms, on_unknown, 0.0)  # a wrong value is found before the model loads
    note_mini(model)
    limit = _threshold(threshold)
    if refine and top_k is None and threshold is None:
        typer.echo("note: --refine changes nothing without --top-k or --threshold", err=True)
    records = list(read_passages(passages, file_format, text_field, id_field))
    tier = shared_tier(remote, remote_mode, namespace, secret_file, unauthenticated, remote_timeout_ms)
    with (
        PassageCache(cache, base_ratio=base_ratio(ratio), **tier) as kept,
        KaLMReranker(
            model,
            revision=revision,
            lora=lora,
            device=device,
            dtype=dtype,
            ratio=ratio,
            cache=kept,
            refine=refine,
            long_passages=cast("LongPassages", long_passages),
            window_tokens=window_tokens,
            window_overlap=window_overlap,
            max_windows=max_windows,
        ) as reranker,
    ):
        if budget_ms is not None:
            reranker.load()  # so that the budget is about ranking
        within: dict[str, Any] = {"budget_ms": budget_ms, "on_unknown": on_unknown}
        ranking: Ranking[str] | PartialRanking[str] = reranker.rank(
            query,
            [record.text for record in records],
            top_k,
            instruction,
            threshold=limit,
            calibrated=calibrated,
            **within,
        )
        # Leaving the block waits for passages that are encoded in the background.
        if as_json:
            print_json([_fields(hit, records) for hit in ranking])
        else:
            _show(ranking, records, reranker.settings.query_max_length)
        sys.stdout.flush()


def _fields(hit: RankedPassage[str] | UnscoredPassage[str], records: Sequence[Record]) -> dict[str, Any]:
    """Return what `--json` says of a passage; what is not known of one without a score is null."""
    return {
        "index": hit.index,
        "id": records[hit.index].id,
        "score": hit.score,
        "scored": hit.scored,
        "margin": hit.margin,
        "text": hit.document,
        "passage_truncated": getattr(hit, "passage_truncated", None),
        "query_truncated": hit.query_truncated,
        "passage_repaired": hit.passage_repaired,
        "query_repaired": hit.query_repaired,
        "exact": getattr(hit, "exact", None),
        "span": getattr(hit, "span", None),
    }


def _show(ranking: Ranking[str] | PartialRanking[str], records: Sequence[Record], query_max_length: int) -> None:
    """Print the table, and what a reader should know of it."""
    rows = []
    for place, hit in enumerate(ranking, start=1):
        record = records[hit.index]
        label = record.id if record.id is not None else str(hit.index)
        score, cut, text = "", "", record.text
        if isinstance(hit, RankedPassage):
            score, cut = f"{hit.score:.4f}", "yes" if hit.passage_truncated else ""
            text = text if hit.span is None else text[slice(*hit.span)]
        rows.append([str(place), score, label, cut, text])
    out = console()
    out.print(passage_table(["rank", "score", "<id", "<cut", "<passage"], rows))
    if ranking.counts is not None and ranking.counts.skipped:
        out.print(
            f"{ranking.counts.skipped} of {ranking.counts.passages} passages were not reached and have no score. Those "
            "that are not cached are encoded before this command ends, for ten seconds at most."
        )
    repaired = sum(hit.passage_repaired for hit in ranking)
    if repaired:
        out.print(f"{repaired} passages hold half a surrogate pair, which was read as U+FFFD.")
    near = sum(isinstance(hit, RankedPassage) and not hit.exact for hit in ranking)
    if near:
        out.print(f"{near} scores far above the threshold are approximate. With --top-k, all that are shown are exact.")
    if ranking and ranking[0].query_truncated:
        out.print(f"The query is longer than {query_max_length} tokens; its tail was not read.")


def _threshold(given: str | None) -> float | str | None:
    """Return what `--threshold` names: a number, or else the path of a profile."""
    if given is None:
        return None
    try:
        return float(given)
    except ValueError:
        return given
