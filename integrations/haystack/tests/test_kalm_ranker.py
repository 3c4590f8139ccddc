"""Haystack's contract, on the real framework and a real (random) model."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from adapterkit import ANSWERS, CACHES, MODES, QUERY, TEXTS, WRONG_CACHES, WRONG_MODEL_ARGUMENTS, wrong_types
from haystack import Document, Pipeline, tracing
from haystack.components.joiners import DocumentJoiner
from haystack.components.retrievers.in_memory import InMemoryBM25Retriever, InMemoryEmbeddingRetriever
from haystack.components.writers import DocumentWriter
from haystack.core.errors import SerializationError
from haystack.document_stores.in_memory import InMemoryDocumentStore
from haystack.utils import ComponentDevice, Secret
from haystack_integrations.components.rankers.kalm import KalmPassageEncoder, KalmRanker

from kalm_rag import KaLMReranker, PassageCache

TYPE = "haystack_integrations.components.rankers.kalm.ranker.KalmRanker"


def documents() -> list[Document]:
    return [
        Document(
            content=text,
            meta={"number": number, "title": f"T{number}", "none": None, "zero": 0},
            embedding=[float(number), 1.0],
        )
        for number, text in enumerate(TEXTS)
    ]


def run(component: Any, mode: str, **arguments: Any) -> dict[str, Any]:
    return component.run(**arguments) if mode == "sync" else asyncio.run(component.run_async(**arguments))


def numbers(found: list[Document]) -> list[int]:
    return [document.meta["number"] for document in found]


@pytest.fixture
def options(checkpoint: Path, tmp_path: Path) -> dict[str, Any]:
    return {"model": checkpoint, "cache": tmp_path / "cache", "device": ComponentDevice.from_str("cpu")}


@pytest.fixture
def expected(checkpoint: Path) -> list[tuple[int, float]]:
    ranking = KaLMReranker(checkpoint, cache=None, device="cpu").rank(QUERY, TEXTS)
    return [(hit.index, hit.score) for hit in ranking]


def test_init_default() -> None:
    ranker = KalmRanker()
    assert (ranker.model, ranker.cache, ranker.keep, ranker.top_k, ranker.device, ranker.dtype) == (
        "nano",
        "default",
        "states",
        10,
        None,
        None,
    )
    assert ranker.token == Secret.from_env_var(["HF_API_TOKEN", "HF_TOKEN"], strict=False)


@pytest.mark.parametrize("top_k", [0, -2])
def test_invalid_top_k(options: dict[str, Any], top_k: int) -> None:
    with pytest.raises(ValueError, match=f"top_k must be at least 1, got {top_k}"):
        KalmRanker(top_k=top_k)
    with pytest.raises(ValueError, match=f"top_k must be at least 1, got {top_k}"):
        KalmRanker(**options).run(query=QUERY, documents=documents(), top_k=top_k)


@MODES
@pytest.mark.parametrize("wrong", wrong_types("top_k"))
def test_wrong_types_are_refused_at_construction_and_at_run(
    options: dict[str, Any], wrong: dict[str, Any], mode: str
) -> None:
    name = next(iter(wrong))
    with pytest.raises((ValueError, TypeError), match=f"{name} must be"):
        KalmRanker(**wrong)
    with pytest.raises((ValueError, TypeError), match=f"{name} must be"):
        run(KalmRanker(**options), mode, query=QUERY, documents=documents(), **wrong)


@pytest.mark.parametrize("kind", [KalmRanker, KalmPassageEncoder])
@pytest.mark.parametrize(
    "wrong",
    [
        {"meta_fields_to_embed": "title"},
        {"meta_fields_to_embed": ["title", 7]},
        {"embedding_separator": None},
        {"device": "cpu"},
        {"token": "hf_secret"},
        *WRONG_MODEL_ARGUMENTS,
    ],
)
def test_wrong_model_arguments_are_refused(kind: Any, wrong: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError), match=f"{next(iter(wrong))} must be") as error:
        kind(**wrong)
    assert "hf_secret" not in str(error.value)


def test_numbers_of_numpy_are_numbers(options: dict[str, Any]) -> None:
    numpy = pytest.importorskip("numpy")
    ranker = KalmRanker(**options, top_k=numpy.int64(2), score_threshold=numpy.float32(0), ratio=numpy.int32(8))
    assert (type(ranker.top_k), type(ranker.score_threshold), type(ranker.ratio)) == (int, float, int)
    assert len(ranker.run(query=QUERY, documents=documents())["documents"]) == 2
    assert len(ranker.run(query=QUERY, documents=documents(), top_k=numpy.int64(1))["documents"]) == 1


def test_an_empty_or_padded_token_does_not_set_it_apart(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    held = KalmRanker(**options).reranker
    for value in ("", " \n", "hf_x\n"):
        monkeypatch.setenv("HF_API_TOKEN", value)
        assert KalmRanker(**options).reranker is held


def test_unknown_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'batch'"):
        KalmRanker(batch=3)  # type: ignore[call-arg]


def test_to_dict_default() -> None:
    assert KalmRanker().to_dict() == {
        "type": TYPE,
        "init_parameters": {
            "model": "nano",
            "revision": None,
            "lora": None,
            "cache": "default",
            "keep": "states",
            "device": None,
            "dtype": None,
            "token": {"type": "env_var", "env_vars": ["HF_API_TOKEN", "HF_TOKEN"], "strict": False},
            "max_length": 1024,
            "ratio": None,
            "meta_fields_to_embed": [],
            "embedding_separator": "\n",
            "top_k": 10,
            "score_threshold": None,
            "calibrated": False,
            "instruction": None,
            "budget_ms": None,
            "on_unknown": None,
            "server": None,
            "options": None,
        },
    }


@pytest.mark.parametrize("kind", [KalmRanker, KalmPassageEncoder])
def test_dict_round_trip(options: dict[str, Any], kind: Any) -> None:
    arguments = {
        **options,
        "keep": "prefilled",
        "dtype": "bfloat16",
        "meta_fields_to_embed": ["title"],
        "embedding_separator": " | ",
        "token": None,
    }
    if kind is KalmRanker:
        arguments |= {"top_k": 3, "score_threshold": 0.1, "instruction": "Find code.", "ratio": 8}
    first = kind(**arguments)
    second = kind.from_dict(first.to_dict())
    assert second.to_dict() == first.to_dict()
    assert second.device == ComponentDevice.from_str("cpu")
    assert second.reranker is first.reranker
    assert second.reranker.cache.keeps_prefilled


KINDS = pytest.mark.parametrize("kind", [KalmRanker, KalmPassageEncoder])


@KINDS
def test_keep_sets_apart_and_may_be_missing_in_what_was_saved(options: dict[str, Any], kind: Any) -> None:
    plain, prefilled = kind(**options), kind(**options, keep="prefilled")
    assert (plain.reranker.cache.keeps_prefilled, prefilled.reranker.cache.keeps_prefilled) == (False, True)
    assert prefilled.reranker is kind(**options, keep="prefilled").reranker
    saved = plain.to_dict()
    del saved["init_parameters"]["keep"]
    assert kind.from_dict(saved).reranker is plain.reranker


@KINDS
@pytest.mark.parametrize("wrong", WRONG_CACHES)
def test_wrong_caches_are_refused(kind: Any, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
        kind(**wrong)


def test_indexing_leaves_prefilled_documents_on_disk(options: dict[str, Any]) -> None:
    KalmPassageEncoder(**options, keep="prefilled").run(documents=documents())
    core = KaLMReranker(options["model"], cache=PassageCache(options["cache"], keep="prefilled"), device="cpu")
    core.rank(QUERY, TEXTS)
    assert (core.cache.stats().prefilled.hits, core.cache.stats().encoded) == (len(TEXTS), 0)


@KINDS
@CACHES
def test_keep_beside_a_ready_made_cache_is_refused(options: dict[str, Any], kind: Any, make: Any) -> None:
    cache = make(options.pop("cache"))
    with pytest.raises(ValueError, match=r"is a folder, got keep='prefilled', cache=.*pass cache=PassageCache"):
        kind(**options, cache=cache, keep="prefilled")


@KINDS
@CACHES
def test_a_ready_made_cache_is_used_as_it_is_and_not_serialised(options: dict[str, Any], kind: Any, make: Any) -> None:
    cache = make(options.pop("cache"))
    first = kind(**options, cache=cache)
    assert first.cache is cache
    assert cache in (first.reranker.cache, first.reranker.cache.store)
    assert first.reranker is KalmRanker(**options, cache=cache).reranker
    made = Pipeline()
    made.add_component("kalm", first)
    for serialise in (first.to_dict, made.dumps):
        with pytest.raises(SerializationError, match="serialised with a component, got cache=.*give a folder"):
            serialise()


def test_a_ready_made_cache_serves_indexing_and_queries(options: dict[str, Any]) -> None:
    cache = PassageCache(options.pop("cache"), keep="prefilled")
    made = Pipeline()
    made.add_component("encoder", KalmPassageEncoder(**options, cache=cache))
    made.add_component("ranker", KalmRanker(**options, cache=cache))
    made.connect("encoder.documents", "ranker.documents")
    made.run({"encoder": {"documents": documents()}, "ranker": {"query": QUERY}})
    assert cache.stats().encoded == 5


@MODES
def test_order_scores_and_untouched_input(
    options: dict[str, Any], expected: list[tuple[int, float]], mode: str
) -> None:
    given = documents()
    before = copy.deepcopy(given)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = run(KalmRanker(**options), mode, query=QUERY, documents=given)["documents"]
    assert numbers(found) == [number for number, _ in expected]
    assert [document.score for document in found] == pytest.approx([score for _, score in expected], abs=1e-5)
    assert all(type(document.score) is float for document in found)
    assert given == before
    assert {document.id for document in found} == {document.id for document in given}


@MODES
def test_options_at_init_and_at_run(
    options: dict[str, Any], expected: list[tuple[int, float]], checkpoint: Path, mode: str
) -> None:
    ranker = KalmRanker(**options, top_k=3)
    assert len(run(ranker, mode, query=QUERY, documents=documents())["documents"]) == 3
    assert len(run(ranker, mode, query=QUERY, documents=documents(), top_k=1)["documents"]) == 1
    cut = expected[1][1] - 1e-5
    assert len(run(ranker, mode, query=QUERY, documents=documents(), score_threshold=cut)["documents"]) == 2
    wanted = KaLMReranker(checkpoint, cache=None, device="cpu").rank(QUERY, TEXTS, instruction="Find code.", ratio=8)
    for found in (
        run(KalmRanker(**options, instruction="Find code.", ratio=8), mode, query=QUERY, documents=documents()),
        run(KalmRanker(**options), mode, query=QUERY, documents=documents(), instruction="Find code.", ratio=8),
    ):
        assert [document.score for document in found["documents"]] == pytest.approx(
            [hit.score for hit in wanted], abs=1e-5
        )


def test_meta_fields(options: dict[str, Any], checkpoint: Path) -> None:
    ranker = KalmRanker(**options, meta_fields_to_embed=["title", "none", "zero", "missing"], embedding_separator=" / ")
    found = ranker.run(query=QUERY, documents=documents())["documents"]
    texts = [f"T{number} / 0 / {text}" for number, text in enumerate(TEXTS)]
    wanted = KaLMReranker(checkpoint, cache=None, device="cpu").rank(QUERY, texts)
    assert [document.score for document in found] == pytest.approx([hit.score for hit in wanted], abs=1e-5)


@MODES
def test_empty_documents_without_a_model(mode: str) -> None:
    assert run(KalmRanker(model="/no/such/model"), mode, query=QUERY, documents=[]) == {"documents": []}
    assert run(KalmPassageEncoder(model="/no/such/model"), mode, documents=[])["documents"] == []


@MODES
def test_wrong_calls(options: dict[str, Any], mode: str) -> None:
    ranker = KalmRanker(**options)
    with pytest.raises(ValueError, match="query must not be empty"):
        run(ranker, mode, query="", documents=documents())
    with pytest.raises(TypeError, match="query must be a string, got NoneType"):
        run(ranker, mode, query=None, documents=documents())
    for wrong in (None, "text", [*documents(), "text"], documents()[0]):
        with pytest.raises(TypeError, match="documents must be a list of haystack Documents"):
            run(ranker, mode, query=QUERY, documents=wrong)
    with pytest.raises(TypeError, match="instruction must be a string"):
        run(ranker, mode, query=QUERY, documents=documents(), instruction=7)


def test_duplicates_and_missing_content(options: dict[str, Any]) -> None:
    one = documents()[0]
    given = [one, Document(content=None, meta={"number": 9}), Document(content="  ", meta={"number": 8}), one]
    found = KalmRanker(**options).run(query=QUERY, documents=given)["documents"]
    assert sorted(numbers(found)) == [0, 8, 9]


def test_warm_up_is_idempotent_and_init_is_light(options: dict[str, Any]) -> None:
    ranker = KalmRanker(**options)
    assert "not loaded" in repr(ranker.reranker)
    ranker.warm_up()
    ranker.warm_up()
    assert "not loaded" not in repr(ranker.reranker)
    assert KalmRanker(**options).reranker is ranker.reranker


def pipeline(store: InMemoryDocumentStore, options: dict[str, Any]) -> Pipeline:
    made = Pipeline()
    made.add_component("retriever", InMemoryBM25Retriever(store, top_k=5))
    made.add_component("ranker", KalmRanker(**options, top_k=2))
    made.connect("retriever.documents", "ranker.documents")
    return made


def test_pipeline_dumps_loads_and_runs(options: dict[str, Any]) -> None:
    store = InMemoryDocumentStore()
    store.write_documents(documents())
    first = pipeline(store, options)
    second = Pipeline.loads(first.dumps())
    assert second.dumps() == first.dumps()
    data = {"retriever": {"query": "sort list"}, "ranker": {"query": QUERY}}
    found = first.run(data)["ranker"]["documents"]
    assert len(found) == 2
    retrieved = InMemoryBM25Retriever(store, top_k=5).run(query="sort list")["documents"]
    assert numbers(found) == numbers(KalmRanker(**options, top_k=2).run(query=QUERY, documents=retrieved)["documents"])
    if hasattr(first, "run_async"):
        assert asyncio.run(first.run_async(data))["ranker"]["documents"] == found


class Spans(tracing.Tracer):
    """Keeps the tags of the spans of components."""

    def __init__(self) -> None:
        self.tags: dict[str, dict[str, Any]] = {}
        self.open: list[tracing.Span] = []

    @contextlib.contextmanager
    def trace(
        self, operation_name: str, tags: dict[str, Any] | None = None, parent_span: tracing.Span | None = None
    ) -> Iterator[tracing.Span]:
        kept = self.tags.setdefault((tags or {}).get("haystack.component.name", operation_name), {})

        class Span(tracing.Span):
            def set_tag(self, key: str, value: Any) -> None:
                kept[key] = value

        self.open.append(Span())
        try:
            yield self.open[-1]
        finally:
            self.open.pop()

    def current_span(self) -> tracing.Span | None:
        return self.open[-1] if self.open else None


@MODES
def test_the_components_span_tells_what_the_run_took(options: dict[str, Any], mode: str) -> None:
    spans = Spans()
    alone = Pipeline()
    alone.add_component("ranker", KalmRanker(**options))
    tracing.enable_tracing(spans)
    try:
        data = {"ranker": {"query": QUERY, "documents": documents()}}
        if mode == "sync":
            alone.run(data)
        else:
            with spans.trace("request", {"haystack.component.name": "ranker"}):
                asyncio.run(alone.get_component("ranker").run_async(**data["ranker"]))  # type: ignore[attr-defined]
        assert run(KalmRanker(**options), mode, query=QUERY, documents=documents()), "there may be no span"
    finally:
        tracing.disable_tracing()
    told = {name: value for name, value in spans.tags.pop("ranker").items() if name.startswith("kalm_rag.")}
    assert told["kalm_rag.counts.encoded"] == told["kalm_rag.counts.scored"] == len(TEXTS)
    assert told["kalm_rag.timings.total"] > 0
    assert {type(value) for value in told.values()} == {int, float}, "no text"
    assert not any(name.startswith("kalm_rag.") for tags in spans.tags.values() for name in tags)


def test_hybrid_join(options: dict[str, Any]) -> None:
    store = InMemoryDocumentStore()
    store.write_documents(documents())
    made = Pipeline()
    made.add_component("words", InMemoryBM25Retriever(store, top_k=4))
    made.add_component("vectors", InMemoryEmbeddingRetriever(store, top_k=4))
    made.add_component("join", DocumentJoiner())
    made.add_component("ranker", KalmRanker(**options))
    made.connect("words", "join")
    made.connect("vectors", "join")
    made.connect("join", "ranker")
    found = made.run(
        {"words": {"query": "sort"}, "vectors": {"query_embedding": [1.0, 1.0]}, "ranker": {"query": QUERY}}
    )
    identifiers = [document.id for document in found["ranker"]["documents"]]
    assert len(identifiers) == len(set(identifiers)) >= 4


@MODES
def test_ingestion_makes_the_first_query_warm(options: dict[str, Any], mode: str) -> None:
    store = InMemoryDocumentStore()
    if mode == "sync":
        made = Pipeline()
        made.add_component("encoder", KalmPassageEncoder(**options, meta_fields_to_embed=["title"]))
        made.add_component("writer", DocumentWriter(store))
        made.connect("encoder.documents", "writer.documents")
        done = made.run({"encoder": {"documents": documents()}})
        assert (done["encoder"]["encoded"], done["encoder"]["known"]) == (5, 0)
    else:
        encoder = KalmPassageEncoder(**options, meta_fields_to_embed=["title"])
        given = documents()
        assert run(encoder, mode, documents=given)["documents"] is given
        store.write_documents(documents())
    ranker = KalmRanker(**options, meta_fields_to_embed=["title"])
    before = ranker.reranker.cache.stats().encoded
    retrieved = InMemoryBM25Retriever(store, top_k=5).run(query="sort")["documents"]
    ranker.run(query=QUERY, documents=retrieved)
    assert ranker.reranker.cache.stats().encoded == before


def test_fifty_concurrent_runs_on_one_instance(options: dict[str, Any]) -> None:
    ranker = KalmRanker(**options)
    queries = [f"query {number % 7}" for number in range(50)]
    wanted = {query: ranker.run(query=query, documents=documents()) for query in set(queries)}

    async def main() -> list[dict[str, Any]]:
        return await asyncio.gather(*(ranker.run_async(query=query, documents=documents()) for query in queries))

    for query, found in zip(queries, asyncio.run(main()), strict=True):
        assert found == wanted[query]


def test_a_token_in_the_environment_does_not_set_it_apart(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = KalmRanker(**options)
    held = before.reranker
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    assert KalmRanker(**options).reranker is held
    assert KalmRanker(**options, token=Secret.from_token("hf_other")).reranker is not held


def test_results_do_not_share_metadata_with_the_input(options: dict[str, Any]) -> None:
    given = documents()
    found = KalmRanker(**options).run(query=QUERY, documents=given)["documents"]
    found[0].meta["changed"] = True
    assert all("changed" not in document.meta for document in given)


def test_warm_up_leaves_the_event_loop_free(options: dict[str, Any]) -> None:
    ranker = KalmRanker(**options)
    asyncio.run(ranker.warm_up_async())
    assert "not loaded" not in repr(ranker.reranker)


@pytest.mark.weights
def test_the_answer_is_first_with_the_released_weights(nano: str, tmp_path: Path) -> None:
    ranker = KalmRanker(model=nano, cache=tmp_path)
    for query, answer in ANSWERS.items():
        given = [Document(content=text) for text in ANSWERS.values()]
        found = ranker.run(query=query, documents=given)["documents"]
        assert (found[0].content, len(found)) == (answer, len(ANSWERS))
