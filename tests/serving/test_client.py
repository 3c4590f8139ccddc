"""The client of a server: the scores of the local model, and what it does when the server is away or another one."""

from __future__ import annotations

import copy
import json
import logging
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest
import uvicorn
from servedkit import DIGEST, Scripted, answer_of, free_port, served
from thresholdkit import make_profile

from kalm_rag import (
    FirstStage,
    KaLMReranker,
    PartialRanking,
    RankedPassage,
    Ranking,
    RerankerClient,
    UnscoredPassage,
)
from kalm_rag.errors import MissingExtraError, ServerError, ServerUnavailableError
from kalm_rag.serving.app import create_app

KEY = "a key of many letters".replace(" ", "-")
QUERY = "What is the capital of China?"
DOCUMENTS = [
    "Gravity attracts bodies toward one another.",
    {"text": "The capital of China is Beijing.", "id": 7},
    "Bread is baked from flour, water and salt. " * 400,
    "half a \ud83d pair of Beijing",
    "",
]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with served(tmp_path_factory.mktemp("served"), key=KEY) as found:
        yield found


@pytest.fixture
def client(url: str) -> Iterator[RerankerClient]:
    with RerankerClient(url, model="mini", api_key=KEY) as found:
        yield found


@pytest.fixture
def stub() -> Scripted:
    return Scripted()


