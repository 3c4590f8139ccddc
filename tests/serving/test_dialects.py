"""Every dialect: what its clients send and read, and that its numbers are the library's."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from kalm_rag import KaLMReranker
from kalm_rag.serving.dialects import dialect_of, dialect_of_bytes

DOCUMENTS = [
    "Gravity attracts bodies toward one another.",
    "The capital of China is Beijing.",
    "Bread is baked from flour, water and salt.",
]
QUERY = "What is the capital of China?"
LONG = "Bread is baked from flour. " * 400
Post = Callable[..., Any]
DOCUMENTS_PATHS = ("/rerank", "/v1/rerank", "/v2/rerank")

# The path, and what one of its clients sends, by dialect.
REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "cohere v2": ("/v2/rerank", {"model": "rerank-v3.5", "query": QUERY, "documents": DOCUMENTS}),
    "cohere v1": ("/v1/rerank", {"query": QUERY, "documents": [{"text": text} for text in DOCUMENTS]}),
    "jina": ("/v1/rerank", {"model": "jina-reranker-v2", "query": QUERY, "documents": DOCUMENTS, "top_n": 3}),
    "vllm": ("/rerank", {"model": "BAAI/bge", "query": QUERY, "documents": DOCUMENTS, "top_n": 0}),
    "tei": ("/rerank", {"query": QUERY, "texts": DOCUMENTS, "raw_scores": False, "truncate": True}),
    "infinity": ("/infinity/rerank", {"query": QUERY, "documents": DOCUMENTS}),
    "nvidia": ("/v1/ranking", {"query": {"text": QUERY}, "passages": [{"text": text} for text in DOCUMENTS]}),
    "score": ("/score", {"text_1": QUERY, "text_2": DOCUMENTS}),
    "score v1": ("/v1/score", {"queries": QUERY, "documents": DOCUMENTS}),
}
every_dialect = pytest.mark.parametrize("dialect", REQUESTS)


def results_of(answer: Any) -> list[dict[str, Any]]:
    if isinstance(answer, list):
        return answer
    return next(answer[name] for name in ("results", "rankings", "data") if name in answer)


def number_of(result: dict[str, Any]) -> float:
    return next(result[name] for name in ("relevance_score", "score", "logit") if name in result)


def no_nulls(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(no_nulls, value.values()))
    return all(map(no_nulls, value)) if isinstance(value, list) else value is not None


class TestEveryDialect:
    @every_dialect
    def test_its_numbers_are_those_of_the_library(self, dialect: str, post: Post, mini: KaLMReranker) -> None:
        path, body = REQUESTS[dialect]
        response = post(path, **body)
        assert response.status_code == 200, response.text
        ranking = mini.rank(QUERY, DOCUMENTS)
        expected = [(hit.index, hit.margin if dialect == "nvidia" else hit.score) for hit in ranking]
        if dialect.startswith("score"):
            expected.sort()
        found = [(result["index"], number_of(result)) for result in results_of(response.json())]
        assert [index for index, _ in found] == [index for index, _ in expected]
        assert [number for _, number in found] == pytest.approx([number for _, number in expected], abs=1e-5)
        assert no_nulls(response.json())

    @every_dialect
    def test_unknown_fields_and_nulls_are_no_error(self, dialect: str, post: Post) -> None:
        path, body = REQUESTS[dialect]
        nulls = dict.fromkeys(
            ("model", "top_n", "instruction", "ratio", "budget_ms", "long_passages", "return_margin", "details",
             "max_tokens_per_doc", "truncate", "truncation_direction", "raw_scores", "return_documents", "user",
             "return_source")
        )  # fmt: skip
        assert post(path, **{**nulls, "top_k": 3, "encoding": {"a": [1]}, **body}).status_code == 200

    @every_dialect
    def test_extensions(self, dialect: str, post: Post, mini: KaLMReranker) -> None:
        path, body = REQUESTS[dialect]
        wanted = {"instruction": "Find passages about food.", "ratio": 2}
        response = post(path, **body, **wanted, return_margin=True, budget_ms=60_000, long_passages="windows")
        expected = {hit.index: hit.margin for hit in mini.rank(QUERY, DOCUMENTS, **wanted)}
        found = {result["index"]: result["margin"] for result in results_of(response.json())}
        assert found == pytest.approx(expected, abs=1e-5)

    @every_dialect
    def test_details_are_all_that_the_library_says(self, dialect: str, post: Post, mini: KaLMReranker) -> None:
        path, body = REQUESTS[dialect]
        expected = {hit.index: hit for hit in mini.rank(QUERY, DOCUMENTS)}
        for result in results_of(post(path, **body, details=True).json()):
            hit = expected[result["index"]]
            assert result["probability"] == pytest.approx(hit.score, abs=1e-5)
            assert result["margin"] == pytest.approx(hit.margin, abs=1e-5)
            for name in ("passage_truncated", "query_truncated", "passage_repaired", "query_repaired", "exact"):
                assert result[name] is getattr(hit, name)

    @every_dialect
    def test_the_level_that_passages_came_from(self, dialect: str, post: Post) -> None:
        path, body = REQUESTS[dialect]
        for expected in ({"encoded", "memory", "remembered"}, {"remembered"}):
            found = {result["source"] for result in results_of(post(path, **body, return_source=True).json())}
            assert found <= expected
        assert not [result for result in results_of(post(path, **body).json()) if "source" in result]

    @every_dialect
    def test_what_is_not_read_is_reported(self, dialect: str, post: Post) -> None:
        path, body = REQUESTS[dialect]
        longer = json.loads(json.dumps(body).replace(DOCUMENTS[0], LONG.strip()))
        response = post(path, **longer)
        assert response.headers["x-kalm-truncated"] == "1"
        told = {result["index"]: result.get("passage_truncated") for result in results_of(response.json())}
        assert told == {0: True, 1: None, 2: None}

    @every_dialect
    def test_no_passages_are_no_error(self, dialect: str, post: Post) -> None:
        path, body = REQUESTS[dialect]
        empty = {name: [] if isinstance(value, list) else value for name, value in body.items()}
        response = post(path, **empty)
        assert response.status_code == 200, response.text
        assert results_of(response.json()) == []

    @every_dialect
    def test_half_a_surrogate_pair_is_read_and_told(self, dialect: str, post: Post) -> None:
        path, body = REQUESTS[dialect]
        broken = json.loads(json.dumps(body).replace(DOCUMENTS[2], "Bread \\ud83d is baked."))
        response = post(path, **broken, details=True)
        assert response.status_code == 200, response.text
        told = {result["index"]: result["passage_repaired"] for result in results_of(response.json())}
        assert told == {0: False, 1: False, 2: True}

    @every_dialect
    @pytest.mark.parametrize(
        ("changes", "named"),
        [
            ({"ratio": 0}, "ratio"),
            ({"ratio": "much"}, "ratio"),
            ({"budget_ms": -1}, "budget_ms"),
            ({"long_passages": "shred"}, "long_passages"),
            ({"on_unknown": "guess"}, "on_unknown"),
            ({"instruction": 7}, "instruction"),
            ({"model": ["a"]}, "model"),
            ({"query": [1], "text_1": 5, "queries": 5}, ""),
            ({"documents": 5, "texts": "one", "passages": "one", "text_2": 1, "model": []}, ""),
        ],
    )
    def test_wrong_fields(self, dialect: str, changes: dict[str, Any], named: str, post: Post) -> None:
        path, body = REQUESTS[dialect]
        own = {name: value for name, value in changes.items() if named or name in body}
        response = post(path, **{**body, **own})
        assert response.status_code == 422, response.text
        error = response.json()
        assert named in error["message"]
        assert error["detail"] == error["message"]
        assert "Traceback" not in response.text

    @every_dialect
    @pytest.mark.parametrize("raw", [b"", b"{", b"\xff\xfe{", b"[" * 100_000, b"1" * 5_000, b'"text"', b"[1]", b"null"])
    def test_bodies_that_are_no_object(self, dialect: str, raw: bytes, server: Any) -> None:
        response = server.post(REQUESTS[dialect][0], content=raw)
        assert response.status_code in (400, 422), response.text
        assert "message" in response.json()

    @every_dialect
    def test_passages_that_a_budget_leaves_out_are_listed(self, dialect: str, post: Post) -> None:
        path, body = REQUESTS[dialect]
        unknown = [f"A passage of {dialect} that nobody has seen, number {number}." for number in range(3)]
        fresh = json.dumps(body)
        for old, new in zip(DOCUMENTS, unknown, strict=True):
            fresh = fresh.replace(old, new)
        response = post(path, **json.loads(fresh), on_unknown="skip")
        assert response.status_code == 200, response.text
        assert results_of(response.json()) == []
        assert response.headers["x-kalm-unscored"] == "3"
        if dialect != "tei":  # a bare list has no room for it
            assert [left["index"] for left in response.json()["unscored"]] == [0, 1, 2]


class TestDocuments:
    @pytest.mark.parametrize("path", DOCUMENTS_PATHS)
    def test_the_response_satisfies_the_clients_of_all(self, path: str, post: Post) -> None:
        """jina-haystack reads `model` and `usage`; cohere `id` and `meta`; vLLM's clients `document`."""
        answer = post(path, query=QUERY, documents=DOCUMENTS, top_n=2, return_documents=True).json()
        assert [result["document"] for result in answer["results"]] == [
            {"text": DOCUMENTS[result["index"]]} for result in answer["results"]
        ]
        assert len(answer["results"]) == 2
        assert answer["id"]
        assert answer["model"] == "mini"
        assert answer["usage"]["total_tokens"] == answer["usage"]["prompt_tokens"] > 0
        assert answer["meta"]["billed_units"] == {"search_units": 1}

    @pytest.mark.parametrize(("path", "has"), [("/rerank", True), ("/v1/rerank", False), ("/v2/rerank", False)])
    def test_documents_by_default(self, path: str, has: bool, post: Post) -> None:
        for result in post(path, query=QUERY, documents=DOCUMENTS).json()["results"]:
            assert ("document" in result) is has

    def test_objects_come_back_whole(self, post: Post) -> None:
        documents = [{"text": text, "id": number} for number, text in enumerate(DOCUMENTS)]
        answer = post("/v1/rerank", query=QUERY, documents=documents, return_documents=True).json()
        assert all(result["document"] == documents[result["index"]] for result in answer["results"])

    def test_rank_fields(self, post: Post) -> None:
        documents = [{"title": "Physics", "body": DOCUMENTS[0]}, {"title": "China", "body": DOCUMENTS[1]}]
        answer = post("/v1/rerank", query=QUERY, documents=documents, rank_fields=["title", "body"])
        assert [result["index"] for result in answer.json()["results"]] == [1, 0]
        refused = post("/v1/rerank", query=QUERY, documents=documents)
        assert refused.status_code == 422
        assert "rank_fields" in refused.json()["message"]

    def test_margins_instead_of_probabilities(self, post: Post, mini: KaLMReranker) -> None:
        margins = [hit.margin for hit in mini.rank(QUERY, DOCUMENTS)]
        for wanted in ({"use_activation": False}, {"raw_scores": True}):
            answer = post("/rerank", query=QUERY, documents=DOCUMENTS, **wanted).json()
            assert [result["relevance_score"] for result in answer["results"]] == pytest.approx(margins, abs=1e-5)
        answer = post("/rerank", query=QUERY, texts=DOCUMENTS, raw_scores=True).json()
        assert [result["score"] for result in answer] == pytest.approx(margins, abs=1e-5)

    def test_top_n_above_the_number_of_documents(self, post: Post) -> None:
        assert len(post("/v2/rerank", query=QUERY, documents=DOCUMENTS, top_n=10**30).json()["results"]) == 3
        assert post("/v2/rerank", query=QUERY, documents=DOCUMENTS, top_n=-1).status_code == 422

    def test_a_threshold(self, post: Post) -> None:
        answer = post("/v2/rerank", query=QUERY, documents=DOCUMENTS, threshold=0.9).json()
        assert [result["index"] for result in answer["results"]] == [1]
        assert len(post("/score", text_1=QUERY, text_2=DOCUMENTS, threshold=0.9).json()["data"]) == 3


