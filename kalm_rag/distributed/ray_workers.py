"""Batches of a corpus encoded by workers on a Ray cluster, which survives the death of a worker."""

from __future__ import annotations

import logging
import os
import socket
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kalm_rag.errors import KaLMError, MissingExtraError
from kalm_rag.utils.checks import check_finite, check_positive

if TYPE_CHECKING:
    from kalm_rag.distributed.encoder import PassageEncoder

logger = logging.getLogger(__name__)

BATCH = 256
"""Passages that a worker is given at once, and so loses at most."""
_AHEAD = 2
"""Batches that a worker holds: the next one is there when it has encoded one."""
_ATTEMPTS = 3
"""Workers that a passage may kill before it is given up."""
_DEATHS = 20
"""Workers that may die in a row while nothing is encoded; to find one deadly passage in a batch takes ten."""
_ANSWER_SECONDS = 5.0
_OBJECTS = 500_000_000
"""Bytes of a local cluster's object store: it holds texts and statuses only."""


class WorkersLostError(KaLMError, RuntimeError):
    """Workers die again and again before they encode anything; the message names what to look at."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The workers of a job.

    Attributes:
        workers: how many.
        cpus: of each; as many threads compute.
        gpus: of each.
        machines: of the cluster that can run workers.
    """

    workers: int
    cpus: int
    gpus: float
    machines: int


