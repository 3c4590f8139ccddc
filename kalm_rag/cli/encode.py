"""`kalm-rag encode`: encode a corpus ahead of its queries."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from kalm_rag.cli.engine_options import (
    AddressOption,
    EngineOption,
    GpusPerWorkerOption,
    ShardOption,
    WorkersOption,
)
from kalm_rag.cli.estimates import estimate, groups, show_estimate
from kalm_rag.cli.options import (
    BaseRatioOption,
    CacheOption,
    DeviceOption,
    DryRunOption,
    DtypeOption,
    FormatOption,
    IdFieldOption,
    JsonOption,
    KeepOption,
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
    limit_bytes,
)
from kalm_rag.cli.output import note_mini, passages_text, print_json, show, show_notes
from kalm_rag.cli.remote import (
    NamespaceOption,
    RemoteModeOption,
    RemoteOption,
    SecretFileOption,
    UnauthenticatedOption,
    shared_tier,
)
from kalm_rag.utils.display import size_text, visible_line

if TYPE_CHECKING:
    from kalm_rag.cache import PassageCache
    from kalm_rag.cache.passage_cache import Keep, Storage
    from kalm_rag.distributed.shards import Shard
    from kalm_rag.reranker import KaLMReranker
    from kalm_rag.utils.progress import Progress


def encode(
    corpus: Annotated[
        str, typer.Argument(help="Read passages from this file, folder or BEIR folder, or from standard input (-).")
    ],
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
    shard: ShardOption = None,
    engine: EngineOption = None,
    address: AddressOption = None,
    workers: WorkersOption = None,
    gpus_per_worker: GpusPerWorkerOption = None,
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
    """Encode a corpus into the cache.

    If interrupted, rerun the same command to resume. The exit status is 0 only if the cache holds every passage.
    """
    from kalm_rag.cache.preflight import check_room, check_writable
    from kalm_rag.distributed.shards import Shard
    from kalm_rag.documents import repair_text
    from kalm_rag.reranker import KaLMReranker
    from kalm_rag.retrieval.corpus import Record, read_passages

    _check_engine(engine, address, workers, gpus_per_worker, dry_run=dry_run)
    part = None if shard is None else Shard.parse(shard)
    tier = shared_tier(remote, remote_mode, namespace, secret_file, unauthenticated)
    passages = open_cache(cache, base_ratio, storage, keep, limit_gb, **tier)
    note_mini(model)
    options: dict[str, Any] = {
        "revision": revision, "lora": lora, "device": device, "dtype": dtype,
        "ratio": ratio_of_rank(base_ratio), "max_length": max_length, "long_passages": long_passages,
        "window_tokens": window_tokens, "window_overlap": window_overlap, "max_windows": max_windows,
    }  # fmt: skip
    reranker = KaLMReranker(model, cache=passages, **options)

    def records(*, count: bool = False) -> Iterator[Record]:
        for place, record in enumerate(read_passages(corpus, file_format, text_field, id_field), start=1):
            text, changed = repair_text(record.text)
            if part is None or part.holds(text):
                reranker.repairs.add(changed if count else 0)
                yield Record(record.id or f"#{place}", text)

    def texts(*, count: bool = False) -> Iterator[str]:
        return (record.text for record in records(count=count))

    if corpus != "-":
        next(texts(), None)  # report a missing or unreadable file before loading a model
    if dry_run:
        show_estimate(estimate(reranker, texts(), everything=True), passages.keep, as_json)
        return
    if passages.store is None:
        msg = "no folder to keep encoded passages in; name one with --cache"
        raise ValueError(msg)
    check_writable(passages.store)
    check_shared(passages)
    if engine is not None:
        from kalm_rag.cli.encode_ray import RayRun
        from kalm_rag.distributed import PassageEncoder

        reranker.checkpoint()  # report a missing model before starting workers
        on_ray = RayRun(reranker, None if corpus == "-" else sum(1 for _ in records()), part)
        on_ray.encode_all(
            PassageEncoder(model, cache=passages, **options), records(count=True), address, workers, gpus_per_worker
        )
        on_ray.report(as_json)
        return
    total = None
    if corpus != "-":
        expected = estimate(reranker, texts(), everything=False)
        total = expected.passages
        check_room(passages.store, *expected.room(prefilled=passages.keeps_prefilled))
    run = EncodeRun(reranker, total, part)
    run.encode_all(texts(count=True), None if corpus == "-" else texts)
    run.report(as_json)


def _check_engine(engine: str | None, address: str | None, *numbers: float | None, dry_run: bool) -> None:
    """Refuse an unknown engine, options of an engine without one, and an estimate of what an engine would take."""
    if engine not in (None, "ray"):
        msg = f"--engine must be ray, got {engine!r:.80}; leave it out to encode in this process"
        raise ValueError(msg)
    if engine is None and (address is not None or any(number is not None for number in numbers)):
        msg = "--address, --workers and --gpus-per-worker apply only to an engine: add --engine ray, or leave them out"
        raise ValueError(msg)
    if engine is not None and dry_run:
        msg = "--dry-run estimates for one process on this machine: leave --engine and its options out"
        raise ValueError(msg)


def check_shared(passages: PassageCache) -> None:
    """Find out before the work whether a shared tier answers.

    Raises:
        StoreError: it does not, or refuses; the message says what to do.
    """
    if passages.remote is not None:
        passages.remote.link.check()


def open_cache(
    cache: str, base_ratio: int, storage: str, keep: str, limit_gb: float | None, **tier: Any
) -> PassageCache:
    """Open the folder that passages are encoded into.

    Arguments are what the options of the same names were given, and what `shared_tier` returned.
    """
    from kalm_rag.cache import PassageCache

    return PassageCache(
        cache,
        memory=0,
        base_ratio=base_ratio,
        storage=cast("Storage", storage),
        keep=cast("Keep", keep),
        limit=limit_bytes(limit_gb),
        **tier,
    )


def ratio_of_rank(base_ratio: int) -> int:
    """Return the ratio that `rank` will ask for."""
    return 4 if 4 % base_ratio == 0 else base_ratio


class EncodeRun:
    """Counts what one run encoded, and what the cache holds."""

    def __init__(self, reranker: KaLMReranker, total: int | None, shard: Shard | None = None) -> None:
        self.seen = self.held = 0
        self.failure = ""
        self._reranker = reranker
        self._total = total
        self._new = self._known = self._truncated = self._unshared = 0
        self._shard = shard
        self._start = time.perf_counter()
        self._evicted = reranker.cache.stats().store.size.evicted
        self._first: list[str] = []
        self._facts: dict[str, Any] = {}
        self._most = ""  # "at most ", where the cache gave up what cannot be counted

    def encode_all(self, texts: Iterator[str], again: Callable[[], Iterator[str]] | None) -> None:
        """Load the model, encode, count what is held, and close the cache; an interrupt ends the program.

        Args:
            texts: the passages.
            again: gives them once more, to count what is held; None if they can be read only once.
        """
        from kalm_rag.utils.progress import Progress

        _ = self._reranker.scorer  # loads the model
        self._start = time.perf_counter()
        total = None if self._reranker.settings.splits else self._total
        with self._reranker.cache as passages, Progress(total, "encoding") as progress:
            try:
                for group in groups(texts):
                    self.encode(group, progress)
                    if self.failure:
                        break
                self.count_again(None if again is None else again())
            except KeyboardInterrupt:
                passages.flush()
                stats = passages.stats()
                kept = stats.encoded - stats.store.counters.write_failed
                typer.echo(
                    f"interrupted: {kept} passages encoded by this run are kept; rerun the same command to resume",
                    err=True,
                )
                sys.exit(130)
        self._facts = self._count()

    def report(self, as_json: bool, more: Mapping[str, Any] | None = None) -> None:
        """Print the result and end the program with status 1 if not everything is held.

        Args:
            as_json: print JSON instead of text.
            more: further facts for the JSON.
        """
        if as_json:
            print_json({**(more or {}), **self._facts})
        else:
            self.show()
        if self.failure:
            typer.echo(f"error: {visible_line(self.failure)}", err=True)
        if self.failure or self.held < self.seen:
            sys.exit(1)

    def encode(self, group: list[str], progress: Progress) -> None:
        """Encode some passages and check that the cache holds them; otherwise the run has failed."""
        scorer, cache = self._reranker.scorer, self._reranker.cache
        report = scorer.encode(group, progress)
        cache.flush()
        self._new, self._known = self._new + report.new, self._known + report.known
        self._truncated += report.truncated
        missing = self._reranker.unknown(group)
        if missing:  # try again: a lock or a full disk may be temporary
            scorer.encode(missing)
            cache.flush()
            missing = self._reranker.unknown(missing)
        lacking = set(missing)
        held = sum(text not in lacking for text in self._reranker.scorer.clean(group))
        self.seen, self.held = self.seen + len(group), self.held + held
        self._unshared += self._reranker.scorer.share(group)
        stats = cache.stats()
        if report.new and not self._first:
            self._first = group
        # A full cache evicts its oldest passages, which may be another corpus's. If this run's own first passages are
        # gone, the rest will follow.
        if stats.store.size.evicted > self._evicted and self._reranker.unknown(self._first):
            self.failure = f"{self._limit_text()} and gave up passages of this corpus: raise the limit with --limit-gb"
        elif missing or stats.prefilled.write_failed:
            lost = len(missing) or stats.prefilled.write_failed
            self.failure = f"the cache did not keep {lost} passages; the log above says why"

        if self._unshared and not self.failure:
            self.failure = f"the shared tier does not hold {self._unshared} passages; the log above says why"

    def count_again(self, texts: Iterator[str] | None) -> None:
        """If the cache evicted anything during the run, count again what it holds; None cannot be read again."""
        if self._reranker.cache.stats().store.size.evicted == self._evicted:
            return
        if texts is None:
            if self._known or self.failure:
                self._most = "at most "
                self.failure = self.failure or (
                    f"{self._limit_text()} and may have given up passages that it held before; standard input cannot "
                    "be read again to count them: raise the limit with --limit-gb, or give a file"
                )
            return
        self.held = 0
        complete = not self.failure
        for group in groups(texts):
            lacking = set(self._reranker.unknown(group))
            self.held += sum(text not in lacking for text in self._reranker.scorer.clean(group))
        if complete and self.held < self.seen:
            self.failure = (
                f"{self._limit_text()} and gave up {self.seen - self.held} passages of this corpus that it held "
                "before: rerun the same command to encode them again, or raise the limit with --limit-gb"
            )

    def _limit_text(self) -> str:
        return f"the cache reached its limit of {size_text(self._reranker.cache.stats().store.size.limit or 0)}"

    def held_now(self) -> str:
        """The last line: how much of the corpus the cache holds."""
        total = self.seen if self._total is None else self._total
        return f"{self._most}{self.held} of {total} {passages_text(self._shard)} held"

    def _count(self) -> dict[str, Any]:
        """Return the result as JSON."""
        seconds = time.perf_counter() - self._start
        stats = self._reranker.cache.stats()
        return {
            "new": self._new,
            "known": self._known,
            "truncated": self._truncated,
            "repaired": self._reranker.repairs.count,
            "seconds": round(seconds, 2),
            "new_per_second": round(self._new / seconds, 2) if seconds else 0.0,
            "write_failed": stats.store.counters.write_failed,
            "passages": self.seen if self._total is None else self._total,
            "held": self.held,
            "failure": self.failure or None,
            "shard": None if self._shard is None else str(self._shard),
            "cache_entries": stats.store.size.entries,
            "cache_bytes": stats.store.size.bytes,
            "unshared": self._unshared,
        }

    def show(self) -> None:
        """Print the result; the last line says how much is held."""
        facts = self._facts
        rate = f" ({facts['new_per_second']} passages/s)" if self._new else ""
        what = "windows encoded" if self._reranker.settings.splits else "encoded"
        show(f"{self._new} {what}{rate}, {self._known} served from the cache, in {facts['seconds']:.1f} s")
        show_notes(facts, self._reranker.settings)
        show(self.held_now())
