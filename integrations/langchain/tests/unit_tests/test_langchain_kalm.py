"""LangChain's contract, on the real framework and a real (random) model."""

from __future__ import annotations

import asyncio
import copy
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from adapterkit import CACHES, MODES, QUERY, TEXTS, WRONG_CACHES, WRONG_MODEL_ARGUMENTS, wrong_types
from langchain_classic.retrievers import ContextualCompressionRetriever
from langchain_classic.retrievers.document_compressors import CrossEncoderReranker
from langchain_core.callbacks import BaseCallbackHandler, CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.indexing import InMemoryRecordManager, index
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import RunnablePassthrough
from langchain_core.tracers.base import AsyncBaseTracer
from langchain_core.tracers.run_collector import RunCollectorCallbackHandler
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_kalm import KalmCachingEmbeddings, KalmCrossEncoder, KalmPassageEncoder, KalmReranker
from langchain_tests.integration_tests import RetrieversIntegrationTests
from pydantic import ValidationError

from kalm_rag import KaLMReranker, PassageCache
from kalm_rag.adapters import HIT_KEYS


def documents() -> list[Document]:
    return [
        Document(id=f"id-{number}", page_content=text, metadata={"number": number, "nested": {"a": [number]}})
        for number, text in enumerate(TEXTS)
    ]


def rerank(
    reranker: KalmReranker, given: Sequence[Document], query: str, mode: str, **options: Any
) -> Sequence[Document]:
    if mode == "sync":
        return reranker.compress_documents(given, query, **options)
    return asyncio.run(reranker.acompress_documents(given, query, **options))


@pytest.fixture
def expected(checkpoint: Path) -> list[tuple[int, float]]:
    ranking = KaLMReranker(checkpoint, cache=None, device="cpu").rank(QUERY, TEXTS)
    return [(hit.index, hit.score) for hit in ranking]


def test_defaults() -> None:
    reranker = KalmReranker()
    assert (reranker.model, reranker.cache, reranker.keep, reranker.top_n) == ("nano", "default", "states", 3)
    assert (reranker.score_threshold, reranker.instruction, reranker.ratio, reranker.device, reranker.dtype) == (
        None,
    ) * 5


@MODES
def test_order_scores_and_copies(options: dict[str, Any], expected: list[tuple[int, float]], mode: str) -> None:
    given = documents()
    before = copy.deepcopy(given)
    for _ in range(2):  # the second time must not meet what the first one left
        found = rerank(KalmReranker(**options, top_n=None), given, QUERY, mode)
        assert [document.metadata["number"] for document in found] == [number for number, _ in expected]
        for document, (number, score) in zip(found, expected, strict=True):
            assert type(document.metadata["relevance_score"]) is float
            assert document.metadata["relevance_score"] == pytest.approx(score, abs=1e-5)
            assert document.id == f"id-{number}"
            old = {**document.metadata, **dict.fromkeys(("relevance_score", *HIT_KEYS))}
            assert old == {**given[number].metadata, **dict.fromkeys(("relevance_score", *HIT_KEYS))}
            assert document is not given[number]
        assert given == before


@MODES
def test_top_n_and_threshold(options: dict[str, Any], expected: list[tuple[int, float]], mode: str) -> None:
    assert len(rerank(KalmReranker(**options), documents(), QUERY, mode)) == 3
    assert len(rerank(KalmReranker(**options, top_n=99), documents(), QUERY, mode)) == 5
    cut = expected[1][1] - 1e-5
    assert len(rerank(KalmReranker(**options, top_n=None, score_threshold=cut), documents(), QUERY, mode)) == 2


def test_instruction_and_ratio_are_used(options: dict[str, Any], checkpoint: Path) -> None:
    core = KaLMReranker(checkpoint, cache=None, device="cpu")
    reranker = KalmReranker(**options, top_n=None, instruction="Find code.", ratio=8)
    found = reranker.compress_documents(documents(), QUERY)
    wanted = core.rank(QUERY, TEXTS, instruction="Find code.", ratio=8)
    assert [document.metadata["number"] for document in found] == [hit.index for hit in wanted]
    scores = [document.metadata["relevance_score"] for document in found]
    assert scores == pytest.approx([hit.score for hit in wanted], abs=1e-5)
    per_call = (
        KalmReranker(**options, top_n=None)
        .as_runnable()
        .invoke({"query": QUERY, "documents": documents(), "instruction": "Find code.", "ratio": 8})
    )
    assert [document.metadata["relevance_score"] for document in per_call] == pytest.approx(scores, abs=1e-5)


