"""What a deployment takes, from its workload and what work costs on one of its machines."""

from __future__ import annotations

import math
from dataclasses import dataclass

from kalm_rag.sizing.bytes import FORMS, Form, entry_bytes, folder_bytes, redis_bytes
from kalm_rag.sizing.costs import Costs
from kalm_rag.sizing.shapes import Shape
from kalm_rag.utils.checks import check_choice, check_flag, check_positive, check_ratio, check_share

S3_READS = 5500.0
"""GET requests a second for each prefix of S3 (its user guide, "Optimizing Amazon S3 performance")."""
PREFIXES = 16**2
"""Prefixes that entries are spread over, two hexadecimal digits: see `ObjectStore`."""
LINK_BYTES = 1.25e9
"""Bytes a second of a 10 Gbit link, which one Redis server has."""
REDIS_READS = 100_000.0
"""Keys a second of one Redis server at small values (`redis-benchmark`); at larger ones its link ends first."""
BUSY = 0.7
"""Share of its time that a replica is planned to work: above, waiting grows without bound (queueing)."""


@dataclass(frozen=True, slots=True)
class Workload:
    """What is asked of a deployment.

    Attributes:
        passages: in the corpus.
        tokens: of a passage, on average.
        queries_per_second: at the busiest time.
        candidates: passages of a query.
        query_tokens: of a query.
        form: what is kept of a passage: `states`, `compact` or `prefilled`, which include the states.
        dtype: what the model computes in: `bfloat16`, `float16` or `float32`.
        ratio: at which states are kept.
        int8: states in 8 bits.
        secret: entries carry a tag, as a shared tier demands.
        local_share: share of the candidates that are on a replica's own disk or in its memory.
        hours: within which the corpus is to be encoded.

    Raises:
        TypeError, ValueError: a field is wrong; the message names it, its value and the rule.
    """

    passages: int
    tokens: int = 300
    queries_per_second: float = 10.0
    candidates: int = 50
    query_tokens: int = 16
    form: Form = "states"
    dtype: str = "bfloat16"
    ratio: int = 4
    int8: bool = False
    secret: bool = True
    local_share: float = 0.9
    hours: float = 24.0

    def __post_init__(self) -> None:
        for name in ("passages", "tokens", "candidates", "query_tokens"):
            object.__setattr__(self, name, check_positive(name, getattr(self, name)))
        object.__setattr__(self, "ratio", check_ratio("ratio", self.ratio))
        object.__setattr__(self, "local_share", check_share("local_share", self.local_share))
        check_choice("form", self.form, FORMS)
        check_choice("dtype", self.dtype, ("bfloat16", "float16", "float32"))
        check_flag("int8", self.int8)
        check_flag("secret", self.secret)
        for name in ("queries_per_second", "hours"):
            object.__setattr__(self, name, check_above(name, getattr(self, name)))


@dataclass(frozen=True, slots=True)
class Plan:
    """What a workload takes.

    Attributes:
        entry_bytes: of all entries of one passage.
        entries: of one passage.
        folder_bytes: of a folder with the whole corpus.
        redis_bytes: of Redis or Valkey with the whole corpus, in memory.
        object_bytes: of an object store with the whole corpus.
        reads_per_second: entries that all replicas together read from the shared tier.
        read_bytes_per_second: their bytes.
        object_share: those reads as a share of what an object store answers.
        redis_servers: Redis servers whose links and speed suffice for those reads.
        read_seconds: that a query's candidates take to read from a replica's disk, whatever the size of the corpus:
            a look-up goes down a tree of a few levels; None where that is not known.
        replicas: processes like the measured one; None where a query's time is not known.
        encode_machine_hours: to encode the corpus on one machine; None where that is not known.
        encode_machines: machines that encode it within the workload's hours.
        break_even_queries: queries after which encoding ahead has taken less time than a joint cross-encoder over all
            of them; None where a time is not known, infinite where the joint model is faster.
        joint_replicas: processes that a joint cross-encoder needs.
    """

    entry_bytes: int
    entries: int
    folder_bytes: int
    redis_bytes: int
    object_bytes: int
    reads_per_second: float
    read_bytes_per_second: float
    object_share: float
    redis_servers: int
    read_seconds: float | None
    replicas: int | None
    encode_machine_hours: float | None
    encode_machines: int | None
    break_even_queries: float | None
    joint_replicas: int | None


def check_above(name: str, value: object) -> float:
    """Return a finite number above 0, else raise with the name and the value."""
    from kalm_rag.utils.checks import check_finite

    number = check_finite(name, value)
    if number <= 0:
        msg = f"{name} must be above 0, got {value!r:.80}"
        raise ValueError(msg)
    return number


def plan(workload: Workload, shape: Shape, costs: Costs) -> Plan:
    """Size a deployment.

    Args:
        workload: what is asked of it.
        shape: of the model.
        costs: of one machine.
    """
    one = entry_bytes(
        shape,
        workload.tokens,
        form=workload.form,
        dtype=workload.dtype,
        ratio=workload.ratio,
        int8=workload.int8,
        secret=workload.secret,
    )
    # The prefilled form in full holds all that a query needs; the compact one is read with its states.
    read = one.values if workload.form == "compact" else one.values[-1:]
    missing = workload.queries_per_second * workload.candidates * (1 - workload.local_share)
    reads, read_bytes = missing * len(read), missing * sum(read)
    machine_hours = None
    if costs.encode_tokens is not None:
        machine_hours = workload.passages * workload.tokens / check_above("encode_tokens", costs.encode_tokens) / 3600
    return Plan(
        entry_bytes=one.total,
        entries=len(one.values),
        folder_bytes=folder_bytes(one.values, workload.passages),
        redis_bytes=redis_bytes(one.values, workload.passages),
        object_bytes=one.total * workload.passages,
        reads_per_second=reads,
        read_bytes_per_second=read_bytes,
        object_share=reads / (S3_READS * PREFIXES),
        redis_servers=max(1, math.ceil(max(reads / REDIS_READS, read_bytes / LINK_BYTES))),
        read_seconds=costs.read_seconds,
        replicas=_replicas(workload, costs.query_seconds),
        encode_machine_hours=machine_hours,
        encode_machines=None if machine_hours is None else max(1, math.ceil(machine_hours / workload.hours)),
        break_even_queries=_break_even(machine_hours, costs),
        joint_replicas=_replicas(workload, costs.joint_seconds),
    )


def _replicas(workload: Workload, seconds: float | None) -> int | None:
    return None if seconds is None else max(1, math.ceil(workload.queries_per_second * seconds / BUSY))


def _break_even(machine_hours: float | None, costs: Costs) -> float | None:
    if machine_hours is None or costs.query_seconds is None or costs.joint_seconds is None:
        return None
    gained = costs.joint_seconds - costs.query_seconds
    return math.inf if gained <= 0 else machine_hours * 3600 / gained
