"""`kalm-rag warm`: encode ahead what a log of queries says will be asked for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from kalm_rag.cli.encode import EncodeRun, check_shared, open_cache, ratio_of_rank
from kalm_rag.cli.options import (
    BaseRatioOption,
    CacheOption,
    DeviceOption,
    DryRunOption,
    DtypeOption,
    FoldAccentsOption,
    FormatOption,
    IdFieldOption,
    JsonOption,
    KeepOption,
    LanguageOption,
    LimitOption,
    LongPassagesOption,
    LoraOption,
    MaxLengthOption,
    MaxWindowsOption,
    ModelOption,
    RevisionOption,
    StorageOption,
    TextFieldOption,
    WindowOverlapOption,
    WindowTokensOption,
    read_bytes,
    whole_number,
)
from kalm_rag.cli.output import console, note_mini, print_json, show
from kalm_rag.cli.remote import (
    NamespaceOption,
    RemoteModeOption,
    RemoteOption,
    SecretFileOption,
    UnauthenticatedOption,
    shared_tier,
)
from kalm_rag.utils.display import size_text, visible, visible_line

if TYPE_CHECKING:
    from kalm_rag.reranker import KaLMReranker
    from kalm_rag.retrieval.corpus import Record
    from kalm_rag.retrieval.traffic import QueryLog, Requests, WarmPlan
    from kalm_rag.settings import LongPassages

_FEWER = "use a coarser --base-ratio or --storage int8, or lower --budget"


def warm(
    corpus: Annotated[
        str, typer.Argument(help="Read passages from this file, folder or BEIR folder, or from standard input (-).")
    ],
    queries: Annotated[
        Path,
        typer.Option(
            "--queries",
            help="Read what was asked from this log: a JSON object a line with the query's text or id, oldest first.",
            metavar="FILE",
        ),
    ],
    budget: Annotated[
        int,
        typer.Option(
            "--budget",
            help="Keep passages of this many bytes at most, such as 500MB or 20GB.",
            metavar="BYTES",
            parser=read_bytes,
        ),
    ],
    run: Annotated[
        Path | None,
        typer.Option(
            "--run",
            help="Read the candidates of each query from this TREC run of your first stage.",
            metavar="FILE",
            show_default="candidates that BM25 finds",
        ),
    ] = None,
    depth: Annotated[
        int,
        typer.Option("--depth", help="Count this many candidates of each query.", metavar="N", parser=whole_number),
    ] = 50,
    language: LanguageOption = "auto",
    fold_accents: FoldAccentsOption = False,
    model: ModelOption = "nano",
    cache: CacheOption = "default",
    base_ratio: BaseRatioOption = 4,
    storage: StorageOption = "native",
    keep: KeepOption = "states",
    limit_gb: LimitOption = None,
    remote: RemoteOption = None,
    remote_mode: RemoteModeOption = "read-write",
    namespace: NamespaceOption = "default",
    secret_file: SecretFileOption = None,
    unauthenticated: UnauthenticatedOption = False,
    max_length: MaxLengthOption = 1024,
    long_passages: LongPassagesOption = "truncate",
    window_tokens: WindowTokensOption = None,
    window_overlap: WindowOverlapOption = None,
    max_windows: MaxWindowsOption = 64,
    dry_run: DryRunOption = False,
    revision: RevisionOption = None,
    lora: LoraOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    file_format: FormatOption = "auto",
    text_field: TextFieldOption = None,
    id_field: IdFieldOption = None,
    as_json: JsonOption = False,
) -> None:
    """Encode what a log says will be asked for.

    Passages that the queries of the log ask for most are encoded first, until the budget is filled. A table tells which
    share of the requests a smaller budget would answer: learned from the first half of the log, and checked by
    replaying the second half.

    If interrupted, rerun the same command to resume. The exit status is 0 only if the cache holds every passage chosen.
    """
    from kalm_rag.cache.preflight import check_room, check_writable
    from kalm_rag.reranker import KaLMReranker
    from kalm_rag.retrieval.corpus import read_passages
    from kalm_rag.retrieval.traffic import plan_warming, read_query_log
    from kalm_rag.utils.checks import check_positive

    tier = shared_tier(remote, remote_mode, namespace, secret_file, unauthenticated)
    passages = open_cache(cache, base_ratio, storage, keep, limit_gb, **tier)
    note_mini(model)
    check_positive("depth", depth)
    log = read_query_log(queries)
    if log.broken:
        first = "; the first are" if log.broken > len(log.named) else ":"
        _note(f"{log.broken} lines of {queries} cannot be read and are left out{first} {', '.join(log.named)}")
    reranker = KaLMReranker(
        model, revision=revision, lora=lora, device=device, dtype=dtype,
        ratio=ratio_of_rank(base_ratio), max_length=max_length, cache=passages,
        long_passages=cast("LongPassages", long_passages), window_tokens=window_tokens, window_overlap=window_overlap,
        max_windows=max_windows,
    )  # fmt: skip
    records = read_passages(corpus, file_format, text_field, id_field)
    requests = _requests(log, run, records, depth, language=language, fold_accents=fold_accents)
    for note in requests.notes:
        _note(note)
    sizes = _sizes(reranker, requests)
    plan = plan_warming(requests.asked, sizes, budget)
    texts = [requests.passages[key] for key in plan.keys]
    lacking = set(reranker.unknown(texts))
    new = sum(sizes[key] for key, text in zip(plan.keys, texts, strict=True) if text in lacking)
    facts = {"lines": len(log.queries), "broken": log.broken, **_facts(plan), "to_encode": len(lacking)}
    if not as_json:
        _show(plan, len(requests.asked), len(lacking))
    if dry_run:
        if as_json:
            print_json(facts)
        return
    if passages.store is None:
        msg = "no folder to keep encoded passages in; name one with --cache"
        raise ValueError(msg)
    check_writable(passages.store)
    check_shared(passages)
    check_room(passages.store, plan.bytes, new, _FEWER)

    def again() -> Iterator[str]:
        return iter(texts)

    encoded = EncodeRun(reranker, len(texts))
    encoded.encode_all(again(), again)
    encoded.report(as_json, facts)


def _note(text: str) -> None:
    typer.echo(f"note: {visible_line(text)}", err=True)


def _requests(
    log: QueryLog, run: Path | None, records: Iterator[Record], depth: int, *, language: str, fold_accents: bool
) -> Requests:
    from kalm_rag.evaluation.trec import read_run
    from kalm_rag.retrieval.traffic import requests_of_bm25, requests_of_run

    if run is None:
        return requests_of_bm25(log, records, depth, language=language, fold_accents=fold_accents)
    return requests_of_run(log, read_run(run), records, depth)


def _sizes(reranker: KaLMReranker, requests: Requests) -> dict[str, int]:
    """Bytes of each passage in the cache, from its tokens."""
    from kalm_rag.utils.progress import Progress

    sizes = {}
    with Progress(len(requests.passages), "counting tokens") as progress:
        for key, text in requests.passages.items():
            one = reranker.estimate([text])
            sizes[key] = one.states_bytes + (one.prefilled_bytes if reranker.cache.keeps_prefilled else 0)
            progress.advance(1)
    return sizes


def _facts(plan: WarmPlan) -> dict[str, Any]:
    return {
        "asked": plan.asked,
        "asked_bytes": plan.asked_bytes,
        "chosen": len(plan.keys),
        "chosen_bytes": plan.bytes,
        "expected": plan.expected,
        "table": [asdict(row) for row in plan.table],
    }


def _show(plan: WarmPlan, asked: int, new: int) -> None:
    from rich.table import Table

    half = (asked + 1) // 2
    show(f"Hit ratio, learned from {half} queries of the log and replayed on the other {asked - half}:")
    table = Table(box=None, pad_edge=False)
    for name in ("bytes", "passages", "expected", "replayed"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in plan.table:
        replayed = "-" if row.replayed is None else f"{100 * row.replayed:.1f} %"
        table.add_row(size_text(row.bytes), str(row.passages), f"{100 * row.expected:.1f} %", replayed)
    console().print(table)
    show(
        visible(
            f"{len(plan.keys)} of {plan.asked} passages asked for are kept: {size_text(plan.bytes)} of "
            f"{size_text(plan.asked_bytes)}. Expected from the whole log: {100 * plan.expected:.1f} %. "
            f"{len(plan.keys) - new} known already, {new} to encode."
        )
    )