@MODES
def test_empty_in_empty_out_without_a_model(mode: str) -> None:
    assert list(rerank(KalmReranker(model="/no/such/model"), [], QUERY, mode)) == []


def test_equal_documents_keep_their_order(options: dict[str, Any]) -> None:
    given = [Document(page_content="same", metadata={"number": number}) for number in range(4)]
    found = KalmReranker(**options, top_n=None).compress_documents(given, QUERY)
    assert [document.metadata["number"] for document in found] == [0, 1, 2, 3]


@pytest.mark.parametrize("text", [" ", "\n\t", ""])
def test_blank_documents_are_ranked(options: dict[str, Any], text: str) -> None:
    given = [Document(page_content=text), Document(page_content="words")]
    assert len(KalmReranker(**options).compress_documents(given, QUERY)) == 2


@pytest.mark.parametrize(
    "wrong",
    [
        {"top_n": 0},
        {"top_n": -1},
        {"score_threshold": 2},
        {"unknown": 1},
        *WRONG_MODEL_ARGUMENTS,
        *WRONG_CACHES,
    ],
)
def test_wrong_arguments_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        KalmReranker(**wrong)


@pytest.mark.parametrize("wrong", wrong_types("top_n"))
def test_wrong_types_are_refused_at_construction_and_in_a_call(options: dict[str, Any], wrong: dict[str, Any]) -> None:
    name = next(iter(wrong))
    with pytest.raises(ValidationError, match=f"{name} must be"):
        KalmReranker(**wrong)
    with pytest.raises((ValueError, TypeError), match=f"{name} must be"):
        KalmReranker(**options).as_runnable().invoke({"query": QUERY, "documents": documents(), **wrong})


def test_numbers_of_numpy_are_numbers(options: dict[str, Any]) -> None:
    numpy = pytest.importorskip("numpy")
    reranker = KalmReranker(**options, top_n=numpy.int64(2), score_threshold=numpy.float32(0), ratio=numpy.int32(8))
    assert (type(reranker.top_n), type(reranker.score_threshold), type(reranker.ratio)) == (int, float, int)
    assert len(reranker.compress_documents(documents(), QUERY)) == 2
    call = {"query": QUERY, "documents": documents(), "top_n": numpy.int64(1)}
    assert len(reranker.as_runnable().invoke(call)) == 1


@MODES
def test_any_iterable_of_documents_and_nothing_else(options: dict[str, Any], mode: str) -> None:
    reranker, given = KalmReranker(**options), documents()
    wanted = rerank(reranker, given, QUERY, mode)
    assert rerank(reranker, iter(given), QUERY, mode) == rerank(reranker, tuple(given), QUERY, mode) == wanted  # type: ignore[arg-type]
    encoder = KalmPassageEncoder(**options)
    assert list(encoder.transform_documents(iter(given))) == given  # type: ignore[arg-type]
    assert given == documents()
    for wrong in (None, given[0], "text", 7, {"page_content": "text"}):
        with pytest.raises(
            TypeError, match=r"documents must be a list of langchain_core Documents, got .*\[document\]"
        ):
            rerank(reranker, wrong, QUERY, mode)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="documents must be a list"):
            encoder.transform_documents(wrong)  # type: ignore[arg-type]
    for call in ("text", None, [QUERY, given]):
        with pytest.raises(TypeError, match="expected a mapping with a query and documents, got"):
            reranker.as_runnable().invoke(call)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="pairs must be"):
        KalmCrossEncoder(**options).score(None)  # type: ignore[arg-type]


