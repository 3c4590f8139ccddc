"""A shared tier that fails in every way a network and a server can: scores stay right, and no query fails.

The counts are small here; `make faults` runs 5,000 queries. `benchmarks/remote.py` shows how long they take.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from proxykit import Proxy
from serverkit import RedisServer, S3Server
from tierkit import NEW, Site, begin_anew, environment_for, run_fault, run_queries, set_environment

from kalm_rag import KaLMReranker

REDIS = ("password changed", "memory full")
S3 = ("bucket gone", "permission taken away")
BOTH = (
    *("20 ms of latency", "500 ms of latency", "refuse", "reset", "black hole", "half-open", "truncated"),
    *("wrong bytes", "drip", "server stopped", "server restarted empty", "entries damaged"),
)
SOMETIMES = ("20 ms of latency", "memory full", "wrong bytes", "half-open")
"""Faults under which passages may still come from the tier."""

Machine = tuple[Site, KaLMReranker]


@pytest.fixture(scope="module")
def redis_site(one_redis: RedisServer, checkpoint: Path) -> Iterator[Machine]:
    one_redis.empty()
    with Proxy(one_redis.port) as proxy:
        site = Site(one_redis, proxy, checkpoint)
        with site.reranker() as reranker:
            yield site, reranker


@pytest.fixture(scope="module")
def s3_site(one_s3: S3Server, checkpoint: Path) -> Iterator[Machine]:
    one_s3.empty()
    one_s3.make_bucket("bucket")
    with Proxy(one_s3.port) as proxy, set_environment(environment_for(one_s3, proxy)):
        site = Site(one_s3, proxy, checkpoint)
        with site.reranker() as reranker:
            yield site, reranker


def check(machine: Machine, name: str, scale: int, tally: Callable[[str, int, int], None]) -> None:
    site, reranker = machine
    outcome = run_fault(site, reranker, site.faults()[name], 1 + scale // 3, queries=8)
    assert outcome.errors == []
    tally(f"{type(site.server).__name__}, {name}: queries that raised", outcome.raised, outcome.operations)
    tally(f"{type(site.server).__name__}, {name}: wrong scores", outcome.wrong, outcome.asked)
    assert outcome.hits + outcome.encoded == outcome.asked
    if name not in SOMETIMES:
        assert outcome.encoded > 0, "the fault did nothing"


@pytest.mark.parametrize("name", [*BOTH, *REDIS])
def test_redis(redis_site: Machine, name: str, scale: int, tally: Callable[[str, int, int], None]) -> None:
    check(redis_site, name, scale, tally)


def test_a_full_server_is_still_read_from(redis_site: Machine) -> None:
    """However often a write is refused."""
    site, reranker = redis_site
    begin_anew(reranker.cache)
    before = reranker.cache.stats().remote.counters
    with site.faults()["memory full"]():
        for text in NEW[:6]:
            reranker.encode([text + " Again."])
            reranker.cache.flush(20)
        assert run_queries(reranker, site.expected, 3, random.Random(0)).hits > 0
    after = reranker.cache.stats().remote.counters
    assert after.write_failed - before.write_failed >= 6


@pytest.mark.parametrize("name", [*BOTH, *S3])
def test_s3(s3_site: Machine, name: str, scale: int, tally: Callable[[str, int, int], None]) -> None:
    check(s3_site, name, scale, tally)


@pytest.mark.parametrize("name", ["half-open", "server stopped"])
def test_a_tier_that_is_back_is_used_again(redis_site: Machine, name: str) -> None:
    """With `half-open`, the old connections never say that they are dead."""
    site, reranker = redis_site
    begin_anew(reranker.cache)
    chooser = random.Random(1)
    run_queries(reranker, site.expected, 2, chooser)
    late = reranker.cache.stats().remote.counters.late
    with contextlib.ExitStack() as broken:
        broken.enter_context(site.faults()[name]())
        run_queries(reranker, site.expected, 6, chooser)
        if name != "half-open":
            broken.close()
        assert reranker.cache.stats().remote.counters.late > late
        until = time.monotonic() + 40
        while not run_queries(reranker, site.expected, 1, chooser).hits and time.monotonic() < until:
            time.sleep(0.05)
    assert reranker.cache.stats().remote.state == "closed"


def test_every_fault_is_tested(redis_site: Machine, s3_site: Machine) -> None:
    assert set(redis_site[0].faults()) == {*BOTH, *REDIS}
    assert set(s3_site[0].faults()) == {*BOTH, *S3}
