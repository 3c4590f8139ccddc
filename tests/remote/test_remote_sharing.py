"""Machines that share a tier on a real server, and what they are told where they cannot."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from proxykit import MODES, Proxy
from serverkit import RedisServer, S3Server, full_backlog, make_certificate
from tierkit import KNOWN, QUERIES, SECRET

from kalm_rag import KaLMReranker, PassageCache
from kalm_rag.cache import StoreError

TEXTS = KNOWN[:12]


def machine(folder: Path, url: str, **options: Any) -> PassageCache:
    return PassageCache(folder, **{"remote": url, "secret": SECRET, "remote_timeout_ms": 10_000, **options})


def rank(checkpoint: Path, cache: PassageCache, texts: Any = TEXTS) -> list[float]:
    reranker = KaLMReranker(checkpoint, device="cpu", cache=cache, score_memory=0)
    return reranker.predict([(QUERIES[0], text) for text in texts])


OTHER = """
import json, sys
from kalm_rag import KaLMReranker, PassageCache
checkpoint, folder, url, texts = sys.argv[1:]
cache = PassageCache(folder, remote=url, remote_timeout_ms=10_000)
reranker = KaLMReranker(checkpoint, device="cpu", cache=cache)
print(json.dumps(reranker.predict([(sys.stdin.readline(), text) for text in json.loads(texts)])), flush=True)
print(cache.stats().encoded, flush=True)
"""
"""A process that ends without `close` or `flush`."""


@pytest.fixture(params=["redis", "s3"])
def url(request: pytest.FixtureRequest) -> str:
    if request.param == "s3":
        request.getfixturevalue("s3")
        return "s3://bucket/tier"
    return str(request.getfixturevalue("redis_server").url)


def test_two_processes_encode_each_passage_once(url: str, checkpoint: Path, tmp_path: Path) -> None:
    """With separate folders. The second answers its first query from the tier, and from its own disk afterwards."""
    command = [sys.executable, "-c", OTHER, str(checkpoint), str(tmp_path / "first"), url, json.dumps(TEXTS[:8])]
    environment = {**os.environ, "KALM_RAG_CACHE_SECRET": SECRET}
    done = subprocess.run(command, input="", capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "not written" not in done.stderr
    assert int(done.stdout.splitlines()[1]) == 8
    with machine(tmp_path / "second", url) as second:
        scores = rank(checkpoint, second)
        assert second.flush()
        stats = second.stats()
        assert (stats.encoded, stats.remote.counters.hits, stats.remote.counters.written) == (4, 8, 4)
    alone = KaLMReranker(checkpoint, device="cpu", cache=None)
    assert scores == pytest.approx(alone.predict([(QUERIES[0], text) for text in TEXTS]), abs=1e-5)
    assert alone.predict([("", text) for text in TEXTS[:8]]) == pytest.approx(
        json.loads(done.stdout.splitlines()[0]), abs=1e-5
    )
    with PassageCache(tmp_path / "second", secret=SECRET) as offline:
        assert rank(checkpoint, offline) == pytest.approx(scores, abs=1e-5)
        assert offline.stats().encoded == 0


def test_tenants_and_secrets_and_other_data_are_kept_apart(url: str, checkpoint: Path, tmp_path: Path) -> None:
    for number, options in enumerate(({}, {"namespace": "tenant"}, {"secret": "another secret than theirs"})):
        with machine(tmp_path / str(number), url, **options) as cache:
            rank(checkpoint, cache, TEXTS[:2])
            assert cache.stats().encoded == 2, "nothing of the others was found"
            assert cache.flush()
            assert cache.stats().remote.size.entries == 2


def test_forgetting_reaches_the_tier(url: str, checkpoint: Path, tmp_path: Path) -> None:
    with machine(tmp_path / "first", url) as cache:
        rank(checkpoint, cache, TEXTS[:4])
        cache.flush()
        cache.forget(TEXTS[:3])
    with machine(tmp_path / "second", url) as cache:
        rank(checkpoint, cache, TEXTS[:4])
        assert cache.stats().encoded == 3


def spoil(data: bytes, how: str, other: bytes) -> bytes:
    """What somebody else, or another version, may have put under a key of ours."""
    if how == "another format":
        return data[:4] + bytes([data[4] + 1]) + data[5:]
    return {"another key's": other, "not ours": b"{}" * 100, "cut": data[:-1], "empty": b""}[how]


@pytest.mark.parametrize("how", ["another format", "another key's", "not ours", "cut", "empty", "a number"])
def test_what_is_not_ours_is_encoded_again_and_replaced(
    redis_server: RedisServer, checkpoint: Path, tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    """`a number` is a value of another type, which Redis gives no bytes for."""
    with machine(tmp_path / "first", redis_server.url) as first:
        expected = rank(checkpoint, first, TEXTS[:3])
        assert first.flush()
        keys = list(first.store.keys())
    with redis_server.client() as client:
        names = [name for name in client.scan_iter() if name.decode().rpartition(":")[2] in keys]
        assert len(names) == 3
        values = client.mget(names)
        for number, name in enumerate(names):
            if how == "a number":
                client.delete(name)
                client.rpush(name, 1)
            else:
                client.set(name, spoil(values[number], how, values[number - 1]))
    with machine(tmp_path / "second", redis_server.url) as second:
        assert rank(checkpoint, second, TEXTS[:3]) == pytest.approx(expected, abs=1e-5)
        assert second.flush()
        stats = second.stats()
        assert stats.encoded == 3
        if how != "a number":
            assert stats.remote.counters.corrupt == 3
            assert "does not verify" in caplog.text
    with redis_server.client() as client:
        assert sorted(client.mget(names)) == sorted(values)


def test_another_model_finds_nothing(redis_server: RedisServer, checkpoint: Path, tmp_path: Path) -> None:
    from kalm_rag.testing import build_checkpoint

    other = build_checkpoint(tmp_path / "other", seed=7)
    for name, model in (("first", checkpoint), ("second", other)):
        with machine(tmp_path / name, redis_server.url) as cache:
            rank(model, cache, TEXTS[:2])
            assert cache.stats().encoded == 2
            assert cache.stats().remote.counters.corrupt == 0


class TestRefusals:
    """What is said at once where somebody asks, as `kalm-rag cache info` and `encode` do; a query goes on without."""

    def told(self, url: str, folder: Path, checkpoint: Path, caplog: pytest.LogCaptureFixture) -> str:
        with machine(folder, url) as cache:
            with pytest.raises(StoreError) as error:
                cache.remote.link.check()
            with caplog.at_level(logging.WARNING):
                assert len(rank(checkpoint, cache, TEXTS[:2])) == 2
            assert cache.stats().encoded == 2
        return str(error.value)

    def test_a_wrong_password(self, checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        with RedisServer(password="right") as server:
            for name, url in (("none", server.url), ("wrong", server.url.replace("//", "//:hunter2@"))):
                text = self.told(url, tmp_path / name, checkpoint, caplog)
                assert "refuses this user" in text or "NOAUTH" in text
                assert "hunter2" not in text + caplog.text
            with machine(tmp_path, server.url.replace("//", "//:right@")) as cache:
                cache.remote.link.check()

    def test_a_user_who_may_only_read(
        self, redis_server: RedisServer, checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """What the tier holds is used, and the log says once that nothing is written."""
        with machine(tmp_path / "a", redis_server.url) as cache:
            rank(checkpoint, cache, TEXTS[:4])
        with redis_server.client() as client:
            client.acl_setuser("reader", enabled=True, passwords=["+a password"], keys=["*"], categories=["+@read"])
        url = redis_server.url.replace("//", "//reader:a%20password@")
        with caplog.at_level(logging.WARNING), machine(tmp_path / "b", url) as cache:
            for text in TEXTS[4:8]:
                rank(checkpoint, cache, [text])
                cache.flush()
            rank(checkpoint, cache, TEXTS[:4])
            counters = cache.stats().remote.counters
            assert (counters.hits, counters.written, counters.write_failed, counters.outages) == (4, 0, 4, 0)
        assert caplog.text.count("nothing is written to the shared tier") == 1

    def test_certificates(self, checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        good, other = make_certificate(tmp_path, "good"), make_certificate(tmp_path, "other")
        with RedisServer(certificate=good) as server:
            text = self.told(f"{server.url}?ssl_ca_certs={other[0]}", tmp_path / "a", checkpoint, caplog)
            assert "certificate" in text.lower()
            self.told(server.url.replace("rediss", "redis"), tmp_path / "b", checkpoint, caplog)
            for name in ("c", "d"):
                with machine(tmp_path / name, f"{server.url}?ssl_ca_certs={good[0]}") as cache:
                    cache.remote.link.check()
                    rank(checkpoint, cache, TEXTS[:2])
            assert cache.stats().encoded == 0

    def test_a_certificate_of_another_host(
        self, checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        elsewhere = make_certificate(tmp_path, "elsewhere", host="192.0.2.1")
        with RedisServer(certificate=elsewhere) as server:
            text = self.told(f"{server.url}?ssl_ca_certs={elsewhere[0]}", tmp_path / "a", checkpoint, caplog)
            assert "certificate" in text.lower()

    def test_buckets(self, s3: S3Server, checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        text = self.told("s3://no-such-bucket/x", tmp_path / "a", checkpoint, caplog)
        assert "does not exist, or is in another region" in text
        s3.check_credentials(True)
        try:
            text = self.told("s3://bucket/x", tmp_path / "b", checkpoint, caplog)
        finally:
            s3.check_credentials(False)
        assert "refuses this user" in text
        assert "InvalidAccessKeyId" in text

    def test_nobody_there(self, checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        pytest.importorskip("redis", reason="the extra redis is not installed")
        self.told("redis://127.0.0.1:1/0", tmp_path / "a", checkpoint, caplog)

    def test_a_host_that_swallows_connections(
        self, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pytest.importorskip("redis", reason="the extra redis is not installed")
        monkeypatch.setattr("kalm_rag.cache.passage_cache._CLOSING_SECONDS", 0.5)
        with full_backlog() as port, machine(tmp_path, f"redis://127.0.0.1:{port}/0", remote_timeout_ms=100) as cache:
            rank(checkpoint, cache, TEXTS[:2])
            assert cache.stats().remote.counters.late == 2
        counters = cache.stats().remote.counters
        assert counters.written == 0
        assert counters.dropped > 0, "closing did not wait for what cannot be written"


def test_the_proxy_does_what_it_says(redis_server: RedisServer) -> None:
    """Else the tests of faults would test nothing."""
    import redis

    value = bytes(40)
    with redis_server.client() as client:
        client.set("key", value)
    found: dict[str, object] = {}
    for mode in MODES:
        with Proxy(redis_server.port) as proxy:
            options = {"port": proxy.port, "socket_timeout": 0.3, "socket_connect_timeout": 0.3, "retry": None}
            client = redis.Redis(host="127.0.0.1", **options)
            assert client.get("key") == value
            proxy.become(mode)
            try:
                found[mode] = client.get("key") == value
            except redis.RedisError as error:
                found[mode] = type(error).__name__
            client.close()
            if mode not in ("half-open", "black hole"):
                continue
            with redis.Redis(host="127.0.0.1", **options) as other:
                try:
                    found[f"{mode}, new"] = other.get("key") == value
                except redis.RedisError as error:
                    found[f"{mode}, new"] = type(error).__name__
    del found["wrong bytes"]
    assert found == {
        "pass": True,
        "drip": True,
        "refuse": "ConnectionError",
        "reset": "ConnectionError",
        "black hole": "TimeoutError",
        "black hole, new": "TimeoutError",
        "half-open": "TimeoutError",
        "half-open, new": True,
        "truncated": "ConnectionError",
    }


def test_the_proxy_flips_bits(redis_proxy: Proxy) -> None:
    data = bytes(range(256)) * 256
    spoiled = [redis_proxy.flipped(data) for _ in range(4)]
    assert len({data, *spoiled}) == 5
    for other in spoiled:
        assert len(other) == len(data)
        assert 10 < sum(left != right for left, right in zip(data, other, strict=True)) < 100


@pytest.mark.parametrize("latency", [0.0, 0.1])
def test_the_proxy_adds_latency(redis_proxy: Proxy, latency: float) -> None:
    import redis

    redis_proxy.become("pass", latency=latency)
    with redis.Redis(host="127.0.0.1", port=redis_proxy.port) as client:
        client.set("key", bytes(4_000_000))
        began = time.perf_counter()
        assert len(client.get("key")) == 4_000_000
        assert time.perf_counter() - began >= latency
