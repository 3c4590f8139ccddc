"""`kalm-rag encode`: encode a corpus ahead of its queries."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from kalm_rag.cli.options import (
    CacheOption,
    DeviceOption,
    DtypeOption,
    FormatOption,
    IdFieldOption,
    JsonOption,
    LimitOption,
    LoraOption,
    MaxLengthOption,
    ModelOption,
    RevisionOption,
    TextFieldOption,
    choices,
    limit_bytes,
    note_mini,
    print_json,
    show,
    whole_number,
)
from kalm_rag.utils.display import duration_text, size_text, visible_line

if TYPE_CHECKING:
    from kalm_rag.cache.passage_cache import Keep, Storage
    from kalm_rag.reranker import KaLMReranker
    from kalm_rag.utils.progress import Progress

_FIRST_WINDOW, _WINDOW = 32, 512
_SAMPLE = 256
_TIMED = 12


def encode(
    corpus: Annotated[
        str, typer.Argument(help="Read passages from this file, folder or BEIR folder, or from standard input (-).")
    ],
    model: ModelOption = "nano",
    cache: CacheOption = "default",
    base_ratio: Annotated[
        int,
        typer.Option(
            "--base-ratio",
            help="Keep passages compressed this many times; multiples of it are derived from them.",
            metavar="N",
            parser=whole_number,
        ),
    ] = 4,
    storage: Annotated[
        str,
        typer.Option(
            "--storage",
            help="Keep numbers as they are (native), or in a fraction of the bytes (int8).",
            metavar="STORAGE",
            autocompletion=choices("native", "int8"),
        ),
    ] = "native",
    keep: Annotated[
        str,
        typer.Option(
            "--keep",
            help="Keep states, or prefilled passages too, for fast cold starts on a CPU: prefilled at 25 times the "
            "bytes, or compact at three times with scores that change a little.",
            metavar="KIND",
            autocompletion=choices("states", "prefilled", "compact"),
        ),
    ] = "states",
    limit_gb: LimitOption = None,
    max_length: MaxLengthOption = 1024,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Estimate bytes and time, and encode nothing.")] = False,
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
    from kalm_rag.cache import PassageCache
    from kalm_rag.cache.preflight import check_room, check_writable
    from kalm_rag.documents import repair_text
    from kalm_rag.reranker import KaLMReranker
    from kalm_rag.retrieval.corpus import read_passages
    from kalm_rag.utils.progress import Progress

    passages = PassageCache(
        cache,
        memory=0,
        base_ratio=base_ratio,
        storage=cast("Storage", storage),
        keep=cast("Keep", keep),
        limit=limit_bytes(limit_gb),
    )
    note_mini(model)
    ratio = 4 if 4 % base_ratio == 0 else base_ratio  # what `rank` will ask for
    reranker = KaLMReranker(
        model, revision=revision, lora=lora, device=device, dtype=dtype,
        ratio=ratio, max_length=max_length, cache=passages,
    )  # fmt: skip

    def texts(*, count: bool = False) -> Iterator[str]:
        for record in read_passages(corpus, file_format, text_field, id_field):
            text, changed = repair_text(record.text)
            reranker.repairs.add(changed if count else 0)
            yield text

    if corpus != "-":
        next(texts(), None)  # report a missing or unreadable file before loading a model
    if dry_run:
        _show_estimate(_estimate(reranker, texts(), everything=True), passages.keep, as_json)
        return
    if passages.store is None:
        msg = "no folder to keep encoded passages in; name one with --cache"
        raise ValueError(msg)
    check_writable(passages.store)
    total = None
    if corpus != "-":
        estimate = _estimate(reranker, texts(), everything=False)
        total = estimate.passages
        check_room(passages.store, *estimate.room(prefilled=passages.keeps_prefilled))
    reranker.load()
    run = _Run(reranker, total)
    with passages, Progress(total, "encoding") as progress:
        try:
            for window in _windows(texts(count=True)):
                run.encode(window, progress)
                if run.failure:
                    break
            run.count_again(None if corpus == "-" else texts())
        except KeyboardInterrupt:
            passages.flush()
            stats = passages.stats()
            kept = stats.encoded - stats.store.counters.write_failed
            typer.echo(
                f"interrupted: {kept} passages encoded by this run are kept; rerun the same command to resume", err=True
            )
            sys.exit(130)
        facts = run.facts()
    if as_json:
        print_json(facts)
    else:
        run.show(max_length)
    if run.failure:
        typer.echo(f"error: {visible_line(run.failure)}", err=True)
    if run.failure or run.held < run.seen:
        sys.exit(1)


class _Run:
    """Counts what one run encoded, and what the cache holds."""

    def __init__(self, reranker: KaLMReranker, total: int | None) -> None:
        self.seen = self.held = 0
        self.failure = ""
        self._reranker = reranker
        self._total = total
        self._new = self._known = self._truncated = 0
        self._start = time.perf_counter()
        self._evicted = reranker.cache.stats().store.size.evicted
        self._first: list[str] = []
        self._most = ""  # "at most ", where the cache gave up what cannot be counted

    def encode(self, window: list[str], progress: Progress) -> None:
        """Encode some passages and check that the cache holds them; otherwise the run has failed."""
        scorer, cache = self._reranker.scorer, self._reranker.cache
        report = scorer.encode(window, progress)
        cache.flush()
        self._new, self._known = self._new + report.new, self._known + report.known
        self._truncated += report.truncated
        missing = self._reranker.unknown(window)
        if missing:  # try again: a lock or a full disk may be temporary
            scorer.encode(missing)
            cache.flush()
            missing = self._reranker.unknown(missing)
        lacking = set(missing)
        held = sum(text not in lacking for text in self._reranker.scorer.clean(window))
        self.seen, self.held = self.seen + len(window), self.held + held
        stats = cache.stats()
        if report.new and not self._first:
            self._first = window
        # A full cache evicts its oldest passages, which may be another corpus's. If this run's own first passages are
        # gone, the rest will follow.
        if stats.store.size.evicted > self._evicted and self._reranker.unknown(self._first):
            self.failure = f"{self._limit_text()} and gave up passages of this corpus: raise the limit with --limit-gb"
        elif missing or stats.prefilled.write_failed:
            lost = len(missing) or stats.prefilled.write_failed
            self.failure = f"the cache did not keep {lost} passages; the log above says why"

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
        for window in _windows(texts):
            lacking = set(self._reranker.unknown(window))
            self.held += sum(text not in lacking for text in self._reranker.scorer.clean(window))
        if complete and self.held < self.seen:
            self.failure = (
                f"{self._limit_text()} and gave up {self.seen - self.held} passages of this corpus that it held "
                "before: rerun the same command to encode them again, or raise the limit with --limit-gb"
            )

    def _limit_text(self) -> str:
        return f"the cache reached its limit of {size_text(self._reranker.cache.stats().store.size.limit or 0)}"

    def held_now(self) -> str:
        """The last line: how much of the corpus the cache holds."""
        return f"{self._most}{self.held} of {self.seen if self._total is None else self._total} passages held"

    def facts(self) -> dict[str, Any]:
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
            "cache_entries": stats.store.size.entries,
            "cache_bytes": stats.store.size.bytes,
        }

    def show(self, max_length: int) -> None:
        """Print the result; the last line says how much is held."""
        facts = self.facts()
        rate = f" ({facts['new_per_second']} passages/s)" if self._new else ""
        show(f"{self._new} encoded{rate}, {self._known} served from the cache, in {facts['seconds']:.1f} s")
        if self._truncated:
            show(f"{self._truncated} are longer than {max_length} tokens; their tails were not read (--max-length)")
        if facts["repaired"]:
            show(f"{facts['repaired']} hold half a surrogate pair, which was read as U+FFFD")
        if facts["cache_entries"] is not None:
            size = size_text(facts["cache_bytes"] or 0)
            show(f"The cache holds {facts['cache_entries']} passages, {size}.")
        show(self.held_now())


def _windows(texts: Iterator[str]) -> Iterator[list[str]]:
    """Yield growing groups: small ones show soon whether the cache works, large ones batch better."""
    size = _FIRST_WINDOW
    while window := list(islice(texts, size)):
        yield window
        size = min(_WINDOW, 2 * size)


@dataclass(frozen=True, slots=True)
class _Estimate:
    """The cost of encoding a corpus, estimated from a sample.

    Attributes:
        passages: in the corpus.
        known: of them, those that the cache holds; only of the sample unless everything was looked up.
        sampled: size of the sample.
        timed: passages of it that were timed.
        tokens: mean of a passage.
        each: bytes of an encoded passage.
        prefilled: bytes of a prefilled passage.
        seconds: to encode what is new; 0 if nothing was timed.
    """

    passages: int
    known: int
    sampled: int
    timed: int
    tokens: float
    each: float
    prefilled: float
    seconds: float

    def room(self, *, prefilled: bool) -> tuple[int, int]:
        """Bytes of all passages, and of those that are new."""
        each = self.each + (self.prefilled if prefilled else 0)
        return round(each * self.passages), round(each * (self.passages - self.known))


def _estimate(reranker: KaLMReranker, texts: Iterator[str], *, everything: bool) -> _Estimate:
    """Count everything and tokenise a sample; with `everything`, also look up everything, and time a few."""
    chooser = random.Random(0)  # noqa: S311 - a reproducible sample
    total = known = drawn = 0
    sample: list[str] = []
    for window in _windows(texts):
        total += len(window)
        candidates = reranker.unknown(window) if everything else window
        known += len(window) - len(candidates)
        for text in candidates:
            drawn += 1
            if len(sample) < _SAMPLE:
                sample.append(text)
            elif (place := chooser.randrange(drawn)) < _SAMPLE:
                sample[place] = text
    count = max(1, len(sample))
    if not everything:
        known = round(total * (1 - len(reranker.unknown(sample)) / count))
    sizes = reranker.estimate(sample)
    mean = sum(sizes.tokens) / count
    timed = sample[:_TIMED] if everything else []
    seconds = reranker.scorer.states.time_encoding(timed) if timed else 0.0
    rate = seconds / max(1, sum(sizes.tokens[: len(timed)]))
    each, prefilled = sizes.states_bytes / count, sizes.prefilled_bytes / count
    return _Estimate(total, known, len(sample), len(timed), mean, each, prefilled, rate * mean * (total - known))


def _show_estimate(found: _Estimate, keep: str, as_json: bool) -> None:
    new = found.passages - found.known
    facts = {
        "passages": found.passages,
        "known": found.known,
        "to_encode": new,
        "mean_tokens": round(found.tokens, 1),
        "bytes_per_passage": round(found.each),
        "bytes": round(found.each * new),
        "prefilled_bytes": round(found.prefilled * new),
        "seconds": round(found.seconds, 1),
    }
    if as_json:
        print_json(facts)
        return
    show(f"{found.passages} passages, {found.known} known already, {new} to encode.")
    show(
        f"About {found.tokens:.0f} tokens and {size_text(found.each)} each: {size_text(found.each * new)} and "
        f"{duration_text(found.seconds)}."
    )
    show(f"With --keep {keep.replace('states', 'prefilled')}: {size_text(found.prefilled * new)} more, and more time.")
    show(f"Sizes from {found.sampled} of them, time from {found.timed}.")
