"""Queries to a reranker whose shared tier fails: what is wrong, what is raised, and how long they take.

The tests and `benchmarks/remote.py` share it. A site is a real server behind a proxy, filled with encoded passages; a
fault is a context manager that breaks the site and mends it again.
"""

from __future__ import annotations

import contextlib
import math
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

from proxykit import FAULTS, Proxy
from serverkit import RedisServer, S3Server, Server

from kalm_rag import KaLMReranker, PassageCache

SECRET = "a secret of the tests of shared tiers"
QUERIES = ("Which animal purrs?", "How is bread made?")
KNOWN = tuple(f"Passage {number} is about {'cats that purr' if number % 2 else 'flour'}." for number in range(16))
"""Passages that the tier holds before a fault."""
NEW = tuple(f"Passage {number} is new, and about {'bread' if number % 2 else 'dogs'}." for number in range(16))
"""Passages that nobody has encoded before."""
TOLERANCE = 1e-5
PASSAGES = 3
"""Of one query."""
Fault = Callable[[], contextlib.AbstractContextManager[None]]


@dataclass
class Outcome:
    """What queries under one fault came to.

    Attributes:
        operations: queries.
        asked: passages that they ranked.
        hits: passages that came from the tier.
        encoded: passages that did not, and were encoded.
        wrong: scores that differ from those without a cache.
        raised: queries that ended in an exception.
        spoiled: how often the proxy did something.
        seconds: of each query.
        errors: what was raised.
    """

    operations: int = 0
    asked: int = 0
    hits: int = 0
    encoded: int = 0
    wrong: int = 0
    raised: int = 0
    spoiled: int = 0
    seconds: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def __iadd__(self, other: Outcome) -> Outcome:
        for part in fields(self):
            setattr(self, part.name, getattr(self, part.name) + getattr(other, part.name))
        return self


