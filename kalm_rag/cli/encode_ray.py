"""`kalm-rag encode --engine ray`: encode a corpus with workers on a Ray cluster."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any

import typer

from kalm_rag.cli.output import passages_text, print_json, show, show_notes
from kalm_rag.utils.display import visible_line

if TYPE_CHECKING:
    from kalm_rag.distributed.encoder import PassageEncoder
    from kalm_rag.distributed.shards import Shard
    from kalm_rag.reranker import KaLMReranker
    from kalm_rag.retrieval.corpus import Record

_FIRST = 32
_NAMED = 10
"""Passages that a message names."""


class RayRun:
    """Counts what the workers of one run encoded, and what the cache holds.

    Args:
        reranker: says how passages are read; its model is not loaded.
        total: how many passages there are; None if nobody knows.
        shard: which part of the corpus they are.
    """

    def __init__(self, reranker: KaLMReranker, total: int | None, shard: Shard | None) -> None:
        self._reranker = reranker
        self._total = total
        self._shard = shard
        self._workers = 0
        self._counts: Counter[str] = Counter()
        self._truncated = 0
        self._named: list[str] = []
        self._failure = ""
        self._seconds = 0.0

    def encode_all(
        self,
        encoder: PassageEncoder,
        records: Iterator[Record],
        address: str | None,
        workers: int | None,
        gpus_per_worker: float | None,
    ) -> None:
        """Start workers and encode; an interrupt ends the program.

        Args:
            encoder: what each worker runs.
            records: the passages.
            address: as in `kalm_rag.distributed.ray_workers.connect`.
            workers: as in `plan_workers`.
            gpus_per_worker: as in `plan_workers`.

        Raises:
            KaLMError, ValueError, OSError: there is no such cluster, it cannot run the workers, they cannot load the
                model, or the cache reached its limit.
        """
        from kalm_rag.distributed import ray_workers
        from kalm_rag.utils.progress import Progress

        ray = ray_workers.connect(address)
        try:
            plan = ray_workers.plan_workers(ray_workers.resources(ray), workers, gpus_per_worker)
            ray_workers.check_shared(encoder, plan.machines)
            self._workers = plan.workers
            start = time.perf_counter()
            with Progress(self._total, "encoding") as progress:
                batches = _batches(records, encoder, ray_workers.BATCH)
                for result in ray_workers.RayWorkers(ray, encoder, plan).encode(batches):
                    self._count(result, result[encoder.id_column])
                    progress.advance(len(result["status"]))
                    if self._failure:
                        break
            self._seconds = time.perf_counter() - start
        except KeyboardInterrupt:
            typer.echo(
                f"interrupted: at least {self._counts['encoded']} passages encoded by this run are kept; rerun the "
                "same command to resume",
                err=True,
            )
            sys.exit(130)
        finally:
            ray.shutdown()

    def report(self, as_json: bool) -> None:
        """Print the result and end the program with status 1 if not everything is held."""
        facts = self._facts()
        if as_json:
            print_json(facts)
        else:
            self._show(facts)
        for line in self._named:
            typer.echo(f"note: {visible_line(line)}", err=True)
        if self._failure:
            typer.echo(f"error: {visible_line(self._failure)}", err=True)
        if facts["held"] < facts["passages"]:
            sys.exit(1)

    def _count(self, result: Mapping[str, list[Any]], ids: list[Any]) -> None:
        self._counts.update(result["status"])
        self._truncated += sum(result["truncated"])
        for identifier, status, message in zip(ids, result["status"], result["message"], strict=True):
            if status == "failed" and len(self._named) < _NAMED:
                self._named.append(f"passage {identifier} failed: {message}")
        if lost := result["status"].count("not kept"):
            # All workers share the cache: what happens to one of them happens to the others.
            self._failure = f"the cache did not keep {lost} passages; the log of the workers says why"

    def _facts(self) -> dict[str, Any]:
        seen, new, known = sum(self._counts.values()), self._counts["encoded"], self._counts["known"]
        size = self._reranker.cache.stats().store.size
        return {
            "new": new,
            "known": known,
            "truncated": self._truncated,
            "repaired": self._reranker.repairs.count,
            "failed": self._counts["failed"],
            "not_kept": self._counts["not kept"],
            "workers": self._workers,
            "seconds": round(self._seconds, 2),
            "new_per_second": round(new / self._seconds, 2) if self._seconds else 0.0,
            "passages": seen if self._total is None else self._total,
            "held": new + known,
            "failure": self._failure or None,
            "shard": None if self._shard is None else str(self._shard),
            "cache_entries": size.entries,
            "cache_bytes": size.bytes,
        }

    def _show(self, facts: Mapping[str, Any]) -> None:
        rate = f" ({facts['new_per_second']} passages/s)" if facts["new"] else ""
        by = "1 worker" if self._workers == 1 else f"{self._workers} workers"
        show(f"{facts['new']} encoded by {by}{rate}, {facts['known']} served from the cache, in {self._seconds:.1f} s")
        show_notes(facts, self._reranker.settings)
        show(f"{facts['held']} of {facts['passages']} {passages_text(self._shard)} held")


def _batches(records: Iterator[Record], encoder: PassageEncoder, most: int) -> Iterator[dict[str, list[Any]]]:
    """Group passages into columns; the first groups are small, to show soon whether workers and cache work."""
    size = min(_FIRST, most)
    while some := list(islice(records, size)):
        yield {
            encoder.id_column: [record.id for record in some],
            encoder.text_column: [record.text for record in some],
        }
        size = min(most, 2 * size)
