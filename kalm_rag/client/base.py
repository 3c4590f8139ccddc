"""A model on a server: the connection to it, and what its requests have in common."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from kalm_rag.client.answers import Answer, joined, read_answer
from kalm_rag.client.connection import Connection
from kalm_rag.client.exchange import Deadline, read_object
from kalm_rag.client.server import Server
from kalm_rag.documents import REPAIRED, TRUNCATED, TextCounter, TextOf, iter_documents, repair_text
from kalm_rag.errors import ServerUnavailableError
from kalm_rag.latency.records import Totals
from kalm_rag.results import D
from kalm_rag.settings import AT_ONCE
from kalm_rag.thresholds import Scope
from kalm_rag.utils import forks
from kalm_rag.utils.async_calls import AsyncCalls
from kalm_rag.utils.checks import check_ratio, check_string, check_text

if TYPE_CHECKING:
    from typing_extensions import Self

    from kalm_rag.documents import Passage

T = TypeVar("T")

logger = logging.getLogger(__name__)

_BODY_SHARE = 0.9
"""Share of the bytes that the server accepts, for texts; the rest is for the other fields of a request."""


class ServedModel:
    """A model on a server, and the connection to it.

    Args:
        server: where it is, and how it is asked.
        model: as in `RerankerClient`.
        instruction: as in `RerankerClient`.
        ratio: as in `RerankerClient`.
    """

    def __init__(self, server: Server, model: str | None, instruction: str | None, ratio: int | None) -> None:
        self._server = server
        self.server = self._server.url
        self.model = None if model is None else check_text("model", model)
        self._instruction = None if instruction is None else check_string("instruction", instruction)
        self._ratio = None if ratio is None else check_ratio("ratio", ratio)
        self._connection = Connection(self._server, self.model)
        self._totals = Totals()
        self.repairs = TextCounter(REPAIRED)
        self.truncations = TextCounter(TRUNCATED)
        self.after_fork_in_child()
        forks.watch(self)

    def after_fork_in_child(self) -> None:
        """Replace threads, which did not survive."""
        self._calls = AsyncCalls()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.server!r}, model={self.model!r})"

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("_"):
            raise AttributeError(name)
        msg = (
            f"{type(self).__name__} has no {name!r}: the model and its cache are on the server. Use a KaLMReranker "
            "there, or what `kalm-rag serve` tells at /info, /v1/stats and /metrics"
        )
        raise AttributeError(msg)

    def load(self) -> Self:
        """Check that the server answers and has the model that was named, and return this instance.

        Raises:
            ServerError: the model is another one, or the key is not accepted.
            ServerUnavailableError: the server is away, and `on_failure` is `raise`; else that is logged.
        """
        try:
            self._connection.info()
        except ServerUnavailableError as error:
            if not self._server.keeps_order:
                raise
            logger.warning("%s; rankings keep the order of their passages until it answers", error)
        return self

    def info(self) -> dict[str, Any]:
        """Return what the server says of itself at `/info`: model, digest, settings, limits and version.

        Raises:
            ServerError: the model is another one, the key is not accepted, or the server is away.
        """
        return self._connection.info()

    def close(self) -> None:
        """Close the connections. The next call opens new ones."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _fields(self, instruction: str | None, ratio: int | None) -> dict[str, Any]:
        """Return the fields that requests have in common; null is the server's own setting."""
        task = self._instruction if instruction is None else check_string("instruction", instruction)
        return {"instruction": task, "ratio": self._ratio if ratio is None else check_ratio("ratio", ratio)}

    def _scope(self, fields: dict[str, Any]) -> Scope:
        """Return what the scores of a request hold for."""
        info = self._connection.known()
        ratio, task = fields["ratio"], fields["instruction"]
        return Scope(
            info["digest"],
            info["ratio"] if ratio is None else ratio,
            info["instruction"] if task is None else repair_text(task)[0],
            info["system_prompt"],
        )

    def _answer(
        self,
        query: str,
        given: Sequence[Passage],
        fields: Callable[[], dict[str, Any]],
        deadline: Deadline,
        *,
        complete: bool,
    ) -> Answer:
        """Return what the server says of passages, in as many requests as it takes: each is scored by itself."""
        parts: list[tuple[int, Answer]] = []
        start = 0
        for texts in in_parts(self._connection, [passage.given for passage in given], deadline):
            parts.append((start, _ask(self._connection, query, texts, fields, deadline, complete=complete)))
            start += len(texts)
        answer = joined(parts)
        some = next(iter(answer.scored.values()), {})
        self.truncations.add(answer.counts.truncated + some.get("query_truncated", False))
        return answer


def _ask(
    connection: Connection,
    query: str,
    texts: list[str],
    fields: Callable[[], dict[str, Any]],
    deadline: Deadline,
    *,
    complete: bool,
) -> Answer:
    def body() -> dict[str, Any]:
        return {"query": query, "documents": texts, "return_documents": False, "details": True, **fields()}

    def read(parts: Iterable[bytes]) -> Answer:
        answer = read_answer(read_object(parts), len(texts))
        if complete:
            answer.check_complete(len(texts))
        return answer

    return connection.send("/v2/rerank", body, read, deadline)


def texts_in_parts(connection: Connection, documents: Iterable[D], text: TextOf[D] | None) -> Iterator[list[str]]:
    """Yield the texts of passages, as many as the server accepts in a request."""
    given = (passage.given for passage in iter_documents(documents, text))
    while some := list(islice(given, AT_ONCE)):
        yield from in_parts(connection, some)


def in_parts(connection: Connection, items: list[T], deadline: Deadline | None = None) -> Iterator[list[T]]:
    """Yield the items, as many as the server accepts in a request.

    Args:
        connection: to the server; asks what it accepts if that is not known.
        items: texts, or pairs of them.
        deadline: of that request, as in `Connection.send`.
    """
    if not items:
        return
    limits = connection.known(deadline)["limits"]
    part: list[T] = []
    size = 0
    for item in items:
        own = len(json.dumps(item))
        if part and (len(part) == limits["documents"] or size + own > _BODY_SHARE * limits["body_bytes"]):
            yield part
            part, size = [], 0
        part.append(item)
        size += own
    yield part