class Site:
    """A real server, a proxy in front of it, and what machines see of it.

    Args:
        server: Redis or S3, started.
        proxy: in front of it, started.
        checkpoint: of the model.
        timeout_ms: of all reads of a query together.
    """

    def __init__(self, server: Server, proxy: Proxy, checkpoint: Path, *, timeout_ms: float = 100.0) -> None:
        self.server, self.proxy, self.timeout_ms = server, proxy, timeout_ms
        self._checkpoint = checkpoint
        plain = KaLMReranker(checkpoint, device="cpu", cache=None, score_memory=0)
        pairs = [(query, text) for query in QUERIES for text in (*KNOWN, *NEW)]
        self.expected: dict[tuple[str, str], float] = dict(zip(pairs, plain.predict(pairs), strict=True))
        with self.reranker() as first:
            first.predict([(QUERIES[0], text) for text in KNOWN])
            assert first.cache.flush(30)
            store = first.cache.remote.link.store
            self.items: dict[str, bytes] = store.get_many(list(store.keys()))
        assert len(self.items) == len(KNOWN)

    @property
    def url(self) -> str:
        """The tier's URL, through the proxy."""
        if isinstance(self.server, RedisServer):
            return self.server.url.replace(f":{self.server.port}/", f":{self.proxy.port}/")
        return "s3://bucket/tier"

    def reranker(self, url: str | None = None, **options: Any) -> KaLMReranker:
        """One of a machine without a disk, which asks the tier for each passage."""
        cache = PassageCache(
            None, memory=0, remote=url or self.url, secret=SECRET, remote_timeout_ms=self.timeout_ms, **options
        )
        return KaLMReranker(self._checkpoint, device="cpu", cache=cache, score_memory=0, prefill_memory=0)

    def alone(self) -> KaLMReranker:
        """One without a tier."""
        cache = PassageCache(None, memory=0)
        return KaLMReranker(self._checkpoint, device="cpu", cache=cache, score_memory=0, prefill_memory=0)

    def refill(self) -> None:
        """Put back what the tier held at first."""
        if isinstance(self.server, S3Server):
            self.server.make_bucket("bucket")
        cache = PassageCache(None, remote=self.url, secret=SECRET)
        cache.remote.link.store.put_many(self.items)
        cache.close()

    def faults(self) -> dict[str, Fault]:
        """Every fault that this site can have, by name."""
        found: dict[str, Fault] = {
            "20 ms of latency": partial(self._proxied, "pass", 0.02),
            "500 ms of latency": partial(self._proxied, "pass", 0.5),
            **{mode: partial(self._proxied, mode, 0.0) for mode in FAULTS},
            "server stopped": self._stopped,
            "server restarted empty": self._restarted,
            "entries damaged": self._damaged,
        }
        if isinstance(self.server, RedisServer):
            found |= {"password changed": self._password, "memory full": self._full}
        else:
            found |= {"bucket gone": self._emptied, "permission taken away": self._refused}
        return found

    @contextlib.contextmanager
    def _proxied(self, mode: Any, latency: float) -> Iterator[None]:
        self.proxy.become(mode, latency=latency)
        try:
            yield
        finally:
            self.proxy.become("pass", latency=0.0)

    @contextlib.contextmanager
    def _stopped(self) -> Iterator[None]:
        self.server.pause()
        try:
            yield
        finally:
            self.server.resume()

    @contextlib.contextmanager
    def _restarted(self) -> Iterator[None]:
        self.server.restart()
        if isinstance(self.server, S3Server):
            self.server.make_bucket("bucket")
        try:
            yield
        finally:
            self.refill()

    @contextlib.contextmanager
    def _damaged(self) -> Iterator[None]:
        """Each value is cut, replaced by that of another key, or has a flipped bit, under the key as before."""
        keys = list(self.items)
        damaged: dict[str, bytes] = {}
        for place, (key, value) in enumerate(self.items.items()):
            flipped = bytearray(value)
            flipped[(place * 997) % len(value)] ^= 1 << place % 8
            other = self.items[keys[place - 1]]
            damaged[key] = (value[: len(value) // 2], other, bytes(flipped), b"")[place % 4]
        cache = PassageCache(None, remote=self.url, secret=SECRET)
        cache.remote.link.store.put_many(damaged)
        cache.close()
        try:
            yield
        finally:
            self.refill()

    @contextlib.contextmanager
    def _password(self) -> Iterator[None]:
        assert isinstance(self.server, RedisServer)
        with self.server.client() as client:
            client.config_set("requirepass", "another")
            client.client_kill_filter(_type="normal", skipme=True)
            try:
                yield
            finally:
                client.config_set("requirepass", "")

    @contextlib.contextmanager
    def _full(self) -> Iterator[None]:
        assert isinstance(self.server, RedisServer)
        with self.server.client() as client:
            client.config_set("maxmemory", 1_000_000)
            try:
                yield
            finally:
                client.config_set("maxmemory", 0)

    @contextlib.contextmanager
    def _emptied(self) -> Iterator[None]:
        assert isinstance(self.server, S3Server)
        self.server.empty()
        try:
            yield
        finally:
            self.refill()

    @contextlib.contextmanager
    def _refused(self) -> Iterator[None]:
        assert isinstance(self.server, S3Server)
        self.server.check_credentials(True)
        try:
            yield
        finally:
            self.server.check_credentials(False)


def run_queries(
    reranker: KaLMReranker, expected: Mapping[tuple[str, str], float], count: int, chooser: random.Random
) -> Outcome:
    """Ask queries, two thirds of them about known passages only; never raises."""
    outcome = Outcome(operations=count)
    before = reranker.stats().counts
    for number in range(count):
        texts = chooser.sample(KNOWN, PASSAGES) if number % 3 else [*chooser.sample(KNOWN, 2), chooser.choice(NEW)]
        query = chooser.choice(QUERIES)
        outcome.asked += len(texts)
        began = time.perf_counter()
        try:
            scores = reranker.predict([(query, text) for text in texts])
        except Exception as error:  # noqa: BLE001 - counted as what must not happen
            outcome.raised += 1
            outcome.errors.append(f"{type(error).__name__}: {error}")
        else:
            outcome.wrong += sum(
                not math.isclose(score, expected[query, text], rel_tol=0, abs_tol=TOLERANCE)
                for text, score in zip(texts, scores, strict=True)
            )
        outcome.seconds.append(time.perf_counter() - began)
    after = reranker.stats().counts
    outcome.hits, outcome.encoded = after.remote - before.remote, after.encoded - before.encoded
    return outcome


def run_fault(
    site: Site, reranker: KaLMReranker, fault: Fault, episodes: int, *, queries: int = 10, seed: int = 0
) -> Outcome:
    """Break a site that works, ask queries, and mend it, so many times; only queries under the fault count.

    Args:
        site: the site.
        reranker: of `site.reranker()`.
        fault: of `site.faults()`.
        episodes: how often.
        queries: in each.
        seed: of what is asked.
    """
    total, chooser = Outcome(), random.Random(seed)
    for _ in range(episodes):
        begin_anew(reranker.cache)
        run_queries(reranker, site.expected, 1, chooser)
        reranker.cache.flush(20)  # what waits since the last fault would mend this one
        before = site.proxy.spoiled
        with fault():
            total += run_queries(reranker, site.expected, queries, chooser)
        total.spoiled += site.proxy.spoiled - before
    return total


def begin_anew(cache: PassageCache) -> None:
    """Close the breaker and forget which keys were absent, as a machine does that has just started."""
    tier = cache.remote
    assert tier is not None
    tier.link.breaker.after_fork_in_child()
    tier._absent.clear()


def environment_for(server: Server, proxy: Proxy) -> dict[str, str]:
    """The environment variables with which clients reach S3 through the proxy."""
    return server.environment(f"http://127.0.0.1:{proxy.port}") if isinstance(server, S3Server) else {}


@contextlib.contextmanager
def set_environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set variables, and put back what was there."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
