"""Requests to a server: sent again while it is away, and only to a server that has the model that was named."""

from __future__ import annotations

import logging
import random
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from time import sleep
from typing import Any, TypeVar

from kalm_rag.client.exchange import Deadline, Exchange, read_object
from kalm_rag.client.server import Server
from kalm_rag.errors import ServerError, ServerUnavailableError
from kalm_rag.model.checkpoint import ALIASES
from kalm_rag.utils import forks
from kalm_rag.utils.breaker import Breaker
from kalm_rag.utils.turns import check_stopped

logger = logging.getLogger(__name__)

T = TypeVar("T")

_FIRST_PAUSE, _LONGEST_PAUSE = 0.25, 5.0
_LEFT_ALONE = 5.0
"""Seconds at most that a server is left alone before a call tries it again: a caller waits for its return."""
_DIGEST = re.compile("[0-9a-f]{24}")


class Connection:
    """Sends the requests of a client, from any number of threads.

    `tenacity` was looked at: what a server asks for in `Retry-After`, the deadline and a cancelled call would each be a
    callback of it, and no line fewer.

    Args:
        server: where it is.
        model: the name of its model, or its digest; None takes any.

    Attributes:
        server: as given.
        failures: requests that got no answer, after the last attempt.
    """

    def __init__(self, server: Server, model: str | None) -> None:
        self.server = server
        self.failures = 0
        self._model = model
        meanwhile = "rankings keep the order of their passages" if server.keeps_order else "calls fail at once"
        self._breaker = Breaker(f"the server at {server.url}", meanwhile, _LEFT_ALONE)
        self._exchange = Exchange(server)
        self.after_fork_in_child()
        forks.watch(self)
        forks.watch(self._breaker)

    def after_fork_in_child(self) -> None:
        """Replace the lock, and ask the server again what it is."""
        self._lock = threading.Lock()  # of the next line, and of `failures`
        self._info: dict[str, Any] = {}

    def info(self) -> dict[str, Any]:
        """Ask the server what it is, even one that is left alone, and check that its model is the one that was named.

        Raises:
            ServerError: it is another model, or not a server of `kalm-rag serve`.
            ServerUnavailableError: it is away.
        """
        deadline = Deadline(self.server.timeout)
        return self._tried(lambda: self._verify(deadline), deadline, self.server.retries)

    def known(self, deadline: Deadline | None = None) -> dict[str, Any]:
        """Return what the server said of itself when its model was checked last; the arguments are those of `send`."""
        ends = deadline or Deadline(self.server.timeout)
        return self._info or self._asked(lambda: self._verify(ends), ends)

    def send(
        self,
        path: str,
        body: Callable[[], Mapping[str, Any]],
        read: Callable[[Iterator[bytes]], T],
        deadline: Deadline | None = None,
    ) -> T:
        """Send a request and return what is read of the answer.

        After three calls that found the server away, others fail at once, except one now and then that tries it again.

        Args:
            path: of the endpoint.
            body: makes the content of an attempt.
            read: reads an answer; raises `ValueError` for one that it does not understand.
            deadline: of all attempts together; by default the server's timeout from now.

        Raises:
            ServerError: the server refuses the request, or has another model.
            ServerUnavailableError: it is away, too slow, busy, or answers something that cannot be read.
        """
        ends = deadline or Deadline(self.server.timeout)

        def attempt() -> T:
            known = self._info or self._verify(ends)
            found, digest = self._exchange.request(path, body(), read, ends)
            if digest != known["digest"]:
                self._verify(ends, digest)
            return found

        return self._asked(attempt, ends)

    def close(self) -> None:
        """Close the connections. The next request opens new ones, and asks for the model again."""
        with self._lock:
            self._info = {}
        self._exchange.close()

    def _asked(self, attempt: Callable[[], T], deadline: Deadline) -> T:
        """Return what `_tried` does, unless the server is left alone."""
        is_probe = self._breaker.wants_probe()
        if not is_probe and self._breaker.state != "closed":
            self._count_failure()
            msg = (
                f"the server at {self.server.url} is left alone, because it did not answer several calls; it is tried "
                f"again after {_LEFT_ALONE:g} seconds at most"
            )
            raise ServerUnavailableError(msg)
        return self._tried(attempt, deadline, 0 if is_probe else self.server.retries)

    def _tried(self, attempt: Callable[[], T], deadline: Deadline, retries: int) -> T:
        """Return what an attempt returns; it is repeated while the server is away, with a growing pause."""
        for number in range(retries + 1):
            try:
                found = attempt()
            except ServerUnavailableError as error:
                grown = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2**number)
                pause = max(error.retry_after or 0.0, grown * random.uniform(0.5, 1.0))  # noqa: S311 - no secret
                if number == retries or pause >= deadline.left_to_begin:
                    self._count_failure()
                    self._breaker.failed(str(error))
                    raise
                logger.info("%s; trying again in %.1f seconds", error, pause)
            except ServerError:
                self._breaker.succeeded()  # a refusal is an answer
                raise
            else:
                self._breaker.succeeded()
                return found
            sleep(pause)
            check_stopped()  # whoever asked may have been cancelled
        raise AssertionError  # the last attempt returns or raises

    def _count_failure(self) -> None:
        with self._lock:
            self.failures += 1

    def _verify(self, deadline: Deadline, answered: str | None = None) -> dict[str, Any]:
        """Ask the server what it is, and check its model.

        Args:
            deadline: when to give up.
            answered: digest of the model that gave an answer, if there is one.
        """
        info, _ = self._exchange.request("/info", None, _read_info, deadline)
        self._check_model(info)
        if answered is not None and answered != info["digest"]:
            msg = (
                f"an answer of the server at {self.server.url} is of a model with the digest {answered!r:.40}, and its "
                f"model has the digest {info['digest']}; give all servers behind this address the same model"
            )
            raise ServerError(msg)
        with self._lock:
            known, self._info = self._info, info
        if known and known["digest"] != info["digest"]:
            logger.warning(
                "the model of the server at %s changed: its digest was %s and is %s; earlier scores do not compare",
                self.server.url,
                known["digest"],
                info["digest"],
            )
        return info

    def _check_model(self, info: Mapping[str, Any]) -> None:
        named, digest, name = self._model, info["digest"], info["model"]
        if named is None or named == digest:
            return
        has = f"the server at {self.server.url} has the model {name!r:.200} with the digest {digest}"
        if _DIGEST.fullmatch(named) or _plain(named) != _plain(name):
            msg = f"{has}, got model={named!r}; name the server's model or its digest, or give another server"
            raise ServerError(msg)
        if info["lora"] is not None:
            msg = f"{has} and an adapter trained on it, got model={named!r}; name the digest to use the tuned model"
            raise ServerError(msg)


def _read_info(parts: Iterable[bytes]) -> dict[str, Any]:
    info = read_object(parts)
    kinds: dict[str, type | tuple[type, ...]] = {
        "model": str,
        "digest": str,
        "lora": (str, type(None)),
        "ratio": int,
        "instruction": str,
        "system_prompt": str,
        "limits": dict,
    }
    wrong = [name for name, kind in kinds.items() if name not in info or not isinstance(info[name], kind)]
    if not wrong:
        wrong = [name for name in ("documents", "body_bytes") if not isinstance(info["limits"].get(name), int)]
    if not wrong and not _DIGEST.fullmatch(info["digest"]):
        wrong = ["digest"]
    if wrong:
        msg = f"{wrong[0]} is missing or has another type"
        raise ValueError(msg)
    return info


def _plain(name: str) -> str:
    """Return one name of a model that has several: its address on the hub, or the last part of a folder."""
    if name in ALIASES:
        return ALIASES[name]
    return name if name in ALIASES.values() else Path(name).name