class TestTruncation:
    def test_a_limit_of_tokens_is_honoured(self, post: Post, mini: KaLMReranker) -> None:
        tokenizer = mini.scorer.loaded.tokenizer
        for tokens in (1, 7, 50):
            answer = post("/v2/rerank", query=QUERY, documents=[LONG], max_tokens_per_doc=tokens).json()
            query_tokens = len(tokenizer.encode([QUERY])[0])
            assert answer["usage"]["prompt_tokens"] == tokens + query_tokens
            assert answer["results"][0]["passage_truncated"] is True
            assert "longer" in answer["meta"]["warnings"][0]

    def test_the_cut_passage_scores_as_its_beginning(self, post: Post, mini: KaLMReranker) -> None:
        text = DOCUMENTS[1] + " " + LONG
        tokens = len(mini.scorer.loaded.tokenizer.encode([DOCUMENTS[1]])[0])
        [result] = post("/v2/rerank", query=QUERY, documents=[text], max_tokens_per_doc=tokens).json()["results"]
        assert result["relevance_score"] == pytest.approx(mini.rank(QUERY, [DOCUMENTS[1]])[0].score, abs=1e-5)

    def test_the_other_end(self, post: Post) -> None:
        text = LONG + " " + DOCUMENTS[1]
        [right] = post("/rerank", query=QUERY, texts=[text]).json()
        [left] = post("/rerank", query=QUERY, texts=[text], truncation_direction="Left").json()
        assert right["score"] < 0.5 < left["score"]
        assert left["passage_truncated"] is True

    def test_truncation_may_be_refused(self, post: Post) -> None:
        for path, body in (
            ("/rerank", {"query": QUERY, "texts": [LONG], "truncate": False}),
            ("/v1/rerank", {"query": QUERY, "documents": [LONG], "truncation": False}),
            ("/v1/ranking", {"query": {"text": QUERY}, "passages": [{"text": LONG}], "truncate": "NONE"}),
        ):
            response = post(path, **body)
            assert response.status_code == 413
            assert re.search(r"more than the 10\d\d tokens", response.json()["message"])

    def test_a_limit_of_the_pair_and_of_the_query(self, post: Post) -> None:
        answer = post("/rerank", query=QUERY, documents=[LONG], truncate_prompt_tokens=30).json()
        assert answer["usage"]["prompt_tokens"] == 30
        answer = post("/rerank", query=LONG, documents=DOCUMENTS, max_tokens_per_query=4, details=True).json()
        assert all(result["query_truncated"] for result in answer["results"])

    def test_spans_are_places_in_what_was_sent(self, post: Post) -> None:
        text = LONG + "\n\n" + DOCUMENTS[1] + "\n\n" + LONG
        body = {"query": QUERY, "documents": [text], "long_passages": "windows", "details": True}
        [result] = post("/v2/rerank", **body).json()["results"]
        start, end = result["span"]
        assert DOCUMENTS[1] in text[start:end]


