"""The server on Ray Serve: its arguments, and two replicas on a local Ray (`make test-ray-serve`)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import yaml
from pydantic import ValidationError

from kalm_rag import KaLMReranker, PassageCache
from kalm_rag.cache.forgetting import ForgetReport, Forgotten, together
from kalm_rag.serving.arguments import ReplicaArguments
from kalm_rag.serving.limits import Limits

EXAMPLE = Path(__file__).parents[2] / "examples" / "ray_serve.yaml"
KEY = "k" * 32
SECRET = "a secret of at least sixteen bytes"
QUERY = "What is the capital of China?"
DOCUMENTS = [
    "Gravity attracts bodies toward one another.",
    "The capital of China is Beijing.",
    "Bread is baked from flour, water and salt.",
]
PATHS = {
    "/v2/rerank": {"query": QUERY, "documents": DOCUMENTS},
    "/v1/rerank": {"query": QUERY, "documents": DOCUMENTS, "top_n": 2},
    "/rerank": {"query": QUERY, "texts": DOCUMENTS},
    "/infinity/rerank": {"query": QUERY, "documents": DOCUMENTS},
    "/v1/ranking": {"query": {"text": QUERY}, "passages": [{"text": text} for text in DOCUMENTS]},
    "/score": {"text_1": QUERY, "text_2": DOCUMENTS},
}


class TestArguments:
    def test_text_as_a_command_line_gives_it(self) -> None:
        given = {
            "model": "mini",
            "ratio": "8",
            "cpus": "2",
            "max_replicas": "3",
            "strict_model": "true",
            "threshold": "0.2",
        }
        found = ReplicaArguments.model_validate(given)
        assert (found.ratio, found.cpus, found.max_replicas, found.strict_model, found.threshold) == (
            8,
            2,
            3,
            True,
            0.2,
        )
        assert found.checked_limits() == Limits()

    def test_the_reranker_gets_them(self, tmp_path: Path) -> None:
        given = {"model": "mini", "ratio": 8, "cache": str(tmp_path), "instruction": "Find it.", "device": "cpu"}
        arguments = ReplicaArguments(**given, options={"max_windows": 3, "long_passages": "windows"})
        with arguments.reranker() as reranker:
            settings = reranker.settings
            assert (settings.ratio, settings.instruction, settings.max_windows) == (8, "Find it.", 3)
            assert reranker.cache.base_ratio == 4
            assert reranker.rank(QUERY, DOCUMENTS)[0].index == 1
        with arguments.reranker() as another:
            assert another.unknown(DOCUMENTS) == [], "the first one has written its folder out"

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"modle": "mini"}, "unknown argument 'modle': did you mean 'model'"),
            ({"ratio": 3.5}, "ratio"),
            ({"ratio": 0}, "ratio must be"),
            ({"max_length": -1}, "max_length must be"),
            ({"keep": "everything"}, "keep"),
            ({"threshold": 2.0}, "threshold must be"),
            ({"limits": {"runing": 3}}, "unknown limit 'runing': did you mean 'running'"),
            ({"limits": {"running": 17}}, "running must be at most 16"),
            ({"options": {"cache_remot": "x"}}, "did you mean 'cache_remote'"),
            ({"options": {"cache_secret": SECRET}}, "set KALM_RAG_CACHE_SECRET in the environment"),
            ({"options": {"cache_remote": "redis://:password@host:1/0"}}, "KALM_RAG_REMOTE_PASSWORD"),
            ({"cpus": 0}, "cpus"),
            ({"min_replicas": 3, "max_replicas": 2}, "min_replicas must be at most max_replicas, got 3 and 2"),
        ],
    )
    def test_wrong_ones_are_told_before_anything_starts(self, given: dict[str, Any], message: str) -> None:
        with pytest.raises(ValidationError) as caught:
            ReplicaArguments.model_validate({"model": "mini"} | given)
        assert message in str(caught.value)
        assert SECRET not in str(caught.value)
        assert "password@" not in str(caught.value)

    def test_the_example(self) -> None:
        text = EXAMPLE.read_text("utf-8")
        [application] = yaml.safe_load(text)["applications"]
        assert len(text.splitlines()) < 60
        assert application["import_path"] == "kalm_rag.serving.ray:build"
        assert ReplicaArguments.model_validate(application["args"]).model == "mini"
        # What is commented out for real work is right too.
        [real] = yaml.safe_load(re.sub(r"^( *)#- ", r"\1", text, flags=re.MULTILINE))["applications"]
        assert ReplicaArguments.model_validate(real["args"]).options["cache_remote"].startswith("redis://")

    def test_nothing_but_the_application_imports_ray(self) -> None:
        code = "import sys, kalm_rag.serving.arguments, kalm_rag.serving.app; print('ray' in sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "False"

    def test_forgetting_is_counted_over_replicas(self) -> None:
        memory, store = Forgotten(states=1, scores=2), Forgotten(states=1)
        one = ForgetReport(texts=2, memory=memory, store=store, spaces=3)
        other = ForgetReport(texts=2, memory=memory, store=Forgotten(), spaces=4, unrecorded=1)
        expected = ForgetReport(texts=2, memory=Forgotten(states=2, scores=4), store=store, spaces=4, unrecorded=1)
        assert together([one, other], texts=2) == expected

    @pytest.mark.parametrize("answers", ["one fails", "one is not reached", "none in time"])
    def test_a_replica_that_has_not_forgotten_is_told(
        self, answers: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        pytest.importorskip("ray.serve", reason="Ray is not installed")
        from kalm_rag.serving import ray as application
        from kalm_rag.serving.limits import ServingError

        report = ForgetReport(texts=1, memory=Forgotten(), store=Forgotten(), spaces=1)

        async def results(**_: Any) -> list[Any]:
            if answers == "none in time":
                raise TimeoutError
            return [report, OSError("Zaphod")] if answers == "one fails" else [report]

        async def forget(_: list[str]) -> ForgetReport:
            return report

        handle = SimpleNamespace(broadcast=lambda method, texts: SimpleNamespace(results_async=results))
        context = SimpleNamespace(deployment="Reranker", app_name="kalm-rag", world_size=2)
        monkeypatch.setattr(application.serve, "get_replica_context", lambda: context)
        monkeypatch.setattr(application.serve, "get_deployment_handle", lambda deployment, app: handle)
        with pytest.raises(ServingError, match="of 2 replicas have forgotten the passages: send") as caught:
            asyncio.run(application.Replica._forget_everywhere(SimpleNamespace(forget=forget), ["Zaphod"]))
        assert (caught.value.status, caught.value.retry_after) == (503, 1)
        assert "of 2 replicas" in caplog.text
        assert "Zaphod" not in caplog.text


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline, "it did not happen within five minutes"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def cluster(request: pytest.FixtureRequest) -> Iterator[str]:
    """The address of a Ray of this machine; its processes have this environment."""
    if not request.config.getoption("--ray-serve"):
        pytest.skip("runs under `make test-ray-serve`, or with --ray-serve")
    ray = pytest.importorskip("ray", reason="Ray is not installed")

    with pytest.MonkeyPatch.context() as patch:
        if not any(name.lower() == "ray_worker_niceness" for name in os.environ):
            patch.setenv("RAY_worker_niceness", "0")  # else its workers wait for every other process of the machine
        patch.setenv("KALM_RAG_API_KEY", KEY)
        patch.setenv("KALM_RAG_CACHE_SECRET", SECRET)
        context = ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            object_store_memory=200_000_000,
            logging_level="ERROR",
            log_to_driver=False,
        )
        yield context.address_info["gcs_address"]
        ray.shutdown()


@contextlib.contextmanager
def serving(cluster: str, folder: Path, **arguments: Any) -> Iterator[httpx.Client]:
    """The example of a configuration, with other arguments, under `serve run`."""
    config, port = yaml.safe_load(EXAMPLE.read_text("utf-8")), free_port()
    config["http_options"]["port"] = port
    config["applications"][0]["args"] |= {"cache": str(folder / "cache"), "device": "cpu"} | arguments
    file = folder / "serve.yaml"
    file.write_text(json.dumps(config))  # JSON is YAML
    command = [sys.executable, "-m", "ray.serve.scripts", "run", str(file), "--address", cluster]
    with (folder / "log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            headers = {"authorization": f"Bearer {KEY}"}
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=120) as client:
                wait_for(lambda: is_ready(client, process, folder / "log"))
                yield client
            process.send_signal(signal.SIGINT)
            process.wait(120)
        finally:
            process.kill()


def is_ready(client: httpx.Client, process: subprocess.Popen[bytes], log: Path) -> bool:
    assert process.poll() is None, log.read_text()[-3000:]
    with contextlib.suppress(httpx.TransportError):
        return client.get("/ready").status_code == 200
    return False


@pytest.fixture(scope="class")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("ray-serve")
    (found / "tier").mkdir()
    return found


@pytest.fixture(scope="class")
def client(cluster: str, folder: Path) -> Iterator[httpx.Client]:
    """Two replicas with one folder and a shared tier."""
    options = {"cache_remote": f"file://{folder / 'tier'}"}
    limits = {"documents": 200, "body_bytes": 100_000}
    with serving(cluster, folder, min_replicas=2, max_replicas=2, options=options, limits=limits) as client:
        wait_for(lambda: client.post("/v1/forget", json={"documents": DOCUMENTS}).json()["replicas"] == 2)
        yield client


def statuses(client: httpx.Client, count: int) -> list[int]:
    """Of requests that come on connections of their own, of four clients."""
    found: list[int] = []

    def ask(number: int) -> None:
        for place in range(count // 4):
            body = {"query": f"{QUERY} {number} {place}", "documents": DOCUMENTS}
            url, headers = f"{client.base_url}/v2/rerank", dict(client.headers)
            found.append(httpx.post(url, json=body, headers=headers, timeout=120).status_code)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def replicas() -> list[Any]:
    import psutil

    processes = psutil.Process().children(recursive=True)
    return [process for process in processes if "ServeReplica" in " ".join(process.cmdline())]


class TestTwoReplicas:
    def test_every_dialect_has_the_scores_of_the_library(self, client: httpx.Client) -> None:
        with KaLMReranker("mini", device="cpu", cache=None, show_progress=False) as reranker:
            ranking = reranker.rank(QUERY, DOCUMENTS)
        assert set(statuses(client, 24)) == {200}
        for path, body in PATHS.items():
            for _ in range(4):
                answer = client.post(path, json=body)
                assert answer.status_code == 200, answer.text
                found = answer.json()
                found = (
                    found
                    if isinstance(found, list)
                    else next(found[name] for name in ("results", "rankings", "data") if name in found)
                )
                for item in found:
                    [hit] = [hit for hit in ranking if hit.index == item["index"]]
                    value = next(item[name] for name in ("relevance_score", "score", "logit") if name in item)
                    assert value == pytest.approx(hit.margin if "logit" in item else hit.score, abs=1e-5)

    def test_keys_limits_and_errors(self, client: httpx.Client) -> None:
        assert httpx.post(f"{client.base_url}/v2/rerank", json=PATHS["/v2/rerank"]).status_code == 401
        assert httpx.get(f"{client.base_url}/health").status_code == 200
        refused = client.post("/v2/rerank", json={"query": QUERY, "documents": ["x"] * 201})
        assert (refused.status_code, "200 in one request, got 201" in refused.json()["message"]) == (413, True)
        assert client.post("/v2/rerank", content=b"x" * 100_001).status_code == 413
        assert client.post("/rerank", json={"query": QUERY, "texts": [5]}).json()["error_type"]
        assert client.get("/nothing").status_code == 404
        assert "<title>" in client.get("/").text

    def test_what_replicas_encode_is_in_the_tier(self, client: httpx.Client, folder: Path, tmp_path: Path) -> None:
        documents = [f"Passage number {number} tells of Beijing." for number in range(40)]
        lines = client.post("/v1/encode", json={"documents": documents}).text.splitlines()
        assert (json.loads(lines[-1])["new"], json.loads(lines[-1])["finished"]) == (40, True)

        def remote() -> int:
            """How many come from the tier to a machine that has nothing."""
            where = tmp_path / str(time.monotonic_ns())
            with (
                PassageCache(
                    where, remote=f"file://{folder / 'tier'}", secret=SECRET, remote_timeout_ms=10_000
                ) as cache,
                KaLMReranker("mini", device="cpu", cache=cache, show_progress=False) as reranker,
            ):
                counts = reranker.rank(QUERY, documents).counts
                assert counts is not None
                return counts.remote

        wait_for(lambda: remote() == 40)

    def test_forgetting_reaches_both(self, client: httpx.Client) -> None:
        assert set(statuses(client, 24)) == {200}
        report = client.post("/v1/forget", json={"documents": DOCUMENTS[:1]}).json()
        assert (report["replicas"], report["memory"]["states"], report["store"]["states"]) == (2, 2, 1)
        assert report["remote"]["states"] == 1
        again = client.post("/v1/forget", json={"documents": DOCUMENTS[:1]}).json()
        assert [again[level]["states"] for level in ("memory", "store", "remote")] == [0, 0, 0]

    def test_one_that_is_killed_is_replaced(self, client: httpx.Client) -> None:
        first, other = replicas()
        first.kill()
        found = statuses(client, 40)
        assert set(found[4:]) == {200}, found  # of four clients, each may have lost a request that was on its way
        wait_for(lambda: len(replicas()) == 2 and other in replicas())
        assert set(statuses(client, 8)) == {200}


def test_the_end_of_a_replica_waits_for_requests_and_keeps_what_was_encoded(cluster: str, tmp_path: Path) -> None:
    from ray import serve

    documents = [f"Passage number {number} tells of Beijing and its streets. " * 8 for number in range(60)]
    answers: list[httpx.Response] = []
    with serving(cluster, tmp_path, max_replicas=1) as client:
        body = {"query": QUERY, "documents": documents}
        thread = threading.Thread(target=lambda: answers.append(client.post("/v2/rerank", json=body)))
        thread.start()
        wait_for(lambda: client.get("/v1/stats").json()["queue"]["running"] == 1)
        serve.delete("kalm-rag")  # as when there are fewer replicas; the end of Ray Serve itself cuts connections
        thread.join(120)
    assert [answer.status_code for answer in answers] == [200]
    assert len(answers[0].json()["results"]) == 60
    with (
        PassageCache(tmp_path / "cache", secret=SECRET) as cache,
        KaLMReranker("mini", device="cpu", cache=cache, show_progress=False) as reranker,
    ):
        assert reranker.unknown(documents) == []


def test_a_session_stays_with_a_replica(cluster: str, tmp_path: Path) -> None:
    with serving(cluster, tmp_path, min_replicas=2, max_replicas=2, sessions=True) as client:

        def calls(session: str) -> int:
            return int(client.get("/v1/stats", headers={"x-session-id": session}).json()["reranker"]["calls"])

        wait_for(lambda: client.post("/v1/forget", json={"documents": DOCUMENTS}).json()["replicas"] == 2)
        for number in range(5):
            before = calls("collection")
            body = {"query": f"{QUERY} {number}", "documents": DOCUMENTS}
            assert client.post("/v2/rerank", json=body, headers={"x-session-id": "collection"}).status_code == 200
            assert calls("collection") == before + 1
        assert {calls(f"collection {number}") for number in range(20)} == {0, 5}
        assert set(statuses(client, 8)) == {200}, "those without a session are answered too"


def test_requests_that_pile_up_start_another_replica(cluster: str, tmp_path: Path) -> None:
    with serving(cluster, tmp_path, max_replicas=2, target_ongoing_requests=1) as client:
        assert len(replicas()) == 1
        found: list[int] = []

        def is_scaled() -> bool:
            found.extend(statuses(client, 40))
            return len(replicas()) == 2

        wait_for(is_scaled)
        assert set(found) == {200}
