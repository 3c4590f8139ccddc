"""LlamaIndex's contract, on the real framework and a real (random) model."""

from __future__ import annotations

import asyncio
import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
from adapterkit import ANSWERS, CACHES, MODES, QUERY, TEXTS, WRONG_CACHES, WRONG_MODEL_ARGUMENTS
from llama_index.core import MockEmbedding, VectorStoreIndex
from llama_index.core.callbacks import CallbackManager, CBEventType, LlamaDebugHandler
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
from llama_index.core.llms import MockLLM
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import Document, MetadataMode, NodeWithScore, QueryBundle, TextNode
from llama_index.postprocessor.kalm_rerank import KalmPassageEncoder, KalmRerank
from llama_index.retrievers.bm25 import BM25Retriever

from kalm_rag import KaLMReranker, PassageCache


def nodes() -> list[NodeWithScore]:
    return [
        NodeWithScore(node=TextNode(id_=f"id-{number}", text=text, metadata={"source": f"page {number}"}), score=0.5)
        for number, text in enumerate(TEXTS)
    ]


def embed_texts() -> list[str]:
    return [node.node.get_content(MetadataMode.EMBED) for node in nodes()]


def rerank(reranker: KalmRerank, given: list[NodeWithScore], query: str | None, mode: str) -> list[NodeWithScore]:
    if mode == "sync":
        return reranker.postprocess_nodes(given, query_str=query)
    return asyncio.run(reranker.apostprocess_nodes(given, query_str=query))


@pytest.fixture
def expected(checkpoint: Path) -> list[tuple[int, float]]:
    ranking = KaLMReranker(checkpoint, cache=None, device="cpu").rank(QUERY, embed_texts())
    return [(hit.index, hit.score) for hit in ranking]


def test_class() -> None:
    assert BaseNodePostprocessor.__name__ in [base.__name__ for base in KalmRerank.__mro__]


def test_defaults() -> None:
    reranker = KalmRerank()
    assert (reranker.model, reranker.cache, reranker.keep, reranker.top_n, reranker.metadata_mode) == (
        "nano",
        "default",
        "states",
        5,
        MetadataMode.EMBED,
    )


@MODES
def test_order_scores_and_untouched_input(
    options: dict[str, Any], expected: list[tuple[int, float]], mode: str
) -> None:
    given = nodes()
    before = copy.deepcopy(given)
    for _ in range(2):
        found = rerank(KalmRerank(**options, top_n=None), given, QUERY, mode)
        assert [node.node.node_id for node in found] == [f"id-{number}" for number, _ in expected]
        assert [node.score for node in found] == pytest.approx([score for _, score in expected], abs=1e-5)
        assert all(type(node.score) is float for node in found)
        assert given == before
    assert len(rerank(KalmRerank(**options, top_n=2), given, QUERY, mode)) == 2


@pytest.mark.parametrize("metadata_mode", list(MetadataMode))
def test_metadata_mode_instruction_and_ratio(
    options: dict[str, Any], checkpoint: Path, metadata_mode: MetadataMode
) -> None:
    texts = [node.node.get_content(metadata_mode) for node in nodes()]
    core = KaLMReranker(checkpoint, cache=None, device="cpu")
    wanted = core.rank(QUERY, texts, instruction="Find code.", ratio=8)
    reranker = KalmRerank(**options, top_n=None, metadata_mode=metadata_mode, instruction="Find code.", ratio=8)
    found = reranker.postprocess_nodes(nodes(), query_str=QUERY)
    assert [node.score for node in found] == pytest.approx([hit.score for hit in wanted], abs=1e-5)


def test_retrieval_score_is_kept_outside_of_the_text(options: dict[str, Any]) -> None:
    reranker = KalmRerank(**options, top_n=None, keep_retrieval_score=True)
    given = nodes()
    first = reranker.postprocess_nodes(given, query_str=QUERY)
    assert all(node.node.metadata["retrieval_score"] == 0.5 for node in first)
    assert "retrieval_score" not in given[0].node.metadata
    assert sorted(node.node.get_content(MetadataMode.EMBED) for node in first) == sorted(embed_texts())
    assert sorted(node.node.get_content(MetadataMode.LLM) for node in first) == sorted(
        node.node.get_content(MetadataMode.LLM) for node in given
    )
    encoded = reranker.reranker.cache.stats().encoded
    again = reranker.postprocess_nodes(first, query_str=QUERY)
    assert reranker.reranker.cache.stats().encoded == encoded, "the kept score does not change the key"
    assert [node.node.node_id for node in again] == [node.node.node_id for node in first]