@MODES
def test_wrong_calls(options: dict[str, Any], mode: str) -> None:
    reranker = KalmReranker(**options)
    with pytest.raises(TypeError, match="query must be a string"):
        rerank(reranker, documents(), None, mode)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expected a langchain_core Document, got str: 'text'"):
        rerank(reranker, [*documents(), "text"], QUERY, mode)  # type: ignore[list-item]
    with pytest.raises(ValueError, match="expected a query and documents"):
        reranker.as_runnable().invoke({"query": QUERY, "documents": [], "top_k": 3})


def test_copies_and_pickles_share_the_model(options: dict[str, Any]) -> None:
    reranker = KalmReranker(**options)
    wanted = reranker.compress_documents(documents(), QUERY)
    for other in (
        pickle.loads(pickle.dumps(reranker)),
        copy.deepcopy(reranker),
        reranker.model_copy(update={"top_n": 3}),
    ):
        assert other.reranker is reranker.reranker
        assert other.compress_documents(documents(), QUERY) == wanted


def test_a_copy_that_names_another_model_evicts_nothing(options: dict[str, Any]) -> None:
    first = KalmReranker(**options)
    held = first.reranker
    other = first.model_copy(update={"dtype": "bfloat16"})
    assert other.reranker is not held
    assert first.reranker is held


def test_a_cache_object_survives_copies(options: dict[str, Any]) -> None:
    cache = PassageCache(options.pop("cache"))
    reranker = KalmReranker(**options, cache=cache)
    assert copy.deepcopy(reranker).cache is cache
    assert reranker.model_copy(deep=True).compress_documents(documents(), QUERY)


KINDS = pytest.mark.parametrize("kind", [KalmReranker, KalmCrossEncoder, KalmPassageEncoder, KalmCachingEmbeddings])


def component(kind: Any, **arguments: Any) -> Any:
    if kind is KalmCachingEmbeddings:
        arguments["embeddings"] = DeterministicFakeEmbedding(size=4)
    return kind(**arguments)


@KINDS
def test_keep_is_an_argument_and_sets_apart(options: dict[str, Any], kind: Any) -> None:
    plain, prefilled = component(kind, **options), component(kind, **options, keep="prefilled")
    assert (plain.reranker.cache.keeps_prefilled, prefilled.reranker.cache.keeps_prefilled) == (False, True)
    assert prefilled.reranker is component(kind, **options, keep="prefilled").reranker
    assert plain.model_copy(update={"keep": "prefilled"}).reranker is prefilled.reranker
    assert pickle.loads(pickle.dumps(prefilled)).keep == "prefilled"
    assert kind(**dict(prefilled)).reranker is prefilled.reranker


def test_keep_is_part_of_the_json(options: dict[str, Any]) -> None:
    reranker = KalmReranker(**options, keep="prefilled")
    other = KalmReranker.model_validate_json(reranker.model_dump_json())
    assert (other.keep, other.cache) == ("prefilled", str(options["cache"]))
    assert other.reranker is reranker.reranker
    assert KalmReranker.model_json_schema()["properties"]["cache"]["type"] == ["string", "null"]


def test_ingestion_leaves_prefilled_documents_on_disk(options: dict[str, Any]) -> None:
    KalmPassageEncoder(**options, keep="prefilled").transform_documents(documents())
    core = KaLMReranker(options["model"], cache=PassageCache(options["cache"], keep="prefilled"), device="cpu")
    core.rank(QUERY, TEXTS)
    assert (core.cache.stats().prefilled.hits, core.cache.stats().encoded) == (len(TEXTS), 0)


@KINDS
@CACHES
def test_keep_beside_a_ready_made_cache_is_refused(options: dict[str, Any], kind: Any, make: Any) -> None:
    cache = make(options.pop("cache"))
    with pytest.raises(ValidationError, match=r"is a folder, got keep='prefilled', cache=.*pass cache=PassageCache"):
        component(kind, **options, cache=cache, keep="prefilled")
    late = component(kind, **options, cache=cache).model_copy(update={"keep": "prefilled"})
    with pytest.raises(ValueError, match="only when cache= is a folder"):
        late.reranker.load()