@pytest.fixture
def stub_url(stub: Scripted, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr("kalm_rag.client.connection._FIRST_PAUSE", 0.01)
    with stub.running() as found:
        yield found


def same(found: Any, wanted: Any) -> None:
    """Two rankings agree in everything; scores within 1e-5."""
    assert type(found) is type(wanted)
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert type(one) is type(other)
        assert one.document is other.document
        if isinstance(one, RankedPassage):
            assert isinstance(other, RankedPassage)
            numbers = [(hit.score, hit.margin, hit.fused or 0.0) for hit in (one, other)]
            assert numbers[0] == pytest.approx(numbers[1], abs=1e-5)
        names = set(vars(other)) - {"score", "margin", "fused", "document"}
        assert {name: getattr(one, name) for name in names} == {name: getattr(other, name) for name in names}


class TestTheSameAsTheLocalModel:
    @pytest.mark.parametrize(
        "given",
        [
            {},
            {"top_k": 2},
            {"threshold": 0.4},
            {"instruction": "Find passages about bread.", "ratio": 8},
            {"first_stage": FirstStage([0.1, 0.2, 0.9, 0.3, 0.4]), "top_k": 3},
            {"first_stage": FirstStage([1, 2, 9, 3, 4], "rrf"), "threshold": 0.2},
            {"budget_ms": 600_000.0},
            {"on_unknown": "wait"},
        ],
    )
    def test_rank(self, client: RerankerClient, mini: KaLMReranker, given: dict[str, Any]) -> None:
        same(client.rank(QUERY, DOCUMENTS, **given), mini.rank(QUERY, DOCUMENTS, **given))

    @pytest.mark.parametrize(
        "given",
        [
            {},
            {"top_k": 2},
            {"top_k": 3, "threshold": 0.2},
            {"first_stage": FirstStage([0.1, 0.2, 0.9, 0.3, 0.4]), "top_k": 3},
            {"first_stage": FirstStage([1, 2, 9, 3, 4], "rrf")},
            {"budget_ms": 600_000.0},
        ],
    )
    @pytest.mark.parametrize("limits", [(2, 10**7), (100, 2000)])
    def test_more_passages_than_a_request_may_have(
        self, client: RerankerClient, mini: KaLMReranker, given: dict[str, Any], limits: tuple[int, int]
    ) -> None:
        client.info()["limits"].update(documents=limits[0], body_bytes=limits[1])
        before = client.stats().counts
        found = client.rank(QUERY, DOCUMENTS, **given)
        same(found, mini.rank(QUERY, DOCUMENTS, **given))
        assert found.counts is not None
        assert (found.counts.passages, found.counts.scored) == (5, 5)
        assert client.stats().counts.passages == before.passages + 5

    def test_the_result_says_what_was_not_read(self, client: RerankerClient) -> None:
        hits = {hit.index: hit for hit in client.rank(QUERY, DOCUMENTS)}
        assert [hits[place].passage_truncated for place in range(5)] == [False, False, True, False, False]
        assert [hits[place].passage_repaired for place in range(5)] == [False, False, False, True, False]
        assert client.repairs.count == client.truncations.count == 1

    def test_rank_many(self, client: RerankerClient, mini: KaLMReranker) -> None:
        queries = [QUERY, "How is bread made?", QUERY]
        found, wanted = (
            client.rank_many(queries, DOCUMENTS, 2, threshold=0.3),
            mini.rank_many(queries, DOCUMENTS, 2, threshold=0.3),
        )
        for one, other in zip(found, wanted, strict=True):
            same(one, other)
        same(found.fused("rrf"), wanted.fused("rrf"))
        assert found.counts is not None
        assert found.counts.passages == 15

    def test_predict(self, client: RerankerClient, mini: KaLMReranker) -> None:
        pairs = [(QUERY, document) for document in DOCUMENTS] + [("bread", DOCUMENTS[2])]
        assert client.predict(pairs) == pytest.approx(mini.predict(pairs), abs=1e-5)

    async def test_the_asynchronous_twins(self, client: RerankerClient, mini: KaLMReranker) -> None:
        same(await client.arank(QUERY, DOCUMENTS), mini.rank(QUERY, DOCUMENTS))
        same((await client.arank_many([QUERY], DOCUMENTS))[0], mini.rank(QUERY, DOCUMENTS))
        assert await client.apredict([(QUERY, "a")]) == pytest.approx(mini.predict([(QUERY, "a")]), abs=1e-5)
        assert (await client.aencode(["only here"])).new == 1
        assert (await client.aforget(["only here"])).total >= 1

    def test_a_profile_is_applied_here_and_checked(self, client: RerankerClient, mini: KaLMReranker) -> None:
        profile = make_profile(mini.scorer.identity.mark)
        given: dict[str, Any] = {"threshold": profile, "calibrated": True}
        same(client.rank(QUERY, DOCUMENTS, **given), mini.rank(QUERY, DOCUMENTS, **given))
        with pytest.raises(ValueError, match="ratio 4, not 8"):
            client.rank(QUERY, DOCUMENTS, ratio=8, **given)

    def test_encode_and_forget(self, client: RerankerClient) -> None:
        texts = [f"Passage {number} of this test." for number in range(70)]
        report = client.encode(texts)
        assert (report.new, report.known) == (70, 0)
        again = client.encode(text for text in texts)
        assert (again.new, again.known) == (0, 70)
        assert client.forget(texts).store.states == 70
        assert client.encode(texts[:1]).new == 1

    def test_passages_that_are_not_encoded(self, client: RerankerClient) -> None:
        client.encode(["known before"])
        found = client.rank(QUERY, ["not known before \ud83d", "known before"], on_unknown="skip")
        assert isinstance(found, PartialRanking)
        assert [hit.index for hit in found] == [1, 0]
        assert [type(hit) for hit in found] == [RankedPassage, UnscoredPassage]
        assert found[1].passage_repaired

    def test_many_threads_share_one_client(self, client: RerankerClient, mini: KaLMReranker) -> None:
        wanted = mini.rank(QUERY, DOCUMENTS)
        found: list[Any] = []
        threads = [threading.Thread(target=lambda: found.append(client.rank(QUERY, DOCUMENTS))) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert len(found) == 8
        for one in found:
            same(one, wanted)

    def test_stats_and_info(self, client: RerankerClient, mini: KaLMReranker) -> None:
        assert client.info()["digest"] == mini.scorer.identity.mark
        ranking = client.rank(QUERY, DOCUMENTS, top_k=1)
        assert ranking.counts is not None
        assert ranking.timings is not None
        assert (ranking.counts.passages, ranking.counts.cut) == (5, 4)
        assert ranking.timings.total >= ranking.timings.score
        assert client.stats().calls == 1
        assert client.stats().counts == ranking.counts


class TestWithoutAServer:
    def test_nothing_is_sent_for_nothing(self) -> None:
        client = RerankerClient("http://127.0.0.1:1")
        assert client.rank(QUERY, []) == Ranking()
        assert client.predict([]) == []
        assert client.encode([]).total == client.forget([]).total == 0
        assert [list(ranking) for ranking in client.rank_many([QUERY], [])] == [[]]

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"server": 7}, "server must be a string"),
            ({"server": ""}, "server must be an address"),
            ({"server": "localhost:8000"}, "server must be an address"),
            ({"server": "ftp://localhost"}, "server must be an address"),
            ({"server": "http://localhost:port"}, "server must be an address"),
            ({"server": "http://me:horse@localhost"}, "without a user, a password or a query"),
            ({"server": "http://localhost?key=horse"}, "without a user, a password or a query"),
            ({"api_key": 7}, "api_key must be a string or None"),
            ({"api_key": ""}, "api_key must be a key of visible ASCII"),
            ({"api_key": "horse\r\nx: y"}, "api_key must be a key of visible ASCII"),
            ({"timeout": 0}, "timeout must be above 0 seconds"),
            ({"timeout": "5"}, "timeout must be a number"),
            ({"retries": -1}, "retries must be"),
            ({"retries": True}, "retries must be an integer"),
            ({"on_failure": "ignore"}, "on_failure must be one of"),
            ({"ratio": 0}, "ratio must be at least 1"),
            ({"instruction": 7}, "instruction must be a string"),
            ({"model": 7}, "model must be a string"),
        ],
    )
    def test_wrong_arguments(self, given: dict[str, Any], message: str) -> None:
        with pytest.raises((ValueError, TypeError)) as error:
            RerankerClient(**{"server": "http://localhost", **given})
        assert message in str(error.value)
        assert "horse" not in str(error.value)

    def test_wrong_arguments_of_a_call(self) -> None:
        client = RerankerClient("http://127.0.0.1:1")
        with pytest.raises(TypeError, match="query must be a string"):
            client.rank(7, ["a"])  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="top_k must be at least 1"):
            client.rank(QUERY, ["a"], top_k=0)
        with pytest.raises(ValueError, match="one score per passage"):
            client.rank(QUERY, ["a"], first_stage=FirstStage([1, 2]))
        with pytest.raises(TypeError, match="put it into a list"):
            client.rank(QUERY, "a")
        with pytest.raises(ValueError, match="calibrated=True needs a threshold profile"):
            client.rank(QUERY, ["a"], calibrated=True)

    def test_what_is_on_the_server_is_refused_with_a_word(self) -> None:
        client = RerankerClient("http://127.0.0.1:1")
        for name in ("cache", "scorer", "unknown", "estimate", "prefill_stats", "flush"):
            with pytest.raises(AttributeError, match=f"no '{name}': the model and its cache are on the server"):
                getattr(client, name)

    def test_keys_are_not_shown_and_copies_keep_them(self) -> None:
        client = RerankerClient("http://127.0.0.1:1/", api_key="correct-horse", ratio=8, on_failure="keep-order")
        assert repr(client) == "RerankerClient('http://127.0.0.1:1', model=None)"
        assert "horse" not in repr(client._server)
        for other in (copy.copy(client), copy.deepcopy(client), pickle.loads(pickle.dumps(client))):
            assert other._server == client._server
            assert other._ratio == 8

    def test_a_missing_package_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "httpx", None)
        with pytest.raises(MissingExtraError, match=r"pip install 'kalm-rag\[client\]'"):
            RerankerClient("http://127.0.0.1:1").load()

    def test_torch_is_never_imported(self, url: str) -> None:
        program = f"""
import sys
sys.modules["torch"] = sys.modules["transformers"] = None  # an import fails
from kalm_rag import RerankerClient
with RerankerClient({url!r}, model="mini") as client:
    client.load().encode(["a"])
    assert len(client.rank({QUERY!r}, ["a", "b"], threshold=0.0)) == 2
    assert len(client.predict([("a", "b")])) == len(client.rank_many(["a"], ["b"])) == 1
    client.forget(["a"])
print(sorted({{"torch", "transformers", "tokenizers", "numpy"}} & {{name for name, m in sys.modules.items() if m}}))
"""
        environment = {**os.environ, "KALM_RAG_API_KEY": f"{KEY},another"}
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == "[]"


