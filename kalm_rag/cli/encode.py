"""`kalm-rag encode`: encode a corpus ahead of its queries."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Annotated, cast

import typer

from kalm_rag.cli.options import (
    CacheOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    RevisionOption,
    console,
    note_mini,
    print_json,
)

if TYPE_CHECKING:
    from kalm_rag.cache.tiers import Keep, Storage
    from kalm_rag.reranker import KaLMReranker

_WINDOW = 512
_SAMPLE = 256
_TIMED = 12


def encode(
    corpus: Annotated[
        str, typer.Argument(help="A .jsonl or text file, a folder, a BEIR folder, or - for standard input.")
    ],
    model: ModelOption = "nano",
    cache: CacheOption = "default",
    base_ratio: Annotated[
        int, typer.Option("--base-ratio", help="Ratio at which states are kept; its multiples come for free.")
    ] = 4,
    storage: Annotated[str, typer.Option("--storage", help="native, or int8 for a fraction of the bytes.")] = "native",
    keep: Annotated[
        str, typer.Option("--keep", help="states, or prefilled: 25 times the bytes, for fast cold starts on a CPU.")
    ] = "states",
    limit_gb: Annotated[
        float | None, typer.Option("--limit-gb", help="Most the cache may take on disk. [default: as it was, or 10]")
    ] = None,
    max_length: Annotated[int, typer.Option("--max-length", help="Tokens of a passage that are read.")] = 1024,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Estimate bytes and time, encode nothing.")] = False,
    revision: RevisionOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Encode a corpus into the cache. Interrupted, the same command goes on where it stopped."""
    from kalm_rag.cache import PassageCache
    from kalm_rag.corpus import read_passages
    from kalm_rag.progress import Progress
    from kalm_rag.reranker import KaLMReranker

    passages = PassageCache(
        cache,
        memory=0,
        base_ratio=base_ratio,
        storage=cast("Storage", storage),
        keep=cast("Keep", keep),
        limit=None if limit_gb is None else int(limit_gb * 1e9),
    )
    note_mini(model)
    ratio = 4 if 4 % base_ratio == 0 else base_ratio  # what `rank` will ask for
    reranker = KaLMReranker(
        model, revision=revision, device=device, dtype=dtype, ratio=ratio, max_length=max_length, cache=passages
    )
    if dry_run:
        _estimate(reranker, corpus, as_json)
        return
    total = None if corpus == "-" else sum(1 for _ in read_passages(corpus))
    texts = (record.text for record in read_passages(corpus))
    new = known = truncated = 0
    reranker.load()
    start = time.perf_counter()
    with passages, Progress(total, "encoding") as progress:
        try:
            for window in _windows(texts):
                report = reranker._loaded().encode(window, progress)
                passages.flush()
                new, known, truncated = new + report.new, known + report.known, truncated + report.truncated
        except KeyboardInterrupt:
            passages.flush()
            stats = passages.stats()
            kept = stats.encoded - stats.store.counters.write_failed
            typer.echo(f"interrupted: {kept} passages encoded by this run are kept; the same command goes on", err=True)
            sys.exit(130)
        seconds = time.perf_counter() - start
        stats = passages.stats()
    facts = {
        "new": new,
        "known": known,
        "truncated": truncated,
        "seconds": round(seconds, 2),
        "new_per_second": round(new / seconds, 2) if seconds else 0.0,
        "write_failed": stats.store.counters.write_failed,
        "cache_entries": stats.store.size.entries,
        "cache_bytes": stats.store.size.bytes,
    }
    if as_json:
        print_json(facts)
        return
    out = console()
    rate = f" ({facts['new_per_second']} passages/s)" if new else ""
    out.print(f"{new} encoded{rate}, {known} known already, in {seconds:.1f} s")
    if truncated:
        out.print(f"{truncated} are longer than {max_length} tokens; their tails were not read (--max-length)")
    if stats.store.counters.write_failed:
        out.print(f"{stats.store.counters.write_failed} could not be written to the cache; see the log above")
    if stats.store.size.entries is not None:
        out.print(f"The cache holds {stats.store.size.entries} passages, {size_text(stats.store.size.bytes or 0)}.")


def _windows(texts: Iterator[str]) -> Iterator[list[str]]:
    while window := list(islice(texts, _WINDOW)):
        yield window


def _estimate(reranker: KaLMReranker, corpus: str, as_json: bool) -> None:
    """Count everything, look up everything, tokenise a sample, and time a few."""
    from kalm_rag.cache.frame import payload_bytes
    from kalm_rag.corpus import read_passages

    engine = reranker._loaded()
    chooser = random.Random(0)  # noqa: S311 - a reproducible sample
    total = known = 0
    sample: list[str] = []
    seen_new = 0
    for window in _windows(record.text for record in read_passages(corpus)):
        total += len(window)
        missing = engine.unknown(window)
        known += len(window) - len(missing)
        for text in missing:
            seen_new += 1
            if len(sample) < _SAMPLE:
                sample.append(text)
            elif (place := chooser.randrange(seen_new)) < _SAMPLE:
                sample[place] = text
    lengths = engine.token_counts(sample)
    mean = sum(lengths) / len(lengths) if lengths else 0.0
    kind = "int8" if reranker.cache.storage == "int8" else str(engine.loaded.dtype).removeprefix("torch.")
    width = engine.loaded.model.config.decoder.hidden_size
    sizes = [payload_bytes(length, reranker.cache.base_ratio, width, kind) for length in lengths]
    each = sum(sizes) / len(sizes) if sizes else 0.0
    prefilled = sum(engine.prefilled_bytes(length) for length in lengths) / len(lengths) if lengths else 0.0
    timed = sample[:_TIMED]
    rate = engine.time_encoding(timed) / max(1, sum(lengths[: len(timed)]))
    seconds = rate * mean * (total - known)
    facts = {
        "passages": total,
        "known": known,
        "to_encode": total - known,
        "mean_tokens": round(mean, 1),
        "bytes_per_passage": round(each),
        "bytes": round(each * (total - known)),
        "prefilled_bytes": round(prefilled * (total - known)),
        "seconds": round(seconds, 1),
    }
    if as_json:
        print_json(facts)
        return
    out = console()
    out.print(f"{total} passages, {known} known already, {total - known} to encode.")
    out.print(
        f"About {mean:.0f} tokens and {size_text(each)} each: {size_text(each * (total - known))} and {_time(seconds)}."
    )
    out.print(f"With --keep prefilled: {size_text(prefilled * (total - known))} more, and more time.")
    out.print(f"Sizes from {len(sample)} of them, time from {len(timed)}.")


def size_text(count: float) -> str:
    """Bytes for people, in powers of ten."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