def plan_workers(
    nodes: Sequence[Mapping[str, float]], workers: int | None = None, gpus_per_worker: float | None = None
) -> Plan:
    """Divide the machines of a cluster among workers.

    Args:
        nodes: the resources of each machine, `CPU` and `GPU`.
        workers: how many. Default: as many as have a GPU, or without GPUs one a machine.
        gpus_per_worker: GPUs of each, or a share of one. Default: 1 if the cluster has GPUs, else 0.

    Raises:
        ValueError: the cluster cannot run them.
    """
    share = _check_gpus(gpus_per_worker)
    able = [(int(node["CPU"]), node.get("GPU", 0.0)) for node in nodes if node.get("CPU", 0) >= 1]
    if share is None:
        share = 1.0 if any(gpus >= 1 for _, gpus in able) else 0.0
    # Of thirds of a GPU three fit, whatever their sum is in floating point.
    room = [min(cpus, int(gpus / share + 1e-6)) if share else cpus for cpus, gpus in able]
    needs = f"a CPU and {share:g} GPUs" if share else "a CPU"
    if not sum(room):
        msg = f"a worker needs {needs}, and no machine of the Ray cluster has that; give less, or another cluster"
        raise ValueError(msg)
    if workers is None:
        workers = sum(room) if share else len(able)
    if check_positive("workers", workers) > sum(room):
        msg = (
            f"workers must be at most {sum(room)} on this Ray cluster, as each needs {needs}, got {workers}; give "
            "fewer workers, or a larger cluster"
        )
        raise ValueError(msg)
    each = 1
    while not share and sum(cpus // (each + 1) for cpus, _ in able) >= workers:
        each += 1
    return Plan(workers, each, share, len(able))


def _check_gpus(value: object) -> float | None:
    if value is None:
        return None
    number = check_finite("gpus_per_worker", value)
    if number < 0 or (number > 1 and number % 1):
        msg = f"gpus_per_worker must be a whole number, or a share between 0 and 1, got {number:g}"
        raise ValueError(msg)
    return number


def connect(address: str | None) -> Any:
    """Connect to a Ray cluster and return the module.

    Args:
        address: of the cluster. Default: what `RAY_ADDRESS` names, else a cluster of its own on this machine, which
            ends with this process.

    Raises:
        MissingExtraError: Ray is not installed.
        ConnectionError: there is no such cluster.
    """
    try:
        import ray
    except ImportError:
        raise MissingExtraError("ray", "ray") from None
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    _check_answers(address)
    own: dict[str, Any] = {}
    if address == "local":
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is told to anybody
        # Ray would let other processes of the machine go first, such as those that the plain command competes with.
        os.environ.setdefault("RAY_worker_niceness", "0")
        own = {"include_dashboard": False, "object_store_memory": _OBJECTS}
    ray.init(address=address, logging_level=logging.ERROR, **own)
    return ray


def _check_answers(address: str) -> None:
    """Refuse an address where nobody answers, which Ray tries for many minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon:
        return  # a name that Ray knows, such as `auto`
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_SECONDS).close()
    except (OSError, ValueError, OverflowError) as error:
        msg = (
            f"no Ray cluster answers at {address!r} ({error}); start one with `ray start --head`, name its host:port, "
            "or leave the address out for a cluster on this machine"
        )
        raise ConnectionError(msg) from None


def resources(ray: Any) -> list[dict[str, float]]:
    """Return the resources of each machine of the cluster that is alive."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def check_shared(encoder: PassageEncoder, machines: int) -> None:
    """Refuse a cache in a folder of one machine for workers on several.

    Raises:
        ValueError: most of what is encoded would be on machines where nobody looks for it.
    """
    if machines > 1 and encoder.folder is not None:
        msg = (
            f"the Ray cluster has {machines} machines, and the cache in {str(encoder.folder)!r} is a folder of one of "
            "them: name a tier that all of them share (remote), or let each machine encode a shard of the corpus"
        )
        raise ValueError(msg)


@dataclass(eq=False)
class _Batch:
    columns: dict[str, list[Any]]
    deaths: int = 0  # workers that died while they had it, since it was split


@dataclass(eq=False)
class _Worker:
    actor: Any
    held: dict[Any, _Batch] = field(default_factory=dict)  # what it will answer to what it was given


class RayWorkers:
    """Workers on a Ray cluster that encode the batches of a corpus.

    A worker that dies is replaced, and what it held is given out again: in halves, so that a passage that kills every
    worker is found, reported as `failed` and left out. What it had written before is `known` then.

    Args:
        ray: as `connect` returned it.
        encoder: what each worker runs.
        plan: the workers.
    """

    def __init__(self, ray: Any, encoder: PassageEncoder, plan: Plan) -> None:
        self._ray = ray
        self._encoder = encoder
        self._plan = plan
        self._actor = ray.remote(_Actor).options(num_cpus=plan.cpus, num_gpus=plan.gpus, max_restarts=0)
        self._workers = [self._new() for _ in range(plan.workers)]
        self._again: deque[_Batch] = deque()
        self._deaths = 0  # since anything was encoded

    def encode(self, batches: Iterable[Mapping[str, list[Any]]]) -> Iterator[dict[str, list[Any]]]:
        """Encode batches and yield the result of each, or of its halves, as soon as there is one.

        Args:
            batches: columns as `PassageEncoder` takes them, in lists. They are read as workers need them.

        Raises:
            CheckpointError, StoreError: as of `PassageEncoder`.
            WorkersLostError: workers die before they encode anything.
        """
        left = iter(batches)
        while True:
            self._give_out(left)
            waiting = {answer: worker for worker in self._workers for answer in worker.held}
            if not waiting:
                return
            [answer], _ = self._ray.wait(list(waiting), num_returns=1)
            yield from self._take(waiting[answer], answer)

    def close(self) -> None:
        """End the workers."""
        for worker in self._workers:
            self._ray.kill(worker.actor)
        self._workers = []

    def _new(self) -> _Worker:
        return _Worker(self._actor.remote(self._encoder))

    def _give_out(self, left: Iterator[Mapping[str, list[Any]]]) -> None:
        """Give each worker what it has room for, the one with the least first."""
        while len((worker := min(self._workers, key=lambda worker: len(worker.held))).held) < _AHEAD:
            if self._again:
                batch = self._again.popleft()
            elif (columns := next(left, None)) is not None:
                batch = _Batch(dict(columns))
            else:
                return
            worker.held[worker.actor.encode.remote(batch.columns)] = batch

    def _take(self, worker: _Worker, answer: Any) -> Iterator[dict[str, list[Any]]]:
        errors = self._ray.exceptions
        try:
            result = self._ray.get(answer)
        except errors.RayTaskError as error:
            raise error.cause if isinstance(error.cause, Exception) else error from None
        except errors.RayError as error:
            yield from self._bury(worker, error)
        else:
            self._deaths = 0
            del worker.held[answer]
            yield result

    def _bury(self, worker: _Worker, error: Exception) -> Iterator[dict[str, list[Any]]]:
        """Replace a worker that died, and see to what it held."""
        self._deaths += 1
        if self._deaths > _DEATHS:
            msg = (
                f"{self._deaths} workers died one after the other before they encoded anything; the last because: "
                f"{' '.join(str(error).split())[:500]}. If they need more memory, give fewer workers"
            )
            raise WorkersLostError(msg)
        self._ray.kill(worker.actor)  # Ray may only have lost sight of it
        self._workers[self._workers.index(worker)] = self._new()
        # It encodes in the order of what it was given, so that it died in the first batch without a result.
        for answer in list(worker.held):
            try:
                result = self._ray.get(answer)
            except self._ray.exceptions.RayError:
                break
            del worker.held[answer]
            self._deaths = 0
            yield result
        if not worker.held:
            return
        first, *rest = worker.held.values()
        logger.warning("a worker died (%s); what it held is given to others", type(error).__name__)
        self._again.extend(rest)
        rows = len(first.columns[self._encoder.id_column])
        first.deaths += 1
        if rows > 1:
            for part in (slice(0, rows // 2), slice(rows // 2, rows)):
                self._again.append(_Batch({name: column[part] for name, column in first.columns.items()}))
        elif first.deaths < _ATTEMPTS:
            self._again.append(first)
        else:
            yield self._encoder.failed(first.columns, f"{first.deaths} workers died while they encoded it")


class _Actor:
    """A process that encodes."""

    def __init__(self, encoder: PassageEncoder) -> None:
        self._encoder = encoder

    def encode(self, columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return self._encoder(columns)