def quick(url: str, **given: Any) -> RerankerClient:
    return RerankerClient(url, **{"model": "mini", "timeout": 5.0, "retries": 1, **given})


class TestWhenTheServerIsAway:
    def test_it_is_an_error_that_says_so(self) -> None:
        client = quick(f"http://127.0.0.1:{free_port()}", retries=0)
        with pytest.raises(ServerUnavailableError, match="cannot be reached"):
            client.rank(QUERY, DOCUMENTS)
        assert client.failures == 1
        with pytest.raises(ServerUnavailableError):
            client.load()

    def test_the_order_of_the_first_stage_is_kept_and_said(self, caplog: pytest.LogCaptureFixture) -> None:
        client = quick(f"http://127.0.0.1:{free_port()}", retries=0, on_failure="keep-order")
        with caplog.at_level(logging.WARNING, "kalm_rag.client"):
            found = client.load().rank(QUERY, DOCUMENTS, top_k=3)
        assert isinstance(found, PartialRanking)
        assert [hit.index for hit in found] == [0, 1, 2]
        assert all(hit.document is DOCUMENTS[hit.index] and not hit.scored for hit in found)
        assert found.counts is not None
        assert (found.counts.passages, found.counts.skipped, found.counts.cut) == (5, 5, 2)
        assert "5 passages keep their order and have no score" in caplog.text
        assert QUERY not in caplog.text
        by_scores = client.rank(QUERY, DOCUMENTS, first_stage=FirstStage([1, 5, 2, 4, 3]))
        assert [hit.index for hit in by_scores] == [1, 3, 4, 2, 0]
        for call in (lambda: client.predict([("a", "b")]), lambda: client.encode(["a"]), lambda: client.forget(["a"])):
            with pytest.raises(ServerUnavailableError):
                call()

    @pytest.mark.parametrize("status", [408, 429, 502, 503, 504])
    def test_a_busy_server_is_asked_again(self, stub: Scripted, stub_url: str, status: int) -> None:
        stub.answers = [(status, {}, b'{"message": "later"}')]
        assert len(quick(stub_url).rank(QUERY, ["a", "bb"])) == 2
        assert stub.paths() == ["/info", "/v2/rerank", "/v2/rerank"]
        stub.answers = [(status, {}, b'{"message": "later"}')] * 2
        with pytest.raises(ServerUnavailableError, match=f"answered {status}: later") as error:
            quick(stub_url).rank(QUERY, ["a", "bb"])
        assert error.value.status == status

    @pytest.mark.parametrize("form", ["seconds", "date"])
    def test_retry_after_is_waited_for(
        self, stub: Scripted, stub_url: str, form: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pauses: list[float] = []
        monkeypatch.setattr("kalm_rag.client.connection.sleep", pauses.append)
        value = "7" if form == "seconds" else formatdate(time.time() + 8, usegmt=True)
        stub.answers = [(429, {"retry-after": value}, b"")]
        quick(stub_url, timeout=60.0).rank(QUERY, ["a"])
        assert len(pauses) == 1
        assert 5 < pauses[0] <= 8

    @pytest.mark.parametrize("value", ["5", "9" * 400, "Fri, 31 Dec 9999 23:59:59 GMT"])
    def test_a_pause_beyond_the_deadline_is_not_waited_for(self, stub: Scripted, stub_url: str, value: str) -> None:
        stub.answers = [(503, {"retry-after": value}, b"")]
        with pytest.raises(ServerUnavailableError) as error:
            quick(stub_url, retries=5).rank(QUERY, ["a"])
        assert error.value.retry_after is not None
        assert error.value.retry_after >= 5
        assert stub.paths() == ["/info", "/v2/rerank"]

    @pytest.mark.parametrize("value", ["soon", "-1", "Fri, 99 Foo 2026 00:00:00 GMT", ""])
    def test_a_pause_that_cannot_be_read_is_left_to_the_client(self, stub: Scripted, stub_url: str, value: str) -> None:
        stub.answers = [(503, {"retry-after": value}, b"")]
        assert len(quick(stub_url).rank(QUERY, ["a"])) == 1

    def test_the_timeout_holds_for_all_attempts_together(
        self, stub: Scripted, stub_url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        now, pauses = [0.0], []

        def sleep(seconds: float) -> None:
            pauses.append(seconds)
            now[0] += seconds

        monkeypatch.setattr("kalm_rag.client.connection.sleep", sleep)
        monkeypatch.setattr("kalm_rag.client.exchange.monotonic", lambda: now[0])
        stub.answers = [(503, {"retry-after": "2"}, b"")] * 9
        with pytest.raises(ServerUnavailableError):
            quick(stub_url, timeout=5.0, retries=9).rank(QUERY, ["a"])
        assert pauses == [2.0, 2.0]

    def test_an_answer_that_arrives_in_drips_is_given_up(self, stub: Scripted, stub_url: str) -> None:
        end = threading.Event()

        def drip(handler: BaseHTTPRequestHandler) -> None:
            handler.send_response(200)
            handler.send_header("content-length", "1000")
            handler.send_header("x-kalm-digest", DIGEST)
            handler.end_headers()
            while not end.wait(0.05):
                handler.wfile.write(b" ")

        stub.answers = [drip]
        try:
            with pytest.raises(ServerUnavailableError, match=r"did not answer within 0\.4 seconds"):
                quick(stub_url, timeout=0.4, retries=0).rank(QUERY, ["a"])
        finally:
            end.set()

    def test_progress_renews_the_timeout(self, stub: Scripted, stub_url: str) -> None:
        def line(done: int) -> bytes:
            counts = dict.fromkeys(("known", "truncated", "repaired"), 0)
            return json.dumps({"done": done, "new": done, **counts, "finished": done == 4}).encode() + b"\n"

        def slowly(handler: BaseHTTPRequestHandler) -> None:
            handler.send_response(200)
            handler.send_header("content-length", str(4 * len(line(1)) - 1))
            handler.send_header("x-kalm-digest", DIGEST)
            handler.end_headers()
            for done in range(1, 5):
                time.sleep(0.2)
                handler.wfile.write(line(done))

        stub.answers = [slowly]
        client = quick(stub_url, timeout=0.6, retries=0)
        client.load()
        assert client.encode(["a"] * 4).new == 4

    def test_a_server_that_stays_away_is_left_alone(
        self, stub: Scripted, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        port = free_port()
        client = quick(f"http://127.0.0.1:{port}", retries=1, on_failure="keep-order")
        with caplog.at_level(logging.WARNING, "kalm_rag"):
            for _ in range(3):
                client.rank(QUERY, ["a"])
        assert "is left alone until it answers again" in caplog.text
        assert "rankings keep the order of their passages" in caplog.text
        with stub.running(port):
            assert isinstance(client.rank(QUERY, ["a"])[0], UnscoredPassage)
            for call in (lambda: client.predict([("a", "b")]), lambda: client.encode(["a"])):
                with pytest.raises(ServerUnavailableError, match="is left alone, because it did not answer several"):
                    call()
            assert stub.requests == []
            assert client.failures == 6
            monkeypatch.setattr(client._connection._breaker, "_again", 0.0)  # the wait is over
            assert isinstance(client.rank(QUERY, ["a"])[0], RankedPassage)
            assert isinstance(client.rank(QUERY, ["a"])[0], RankedPassage)
        assert caplog.text.count("answers again") == 2

    def test_who_asks_for_a_check_gets_one(self, stub: Scripted) -> None:
        port = free_port()
        client = quick(f"http://127.0.0.1:{port}", retries=0)
        for _ in range(3):
            with pytest.raises(ServerUnavailableError):
                client.rank(QUERY, ["a"])
        with stub.running(port):
            client.load()
            assert len(client.rank(QUERY, ["a"])) == 1

    def test_no_attempt_begins_after_the_budget(self, stub: Scripted, stub_url: str) -> None:
        stub.answers = [(503, {"retry-after": "9"}, b"")]
        with pytest.raises(ServerUnavailableError):
            quick(stub_url, retries=5).rank(QUERY, ["a"], budget_ms=5000)
        assert stub.paths() == ["/info", "/v2/rerank"]
        assert 0 < stub.requests[1][3]["budget_ms"] <= 5000

    def test_a_silent_server_times_out(self, stub: Scripted, stub_url: str) -> None:
        end = threading.Event()
        stub.answers = [lambda _: end.wait(30) and None]
        try:
            with pytest.raises(ServerUnavailableError, match=r"did not answer within 0\.3 seconds"):
                quick(stub_url, timeout=0.3, retries=0).rank(QUERY, ["a"])
        finally:
            end.set()

    def test_a_connection_that_breaks_is_opened_again(self, stub: Scripted, stub_url: str) -> None:
        def hang_up(handler: BaseHTTPRequestHandler) -> None:
            handler.close_connection = True

        stub.answers = [hang_up]
        assert len(quick(stub_url).rank(QUERY, ["a"])) == 1
        assert stub.paths() == ["/info", "/v2/rerank", "/v2/rerank"]

    @pytest.mark.parametrize(
        ("body", "why"),
        [
            (b"", "it is not JSON"),
            (b"<html>", "it is not JSON"),
            (b"\xff\xfe", "it is not JSON"),
            (b"[" * 100_000, "it is not JSON"),
            (b"[]", "it must be a JSON object"),
            (b"{}", "results must be a list"),
            (b'{"results": [{"index": 1, "relevance_score": 0.5}]}', "margin must be a number"),
            (b'{"results": [{"index": 1, "margin": NaN}]}', "margin must be a number"),
            (b'{"results": [{"index": 5, "margin": 1}]}', "must name each of 2 places once"),
            (b'{"results": [{"index": true, "margin": 1}]}', "must name each of 2 places once"),
            (b'{"results": [7]}', "must name each of 2 places once"),
            (b'{"results": [{"index": -1, "margin": 1}]}', "must name each of 2 places once"),
            (b'{"results": [{"index": 1.0, "margin": 1}]}', "must name each of 2 places once"),
            (b'{"results": {"index": 1, "margin": 1}}', "results must be a list"),
            (b'{"results": [{"index": 1, "margin": "1"}]}', "margin must be a number"),
            (b'{"results": [{"index": 1, "margin": true}]}', "margin must be a number"),
            (b'{"results": [{"index": 1, "margin": 1e999}]}', "margin must be a number"),
            (b'{"results": [{"index": 1, "margin": 1' + b"0" * 400 + b"}]}", "margin must be a number"),
            (b'{"results": [{"index": 1, "margin": 1' + b"0" * 5000 + b"}]}", "cannot be read"),
            (b'{"results": [], "unscored": 7, "calls": []}', "unscored must be a list"),
            (b'{"results": [], "calls": [7]}', "RankCounts must be an object"),
            (b'{"results": [], "calls": [{"counts": {"passages": 1.5}}]}', "passages must be a number"),
            (b'{"results": [], "calls": [{"counts": {}, "timings": {"read": "1"}}]}', "read must be a number"),
            (b'{"results": [{"index": 1, "margin": 1, "passage_truncated": 0}]}', "must be true or false"),
        ],
    )
    def test_an_answer_that_cannot_be_read(self, stub: Scripted, stub_url: str, body: bytes, why: str) -> None:
        stub.answers = [(200, {}, body)]
        with pytest.raises(ServerUnavailableError, match="cannot be read") as error:
            quick(stub_url, retries=0).rank(QUERY, ["a", "bb"])
        assert why in str(error.value)
        stub.answers = [(200, {}, body)]
        found = quick(stub_url, retries=0, on_failure="keep-order").rank(QUERY, ["a", "bb"])
        assert [(hit.index, hit.scored) for hit in found] == [(0, False), (1, False)]

    def test_an_answer_that_is_too_long(self, stub: Scripted, stub_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("kalm_rag.client.exchange._MOST_BYTES", 1000)
        stub.answers = [(200, {}, b" " * 1001), (500, {}, b" " * 1001)]
        for _ in range(2):
            with pytest.raises(ServerUnavailableError, match="it is longer than 1000 bytes"):
                quick(stub_url, retries=0).rank(QUERY, ["a"])

    def test_an_answer_that_lacks_passages_makes_no_fused_ranking(self, stub: Scripted, stub_url: str) -> None:
        flags = dict.fromkeys(("passage_truncated", "query_truncated", "passage_repaired", "query_repaired"), False)
        one = {
            "results": [{"index": 1, "margin": 1.0, "exact": True, **flags}],
            "calls": [{"counts": {}, "timings": {}}],
        }
        stub.answers = [(200, {}, json.dumps(one).encode())]
        with pytest.raises(ServerUnavailableError, match="it must tell of 2 passages, got 1 with"):
            quick(stub_url, retries=0).rank(QUERY, ["a", "bb"], first_stage=FirstStage([1, 2]))

    def test_progress_that_breaks_off(self, stub: Scripted, stub_url: str) -> None:
        line = {"total": 2, "done": 1, "new": 1, "known": 0, "truncated": 0, "repaired": 0, "finished": False}
        for last in ({}, {"error": "no memory"}):
            stub.answers = [(200, {}, json.dumps(line | last).encode() + b"\n")]
            with pytest.raises(ServerUnavailableError, match="no memory" if last else "got 1"):
                quick(stub_url, retries=0).encode(["a", "b"])

    def test_many_passages_are_sent_in_parts(self, stub: Scripted, stub_url: str) -> None:
        stub.info["limits"] = {"documents": 3, "body_bytes": 1000}
        with pytest.raises(ServerUnavailableError):  # this server cannot encode
            quick(stub_url, retries=0).encode(["a"] * 4)
        assert len(stub.requests[-1][3]["documents"]) == 3
        with pytest.raises(ServerUnavailableError):
            quick(stub_url, retries=0).encode(["a" * 500] * 2)
        assert len(stub.requests[-1][3]["documents"]) == 1


class TestRefusals:
    """What `keep-order` does not hide."""

    @pytest.mark.parametrize("key", [None, "another-key-of-letters"])
    def test_a_wrong_key(self, url: str, key: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("KALM_RAG_API_KEY", raising=False)
        with pytest.raises(ServerError, match="asks for a key") as error:
            quick(url, api_key=key, on_failure="keep-order").rank(QUERY, ["a"])
        assert error.value.status == 401
        assert not isinstance(error.value, ServerUnavailableError)
        assert "another-key" not in str(error.value)

    def test_the_key_of_the_environment(self, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("KALM_RAG_API_KEY", KEY)
        assert len(quick(url).rank(QUERY, ["a"])) == 1

    @pytest.mark.parametrize("name", ["nano", "small", "0" * 24, "owner/other"])
    def test_another_model(self, url: str, name: str) -> None:
        client = quick(url, api_key=KEY, model=name, on_failure="keep-order")
        with pytest.raises(ServerError, match=f"has the model 'mini' with the digest .* got model='{name}'"):
            client.rank(QUERY, ["a"])

    def test_the_digest_names_the_model(self, url: str, mini: KaLMReranker) -> None:
        assert len(quick(url, api_key=KEY, model=mini.scorer.identity.mark).rank(QUERY, ["a"])) == 1

    def test_a_tuned_model_is_named_by_its_digest(self, stub: Scripted, stub_url: str) -> None:
        stub.info["lora"] = "f" * 12
        with pytest.raises(ServerError, match="an adapter trained on it"):
            quick(stub_url).rank(QUERY, ["a"])
        for name in (None, DIGEST):
            assert len(quick(stub_url, model=name).rank(QUERY, ["a"])) == 1

    def test_an_alias_is_its_address_on_the_hub(self, stub: Scripted, stub_url: str) -> None:
        stub.info["model"] = "KaLM-Embedding/KaLM-Reranker-V1-Nano-R2"
        assert len(quick(stub_url, model="nano").rank(QUERY, ["a"])) == 1

    def test_another_model_after_a_reconnect(self, stub: Scripted, caplog: pytest.LogCaptureFixture) -> None:
        port = free_port()
        by_name, by_digest = (quick(f"http://127.0.0.1:{port}", model=model, retries=3) for model in ("mini", DIGEST))
        with stub.running(port):
            for client in (by_name, by_digest):
                client.rank(QUERY, ["a"])
                client.rank(QUERY, ["a"])
        assert stub.paths().count("/info") == 2, "once per client, not per call"
        other = Scripted()
        other.info["digest"] = "f" * 24
        with other.running(port):
            with caplog.at_level(logging.WARNING, "kalm_rag.client"):
                by_name.rank(QUERY, ["a"])
            assert "its digest was 0123456789abcdef01234567 and is ffff" in caplog.text
            with pytest.raises(ServerError, match="got model='0123456789abcdef01234567'"):
                by_digest.rank(QUERY, ["a"])
            other.info["model"] = "another"
            by_name.close()
            with pytest.raises(ServerError, match="has the model 'another'"):
                by_name.rank(QUERY, ["a"])

    def test_an_answer_of_another_model_than_that_of_info(self, stub: Scripted, stub_url: str) -> None:
        """As behind an address that leads to servers with several models."""
        for model in (None, "mini", DIGEST):
            stub.answers = [(200, {"x-kalm-digest": "f" * 24}, json.dumps(answer_of({"documents": ["a"]})).encode())]
            with pytest.raises(ServerError, match="give all servers behind this address the same model"):
                quick(stub_url, model=model, on_failure="keep-order").rank(QUERY, ["a"])

    def test_a_refused_request(self, client: RerankerClient, url: str) -> None:
        keeping = quick(url, api_key=KEY, on_failure="keep-order")
        for one in (client, keeping):
            with pytest.raises(ServerError, match="answered 413: query must have at most 1000000 characters") as error:
                one.rank("a" * 1_000_001, ["a"])
            assert error.value.status == 413

    def test_a_server_of_another_kind(self, stub: Scripted, stub_url: str) -> None:
        stub.info = {"model_id": "some/reranker"}
        with pytest.raises(ServerUnavailableError, match="check that it is `kalm-rag serve`"):
            quick(stub_url, retries=0).rank(QUERY, ["a"])

    def test_a_redirect_is_not_followed_with_the_key(self, stub: Scripted, stub_url: str) -> None:
        stub.answers = [(307, {"location": "http://127.0.0.1:1/"}, b"")]
        with pytest.raises(ServerError, match="answered 307"):
            quick(stub_url, api_key=KEY).rank(QUERY, ["a"])

    def test_a_key_in_a_message_of_the_server_is_not_repeated(self, stub: Scripted, stub_url: str) -> None:
        stub.answers = [(422, {}, json.dumps({"message": f"bad {KEY}"}).encode())]
        with pytest.raises(ServerError, match=r"answered 422: bad \*\*\*"):
            quick(stub_url, api_key=KEY).rank(QUERY, ["a"])
        assert stub.requests[-1][2]["authorization"] == f"Bearer {KEY}"


def test_the_threshold_of_the_server(mini: KaLMReranker, monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds where the caller names none, and never leaves passages out of what is computed from all of them."""
    monkeypatch.delenv("KALM_RAG_API_KEY", raising=False)
    server = uvicorn.Server(uvicorn.Config(create_app(mini, threshold=0.5), port=0, log_config=None))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        with quick(f"http://127.0.0.1:{port}") as client:
            all_of_them = client.rank(QUERY, DOCUMENTS, threshold=0.0)
            same(all_of_them, mini.rank(QUERY, DOCUMENTS))
            kept = [hit.index for hit in all_of_them if hit.score is not None and hit.score >= 0.5]
            assert 0 < len(kept) < len(DOCUMENTS)
            assert [hit.index for hit in client.rank(QUERY, DOCUMENTS)] == kept
            fused: dict[str, Any] = {"first_stage": FirstStage([1, 2, 3, 4, 5])}
            same(client.rank(QUERY, DOCUMENTS, **fused), mini.rank(QUERY, DOCUMENTS, **fused))
            assert len(client.rank_many([QUERY], DOCUMENTS)[0]) == len(DOCUMENTS)
            assert len(client.predict([(QUERY, document) for document in DOCUMENTS])) == len(DOCUMENTS)
    finally:
        server.should_exit = True
        thread.join(30)