@KINDS
@CACHES
def test_a_ready_made_cache_is_used_as_it_is_and_not_serialised(options: dict[str, Any], kind: Any, make: Any) -> None:
    cache = make(options.pop("cache"))
    first = component(kind, **options, cache=cache)
    assert first.cache is cache
    assert cache in (first.reranker.cache, first.reranker.cache.store)
    assert first.reranker is KalmReranker(**options, cache=cache).reranker
    for serialise in (pickle.dumps, kind.model_dump_json, lambda made: made.model_dump(mode="json")):
        with pytest.raises(ValueError, match="serialised with a component, got cache=.*give a folder, and ke"):
            serialise(first)


@pytest.mark.parametrize("ratio", [1, 2, 8])
def test_ingestion_at_another_ratio_is_found(options: dict[str, Any], ratio: int) -> None:
    KalmPassageEncoder(**options, ratio=ratio).transform_documents(documents())
    reranker = KalmReranker(**options, ratio=ratio)
    before = encoded(reranker)
    reranker.compress_documents(documents(), QUERY)
    assert encoded(reranker) == before


def test_fifty_concurrent_calls_on_one_instance(options: dict[str, Any]) -> None:
    reranker = KalmReranker(**options, top_n=None)
    queries = [f"query {number % 7}" for number in range(50)]
    wanted = {query: reranker.compress_documents(documents(), query) for query in set(queries)}

    async def main() -> list[Sequence[Document]]:
        return await asyncio.gather(*(reranker.acompress_documents(documents(), query) for query in queries))

    for _ in range(2):
        for query, found in zip(queries, asyncio.run(main()), strict=True):
            assert found == wanted[query]


