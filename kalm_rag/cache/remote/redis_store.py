"""Keeps frames in Redis or Valkey."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from kalm_rag.cache.keys import KEY_PATTERN
from kalm_rag.cache.records import SlotRecords
from kalm_rag.cache.remote.address import Address, read_address
from kalm_rag.cache.remote.windows import Windows, by_bytes
from kalm_rag.cache.store import RefusedError, StoreError, StoreStats
from kalm_rag.utils import forks

if TYPE_CHECKING:
    from redis import Redis

logger = logging.getLogger(__name__)

R = TypeVar("R")

_CONNECT_SECONDS, _ANSWER_SECONDS = 2.0, 5.0
_RETRIES = 1
"""At once, for a connection that the server has closed meanwhile. Pauses would keep a query waiting for a server that
refuses; writes are tried again by `RemoteWrites`."""
_WRITE_BYTES = 4_000_000
"""Bytes of one round of writes: a server serves nobody else meanwhile."""
_LASTING = ("CERTIFICATE_VERIFY_FAILED", "WRONG_VERSION_NUMBER", "NOAUTH", "DB index")
"""Marks of errors that stay until somebody changes something."""
_GLOB = re.compile(r"([\\\[\]*?^-])")


class RedisStore:
    """A `Store` in a Redis or Valkey server, for many machines at once.

    Values have no time to live: let the server evict what is not used (`maxmemory-policy allkeys-lru`). The connection
    is made at the first use in each process.

    Args:
        url: `redis://host:6379/0`, or `rediss://` for TLS, with the client's own options in its query. A user and a
            password in it are never shown; the environment variables `KALM_RAG_REMOTE_USERNAME` and
            `KALM_RAG_REMOTE_PASSWORD` are used if it has none.
        prefix: put in front of every key, so that a server may be shared with other data.

    Attributes:
        windows: divides keys into requests.
        records: the key spaces of the entries, see `kalm_rag.cache.spaces`.

    Raises:
        ValueError: the URL is none of Redis.
        ImportError: the extra `redis` is not installed.
    """

    def __init__(self, url: str, prefix: str = "kalm-rag:") -> None:
        address = read_address(url)
        if address.kind != "redis":
            msg = f"a RedisStore needs a redis:// or rediss:// URL, got {address.shown}"
            raise ValueError(msg)
        self._address = address
        self._prefix = prefix
        self._server = _Server(address)
        self.windows = Windows()
        self.records = SlotRecords(self._values, self._server.keeper(prefix))

    def __repr__(self) -> str:
        return f"RedisStore({self._address.shown!r}, {self._prefix!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return RedisStore, (self._address.url, self._prefix)

    def get_many(self, keys: Sequence[str]) -> dict[str, bytes]:
        """Return the values of the keys, read in windows of bounded bytes; missing keys are left out.

        Raises:
            StoreError: the server does not answer, or refuses.
        """
        return {key: value for window in self.windows.of(keys) for key, value in self._values(window).items()}

    def put_many(self, items: Mapping[str, bytes]) -> int:
        """Store values, replacing older ones; return how many are kept, fewer if the server's memory is full.

        A full server is a line in the log and no error, because it still answers reads.

        Raises:
            StoreError: none was kept, for another reason.
        """
        kept = 0
        for part in by_bytes(items, _WRITE_BYTES):
            kept += self._server.run("write to", partial(_put, prefix=self._prefix, items=part))
        self._server.note_room(kept == len(items))
        return kept

    def add(self, key: str, value: bytes) -> bool:
        """Store a value unless there is one already; returns whether this one is kept.

        Raises:
            StoreError: the server does not answer, or refuses.
        """
        name = self._prefix + key
        is_new = bool(self._server.run("write to", lambda client: client.set(name, value, nx=True)))
        if is_new:
            self._server.run("write to", lambda client: _count(client, self._prefix, 1, len(value)))
        return is_new

    def contains(self, keys: Sequence[str]) -> set[str]:
        """Return those of the keys that have a value, without reading it.

        Raises:
            StoreError: the server does not answer, or refuses.
        """

        def ask(client: Redis) -> list[Any]:
            with client.pipeline(transaction=False) as pipe:
                for key in keys:
                    pipe.exists(self._prefix + key)
                return list(pipe.execute())

        return {key for key, found in zip(keys, self._server.run("read", ask), strict=True) if found} if keys else set()

    def delete(self, keys: Iterable[str]) -> int:
        """Delete keys; return how many existed.

        Raises:
            StoreError: the server does not answer, or refuses.
        """
        names = [self._prefix + key for key in keys]

        def remove(client: Redis) -> int:
            with client.pipeline(transaction=False) as pipe:
                for name in names:
                    pipe.strlen(name)
                    pipe.delete(name)
                answers = pipe.execute()
            gone = sum(answers[1::2])
            _count(client, self._prefix, -gone, -sum(answers[0::2]))
            return int(gone)

        return self._server.run("delete from", remove) if names else 0

    def keys(self) -> Iterator[str]:
        """Yield every key. The server goes through all its keys, in small steps: for exports, never for a query.

        Raises:
            StoreError: the server does not answer, or refuses.
        """
        pattern = _GLOB.sub(r"\\\1", self._prefix) + "*"
        found: dict[str, None] = {}
        names = self._server.run("list", lambda client: list(client.scan_iter(match=pattern.encode(), count=1000)))
        for name in names:
            key = name.decode("utf-8", "replace")[len(self._prefix) :]
            if KEY_PATTERN.fullmatch(key):
                found[key] = None  # a server may list a key twice
        return iter(found)

    def stats(self) -> StoreStats:
        """Return what was counted at writing: no key is listed. What the server evicted by itself is not subtracted.

        Raises:
            StoreError: the server does not answer, or refuses.
        """

        def ask(client: Redis) -> StoreStats:
            entries, size = client.hmget(self._prefix + "totals", "entries", "bytes")
            limit = evicted = 0
            try:
                facts = client.info("memory"), client.info("stats")
                limit, evicted = int(facts[0].get("maxmemory", 0)), int(facts[1].get("evicted_keys", 0))
            except Exception:  # noqa: BLE001, S110 - many servers do not tell their users
                pass
            return StoreStats(max(0, int(entries or 0)), max(0, int(size or 0)), limit or None, evicted)

        return self._server.run("read", ask)

    def close(self) -> None:
        """Close the connections. A later call opens them again."""
        self._server.close()

    def _values(self, keys: Sequence[str]) -> dict[str, bytes]:
        """Return the values of a few keys, in one request."""
        if not keys:
            return {}
        names = [self._prefix + key for key in keys]
        values: list[Any] = self._server.run("read", lambda client: client.mget(names))
        found = {key: bytes(value) for key, value in zip(keys, values, strict=True) if value is not None}
        self.windows.learn(found)
        return found


class _Server:
    """Connections of this process to a server, and its errors in words.

    Args:
        address: where it is.
    """

    def __init__(self, address: Address) -> None:
        self._address = address
        self._has_room = True
        self._lock = forks.Lock()  # of the next two lines
        self._client: Redis | None = None
        self._owner = 0

    def run(self, what: str, action: Callable[[Redis], R]) -> R:
        """Do something.

        Raises:
            RefusedError: the server refuses, and will do so again.
            StoreError: it does not answer, or failed.
        """
        from redis import exceptions

        try:
            return action(self._connected())
        except (exceptions.AuthenticationError, exceptions.NoPermissionError) as error:
            msg = (
                f"{self._address.shown} refuses this user ({type(error).__name__}): give the user and the password in "
                "the URL, or in KALM_RAG_REMOTE_USERNAME and KALM_RAG_REMOTE_PASSWORD"
            )
            raise RefusedError(msg) from None
        except exceptions.RedisError as error:
            msg = f"cannot {what} {self._address.shown}: {_first_line(error)}"
            kind = RefusedError if any(mark in str(error) for mark in _LASTING) else StoreError
            raise kind(msg) from error

    def note_room(self, has_room: bool) -> None:
        """Log once when the server has no memory left."""
        if self._has_room and not has_room:
            logger.warning(
                "%s has no memory left and keeps no more passages: raise its maxmemory, or let it evict "
                "(maxmemory-policy allkeys-lru)",
                self._address.shown,
            )
        self._has_room = has_room

    def keeper(self, prefix: str) -> Callable[[Mapping[str, bytes]], None]:
        """Return what stores values that are no entries."""

        def keep(items: Mapping[str, bytes]) -> None:
            self.run("write to", lambda client: client.mset({prefix + key: value for key, value in items.items()}))

        return keep

    def close(self) -> None:
        """Close the connections. A later call opens them again."""
        with self._lock:
            client, self._client = self._client, None
        if client is not None and self._owner == os.getpid():
            client.close()

    def _connected(self) -> Redis:
        from redis import Redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        with self._lock:
            # A forked child must not speak on its parent's connections.
            if self._client is None or self._owner != os.getpid():
                try:
                    self._client = Redis.from_url(
                        self._address.url,
                        socket_connect_timeout=_CONNECT_SECONDS,
                        socket_timeout=_ANSWER_SECONDS,
                        retry=Retry(NoBackoff(), _RETRIES),
                        decode_responses=False,
                    )
                except (ValueError, TypeError) as error:
                    msg = f"{self._address.shown} has a wrong option or path: {_first_line(error)}"
                    raise RefusedError(msg) from None
                self._owner = os.getpid()
            return self._client


def _put(client: Redis, prefix: str, items: Mapping[str, bytes]) -> int:
    from redis.exceptions import OutOfMemoryError

    with client.pipeline(transaction=False) as pipe:
        for key, value in items.items():
            pipe.strlen(prefix + key)
            pipe.set(prefix + key, value)
        answers = pipe.execute(raise_on_error=False)
    kept = new = size = 0
    failure: Exception | None = None
    for before, done, value in zip(answers[0::2], answers[1::2], items.values(), strict=True):
        if isinstance(done, Exception):
            failure = failure if isinstance(done, OutOfMemoryError) else done
            continue
        kept += 1
        older = 0 if isinstance(before, Exception) else int(before)
        new, size = new + (older == 0), size + len(value) - older
    if failure is not None and not kept:
        raise failure
    _count(client, prefix, new, size)
    return kept


def _count(client: Redis, prefix: str, entries: int, size: int) -> None:
    with client.pipeline(transaction=False) as pipe:
        pipe.hincrby(prefix + "totals", "entries", entries)
        pipe.hincrby(prefix + "totals", "bytes", size)
        pipe.execute(raise_on_error=False)  # a count that a full server does not take loses no entry


def _first_line(error: Exception) -> str:
    text = str(error).partition("\n")[0]
    return f"{type(error).__name__}: {text:.200}"
