"""Limits, keys, metrics, logs, and what happens to requests when clients or the server go away."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
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
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

from kalm_rag import KaLMReranker, cli
from kalm_rag.cache.store import StoreError
from kalm_rag.serving import gate as gate_module
from kalm_rag.serving.app import create_app
from kalm_rag.serving.gate import Gate
from kalm_rag.serving.keys import Keys
from kalm_rag.serving.limits import BusyError, Limits
from kalm_rag.serving.logs import JsonFormatter
from kalm_rag.serving.work import Queue

QUERY = "What is the capital of China?"
DOCUMENTS = ["Gravity attracts bodies toward one another.", "The capital of China is Beijing."]
BODY = {"query": QUERY, "documents": DOCUMENTS}
KEY, OTHER = "k" * 32, "o" * 32
# A path, and a request with a text of a secret, by dialect.
PATHS = {
    "/v1/rerank": {"query": QUERY, "documents": DOCUMENTS},
    "/v2/rerank": {"query": QUERY, "documents": DOCUMENTS},
    "/rerank": {"query": QUERY, "texts": DOCUMENTS},
    "/infinity/rerank": {"query": QUERY, "documents": DOCUMENTS},
    "/v1/ranking": {"query": {"text": QUERY}, "passages": [{"text": text} for text in DOCUMENTS]},
    "/score": {"text_1": QUERY, "text_2": DOCUMENTS},
}
every_path = pytest.mark.parametrize("path", PATHS)


@contextlib.contextmanager
def serving(mini: KaLMReranker, **arguments: Any) -> Iterator[TestClient]:
    with TestClient(create_app(mini, **arguments)) as client:
        yield client


class TestLimits:
    @every_path
    def test_each_limit_is_named(self, path: str, mini: KaLMReranker) -> None:
        limits = Limits(body_bytes=2_000, documents=3, characters=100)
        with serving(mini, limits=limits) as client:
            assert client.post(path, json=PATHS[path]).status_code == 200
            for change, named in (
                (lambda text: text.replace(DOCUMENTS[0], "x" * 101), "100 characters, got 101"),
                (lambda text: text.replace(DOCUMENTS[0], "x" * 2_001), "2000 bytes"),
                (lambda text: text.replace(QUERY, "x" * 101), "100 characters, got 101"),
            ):
                refused = client.post(path, content=change(json.dumps(PATHS[path])))
                assert refused.status_code == 413, refused.text
                assert named in refused.json()["message"]
                assert refused.json()["detail"]
            many = json.loads(json.dumps(PATHS[path]))
            for value in many.values():
                if isinstance(value, list):
                    value *= 2
            refused = client.post(path, json=many)
            assert refused.status_code == 413
            assert "3 in one request, got 4" in refused.json()["message"]

    def test_a_body_of_unknown_length(self, mini: KaLMReranker) -> None:
        with serving(mini, limits=Limits(body_bytes=1_000)) as client:
            refused = client.post("/v2/rerank", content=(b"x" * 100 for _ in range(11)))
        assert refused.status_code == 413

    def test_bodies_together(self, mini: KaLMReranker) -> None:
        with serving(mini, limits=Limits(held_bytes=200)) as client:
            refused = client.post("/rerank", json={"query": "x" * 300, "texts": []})
            assert refused.status_code == 429
            assert refused.headers["retry-after"] == "1"
            assert client.post("/v2/rerank", json={"query": "x" * 300, "documents": []}).status_code == 503
            # What was refused is not held any longer.
            assert client.post("/rerank", json={"query": "x", "texts": []}).status_code == 200

    def test_wrong_limits(self) -> None:
        with pytest.raises(ValueError, match="documents must be"):
            Limits(documents=0)
        with pytest.raises(ValueError, match="running must be at most 16"):
            Limits(running=17)

    @every_path
    def test_a_full_queue_answers_what_clients_try_again(self, path: str, mini: KaLMReranker) -> None:
        expected = {"/rerank": 429, "/infinity/rerank": 429, "/score": 429}.get(path, 503)
        app = create_app(mini, limits=Limits(running=1, waiting=1))
        with TestClient(app) as client, holding(mini):
            others = [threading.Thread(target=client.post, args=(path,), kwargs={"json": fresh(path)}) for _ in "ab"]
            for other in others:
                other.start()
            wait_for(lambda: app.state.work.queue.running + app.state.work.queue.waiting == 2)
            refused = client.post(path, json=fresh(path))
            assert refused.status_code == expected
            seconds = int(refused.headers["retry-after"])
            assert seconds >= 1
            assert refused.json()["message"].endswith(f"1 wait, which is its limit: try again in {seconds} s")
            # It is refused before anything is done for it.
            assert client.post(path, content=b"{ no JSON").status_code == expected
            mini.scorer.turns.__exit__(None, None, None)
            for other in others:
                other.join()
            mini.scorer.turns.__enter__()
            assert "kalm_refused_requests_total 2.0" in app.state.metrics.text().decode()

    def test_a_refusal_waits_as_long_as_the_page_says(
        self, mini: KaLMReranker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        waited = []

        async def sleep(seconds: float) -> None:
            waited.append(seconds)

        def refuse(_: Queue) -> None:
            raise BusyError("full", 1.0)

        monkeypatch.setattr(gate_module, "sleep", sleep)
        monkeypatch.setattr(Queue, "check", refuse)
        with TestClient(create_app(mini)) as client:
            assert client.get("/health").status_code == 200
            assert waited == []
            assert client.post("/v2/rerank", content=b"anything").status_code == 503
        assert waited == [0.1]

    def test_places_come_back_after_a_cancellation(self) -> None:
        async def use() -> None:
            queue = Queue(Limits(running=1, waiting=1))
            async with queue.place():
                waiting = asyncio.create_task(enter(queue))
                await asyncio.sleep(0)
                with pytest.raises(BusyError):
                    await enter(queue)
                waiting.cancel()
                await asyncio.gather(waiting, return_exceptions=True)
                assert (queue.running, queue.waiting) == (1, 0)
            await enter(queue)
            assert (queue.running, queue.waiting) == (0, 0)

        async def enter(queue: Queue) -> None:
            async with queue.place():
                pass

        asyncio.run(use())

    def test_a_slow_body(self, mini: KaLMReranker) -> None:
        sent: list[Any] = []

        async def slow() -> None:
            app = create_app(mini)
            gate = Gate(app, Limits(body_seconds=1), Keys(), app.state.metrics, app.state.work.queue.check, {})

            async def receive() -> Any:
                await asyncio.sleep(0.3)
                return {"type": "http.request", "body": b" ", "more_body": True}

            async def send(message: Any) -> None:
                sent.append(message)

            scope = {"type": "http", "path": "/v2/rerank", "method": "POST", "headers": []}
            await gate(scope, receive, send)

        asyncio.run(slow())
        assert sent[0]["status"] == 408
        assert b"within 1 seconds" in sent[1]["body"]


class TestKeys:
    def test_what_needs_one(self, mini: KaLMReranker) -> None:
        with serving(mini, keys=Keys([KEY])) as client:
            for path in ("/health", "/ready", "/docs", "/openapi.json"):
                assert client.get(path).status_code == 200, path
            for path in ("/info", "/metrics", "/v1/stats", "/v1/models", "/nothing"):
                assert client.get(path).status_code == 401, path
            for path, body in PATHS.items():
                for headers, told in (
                    ({}, "Bearer KEY"),
                    ({"authorization": KEY}, "Bearer KEY"),
                    ({"api-key": KEY}, "Bearer KEY"),
                    ({"authorization": f"Bearer {OTHER}"}, "does not know the API key"),
                ):
                    refused = client.post(path, json=body, headers=headers)
                    assert refused.status_code == 401
                    assert refused.headers["www-authenticate"] == "Bearer"
                    assert told in refused.json()["message"]
                    assert OTHER not in refused.text
                for scheme in ("Bearer", "bearer"):
                    assert client.post(path, json=body, headers={"authorization": f"{scheme} {KEY}"}).status_code == 200

    def test_a_file_of_them_is_read_again(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        file = tmp_path / "keys"
        file.write_text(f"# ours\n{KEY}\n\n{OTHER}\n")
        keys = Keys(file=file)
        assert keys.admits(f"Bearer {KEY}")
        assert keys.admits(f"Bearer {OTHER}")
        file.write_text(f"{OTHER}\n")
        assert not keys.admits(f"Bearer {KEY}")
        assert keys.admits(f"Bearer {OTHER}")
        file.unlink()
        assert keys.admits(f"Bearer {OTHER}")
        assert "last keys stay valid" in caplog.text
        assert KEY not in caplog.text

    def test_an_emptied_file_leaves_the_server_closed(self, tmp_path: Path) -> None:
        file = tmp_path / "keys"
        file.write_text(KEY)
        keys = Keys(file=file)
        file.write_text("")
        assert keys.required
        assert keys.admits(f"Bearer {KEY}")
        assert not keys.admits("Bearer ")
        assert not keys.admits(None)

    def test_from_the_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("KALM_RAG_API_KEY", f"{KEY}, {OTHER},")
        keys = Keys.from_environment()
        assert keys.admits(f"Bearer {KEY}")
        assert keys.admits(f"Bearer {OTHER}")
        monkeypatch.setenv("KALM_RAG_API_KEY", "short")
        with pytest.raises(ValueError, match="at least 16 characters") as caught:
            Keys.from_environment()
        assert "short" not in str(caught.value).replace("shorter", "")

    def test_a_file_without_keys(self, tmp_path: Path) -> None:
        (tmp_path / "keys").write_text("# none\n")
        with pytest.raises(ValueError, match="holds no API key"):
            Keys(file=tmp_path / "keys")
        with pytest.raises(OSError, match="nowhere"):
            Keys(file=tmp_path / "nowhere")

    def test_signs_outside_of_ascii(self) -> None:
        key = "schlüssel-" + "ß" * 16
        assert Keys([key]).admits(f"Bearer {key}")


class TestOwnEndpoints:
    def test_encode_forget_and_stats(self, tmp_path: Path) -> None:
        documents = [f"Passage number {number} tells of Beijing." for number in range(40)]
        with (
            KaLMReranker("mini", device="cpu", cache=tmp_path / "cache", show_progress=False) as reranker,
            TestClient(create_app(reranker)) as client,
        ):
            response = client.post("/v1/encode", json={"documents": documents})
            assert response.headers["content-type"] == "application/x-ndjson"
            lines = [json.loads(line) for line in response.text.splitlines()]
            assert [line["done"] for line in lines] == [32, 40, 40]
            assert [line["finished"] for line in lines] == [False, False, True]
            assert lines[-1]["new"] == 40
            again = json.loads(client.post("/v1/encode", json={"documents": documents}).text.splitlines()[-1])
            assert (again["new"], again["known"]) == (0, 40)
            assert client.get("/v1/stats").json()["cache"]["encoded"] == 40
            assert client.get("/ready").json() == {"status": "ready"}
            assert client.post("/v1/forget", json={"documents": documents[:3]}).json()["store"]["states"] == 3
            assert client.post("/v1/forget", json={"documents": [5]}).status_code == 422
            assert client.post("/v1/encode", json={"documents": [{"a": 1}]}).status_code == 422
            empty = json.loads(client.post("/v1/encode", json={"documents": []}).text)
            assert (empty["total"], empty["finished"]) == (0, True)

    @pytest.mark.parametrize(
        ("path", "body"),
        [
            ("/v2/rerank", {"query": "a", "documents": ["b"]}),
            ("/rerank", {"query": "a", "texts": ["b"]}),
            ("/v1/score", {"queries": "a", "documents": ["b"]}),
            ("/v1/encode", {"documents": ["b"]}),
            ("/v1/forget", {"documents": ["b"]}),
            ("/info", None),
        ],
    )
    def test_an_answer_names_the_digest_of_its_model(
        self, server: TestClient, mini: KaLMReranker, path: str, body: dict[str, Any] | None
    ) -> None:
        response = server.get(path) if body is None else server.post(path, json=body)
        assert response.status_code == 200
        assert response.headers["x-kalm-digest"] == mini.scorer.identity.mark == server.get("/info").json()["digest"]

    def test_info_names_the_model_and_no_folder(self, server: TestClient, mini: KaLMReranker) -> None:
        info = server.get("/info").json()
        assert info["digest"] == mini.scorer.identity.mark
        assert info["model"] == info["model_id"] == "mini"
        assert (info["ratio"], info["lora"], info["dtype"]) == (4, None, "float32")
        assert info["limits"]["documents"] == 2000
        assert [model["id"] for model in server.get("/v1/models").json()["data"]] == ["mini"]

    def test_a_folder_is_named_by_its_last_part(self, checkpoint: Path) -> None:
        with KaLMReranker(checkpoint, device="cpu", cache=None) as reranker, serving(reranker) as client:
            assert client.get("/info").json()["model"] == checkpoint.name
            assert client.post("/v2/rerank", json=BODY).json()["model"] == checkpoint.name

    def test_not_ready_when_the_cache_keeps_nothing(self, mini: KaLMReranker, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(_: object) -> None:
            raise StoreError("/secret/folder is full")

        monkeypatch.setattr("kalm_rag.serving.about.check_writable", fail)
        monkeypatch.setattr(mini.cache, "store", object())
        with serving(mini) as client:
            refused = client.get("/ready")
            assert refused.status_code == 503
            assert "secret" not in refused.text
            assert client.get("/health").status_code == 200

    def test_strict_model(self, mini: KaLMReranker) -> None:
        with serving(mini, strict_model=True) as client:
            assert client.post("/v2/rerank", json=BODY).status_code == 200
            assert client.post("/v2/rerank", json={**BODY, "model": "mini"}).status_code == 200
            for path in ("/v2/rerank", "/v1/encode"):
                refused = client.post(path, json={**BODY, "model": "rerank-v3.5"})
                assert refused.status_code == 404
                assert "'mini'" in refused.json()["message"]

    def test_the_threshold_of_the_server(self, mini: KaLMReranker) -> None:
        with serving(mini, threshold=0.9) as client:
            assert len(client.post("/v2/rerank", json=BODY).json()["results"]) == 1
            assert len(client.post("/v2/rerank", json={**BODY, "threshold": 0}).json()["results"]) == 2

    def test_unknown_paths_and_methods(self, server: TestClient) -> None:
        assert server.get("/nothing").status_code == 404
        refused = server.get("/v2/rerank")
        assert refused.status_code == 405
        assert refused.headers["allow"] == "POST"


METRICS = {
    "kalm_requests_total", "kalm_request_duration_seconds", "kalm_queue_seconds", "kalm_read_seconds",
    "kalm_encode_seconds", "kalm_prefill_seconds", "kalm_score_seconds", "kalm_request_passages", "kalm_request_tokens",
    "kalm_batch_rows", "kalm_batch_tokens", "kalm_refused_requests_total", "kalm_abandoned_requests_total",
    "kalm_truncated_texts_total", "kalm_skipped_passages_total", "kalm_running_requests", "kalm_waiting_requests",
    "kalm_passages_total", "kalm_cache_hits_total", "kalm_cache_misses_total", "kalm_cache_corrupt_total",
    "kalm_cache_errors_total", "kalm_cache_bytes", "kalm_cache_limit_bytes", "kalm_cache_entries",
    "kalm_cache_evictions_total", "kalm_background_pending_passages",
}  # fmt: skip


class TestMetricsAndLogs:
    def test_names(self, server: TestClient) -> None:
        server.post("/v2/rerank", json=BODY)
        text = server.get("/metrics").text
        found = set(re.findall(r"^# TYPE (\S+)", text, re.MULTILINE))
        assert {name for name in found if not name.endswith("_created")} == METRICS
        assert 'kalm_requests_total{dialect="cohere",status="200"}' in text

    def test_the_dashboard_asks_for_metrics_that_there_are(self) -> None:
        dashboard = Path(__file__).parents[2] / "docs" / "assets" / "grafana-kalm-rag.json"
        expressions = re.findall(r'"expr": "((?:[^"\\]|\\.)*)"', dashboard.read_text("utf-8"))
        assert expressions
        for expression in expressions:
            for name in re.findall(r"kalm_\w+", expression):
                assert re.sub(r"_(bucket|sum|count)$", "", name) in METRICS

    def test_no_text_is_logged(self, mini: KaLMReranker, caplog: pytest.LogCaptureFixture) -> None:
        secret = "Zaphod"
        caplog.set_level(logging.DEBUG)
        with serving(mini) as client:
            client.post("/v2/rerank", json={"query": secret, "documents": [secret], "model": secret})
            client.post("/v2/rerank", json={"query": secret, "documents": [7, secret]})
            client.post(f"/{secret}", content=secret, headers={"x-request-id": f"{secret} x", "x-a": secret})
            client.post("/v1/encode", json={"documents": [secret]})
        ours = [record for record in caplog.records if record.name.startswith("kalm_rag")]
        lines = [JsonFormatter().format(record) for record in ours]
        assert len(lines) >= 4
        assert not [line for line in lines if secret in line]
        first = next(json.loads(line) for line in lines if '"message": "request"' in line)
        assert (first["endpoint"], first["path"]) == ("cohere", "/v2/rerank")
        assert first["characters"] == len(secret)
        assert first["status"] == 200

    def test_an_unexpected_exception_is_told_by_its_place(
        self, mini: KaLMReranker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def fail(*_: object, **__: object) -> None:
            raise RuntimeError("Zaphod")

        monkeypatch.setattr(mini, "rank_each", fail)
        with serving(mini) as client:
            response = client.post("/v2/rerank", json=BODY, headers={"x-request-id": "abc-1"})
        assert response.status_code == 500
        assert response.headers["x-request-id"] == "abc-1"
        [record] = [record for record in caplog.records if record.getMessage() == "a request failed"]
        line = JsonFormatter().format(record)
        assert "RuntimeError" in line
        assert "abc-1" in line
        assert "Zaphod" not in line + response.text

    def test_security_headers(self, server: TestClient) -> None:
        page = server.get("/docs")
        assert "default-src 'none'" in page.headers["content-security-policy"]
        assert page.headers["x-frame-options"] == "DENY"
        assert "http" not in re.sub(r"<a href='openapi.json'>", "", page.text).lower().replace("http/", "")
        answer = server.post("/v2/rerank", json=BODY, headers={"origin": "https://elsewhere.example"})
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "access-control-allow-origin" not in answer.headers

    def test_cors_if_asked_for(self, mini: KaLMReranker) -> None:
        origin = "https://app.example"
        with serving(mini, cors_origins=[origin], keys=Keys([KEY])) as client:
            asked = {"origin": origin, "access-control-request-method": "POST"}
            assert client.options("/v2/rerank", headers=asked).headers["access-control-allow-origin"] == origin
            asked["origin"] = "https://elsewhere.example"
            assert "access-control-allow-origin" not in client.options("/v2/rerank", headers=asked).headers


class TestClientsThatLeave:
    def test_the_work_of_one_ends(self, mini: KaLMReranker) -> None:
        """Its client closes the connection while it waits for the model."""
        app = create_app(mini)

        async def leave() -> None:
            gone = asyncio.Event()
            messages = [{"type": "http.request", "body": json.dumps(fresh("/v2/rerank")).encode(), "more_body": False}]

            async def receive() -> Any:
                if messages:
                    return messages.pop()
                await gone.wait()
                return {"type": "http.disconnect"}

            async def send(_: Any) -> None:
                pass

            scope = {
                "type": "http", "path": "/v2/rerank", "raw_path": b"/v2/rerank", "method": "POST", "headers": [],
                "query_string": b"", "http_version": "1.1", "scheme": "http", "server": ("a", 1), "client": ("b", 1),
                "root_path": "", "app": app, "asgi": {"version": "3.0"},
            }  # fmt: skip
            with holding(mini):
                request = asyncio.create_task(app(scope, receive, send))
                while not mini.scorer.turns.waiting:
                    await asyncio.sleep(0.01)
                gone.set()
                await request
            assert app.state.work.queue.running == 0

        before = mini.stats().calls
        asyncio.run(leave())
        wait_for(lambda: not mini.scorer.turns.waiting)
        assert mini.stats().calls == before
        assert 'kalm_requests_total{dialect="cohere",status="499"} 1.0' in app.state.metrics.text().decode()


def fresh(path: str) -> dict[str, Any]:
    """A request whose scores nobody remembers."""
    text = json.dumps(PATHS[path]).replace(QUERY, f"What of number {next(_numbers)}?")
    return json.loads(text)


_numbers = iter(range(1_000_000))


@contextlib.contextmanager
def holding(mini: KaLMReranker) -> Iterator[None]:
    """Keep the model from all requests."""
    mini.scorer.turns.__enter__()
    try:
        yield
    finally:
        mini.scorer.turns.__exit__(None, None, None)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, "it did not happen within two minutes"
        time.sleep(0.01)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class TestTheProcess:
    def test_it_drains_and_keeps_what_it_encoded(self, tmp_path: Path) -> None:
        """SIGHUP changes nothing; after SIGTERM, a running request is answered, and the cache holds its passages."""
        port, cache = free_port(), tmp_path / "cache"
        command = [
            sys.executable,
            "-m",
            "kalm_rag",
            "serve",
            "--model",
            "mini",
            "--port",
            str(port),
            "--cache",
            str(cache),
        ]
        documents = [f"Passage number {number} tells of Beijing and its streets. " * 8 for number in range(60)]
        environment = {**os.environ, "KALM_RAG_API_KEY": KEY}
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
            try:
                url = f"http://127.0.0.1:{port}"
                wait_for(lambda: is_up(url, process))
                headers = {"authorization": f"Bearer {KEY}"}
                assert httpx.post(f"{url}/v2/rerank", json=BODY).status_code == 401
                with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
                    connection.sendall(b"GET /health HTTP/1.1\r\nx-long: " + b"x" * 70_000)
                    assert connection.recv(100).startswith(b"HTTP/1.1 431 ")
                if hasattr(signal, "SIGHUP"):
                    process.send_signal(signal.SIGHUP)
                    time.sleep(0.2)
                answers: list[httpx.Response] = []
                body = {"query": QUERY, "documents": documents}
                client = threading.Thread(
                    target=lambda: answers.append(
                        httpx.post(f"{url}/v2/rerank", json=body, headers=headers, timeout=60)
                    )
                )
                client.start()
                wait_for(lambda: httpx.get(f"{url}/v1/stats", headers=headers).json()["queue"]["running"] == 1)
                process.send_signal(signal.SIGTERM)
                _, log = process.communicate(timeout=60)
                client.join(60)
            finally:
                process.kill()
        assert process.returncode == 0
        assert [answer.status_code for answer in answers] == [200]
        assert len(answers[0].json()["results"]) == 60
        for line in log.splitlines()[1:]:  # the first one is the note about mini
            json.loads(line)
        assert "Beijing" not in log
        with KaLMReranker("mini", device="cpu", cache=cache, show_progress=False) as reranker:
            assert reranker.unknown(documents) == []

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--port", "70000"], "--port must be between 0 and 65535"),
            (["--api-key-file", "/nowhere/keys"], "/nowhere/keys"),
            (["--max-running", "17"], "at most 16"),
            (["--max-body", "none"], "number of bytes"),
            (["--threshold", "2"], "threshold must be"),
            (["--model", "/nowhere/model"], "/nowhere/model"),
        ],
    )
    def test_wrong_arguments_are_told_before_it_listens(
        self, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(sys, "argv", ["kalm-rag", "serve", "--model", "mini", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 2
        assert message in capsys.readouterr().err


def is_up(url: str, process: subprocess.Popen[str]) -> bool:
    assert process.poll() is None, "the server ended"
    try:
        return httpx.get(f"{url}/ready").status_code == 200
    except httpx.HTTPError:
        return False