@MODES
def test_empty_in_empty_out_without_a_model(mode: str) -> None:
    assert rerank(KalmRerank(model="/no/such/model"), [], QUERY, mode) == []


@MODES
def test_missing_query_and_wrong_nodes(options: dict[str, Any], mode: str) -> None:
    with pytest.raises(ValueError, match="Missing query bundle in extra info"):
        rerank(KalmRerank(**options), nodes(), None, mode)
    with pytest.raises(TypeError, match="expected a node, got str"):
        KalmRerank(**options).warm(["text"])  # type: ignore[list-item]


@MODES
def test_a_query_may_be_text_and_nodes_any_iterable(options: dict[str, Any], mode: str) -> None:
    reranker, given = KalmRerank(**options), nodes()

    def call(some: Any, query: Any) -> list[NodeWithScore]:
        if mode == "sync":
            return reranker.postprocess_nodes(some, query_bundle=query)
        return asyncio.run(reranker.apostprocess_nodes(some, query_bundle=query))

    wanted = rerank(reranker, given, QUERY, mode)
    for found in (call(given, QUERY), call(iter(given), QueryBundle(QUERY)), call(tuple(given), QUERY)):
        assert [(hit.node.node_id, hit.score) for hit in found] == [(hit.node.node_id, hit.score) for hit in wanted]
    assert [node.score for node in given] == [0.5] * len(given)
    for wrong in (7, QueryBundle(None)):  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="query_bundle must be a QueryBundle or a string, got"):
            call(given, wrong)
    for wrong_nodes in (None, given[0], given[0].node, "text"):
        with pytest.raises(TypeError, match=r"nodes must be a list of nodes, got .*\[node\]"):
            call(wrong_nodes, QUERY)
        with pytest.raises(TypeError, match="nodes must be a list of nodes"):
            KalmPassageEncoder(**options)(wrong_nodes)
    with pytest.raises(TypeError, match=r"nodes\[0\] must be a NodeWithScore, got TextNode"):
        call([given[0].node], QUERY)


def test_numbers_of_numpy_are_numbers(options: dict[str, Any]) -> None:
    numpy = pytest.importorskip("numpy")
    reranker = KalmRerank(**options, top_n=numpy.int64(2), ratio=numpy.int32(8))
    assert (type(reranker.top_n), type(reranker.ratio)) == (int, int)
    assert len(rerank(reranker, nodes(), QUERY, "sync")) == 2


@pytest.mark.parametrize(
    "wrong",
    [
        {"unknown": 1},
        {"instruction": 7},
        {"top_n": 0},
        {"top_n": True},
        {"top_n": 2.0},
        {"top_n": "2"},
        {"keep_retrieval_score": "yes"},
        {"metadata_mode": "x"},
        *WRONG_MODEL_ARGUMENTS,
        *WRONG_CACHES,
    ],
)
def test_wrong_arguments_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        KalmRerank(**wrong)


def test_dict_json_and_pickle_round_trips(options: dict[str, Any]) -> None:
    reranker = KalmRerank(**options, top_n=2, instruction="Find code.", keep_retrieval_score=True)
    wanted = reranker.postprocess_nodes(nodes(), query_str=QUERY)
    for other in (
        KalmRerank.from_dict(reranker.to_dict()),
        KalmRerank.from_json(reranker.to_json()),
        pickle.loads(pickle.dumps(reranker)),
        copy.deepcopy(reranker),
        KalmRerank.model_validate(reranker.model_dump()),
        KalmRerank.model_validate_json(reranker.model_dump_json()),
    ):
        assert other.to_dict() == reranker.to_dict()
        assert other.postprocess_nodes(nodes(), query_str=QUERY) == wanted
    assert reranker.to_dict()["class_name"] == "KalmRerank"


KINDS = pytest.mark.parametrize("kind", [KalmRerank, KalmPassageEncoder])


@KINDS
def test_keep_is_an_argument_and_sets_apart(options: dict[str, Any], kind: Any) -> None:
    plain, prefilled = kind(**options), kind(**options, keep="prefilled")
    assert (plain.reranker.cache.keeps_prefilled, prefilled.reranker.cache.keeps_prefilled) == (False, True)
    for other in (
        kind(**options, keep="prefilled"),
        plain.model_copy(update={"keep": "prefilled"}),
        kind.from_dict(prefilled.to_dict()),
        kind.from_json(prefilled.to_json()),
        pickle.loads(pickle.dumps(prefilled)),
    ):
        assert other.reranker is prefilled.reranker
    assert prefilled.to_dict()["keep"] == "prefilled"
    assert "keep" in kind.model_json_schema()["properties"]