class Steps(BaseCallbackHandler):
    """Names of the chain steps that were started and ended."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.ended = 0

    def on_chain_start(self, serialized: Any, inputs: Any, **kwargs: Any) -> None:
        self.started.append(kwargs.get("name") or "")

    def on_chain_end(self, outputs: Any, **kwargs: Any) -> None:
        self.ended += 1


class Fixed(BaseRetriever):
    """Always the same documents."""

    def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[Document]:
        return documents()


@MODES
def test_contextual_compression_retriever_and_its_trace(
    options: dict[str, Any], expected: list[tuple[int, float]], mode: str
) -> None:
    retriever = ContextualCompressionRetriever(base_compressor=KalmReranker(**options), base_retriever=Fixed())
    steps = Steps()
    config: Any = {"callbacks": [steps]}
    found = retriever.invoke(QUERY, config) if mode == "sync" else asyncio.run(retriever.ainvoke(QUERY, config))
    assert [document.metadata["number"] for document in found] == [number for number, _ in expected[:3]]
    assert steps.started.count("KalmReranker") == 1
    assert steps.ended == len(steps.started)


@MODES
def test_the_run_tells_what_the_call_took(options: dict[str, Any], mode: str) -> None:
    reranker = KalmReranker(**options)
    for callback, runs in (
        (collector := RunCollectorCallbackHandler(), collector.traced_runs),
        asynchronous_collector(),
    ):
        for config in ({"callbacks": [callback], "metadata": {"mine": 1}}, {"callbacks": [callback]}):
            if mode == "sync" and isinstance(callback, RunCollectorCallbackHandler):
                reranker.as_runnable().invoke({"query": QUERY, "documents": documents()}, config)  # type: ignore[arg-type]
            else:
                asyncio.run(reranker.as_runnable().ainvoke({"query": QUERY, "documents": documents()}, config))  # type: ignore[arg-type]
            metadata = runs[-1].metadata
            assert metadata.get("mine") == config.get("metadata", {}).get("mine")  # type: ignore[attr-defined]
            told = {name: value for name, value in metadata.items() if name.startswith("kalm_rag.")}
            assert told["kalm_rag.counts.passages"] == told["kalm_rag.counts.scored"] == len(TEXTS)
            assert told["kalm_rag.timings.total"] > 0
            assert {type(value) for value in told.values()} == {int, float}, "no text"
    assert runs[0].name == "KalmReranker"


def test_a_compressors_run_tells_it_too(options: dict[str, Any]) -> None:
    collector = RunCollectorCallbackHandler()
    retriever = ContextualCompressionRetriever(base_compressor=KalmReranker(**options), base_retriever=Fixed())
    retriever.invoke(QUERY, {"callbacks": [collector]})
    [whole] = collector.traced_runs
    [step] = [run for run in whole.child_runs if run.name == "KalmReranker"]
    assert step.metadata["kalm_rag.counts.encoded"] == len(TEXTS)
    assert not any(name.startswith("kalm_rag.") for name in whole.metadata), "only the step's"


def asynchronous_collector() -> tuple[AsyncBaseTracer, list[Any]]:
    """A tracer for programs with an event loop, and the runs that it meets."""
    runs: list[Any] = []

    class Collector(AsyncBaseTracer):
        async def _persist_run(self, run: Any) -> None:
            runs.append(run)

    return Collector(), runs


def test_lcel_chain(options: dict[str, Any], expected: list[tuple[int, float]]) -> None:
    chain = {"documents": Fixed(), "query": RunnablePassthrough()} | KalmReranker(**options, top_n=1).as_runnable()
    assert [document.metadata["number"] for document in chain.invoke(QUERY)] == [expected[0][0]]


def test_cross_encoder(options: dict[str, Any], expected: list[tuple[int, float]]) -> None:
    encoder = KalmCrossEncoder(**options)
    scores = encoder.score([(QUERY, text) for text in TEXTS])
    assert scores == pytest.approx([score for _, score in sorted(expected)], abs=1e-5)
    assert encoder.score([]) == []
    found = CrossEncoderReranker(model=encoder, top_n=2).compress_documents(documents(), QUERY)
    assert [document.metadata["number"] for document in found] == [number for number, _ in expected[:2]]


def encoded(reranker: KalmReranker) -> int:
    return reranker.reranker.cache.stats().encoded


@MODES
def test_passage_encoder_makes_the_first_query_warm(options: dict[str, Any], mode: str) -> None:
    encoder = KalmPassageEncoder(**options)
    given = documents()
    found = encoder.transform_documents(given) if mode == "sync" else asyncio.run(encoder.atransform_documents(given))
    assert found is given
    reranker = KalmReranker(**options)
    before = encoded(reranker)
    reranker.compress_documents(documents(), QUERY)
    assert encoded(reranker) == before == len(TEXTS)


def test_caching_embeddings_encode_what_index_embeds(options: dict[str, Any]) -> None:
    embeddings = KalmCachingEmbeddings(embeddings=DeterministicFakeEmbedding(size=16), **options)
    store = InMemoryVectorStore(embeddings)
    manager = InMemoryRecordManager("test")
    manager.create_schema()
    arguments: dict[str, Any] = {"cleanup": None, "key_encoder": "sha256"}
    index(documents(), manager, store, **arguments)
    reranker = KalmReranker(**options)
    assert encoded(reranker) == len(TEXTS)
    index([*documents(), Document(page_content="new")], manager, store, **arguments)
    assert encoded(reranker) == len(TEXTS) + 1
    retriever = ContextualCompressionRetriever(
        base_compressor=reranker, base_retriever=store.as_retriever(search_kwargs={"k": 6})
    )
    assert len(retriever.invoke(QUERY)) == 3
    retriever.invoke("another query")
    assert encoded(reranker) == len(TEXTS) + 1, "no encoder call at query time"
    assert asyncio.run(embeddings.aembed_documents(["x"])) == embeddings.embed_documents(["x"])
    assert asyncio.run(embeddings.aembed_query("x")) == embeddings.embed_query("x")


class TopK(ContextualCompressionRetriever):
    """The retriever that LangChain's own suite asks for: one with a `k`."""

    k: int = 3

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun, k: int | None = None, **_: Any
    ) -> list[Document]:
        self.base_compressor.top_n = k or self.k  # type: ignore[attr-defined]
        return super()._get_relevant_documents(query, run_manager=run_manager)


class TestRetriever(RetrieversIntegrationTests):
    """LangChain's conformance suite for retrievers."""

    @pytest.fixture(autouse=True)
    def _use(self, options: dict[str, Any]) -> None:
        type(self).options = options

    @property
    def retriever_constructor(self) -> type[TopK]:
        return TopK

    @property
    def retriever_constructor_params(self) -> dict[str, Any]:
        return {"base_compressor": KalmReranker(**self.options), "base_retriever": Fixed()}

    @property
    def retriever_query_example(self) -> str:
        return QUERY
