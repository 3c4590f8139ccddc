"""A user's program against the public interface. It never runs: `make types` checks it with mypy and pyright."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from haystack import Document as HaystackDocument
from haystack import Pipeline
from haystack.utils import ComponentDevice, Secret
from haystack_integrations.components.rankers.kalm import KalmPassageEncoder as HaystackEncoder
from haystack_integrations.components.rankers.kalm import KalmRanker
from langchain_core.documents import Document as LangChainDocument
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_kalm import KalmCachingEmbeddings, KalmCrossEncoder, KalmReranker
from langchain_kalm import KalmPassageEncoder as LangChainEncoder
from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle, TextNode
from llama_index.postprocessor.kalm_rerank import KalmPassageEncoder as LlamaIndexEncoder
from llama_index.postprocessor.kalm_rerank import KalmQueryBundle, KalmRerank
from typing_extensions import assert_type

from kalm_rag import (
    EncodeReport,
    KaLMReranker,
    Options,
    PartialRanking,
    PassageCache,
    RankedPassage,
    Ranking,
    Rankings,
    RerankerClient,
    ThresholdProfile,
    UnscoredPassage,
)
from kalm_rag.cache import DiskStore, MemoryStore, Store
from kalm_rag.errors import CheckpointError, ScoringError, ServerError, ServerUnavailableError


@dataclass
class Row:
    """A document of somebody's own."""

    body: str


def core(folder: Path) -> None:
    """The core's calls and their results."""
    cache = PassageCache(folder, limit=10**9, keep="prefilled", storage="int8", secret="x" * 16)
    store: Store = DiskStore(folder)
    with KaLMReranker("mini", cache=cache, dtype="float32", control_tokens="allow") as reranker:
        strings = reranker.rank("query", ["one", "two"], top_k=1)
        assert_type(strings, Ranking[str])
        assert_type(strings[0], RankedPassage[str])
        assert_type(strings[0].document.upper(), str)
        assert_type(strings[:1], Ranking[str])
        mappings = reranker.rank("query", [{"text": "one", "source": "faq"}], threshold=0.5)
        profile = ThresholdProfile.load(folder / "threshold-profile.json")
        assert_type(reranker.rank("query", ["one"], threshold=profile, calibrated=True), Ranking[str])
        assert_type(reranker.rank("query", ["one"], threshold=folder / "profile.json")[0].score, float)
        print(profile.score + profile.margin, profile.checked.recall, profile.save(folder / "copy.json"))
        assert_type(mappings[0].document["source"], str)
        rows = reranker.rank("query", [Row("one")], text=lambda row: row.body)
        assert_type(rows[0].document.body, str)
        assert_type(reranker.rank("query", (Row(text) for text in "ab"), text="body")[0].document, Row)
        many = reranker.rank_many(["one query", "another"], ["one", "two"], top_k=1)
        assert_type(many, Rankings[str])
        assert_type(many[0], Ranking[str])
        assert_type(many.fused("rrf", top_k=1)[0].document.upper(), str)
        passages = reranker.rank("query", [LangChainDocument("one")])
        assert_type(passages[0].document.page_content, str)
        partial = reranker.rank("query", ["one"], budget_ms=150)
        assert_type(partial, PartialRanking[str])
        assert_type(partial[:1], PartialRanking[str])
        assert_type(partial[0], RankedPassage[str] | UnscoredPassage[str])
        assert_type(reranker.rank("query", ["one"], on_unknown="skip"), PartialRanking[str])
        first = partial[0]
        if isinstance(first, UnscoredPassage):
            assert_type(first.score, None)
        else:
            assert_type(first.score, float)
        if partial.counts is not None and partial.timings is not None:
            assert_type(partial.counts.skipped + reranker.flush(1.0) + reranker.stats().background.pending, int)
            assert_type(partial.timings.total, float)
        assert_type(reranker.predict([("query", "one")]), list[float])
        report = reranker.encode([{"text": "one"}])
        assert_type(report, EncodeReport)
        assert_type(report.new + report.total, int)
        numbers: tuple[float, float, bool] = (strings[0].score, strings[0].margin, strings[0].passage_truncated)
        print(numbers, reranker.cache.stats().encoded, reranker.estimate(["one"]).states_bytes)
    KaLMReranker(Path("folder"), cache=store, token=None, ratio=None)
    KaLMReranker("nano", cache=MemoryStore(1000), prefill_storage="int8")