def test_ingestion_leaves_prefilled_nodes_on_disk(options: dict[str, Any]) -> None:
    pipeline = IngestionPipeline(transformations=[KalmPassageEncoder(**options)])
    given = [node.node for node in nodes()]
    pipeline.run(nodes=given)
    pipeline.transformations = [KalmPassageEncoder(**options, keep="prefilled")]
    pipeline.run(nodes=given)  # another keep is another step: the pipeline's own cache does not answer for it
    core = KaLMReranker(options["model"], cache=PassageCache(options["cache"], keep="prefilled"), device="cpu")
    core.rank(QUERY, embed_texts())
    assert (core.cache.stats().prefilled.hits, core.cache.stats().encoded) == (len(TEXTS), 0)


@KINDS
@CACHES
def test_keep_beside_a_ready_made_cache_is_refused(options: dict[str, Any], kind: Any, make: Any) -> None:
    cache = make(options.pop("cache"))
    with pytest.raises(ValueError, match=r"is a folder, got keep='prefilled', cache=.*pass cache=PassageCache"):
        kind(**options, cache=cache, keep="prefilled")
    late = kind(**options, cache=cache).model_copy(update={"keep": "prefilled"})
    with pytest.raises(ValueError, match="only when cache= is a folder"):
        late.reranker.load()


@KINDS
@CACHES
def test_a_ready_made_cache_is_used_as_it_is_and_not_serialised(options: dict[str, Any], kind: Any, make: Any) -> None:
    cache = make(options.pop("cache"))
    first = kind(**options, cache=cache)
    assert first.cache is cache
    assert cache in (first.reranker.cache, first.reranker.cache.store)
    assert first.reranker is KalmRerank(**options, cache=cache).reranker
    assert kind.from_dict(first.to_dict()).reranker is first.reranker
    for serialise in (pickle.dumps, kind.to_json, kind.model_dump_json, lambda made: made.model_dump(mode="json")):
        with pytest.raises(ValueError, match="serialised with a component, got cache=.*give a folder, and ke"):
            serialise(first)


@MODES
def test_a_ready_made_cache_serves_ingestion_and_queries(options: dict[str, Any], mode: str) -> None:
    cache = PassageCache(options.pop("cache"), keep="prefilled")
    pipeline = IngestionPipeline(transformations=[KalmPassageEncoder(**options, cache=cache)])
    given = [node.node for node in nodes()]
    for _ in range(2):
        assert len(pipeline.run(nodes=given) if mode == "sync" else asyncio.run(pipeline.arun(nodes=given))) == 5
    rerank(copy.deepcopy(KalmRerank(**options, cache=cache)), nodes(), QUERY, mode)
    assert cache.stats().encoded == 5


def test_workers_do_not_go_on_without_a_ready_made_cache(options: dict[str, Any]) -> None:
    cache = PassageCache(options.pop("cache"))
    pipeline = IngestionPipeline(transformations=[KalmPassageEncoder(**options, cache=cache)])
    with pytest.raises(ValueError, match="only the folder of a cache can be serialised"):
        pipeline.run(nodes=[node.node for node in nodes()], num_workers=2)


class Events(BaseEventHandler):
    """The rerank events that were dispatched."""

    seen: list[Any] = []  # noqa: RUF012 - pydantic copies it

    def handle(self, event: Any, **kwargs: Any) -> None:
        if isinstance(event, (ReRankStartEvent, ReRankEndEvent)):
            self.seen.append(event)


@MODES
def test_events_come_in_pairs(options: dict[str, Any], mode: str) -> None:
    handler = Events()
    debug = LlamaDebugHandler(print_trace_on_end=False)
    dispatcher = get_dispatcher()
    dispatcher.add_event_handler(handler)
    try:
        reranker = KalmRerank(**options, top_n=None, callback_manager=CallbackManager([debug]))
        rerank(reranker, nodes(), QUERY, mode)
        rerank(reranker, [], QUERY, mode)
    finally:
        dispatcher.event_handlers.remove(handler)
    assert [type(event) for event in handler.seen] == [ReRankStartEvent, ReRankEndEvent]
    assert (handler.seen[0].top_n, handler.seen[0].model_name, len(handler.seen[1].nodes)) == (
        5,
        str(options["model"]),
        5,
    )
    assert len(debug.get_event_pairs(CBEventType.RERANKING)) == 1
    told = handler.seen[1].tags
    assert told["kalm_rag.counts.encoded"] == told["kalm_rag.counts.scored"] == len(TEXTS)
    assert told["kalm_rag.timings.total"] > 0
    assert {type(value) for value in told.values()} == {int, float}, "no text"
    assert handler.seen[0].tags == {}


