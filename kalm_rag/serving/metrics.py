"""What Prometheus reads: requests, where their time went, where passages came from, and the cache."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kalm_rag.serving.asked import Outcome

if TYPE_CHECKING:
    from kalm_rag.reranker import KaLMReranker
    from kalm_rag.serving.work import Work as ServedWork
    from kalm_rag.utils.costs import Work
    from kalm_rag.utils.turns import Turn

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_ROWS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)
_TOKENS = (64, 256, 1024, 4096, 16384, 65536, 262144, 1048576)
_PARTS = ("queue", "read", "encode", "prefill", "score")
_SOURCES = ("remembered", "prefilled", "stored", "states", "remote", "encoded")


class Metrics:
    """The metrics of one server; names begin with `kalm_`, and end with their unit.

    Args:
        served: what the endpoints ask of the model.
    """

    def __init__(self, served: ServedWork) -> None:
        self.registry = CollectorRegistry()
        own: dict[str, Any] = {"registry": self.registry}
        self._requests = Counter("kalm_requests", "Requests that ended.", ["dialect", "status"], **own)
        self._duration = Histogram(
            "kalm_request_duration_seconds", "From the first byte to the last.", ["dialect"], buckets=_SECONDS, **own
        )
        self._parts = {
            part: Histogram(f"kalm_{part}_seconds", f"{text} of a request.", buckets=_SECONDS, **own)
            for part, text in zip(
                _PARTS,
                (
                    "Waiting for the model",
                    "Reading the cache",
                    "Running the encoder",
                    "Computing keys and values of passages",
                    "Running the decoder on the query",
                ),
                strict=True,
            )
        }
        self._rows = Histogram("kalm_request_passages", "Passages of a request.", buckets=_ROWS, **own)
        self._tokens = Histogram("kalm_request_tokens", "Tokens of a request.", buckets=_TOKENS, **own)
        self._batch_rows = Histogram(
            "kalm_batch_rows", "Passages or pairs of a step of the model.", ["work"], buckets=_ROWS, **own
        )
        self._batch_tokens = Histogram(
            "kalm_batch_tokens", "Tokens of a step of the model.", ["work"], buckets=_TOKENS, **own
        )
        self._refused = Counter("kalm_refused_requests", "Requests refused because the queue was full.", **own)
        self._gone = Counter("kalm_abandoned_requests", "Requests whose client went away.", **own)
        self._truncated = Counter("kalm_truncated_texts", "Passages and queries not read to their end.", **own)
        self._skipped = Counter("kalm_skipped_passages", "Passages left without a score.", **own)
        Gauge("kalm_running_requests", "Requests that are worked on.", **own).set_function(lambda: served.queue.running)
        Gauge("kalm_waiting_requests", "Requests that wait.", **own).set_function(lambda: served.queue.waiting)
        self.registry.register(_CacheCollector(served.reranker))

    def ended(self, dialect: str, status: int, seconds: float) -> None:
        """Count a request."""
        self._requests.labels(dialect, str(status)).inc()
        self._duration.labels(dialect).observe(seconds)
        if status in (429, 503):
            self._refused.inc()
        if status == 499:
            self._gone.inc()

    def ranked(self, outcome: Outcome) -> None:
        """Count what a request took."""
        rankings = [answer.ranking for answer in outcome.answers]
        timings = [ranking.timings for ranking in rankings if ranking.timings is not None]
        for part, histogram in self._parts.items():
            histogram.observe(sum(getattr(timing, part) for timing in timings))
        self._rows.observe(sum(len(answer.ask.texts) for answer in outcome.answers))
        self._tokens.observe(outcome.tokens)
        self._truncated.inc(outcome.truncated + outcome.queries_truncated)
        self._skipped.inc(sum(ranking.counts.skipped for ranking in rankings if ranking.counts is not None))

    def stepped(self, work: Work, turn: Turn) -> None:
        """Count a step of the model."""
        if turn.rows:
            self._batch_rows.labels(work).observe(turn.rows)
            self._batch_tokens.labels(work).observe(turn.size)

    def text(self) -> bytes:
        """Return all in Prometheus's text format; reads the cache's size, so call it in a thread."""
        return generate_latest(self.registry)


class _CacheCollector(Collector):
    """Reads the counters that the library keeps."""

    def __init__(self, reranker: KaLMReranker) -> None:
        self._reranker = reranker

    def describe(self) -> Iterable[Metric]:
        """Nothing is read when it is registered."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Read them."""
        reranker = self._reranker
        stats, cache, prefill = reranker.stats(), reranker.cache.stats(), reranker.prefill_stats()
        sources = CounterMetricFamily("kalm_passages", "Where passages came from.", labels=["source"])
        for source in _SOURCES:
            sources.add_metric([source], getattr(stats.counts, source))
        yield sources
        levels: dict[str, Any] = {
            "memory": cache.memory.counters,
            "store": cache.store.counters,
            "prefilled_store": cache.prefilled,
        }
        if cache.remote is not None:
            levels["remote"] = cache.remote.counters
        for name, fields, text in (
            ("hits", ("hits",), "Entries found and verified."),
            ("misses", ("misses",), "Entries not found."),
            ("corrupt", ("corrupt",), "Entries that did not verify."),
            ("errors", ("read_failed", "write_failed"), "Entries that could not be read or kept."),
        ):
            family = CounterMetricFamily(f"kalm_cache_{name}", text, labels=["level"])
            for level, counters in levels.items():
                family.add_metric([level], sum(getattr(counters, field) for field in fields))
            if prefill is not None and name in ("hits", "misses"):
                family.add_metric(["prefilled_memory"], getattr(prefill.counters, name))
            yield family
        sizes = {"memory": cache.memory.size, "store": cache.store.size}
        if prefill is not None:
            sizes["prefilled_memory"] = prefill.size
        for name, field, text in (
            ("bytes", "bytes", "What a level takes."),
            ("limit_bytes", "limit", "What a level may take."),
            ("entries", "entries", "Entries of a level."),
        ):
            gauge = GaugeMetricFamily(f"kalm_cache_{name}", text, labels=["level"])
            for level, size in sizes.items():
                if (value := getattr(size, field)) is not None:
                    gauge.add_metric([level], value)
            yield gauge
        evicted = CounterMetricFamily("kalm_cache_evictions", "Entries given up for others.", labels=["level"])
        for level, size in sizes.items():
            evicted.add_metric([level], size.evicted)
        yield evicted
        background = GaugeMetricFamily("kalm_background_pending_passages", "Passages that wait to be encoded.")
        background.add_metric([], stats.background.pending)
        yield background