async def asynchronous(reranker: KaLMReranker) -> None:
    """The asynchronous twins."""
    assert_type(await reranker.arank("query", ["one"]), Ranking[str])
    assert_type(await reranker.arank("query", ["one"], budget_ms=0.5), PartialRanking[str])
    assert_type(await reranker.arank_many(["query"], [Row("one")], text="body"), Rankings[Row])
    assert_type(await reranker.apredict([("query", "one")]), list[float])
    assert_type(await reranker.aencode(["one"]), EncodeReport)


async def client() -> float:
    """The client of a server: its rankings may lack scores."""
    with RerankerClient("http://127.0.0.1:8000", model="nano", retries=1, on_failure="keep-order") as reranker:
        try:
            found = reranker.load().rank("query", [Row("one")], top_k=1, text="body")
        except ServerUnavailableError as error:
            return error.retry_after or 0.0
        except ServerError as error:
            return float(error.status or 0)
        assert_type(found, Ranking[Row] | PartialRanking[Row])
        assert_type(found[0].document, Row)
        assert_type(found[0].score, float | None)
        assert_type(reranker.rank_many(["query"], ["one"]), Rankings[str])
        assert_type(await reranker.arank("query", ["one"]), Ranking[str] | PartialRanking[str])
        assert_type(reranker.predict([("query", "one")]), list[float])
        assert_type(await reranker.aencode(["one"]), EncodeReport)
        return found[0].score or reranker.forget(["one"]).total


def errors(reranker: KaLMReranker) -> bool:
    """What may be caught."""
    try:
        reranker.load()
    except (CheckpointError, ScoringError):
        return False
    return True


def langchain(folder: Path) -> None:
    """LangChain's classes."""
    options = Options(batch_size=8, cache_limit=10**9, control_tokens="allow", prefill_storage="int8")
    reranker = KalmReranker(model="mini", top_n=5, score_threshold=0.5, cache=folder, options=options)
    KalmReranker(server="http://127.0.0.1:8000", options=Options(server_timeout=5.0, server_on_failure="keep-order"))
    KalmReranker(top_n=None, keep="prefilled", options={"batch_size": 8}, instruction="Find code.", ratio=8)
    found = reranker.compress_documents([LangChainDocument("one")], "query")
    print([document.metadata["relevance_score"] for document in found], reranker.reranker.cache)
    print(reranker.as_runnable().invoke({"query": "query", "documents": [LangChainDocument("one")], "top_n": 1}))
    assert_type(KalmCrossEncoder(model="mini").score([("query", "one")]), list[float])
    LangChainEncoder(model="mini", max_length=512).transform_documents([LangChainDocument("one")])
    KalmCachingEmbeddings(embeddings=DeterministicFakeEmbedding(size=4), model="mini").embed_documents(["one"])
    reranker.close()


def llama_index() -> None:
    """LlamaIndex's classes."""
    reranker = KalmRerank(model="mini", top_n=5, score_threshold=0.5, metadata_mode=MetadataMode.NONE, options=None)
    nodes = [NodeWithScore(node=TextNode(text="one"), score=0.5)]
    query: QueryBundle = KalmQueryBundle("query", instruction="Find code.", top_n=2)
    found = reranker.postprocess_nodes(nodes, query_bundle=query)
    print(found[0].score, reranker.warm(nodes).new, LlamaIndexEncoder(model="mini")([TextNode(text="one")]))
    reranker.close()


def haystack() -> None:
    """Haystack's components."""
    ranker = KalmRanker(
        model="mini",
        top_k=5,
        device=ComponentDevice.from_str("cpu"),
        token=Secret.from_env_var("HF_TOKEN", strict=False),
    )
    found: list[HaystackDocument] = ranker.run(query="query", documents=[HaystackDocument(content="one")])["documents"]
    encoder = HaystackEncoder(model="mini", options={"batch_tokens": 4096})
    pipeline = Pipeline()
    pipeline.add_component("encoder", encoder)
    pipeline.add_component("ranker", ranker)
    data: dict[str, Any] = ranker.to_dict()
    print(found, data)
    ranker.close()