def test_fifty_concurrent_calls_on_one_instance(options: dict[str, Any]) -> None:
    reranker = KalmRerank(**options)
    queries = [f"query {number % 7}" for number in range(50)]
    wanted = {query: reranker.postprocess_nodes(nodes(), query_str=query) for query in set(queries)}

    async def main() -> list[list[NodeWithScore]]:
        return await asyncio.gather(*(reranker.apostprocess_nodes(nodes(), query_str=query) for query in queries))

    for query, found in zip(queries, asyncio.run(main()), strict=True):
        assert found == wanted[query]


def test_query_engine_over_a_vector_index(options: dict[str, Any], expected: list[tuple[int, float]]) -> None:
    index = VectorStoreIndex([node.node for node in nodes()], embed_model=MockEmbedding(embed_dim=8))
    engine = index.as_query_engine(
        llm=MockLLM(), similarity_top_k=5, node_postprocessors=[KalmRerank(**options, top_n=3)]
    )
    found = engine.query(QUERY).source_nodes
    assert [node.score for node in found] == pytest.approx([score for _, score in expected[:3]], abs=1e-5)
    assert [node.node.node_id for node in asyncio.run(engine.aquery(QUERY)).source_nodes] == [
        node.node.node_id for node in found
    ]


def test_bm25_retriever(options: dict[str, Any], checkpoint: Path) -> None:
    retriever = BM25Retriever.from_defaults(nodes=[node.node for node in nodes()], similarity_top_k=3)
    retrieved = retriever.retrieve("sort list")
    found = KalmRerank(**options, top_n=None).postprocess_nodes(retrieved, query_str=QUERY)
    core = KaLMReranker(checkpoint, cache=None, device="cpu")
    wanted = core.rank(QUERY, [node.node.get_content(MetadataMode.EMBED) for node in retrieved])
    assert [node.node.node_id for node in found] == [retrieved[hit.index].node.node_id for hit in wanted]


@MODES
def test_ingestion_makes_the_first_query_warm(options: dict[str, Any], mode: str) -> None:
    encoder = KalmPassageEncoder(**options)
    pipeline = IngestionPipeline(transformations=[encoder], disable_cache=False)
    documents = [
        Document(id_=f"id-{number}", text=text, metadata={"source": f"page {number}"})
        for number, text in enumerate(TEXTS)
    ]
    for _ in range(2):  # the second time the pipeline's own cache answers
        done = pipeline.run(documents=documents) if mode == "sync" else asyncio.run(pipeline.arun(documents=documents))
        assert len(done) == 5
    reranker = KalmRerank(**options)
    encoded = reranker.reranker.cache.stats().encoded
    assert encoded == 5
    reranker.postprocess_nodes(nodes(), query_str=QUERY)
    assert reranker.reranker.cache.stats().encoded == encoded


def test_ingestion_with_worker_processes(options: dict[str, Any]) -> None:
    pipeline = IngestionPipeline(transformations=[KalmPassageEncoder(**options)])
    documents = [Document(text=text, metadata={"source": f"page {number}"}) for number, text in enumerate(TEXTS)]
    assert len(pipeline.run(documents=documents, num_workers=2)) == 5
    assert KalmRerank(**options).warm(nodes()).known == 5


def test_warm_encodes_what_is_indexed_already(options: dict[str, Any]) -> None:
    reranker = KalmRerank(**options)
    report = reranker.warm([node.node for node in nodes()])
    assert (report.new, report.known) == (5, 0)
    assert reranker.warm(nodes()).known == 5


def test_a_kept_score_that_would_become_text_is_refused() -> None:
    with pytest.raises(ValueError, match="keep_retrieval_score needs a metadata_mode other than ALL"):
        KalmRerank(keep_retrieval_score=True, metadata_mode=MetadataMode.ALL)


@pytest.mark.weights
def test_the_answer_is_first_with_the_released_weights(nano: str, tmp_path: Path) -> None:
    reranker = KalmRerank(model=nano, cache=tmp_path, top_n=None)
    for query, answer in ANSWERS.items():
        given = [NodeWithScore(node=TextNode(text=text)) for text in ANSWERS.values()]
        found = reranker.postprocess_nodes(given, query_str=query)
        assert (found[0].text, len(found)) == (answer, len(ANSWERS))
