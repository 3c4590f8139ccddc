"""Workers on Ray: what a killed one costs, what a deadly passage costs, and the command; an example runs Ray Data."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kalm_rag import PassageCache
from kalm_rag.distributed import PassageEncoder
from kalm_rag.distributed.ray_workers import (
    Plan,
    RayWorkers,
    WorkersLostError,
    check_shared,
    connect,
    plan_workers,
)
from kalm_rag.errors import CheckpointError, MissingExtraError

TWO = Plan(workers=2, cpus=1, gpus=0, machines=1)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A cluster of this machine for all tests; it takes seconds to start."""
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    os.environ.setdefault("RAY_worker_niceness", "0")  # else its workers wait for every other process of the machine
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=200_000_000,
        logging_level="ERROR",
        log_to_driver=False,
    )
    yield ray
    ray.shutdown()


def batches(texts: list[str], size: int) -> Iterator[dict[str, list[Any]]]:
    for start in range(0, len(texts), size):
        part = texts[start : start + size]
        yield {"id": [f"p{start + number}" for number in range(len(part))], "text": part}


def statuses(results: Any) -> dict[str, str]:
    """The status of each id; none may be told twice."""
    rows = [row for result in results for row in zip(result["id"], result["status"], strict=True)]
    assert len(dict(rows)) == len(rows)
    return dict(rows)


class TestOnACluster:
    def test_a_worker_killed_in_its_batch_loses_nothing_else(
        self, cluster: Any, checkpoint: Path, tmp_path: Path, passages: list[str]
    ) -> None:
        marker, deadly = tmp_path / "killed", passages[13]

        class Killed(PassageEncoder):
            """Kills its process once, when it has encoded half of a batch."""

            def __call__(self, batch: Any) -> dict[str, list[Any]]:
                if deadly in batch["text"] and not marker.exists():
                    marker.touch()
                    half = len(batch["text"]) // 2
                    super().__call__({name: column[:half] for name, column in batch.items()})
                    os.kill(os.getpid(), signal.SIGKILL)
                return super().__call__(batch)

        encoder = Killed(checkpoint, cache=tmp_path / "cache", device="cpu")
        workers = RayWorkers(cluster, encoder, TWO)
        found = statuses(workers.encode(batches(passages[:32], 4)))
        assert marker.exists()
        # What its batch had written is known; everything else is encoded, once.
        assert found == {f"p{place}": "known" if place in (12, 13) else "encoded" for place in range(32)}
        assert statuses(workers.encode(batches(passages[:34], 8))) == {
            f"p{place}": "known" if place < 32 else "encoded" for place in range(34)
        }
        workers.close()
        cache = PassageCache(tmp_path / "cache")
        assert cache.store is not None
        assert len(list(cache.store.keys())) == 34

    def test_an_error_of_the_job_is_raised_here(self, cluster: Any, tmp_path: Path) -> None:
        encoder = PassageEncoder("/no/such/model", cache=tmp_path)
        with pytest.raises(CheckpointError, match="/no/such/model"):
            list(RayWorkers(cluster, encoder, Plan(1, 1, 0, 1)).encode(batches(["one", "two"], 1)))

    def test_the_command_resumes(self, cluster: Any, checkpoint: Path, tmp_path: Path, passages: list[str]) -> None:
        """It uses the cluster of this session, so that the address counts too."""
        file = tmp_path / "corpus.jsonl"
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in passages[:30]))
        encoder = PassageEncoder(checkpoint, cache=tmp_path / "cache")
        encoder({"id": list(range(12)), "text": passages[:12]})
        given = [str(file), "--model", str(checkpoint), "--cache", str(tmp_path / "cache"), "--engine", "ray"]
        command = [sys.executable, "-m", "kalm_rag", "encode", *given, "--workers", "1", "--address"]
        done = subprocess.run(
            [*command, cluster.get_runtime_context().gcs_address, "--json"], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        facts = json.loads(done.stdout)
        assert {name: facts[name] for name in ("new", "known", "held", "passages", "workers", "failure")} == {
            "new": 18,
            "known": 12,
            "held": 30,
            "passages": 30,
            "workers": 1,
            "failure": None,
        }
        assert facts["cache_entries"] == 30


class DiedError(Exception):
    """A worker died."""


class TaskError(DiedError):
    """A worker raised; a subclass of the other one, as in Ray."""


class FakeWorker:
    """A worker in this process: it encodes in order, when somebody wants a result."""

    def __init__(self, encoder: Any) -> None:
        self._encoder = encoder
        self._queue: list[tuple[object, dict[str, list[Any]]]] = []
        self._results: dict[object, Any] = {}
        self.encode = SimpleNamespace(remote=self._take)

    def _take(self, columns: dict[str, list[Any]]) -> Any:
        token = object()
        self._queue.append((token, columns))
        return self, token

    def result(self, token: object) -> Any:
        while token not in self._results:
            own, columns = self._queue.pop(0)
            try:
                self._results[own] = self._encoder(columns)
            except MemoryError:
                self._results |= dict.fromkeys([own, *(other for other, _ in self._queue)])
                self._queue = []
        if self._results[token] is None:
            raise DiedError
        return self._results[token]


class FakeRay:
    """Ray as far as `RayWorkers` uses it; what was given out last is told first."""

    exceptions = SimpleNamespace(RayError=DiedError, RayTaskError=TaskError)

    def __init__(self) -> None:
        self.started = 0

    def remote(self, _: Any) -> Any:
        def start(encoder: Any) -> FakeWorker:
            self.started += 1
            return FakeWorker(encoder)

        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=start))

    def wait(self, answers: list[Any], num_returns: int) -> tuple[list[Any], list[Any]]:
        return answers[-1:], answers[:-1]

    def get(self, answer: Any) -> Any:
        return answer[0].result(answer[1])

    def kill(self, actor: Any) -> None:
        pass


