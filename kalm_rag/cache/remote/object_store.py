"""Keeps frames in an object store: S3, Google Cloud Storage, Azure Blob Storage, or a folder that machines share."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any, TypeVar
from urllib.parse import urlsplit

from kalm_rag.cache.keys import KEY_PATTERN
from kalm_rag.cache.records import SlotRecords
from kalm_rag.cache.remote.address import read_address
from kalm_rag.cache.remote.windows import Windows
from kalm_rag.cache.store import RefusedError, StoreError, StoreStats
from kalm_rag.cache.totals import SlotTotals
from kalm_rag.utils import forks

R = TypeVar("R")

_AT_ONCE = 32
"""Requests under way: obstore answers all of them on one thread, where many more would time out (obstore#475)."""
_CONNECT_SECONDS, _ANSWER_SECONDS = 2, 5
_RETRIES = 1
_PAUSE = {"init_backoff": timedelta(milliseconds=10), "max_backoff": timedelta(milliseconds=50), "base": 2}
"""Before a request is tried again: short, since a query waits. Writes are tried again by `RemoteWrites`."""
_MISSING = ("NoSuchBucket", "PermanentRedirect", "ContainerNotFound", "The specified bucket does not exist")
_REFUSED = ("InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken")
"""Marks of errors that stay until somebody changes something."""

_used_by = 0
"""The process that has used obstore first. Its threads do not survive a fork, and a child would wait for them forever
(obstore#441, tokio#4301)."""


class ObjectStore:
    """A `Store` in an object store, for many machines at once.

    An entry is one object under `PREFIX/ab/ab...`: its key's first two digits make 256 prefixes, over which the object
    store can spread requests. Credentials, region and endpoint come from the environment, as each provider's own tools
    read them (`AWS_*`, `GOOGLE_*`, `AZURE_*`). A user of S3 must be allowed to list the bucket: without it, S3 answers
    for a missing object as for a forbidden one.

    A process that was forked after its parent had used an object store cannot use one, and is told so: fork first, or
    start processes with the method `spawn`.

    Args:
        url: `s3://bucket/prefix`, `gs://...`, `az://container/...`, or `file:///folder`, which must exist.
        prefix: a folder inside of the URL's.
        store: an object store that was made with `obstore`, instead of one for the URL.

    Attributes:
        windows: divides keys into requests.
        records: the key spaces of the entries, see `kalm_rag.cache.spaces`.

    Raises:
        ValueError: the URL is none of an object store.
        ImportError: the extra `objects` is not installed.
    """

    def __init__(self, url: str, prefix: str = "kalm-rag", *, store: Any = None) -> None:
        self._shown = "an obstore store"
        if store is None:
            address = read_address(url)
            if address.kind != "objects":
                msg = f"an ObjectStore needs an s3://, gs://, az:// or file:// URL, got {address.shown}"
                raise ValueError(msg)
            self._shown = address.shown
        self._url = url
        self._given = store
        self.windows = Windows()
        self._bucket = _Bucket(
            (lambda: _open(url)) if store is None else (lambda: store), self._shown, prefix.strip("/")
        )
        self.records = SlotRecords(self._bucket.read, self._bucket.write)
        self._totals = SlotTotals(self._bucket.read, self._bucket.write)
        forks.watch(self._totals)

    def __repr__(self) -> str:
        return f"ObjectStore({self._shown!r}, {self._bucket.prefix!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        if self._given is not None:
            msg = "an ObjectStore of a ready-made obstore store belongs to its process; give a URL instead"
            raise TypeError(msg)
        return ObjectStore, (self._url, self._bucket.prefix)

    def get_many(self, keys: Sequence[str]) -> dict[str, bytes]:
        """Return the values of the keys, many requests at once; missing keys are left out.

        Raises:
            StoreError: the object store does not answer, or refuses.
        """
        found: dict[str, bytes] = {}
        for window in self.windows.of(keys):
            values = self._bucket.read(window)
            self.windows.learn(values)
            found |= values
        return found

    def put_many(self, items: Mapping[str, bytes]) -> int:
        """Store values, replacing older ones.

        Raises:
            StoreError: one was not kept.
        """
        self._bucket.write(items)
        self._totals.put({key: len(value) for key, value in items.items()})
        with contextlib.suppress(StoreError):  # a count that is not kept loses no entry
            self._totals.save()
        return len(items)

    def add(self, key: str, value: bytes) -> bool:
        """Store a value unless there is one already; returns whether this one is kept.

        Raises:
            StoreError: the object store does not answer, or refuses.
        """
        is_new = self._bucket.create(key, value)
        if is_new:
            self._totals.put({key: len(value)})
        return is_new

    def contains(self, keys: Sequence[str]) -> set[str]:
        """Return those of the keys that have a value, without reading it.

        Raises:
            StoreError: the object store does not answer, or refuses.
        """
        return {key for key, size in zip(keys, self._bucket.sizes(keys), strict=True) if size is not None}

    def delete(self, keys: Iterable[str]) -> int:
        """Delete keys; return how many existed.

        Raises:
            StoreError: the object store does not answer, or refuses.
        """
        wanted = list(keys)
        sizes = self._bucket.sizes(wanted)
        known = {key: size for key, size in zip(wanted, sizes, strict=True) if size is not None}
        if known:
            self._bucket.delete(list(known))
            self._totals.delete(known)
            with contextlib.suppress(StoreError):
                self._totals.save()
        return len(known)

    def keys(self) -> Iterator[str]:
        """Yield every key. All objects are listed: for exports, never for a query.

        Raises:
            StoreError: the object store does not answer, or refuses.
        """
        return iter([name for name in self._bucket.names() if KEY_PATTERN.fullmatch(name)])

    def stats(self) -> StoreStats:
        """Return what was counted at writing, to which a lost count may be missing: no object is listed.

        Raises:
            StoreError: the object store does not answer, or refuses.
        """
        entries, size = self._totals.sums()
        return StoreStats(entries, size, None)

    def check(self) -> None:
        """Find out whether the bucket or folder exists and may be read.

        Raises:
            StoreError: it does not, or may not; the message says what to do.
        """
        self._bucket.names(most=1)

    def close(self) -> None:
        """Save counts and end the threads. A later call opens the store again."""
        with contextlib.suppress(StoreError):
            self._totals.save()
        self._bucket.close()


class _Bucket:
    """Objects below a prefix: many requests at once, and errors in words.

    Args:
        make: opens the object store.
        shown: what it is called in messages.
        prefix: a folder inside of it.
    """

    def __init__(self, make: Callable[[], Any], shown: str, prefix: str) -> None:
        self.prefix = prefix
        self._make = make
        self._shown = shown
        self._lock = forks.Lock()  # of the next three lines
        self._made: Any = None
        self._threads: ThreadPoolExecutor | None = None
        self._owner = 0

    def read(self, keys: Sequence[str]) -> dict[str, bytes]:
        """Return the content of objects; missing ones are left out."""
        import obstore

        values = self._each("read", lambda store, key: bytes(obstore.get(store, self._name(key)).bytes()), keys)
        return {key: value for key, value in zip(keys, values, strict=True) if value is not None}

    def sizes(self, keys: Sequence[str]) -> list[int | None]:
        """Return the bytes of objects, None for a missing one."""
        import obstore

        return self._each("read", lambda store, key: int(obstore.head(store, self._name(key))["size"]), keys)

    def write(self, items: Mapping[str, bytes]) -> None:
        """Write objects, replacing older ones."""
        import obstore

        self._each("write to", lambda store, key: obstore.put(store, self._name(key), items[key]), list(items))

    def create(self, key: str, value: bytes) -> bool:
        """Write an object unless there is one already; returns whether this one is kept."""
        import obstore
        from obstore.exceptions import AlreadyExistsError

        def put() -> bool:
            try:
                obstore.put(self._opened(), self._name(key), value, mode="create")
            except AlreadyExistsError:
                return False
            return True

        return self._run("write to", put)

    def delete(self, keys: Sequence[str]) -> None:
        """Delete objects; one that another process deletes at the same time is deleted."""
        import obstore
        from obstore.exceptions import NotFoundError

        def delete() -> None:
            store, names = self._opened(), [self._name(key) for key in keys]
            try:
                obstore.delete(store, names)
            except (NotFoundError, FileNotFoundError) as error:
                # A folder ends at the first file that is not there; the others are left.
                if any(mark in str(error) for mark in _MISSING):
                    raise
                for name in names:
                    with contextlib.suppress(NotFoundError, FileNotFoundError):
                        obstore.delete(store, name)

        self._run("delete from", delete)

    def names(self, most: int | None = None) -> list[str]:
        """Return the last parts of the names of all objects, or of so many."""
        import obstore

        def listed() -> list[str]:
            found: list[str] = []
            for page in obstore.list(self._opened(), prefix=self.prefix or None, chunk_size=most or 1000):
                found += [str(thing["path"]).rpartition("/")[2] for thing in page]
                if most is not None:
                    break
            return found

        return self._run("list", listed)

    def close(self) -> None:
        """End the threads. A later call starts new ones."""
        with self._lock:
            threads, self._threads, self._made = self._threads, None, None
        if threads is not None and self._owner == os.getpid():
            threads.shutdown(wait=False)

    def _name(self, key: str) -> str:
        """Return an object's path: no part of it comes from a text."""
        shard = f"{key[:2]}/" if KEY_PATTERN.fullmatch(key) else ""
        return f"{self.prefix}/{shard}{key}" if self.prefix else f"{shard}{key}"

    def _each(self, what: str, action: Callable[[Any, str], R], keys: Sequence[str]) -> list[R | None]:
        """Run an action for each key, many at once; None where there is no such object."""
        from obstore.exceptions import NotFoundError

        def one(store: Any, key: str) -> R | None:
            try:
                return action(store, key)
            except (NotFoundError, FileNotFoundError):
                if what == "read":
                    return None
                raise

        def run() -> list[R | None]:
            store = self._opened()
            if len(keys) < 2 or self._threads is None:
                return [one(store, key) for key in keys]
            try:
                return list(self._threads.map(lambda key: one(store, key), keys))
            except RuntimeError as error:
                if "shutdown" not in str(error):
                    raise
                return [one(store, key) for key in keys]  # the interpreter is ending, and starts no thread

        return self._run(what, run)

    def _run(self, what: str, action: Callable[[], R]) -> R:
        from obstore import exceptions

        try:
            return action()
        except StoreError:
            raise
        except (exceptions.BaseError, OSError, RuntimeError, ValueError) as error:
            text = " ".join(str(error).split())
            reason = next((mark for mark in _REFUSED if mark in text), None)
            if reason or isinstance(error, (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError)):
                msg = (
                    f"{self._shown} refuses this user ({reason or type(error).__name__}): check the credentials, and "
                    f"that they allow to list, read and write below {self.prefix or 'its root'}/"
                )
                raise RefusedError(msg) from error
            if any(mark in text for mark in _MISSING):
                msg = f"{self._shown} does not exist, or is in another region: create the bucket, or mend the URL"
                raise RefusedError(msg) from error
            msg = f"cannot {what} {self._shown}: {type(error).__name__}: {text:.200}"
            raise StoreError(msg) from error

    def _opened(self) -> Any:
        global _used_by
        if _used_by not in (0, os.getpid()):
            msg = (
                f"{self._shown} cannot be reached from this process: it was forked after its parent had used an object "
                "store, whose client does not survive that; open the cache after the fork, or start processes with the "
                "method 'spawn'"
            )
            raise RefusedError(msg)
        _used_by = os.getpid()
        with self._lock:
            if self._made is None or self._owner != os.getpid():
                self._made = self._make()
                self._threads = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="kalm-rag-objects")
                self._owner = os.getpid()
            return self._made


def _open(url: str) -> Any:
    from obstore.store import LocalStore, from_url

    if url.startswith("file:"):
        folder = urlsplit(url).path
        if not os.path.isdir(folder):
            msg = f"the folder {folder} of a shared tier does not exist: mount or make it first"
            raise RefusedError(msg)
        return LocalStore(folder)
    options: Any = {
        "timeout": timedelta(seconds=_ANSWER_SECONDS),
        "connect_timeout": timedelta(seconds=_CONNECT_SECONDS),
    }
    retries: Any = {
        "max_retries": _RETRIES,
        "backoff": _PAUSE,
        "retry_timeout": timedelta(seconds=_ANSWER_SECONDS),
    }
    endpoint = next(
        (os.environ[name] for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL") if name in os.environ), ""
    )
    if endpoint.startswith("http://"):  # a server on one's own network, such as MinIO: the user has named it
        options["allow_http"] = True
    return from_url(url, client_options=options, retry_config=retries)