class TestScore:
    def test_as_many_queries_as_passages(self, post: Post, mini: KaLMReranker) -> None:
        queries = [QUERY, "What is bread made of?", QUERY]
        answer = post("/score", data_1=queries, data_2=DOCUMENTS).json()
        assert [one["index"] for one in answer["data"]] == [0, 1, 2]
        expected = mini.predict(list(zip(queries, DOCUMENTS, strict=True)))
        assert [one["score"] for one in answer["data"]] == pytest.approx(expected, abs=1e-5)

    def test_numbers_that_do_not_fit(self, post: Post) -> None:
        response = post("/score", text_1=[QUERY, QUERY], text_2=DOCUMENTS)
        assert response.status_code == 422
        assert "got 2 and 3" in response.json()["message"]
        assert post("/score", text_1=QUERY).status_code == 422


def test_errors_have_the_shape_of_their_dialect(post: Post) -> None:
    tei = post("/rerank", query=QUERY, texts=[1]).json()
    assert isinstance(tei["error"], str)
    assert tei["error_type"] == "Validation"
    vllm = post("/rerank", query=QUERY, documents=[1]).json()
    assert vllm["error"]["message"] == vllm["detail"] == vllm["message"]


def test_infinity_returns_documents_as_strings(post: Post) -> None:
    answer = post("/infinity/rerank", query=QUERY, documents=DOCUMENTS, return_documents=True).json()
    assert all(result["document"] == DOCUMENTS[result["index"]] for result in answer["results"])
    assert answer["object"] == "rerank"
    assert post("/infinity/rerank", query=QUERY, documents=DOCUMENTS, top_n=0).status_code == 422


def test_the_dialect_of_a_body_that_is_not_parsed() -> None:
    for content in (
        {"query": "a", "texts": ["b"]},
        {"query": "a", "documents": ["b"]},
        {"query": 'the "texts" of it', "documents": ['"texts"']},
        {"query": 'the "documents" of it', "texts": ['a "documents" b']},
        {"query": "documents", "texts": ["documents"]},
        {"query": "a", "texts": ["b"], "documents": ["c"]},
        {},
    ):
        for path in ("/rerank", "/v2/rerank", "/score", "/v1/ranking", "/none"):
            expected = dialect_of(path, content)
            assert dialect_of_bytes(path, json.dumps(content).encode()) is expected, (path, content)