class TestDeaths:
    def test_a_deadly_passage_is_found_and_named(self, checkpoint: Path, tmp_path: Path, passages: list[str]) -> None:
        class Deadly(PassageEncoder):
            def __call__(self, batch: Any) -> dict[str, list[Any]]:
                if passages[21] in batch["text"]:
                    raise MemoryError
                return super().__call__(batch)

        ray = FakeRay()
        encoder = Deadly(checkpoint, cache=tmp_path, device="cpu")
        results = list(RayWorkers(ray, encoder, TWO).encode(batches(passages[:40], 8)))
        assert statuses(results) == dict.fromkeys((f"p{place}" for place in range(40)), "encoded") | {"p21": "failed"}
        [message] = [text for result in results for text in result["message"] if text]
        assert message == "3 workers died while they encoded it"
        assert ray.started == 2 + 3 + 3, "8 passages are halved three times, and one is tried three times"

    def test_workers_that_only_die_end_the_job(self, checkpoint: Path, tmp_path: Path) -> None:
        class Dead(PassageEncoder):
            def __call__(self, batch: Any) -> dict[str, list[Any]]:
                raise MemoryError

        encoder = Dead(checkpoint, cache=tmp_path)
        texts = [f"passage {number}" for number in range(400)]
        with pytest.raises(WorkersLostError, match=r"21 workers died one after the other .* give fewer workers"):
            list(RayWorkers(FakeRay(), encoder, TWO).encode(batches(texts, 100)))


class TestPlans:
    def test_machines_are_divided_among_workers(self) -> None:
        small, large, gpus = {"CPU": 2.0}, {"CPU": 16.0}, {"CPU": 8.0, "GPU": 4.0}
        assert plan_workers([small]) == Plan(1, 2, 0, 1)
        assert plan_workers([small], 2) == Plan(2, 1, 0, 1)
        assert plan_workers([large, large, {"CPU": 0.0}, {}]) == Plan(2, 16, 0, 2)
        assert plan_workers([large, large], 3) == Plan(3, 8, 0, 2)
        assert plan_workers([small, large], 5) == Plan(5, 3, 0, 2)
        assert plan_workers([gpus, gpus, small]) == Plan(8, 1, 1, 3)
        assert plan_workers([gpus], gpus_per_worker=0.5) == Plan(8, 1, 0.5, 1)
        assert plan_workers([{"CPU": 8.0, "GPU": 1.0}], gpus_per_worker=1 / 3) == Plan(3, 1, 1 / 3, 1)
        assert plan_workers([gpus], 2, 2) == Plan(2, 1, 2, 1)
        assert plan_workers([gpus], gpus_per_worker=0) == Plan(1, 8, 0, 1)

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ((3, None), "workers must be at most 2 on this Ray cluster, as each needs a CPU, got 3"),
            ((0, None), "workers must be at least 1, got 0"),
            ((1, 1), "a worker needs a CPU and 1 GPUs, and no machine of the Ray cluster has that"),
            ((1, -1), "gpus_per_worker must be a whole number, or a share between 0 and 1, got -1"),
            ((1, 1.5), "gpus_per_worker must be a whole number, or a share between 0 and 1, got 1.5"),
        ],
    )
    def test_what_a_cluster_cannot_run(self, given: tuple[int, float | None], message: str) -> None:
        with pytest.raises(ValueError) as error:
            plan_workers([{"CPU": 2.0}], *given)
        assert message in str(error.value)

    def test_a_folder_of_one_machine_is_refused_for_several(self, tmp_path: Path) -> None:
        encoder = PassageEncoder("mini", cache=tmp_path)
        check_shared(encoder, 1)
        with pytest.raises(ValueError, match=r"the Ray cluster has 3 machines, and the cache in .* is a folder of one"):
            check_shared(encoder, 3)

    def test_without_ray_the_message_says_how_to_get_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "ray", None)
        with pytest.raises(MissingExtraError, match=r"pip install 'kalm-rag\[ray\]'"):
            connect(None)

    @pytest.mark.parametrize("address", ["127.0.0.1:9", "ray://127.0.0.1:9", "no.such.host.invalid:6379", "[::1]:x"])
    def test_an_address_where_nobody_answers(self, address: str) -> None:
        pytest.importorskip("ray", reason="Ray is not installed")
        with pytest.raises(ConnectionError, match=r"no Ray cluster answers at .* `ray start --head`"):
            connect(address)
