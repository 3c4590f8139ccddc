"""Servers and stores of a shared tier. A test is skipped only where its server is not installed, and says so."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

import pytest
from proxykit import Proxy
from serverkit import AzureServer, RedisServer, S3Server, Server

S = TypeVar("S", bound=Server)


def needs(kind: type[Server]) -> None:
    if missing := kind.missing():
        pytest.skip(missing)


@pytest.fixture(scope="session")
def one_redis() -> Iterator[RedisServer]:
    needs(RedisServer)
    with RedisServer() as server:
        yield server


@pytest.fixture
def redis_server(one_redis: RedisServer) -> RedisServer:
    """An empty Redis."""
    one_redis.empty()
    return one_redis


@pytest.fixture(scope="session")
def one_s3() -> Iterator[S3Server]:
    needs(S3Server)
    with S3Server() as server:
        yield server


@pytest.fixture
def s3(one_s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """An S3 with one empty bucket, `bucket`, to which the environment of this process leads."""
    one_s3.empty()
    one_s3.make_bucket("bucket")
    for name, value in one_s3.environment().items():
        monkeypatch.setenv(name, value)
    return one_s3


@pytest.fixture(scope="session")
def one_azure() -> Iterator[AzureServer]:
    needs(AzureServer)
    with AzureServer() as server:
        yield server


@pytest.fixture
def azure(one_azure: AzureServer, monkeypatch: pytest.MonkeyPatch) -> AzureServer:
    """An Azure storage account to which the environment of this process leads."""
    for name, value in one_azure.environment().items():
        monkeypatch.setenv(name, value)
    return one_azure


@pytest.fixture
def redis_proxy(redis_server: RedisServer) -> Iterator[Proxy]:
    """A proxy in front of an empty Redis."""
    with Proxy(redis_server.port) as proxy:
        yield proxy


@pytest.fixture
def s3_proxy(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy in front of S3, to which the environment of this process leads."""
    with Proxy(s3.port) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        yield proxy
