"""What all three adapters promise alike: options, what a result says, equality, closing, and ranking of documents."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from adapterkit import MODES, QUERY, TEXTS
from haystack import Document as HaystackDocument
from haystack import Pipeline
from haystack.utils import ComponentDevice
from haystack_integrations.components.rankers.kalm import KalmPassageEncoder as HaystackEncoder
from haystack_integrations.components.rankers.kalm import KalmRanker
from langchain_core.documents import Document as LangChainDocument
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_kalm import KalmCachingEmbeddings, KalmCrossEncoder, KalmReranker
from langchain_kalm import KalmPassageEncoder as LangChainEncoder
from llama_index.core.schema import MetadataMode, NodeWithScore, TextNode
from llama_index.postprocessor.kalm_rerank import KalmPassageEncoder as LlamaIndexEncoder
from llama_index.postprocessor.kalm_rerank import KalmQueryBundle, KalmRerank
from lorakit import write_lora
from thresholdkit import make_profile

from kalm_rag import KaLMReranker, Options, PassageCache, ThresholdProfile
from kalm_rag.adapters import HIT_KEYS

CHANGED: dict[str, Any] = {
    "query_max_length": 5,
    "system_prompt": "Judge the Document.",
    "batch_size": 3,
    "batch_tokens": 999,
    "control_tokens": "allow",
    "prefill_memory": 123_456,
    "prefill_storage": "int8",
    "score_memory": 654_321,
    "refine": True,
    "long_passages": "windows",
    "window_tokens": 100,
    "window_overlap": 10,
    "max_windows": 5,
    "encode_in_background": False,
    "show_progress": False,
    "local_files_only": True,
    "cache_memory": 1_000_000,
    "cache_limit": 5_000_000,
    "cache_base_ratio": 2,
    "cache_storage": "int8",
    "cache_read_only": False,
    "cache_remote": "file:///nowhere/shared",
    "cache_remote_mode": "read",
    "cache_remote_timeout_ms": 250.0,
    "cache_remote_prefilled": True,
    "cache_namespace": "tenant-7",
    "cache_unauthenticated": True,
}
"""A value that is not the default for every option that can be written to a file."""


@dataclass(frozen=True)
class Adapter:
    """One framework's reranker, and how a test speaks to it."""

    make: Callable[..., Any]
    documents: Callable[[Sequence[str]], list[Any]]
    rank: Callable[..., list[Any]]
    metadata: Callable[[Any], dict[str, Any]]
    saved: Callable[[Any], Any]
    """The adapter after a way through a file."""
    others: tuple[Callable[..., Any], ...]
    """Further classes that take the same arguments."""


def rank_haystack(adapter: KalmRanker, documents: list[HaystackDocument]) -> list[HaystackDocument]:
    return list(adapter.run(query=QUERY, documents=documents)["documents"])


def through_yaml(adapter: KalmRanker) -> KalmRanker:
    pipeline = Pipeline()
    pipeline.add_component("ranker", type(adapter).from_dict(adapter.to_dict()))
    found = Pipeline.loads(pipeline.dumps()).get_component("ranker")
    assert isinstance(found, KalmRanker)
    return found


def on_haystack(make: Callable[..., Any]) -> Callable[..., Any]:
    return lambda **given: make(**{**given, "device": ComponentDevice.from_str("cpu")}, token=None)


ADAPTERS = {
    "langchain": Adapter(
        make=lambda **given: KalmReranker(**given, top_n=None),
        documents=lambda texts: [LangChainDocument(page_content=text, metadata={"mine": 1}) for text in texts],
        rank=lambda adapter, documents: list(adapter.compress_documents(documents, QUERY)),
        metadata=lambda document: document.metadata,
        saved=lambda adapter: KalmReranker.model_validate_json(adapter.model_dump_json()),
        others=(
            KalmCrossEncoder,
            LangChainEncoder,
            lambda **given: KalmCachingEmbeddings(**given, embeddings=EMBEDDINGS),
        ),
    ),
    "llama-index": Adapter(
        make=lambda **given: KalmRerank(**given, top_n=None),
        documents=lambda texts: [
            NodeWithScore(node=TextNode(text=text, metadata={"mine": 1}), score=0.5) for text in texts
        ],
        rank=lambda adapter, documents: adapter.postprocess_nodes(documents, query_str=QUERY),
        metadata=lambda node: node.node.metadata,
        saved=lambda adapter: KalmRerank.from_json(adapter.to_json()),
        others=(LlamaIndexEncoder,),
    ),
    "haystack": Adapter(
        make=on_haystack(KalmRanker),
        documents=lambda texts: [
            HaystackDocument(id=str(number), content=text, meta={"mine": 1}) for number, text in enumerate(texts)
        ],
        rank=rank_haystack,
        metadata=lambda document: document.meta,
        saved=through_yaml,
        others=(on_haystack(HaystackEncoder),),
    ),
}
EMBEDDINGS = DeterministicFakeEmbedding(size=4)


@pytest.fixture(params=ADAPTERS)
def adapter(request: pytest.FixtureRequest) -> Adapter:
    return ADAPTERS[request.param]


@pytest.fixture
def given(options: dict[str, Any]) -> dict[str, Any]:
    return {**options, "model": str(options["model"]), "cache": str(options["cache"])}


def check_options(reranker: KaLMReranker) -> None:
    """Every option arrived where it acts."""
    arguments = reranker._arguments
    cache = reranker.cache._arguments
    for name, value in CHANGED.items():
        found = cache[name.removeprefix("cache_")] if name.startswith("cache_") else arguments[name]
        assert found == value, name


def test_every_option_is_tried() -> None:
    names = {option.name for option in dataclasses.fields(Options)}
    of_a_server = {name for name in names if name.startswith("server_")}  # see test_adapters_server.py
    assert names == {*CHANGED, *of_a_server, "token", "cache_secret"}
    assert len(of_a_server) == 4
    default = Options()
    same = [name for name, value in CHANGED.items() if value == getattr(default, name)]
    assert same == ["cache_read_only"], "a read-only folder must exist"


@pytest.mark.parametrize("form", [dict, lambda given: Options(**given)], ids=["mapping", "Options"])
def test_options_reach_scorer_and_cache(adapter: Adapter, given: dict[str, Any], form: Any) -> None:
    for make in (adapter.make, *adapter.others):
        made = make(**given, options=form(CHANGED))
        check_options(made.reranker)
        assert isinstance(made.options, Options)


def test_options_survive_a_file(adapter: Adapter, given: dict[str, Any]) -> None:
    first = adapter.make(**given, options=CHANGED)
    second = adapter.saved(first)
    check_options(second.reranker)
    assert second.reranker is first.reranker
    assert adapter.saved(adapter.make(**given)).options == Options()


def test_credentials_stay_out_of_files_and_words(adapter: Adapter, given: dict[str, Any]) -> None:
    wanted = {"cache_secret": "correct horse battery staple"}
    if adapter is ADAPTERS["haystack"]:
        with pytest.raises(ValueError, match="token does not apply here; give token= a Secret"):
            adapter.make(**given, options={"token": "hf_horse"})
    else:
        wanted["token"] = "hf_horse"
    made = adapter.make(**given, options=wanted)
    assert "horse" not in repr(made.options)
    with_password = {"cache_remote": "redis://me:horse@localhost:1/0", "cache_unauthenticated": True}
    remote = adapter.make(**given, options=with_password)
    assert "horse" not in repr(remote) + str(remote) + repr(remote.reranker.cache)
    with pytest.raises(Exception, match=r"options\.cache_remote is a credential and is never serialised"):
        adapter.saved(remote)
    for text in (repr(made), str(made)):
        assert "horse" not in text
    with pytest.raises(Exception, match=r"options\.\w+ is a credential and is never serialised"):
        adapter.saved(made)
    if adapter is not ADAPTERS["haystack"]:
        data = made.to_dict() if hasattr(made, "to_dict") else made.model_dump()
        assert "horse" not in str(data)
        data.pop("class_name", None)
        assert type(made)(**data) == made, "what is handed on in a process still works"
    adapter.rank(made, adapter.documents(TEXTS))
    made.reranker.cache.flush()
    plain = KaLMReranker(given["model"], cache=given["cache"], device="cpu")
    plain.rank(QUERY, adapter.documents(TEXTS))
    assert plain.cache.stats().store.counters.hits == 5, "a cache without a secret reads tagged entries"
    other = KaLMReranker(given["model"], cache=PassageCache(given["cache"], secret="x" * 16), device="cpu")
    other.rank(QUERY, adapter.documents(TEXTS))
    assert other.cache.stats().store.counters.hits == 0, "the secret was in use"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"batch_sise": 3}, "unknown option 'batch_sise': did you mean 'batch_size'?"),
        ({"ratio": 3}, "unknown option 'ratio': it is an argument of its own"),
        ({"zzz": 3}, "unknown option 'zzz': known are batch_size, "),
        ({"batch_size": "3"}, "batch_size must be an integer, got '3'"),
        ({"batch_size": True}, "batch_size must be an integer, got True"),
        ({"batch_tokens": 0}, "batch_tokens must be at least 1, got 0"),
        ({"query_max_length": 1.5}, "query_max_length must be an integer"),
        ({"system_prompt": 7}, "system_prompt must be a string"),
        ({"control_tokens": "drop"}, "control_tokens must be one of"),
        ({"prefill_memory": -1}, "prefill_memory must be a number of bytes"),
        ({"prefill_memory": "1 GB"}, "or \"auto\" for a share of the free memory, got '1 GB'"),
        ({"score_memory": True}, "score_memory must be a number of bytes"),
        ({"prefill_storage": "int4"}, "prefill_storage must be one of"),
        ({"encode_in_background": 1}, "encode_in_background must be True or False"),
        ({"show_progress": "yes"}, "show_progress must be True or False"),
        ({"local_files_only": 1}, "local_files_only must be True or False"),
        ({"cache_memory": "1 GB"}, "cache_memory must be a number of bytes"),
        ({"cache_limit": 0}, "cache_limit must be at least 1"),
        ({"cache_base_ratio": 0}, "cache_base_ratio must be at least 1"),
        ({"cache_storage": None}, "cache_storage must be one of"),
        ({"cache_secret": "short"}, "cache_secret must have at least 16 bytes"),
        ({"cache_secret": 7}, "cache_secret must be a string or bytes"),
        ({"cache_read_only": "false"}, "cache_read_only must be True or False"),
        ({"cache_remote": "ftp://short"}, "cache_remote must be a URL that begins with one of redis://"),
        ({"cache_remote": 7}, "cache_remote must be a string"),
        ({"cache_remote_mode": "write"}, "cache_remote_mode must be one of"),
        ({"cache_remote_timeout_ms": 0}, "cache_remote_timeout_ms must be above 0 milliseconds"),
        ({"cache_remote_prefilled": 1}, "cache_remote_prefilled must be True or False"),
        ({"cache_namespace": "../x"}, "cache_namespace must be 1 to 64 letters"),
        ({"cache_unauthenticated": "no"}, "cache_unauthenticated must be True or False"),
        ({"token": 7}, "token must be a string"),
        (["batch_size"], "options must be a kalm_rag.Options or a mapping, got list"),
        ("batch_size", "options must be a kalm_rag.Options or a mapping, got str"),
    ],
)
def test_wrong_options_are_refused_at_construction(adapter: Adapter, wrong: Any, message: str) -> None:
    for make in (adapter.make, *adapter.others):
        with pytest.raises((ValueError, TypeError)) as error:
            make(options=wrong)
        assert message in str(error.value)
        assert "short" not in str(error.value)


def test_options_of_the_cache_need_a_folder(adapter: Adapter, given: dict[str, Any]) -> None:
    cache = PassageCache(given["cache"])
    with pytest.raises(ValueError, match=r"options\.cache_limit applies only when cache= is a folder or None"):
        adapter.make(**{**given, "cache": cache}, options={"cache_limit": 5_000_000})
    adapter.make(**{**given, "cache": cache}, options={"batch_size": 3})


def test_another_option_is_another_reranker_on_the_same_cache(adapter: Adapter, given: dict[str, Any]) -> None:
    first, second = adapter.make(**given), adapter.make(**given, options={"batch_size": 3})
    assert first.reranker is not second.reranker
    assert first.reranker.cache is second.reranker.cache
    adapter.rank(first, adapter.documents(TEXTS))
    adapter.rank(second, adapter.documents(TEXTS))
    assert first.reranker.cache.stats().encoded == len(TEXTS), "the second met what the first encoded"
    third = adapter.make(**given, options={"cache_memory": 0})
    assert third.reranker.cache is not first.reranker.cache


def test_a_result_says_what_was_not_read(adapter: Adapter, given: dict[str, Any]) -> None:
    texts = [*TEXTS, "half a \ud83d pair", "a long passage " * 40]
    documents = adapter.documents(texts)
    made = adapter.make(**{**given, "max_length": 40})
    found = adapter.rank(made, documents)
    for document in found:
        metadata = adapter.metadata(document)
        assert set(metadata) - {"relevance_score"} == {"mine", *HIT_KEYS}
    wanted = made.reranker.rank(QUERY, documents)
    assert [adapter.metadata(document)["relevance_margin"] for document in found] == pytest.approx(
        [hit.margin for hit in wanted], abs=1e-5
    )
    for name in HIT_KEYS[1:]:
        field = name.removeprefix("relevance_")
        field = "span" if name == "passage_span" else field
        assert [adapter.metadata(document)[name] for document in found] == [getattr(hit, field) for hit in wanted], name
    cut = [adapter.metadata(document)["passage_truncated"] for document in found]
    assert True in cut
    assert False in cut
    assert all(set(adapter.metadata(document)) == {"mine"} for document in documents), "the input is untouched"
    short = adapter.make(**given, options={"query_max_length": 2})
    assert all(adapter.metadata(document)["query_truncated"] for document in adapter.rank(short, documents))


def test_a_result_names_the_best_window_of_a_long_document(adapter: Adapter, given: dict[str, Any]) -> None:
    texts = [TEXTS[0], "It rained all day, and nobody went out. " * 30 + TEXTS[0]]
    made = adapter.make(**given, options={"long_passages": "windows", "window_tokens": 60})
    documents = adapter.documents(texts)
    wanted = [hit.span for hit in made.reranker.rank(QUERY, documents)]
    found = [adapter.metadata(document)["passage_span"] for document in adapter.rank(made, documents)]
    assert found == [None if span is None else list(span) for span in wanted]
    assert sorted(span is None for span in found) == [False, True]
    json.dumps(found)
    assert made.forget(documents).total >= 3


def test_what_a_result_says_is_no_text_of_the_next_ranking(adapter: Adapter, given: dict[str, Any]) -> None:
    made = adapter.make(**given)
    first = adapter.rank(made, adapter.documents(TEXTS))
    encoded = made.reranker.cache.stats().encoded
    again = adapter.rank(made, first)
    assert made.reranker.cache.stats().encoded == encoded
    for old, new in zip(first, again, strict=True):
        assert adapter.metadata(new) == pytest.approx(adapter.metadata(old), abs=1e-5)


def test_nodes_with_all_their_metadata_as_text(given: dict[str, Any]) -> None:
    made = KalmRerank(**given, top_n=None, metadata_mode=MetadataMode.ALL)
    first = made.postprocess_nodes(ADAPTERS["llama-index"].documents(TEXTS), query_str=QUERY)
    encoded = made.reranker.cache.stats().encoded
    again = made.postprocess_nodes(first, query_str=QUERY)
    assert made.reranker.cache.stats().encoded == encoded
    assert [node.score for node in again] == pytest.approx([node.score for node in first], abs=1e-5)


def test_equal_arguments_make_equal_adapters(adapter: Adapter, given: dict[str, Any]) -> None:
    for make in (adapter.make, *adapter.others):
        first, second = make(**given), make(**given, options={})
        assert first == second
        _ = first.reranker
        assert first == second, "what is loaded is not compared"
        assert first != make(**given, options={"batch_size": 3})
        assert first != make(**{**given, "model": "nano"})
        assert first != "another thing"
        assert make(**{**given, "cache": Path(given["cache"]), "model": Path(given["model"])}) == first


def test_closing_spares_what_another_uses(adapter: Adapter, given: dict[str, Any]) -> None:
    first, second = adapter.make(**given), adapter.make(**given)
    adapter.rank(first, adapter.documents(TEXTS[:2]))
    adapter.rank(second, adapter.documents(TEXTS[:2]))
    reranker = first.reranker
    assert second.reranker is reranker
    first.close()
    assert reranker._scorer is not None
    other = KaLMReranker(given["model"], cache=given["cache"], device="cpu")
    assert other.unknown(adapter.documents(TEXTS[:2])) == [], "closing wrote the cache out"
    second.close()
    assert reranker._scorer is None
    second.close()
    assert len(adapter.rank(first, adapter.documents(TEXTS[:2]))) == 2, "the next use loads again"


def test_documents_of_a_framework_are_ranked_as_they_are(adapter: Adapter, given: dict[str, Any]) -> None:
    documents = adapter.documents(TEXTS)
    made = adapter.make(**given)
    found = adapter.rank(made, documents)
    encoded = made.reranker.cache.stats().encoded
    ranking = made.reranker.rank(QUERY, documents)
    margins = [adapter.metadata(document)["relevance_margin"] for document in found]
    assert [hit.margin for hit in ranking] == pytest.approx(margins, abs=1e-5)
    assert all(hit.document is documents[hit.index] for hit in ranking)
    assert made.reranker.encode(documents).new == 0
    assert made.reranker.unknown(documents) == []
    assert made.reranker.cache.stats().encoded == encoded, "the text is the adapter's"
    with pytest.raises(TypeError, match="documents must be a list of passages, got one"):
        made.reranker.rank(QUERY, documents[0])


def test_an_adapter_of_the_model_is_part_of_the_arguments(
    adapter: Adapter, given: dict[str, Any], tmp_path: Path
) -> None:
    folder = write_lora(given["model"], tmp_path / "tuned", 0.05)
    plain, made = adapter.make(**given), adapter.make(**given, lora=folder)
    documents = adapter.documents(TEXTS)
    before, after = (
        sorted(adapter.metadata(document)["relevance_margin"] for document in adapter.rank(one, documents))
        for one in (plain, made)
    )
    wanted = KaLMReranker(given["model"], lora=folder, cache=None, device="cpu").rank(QUERY, documents)
    assert after == pytest.approx(sorted(hit.margin for hit in wanted), abs=1e-5)
    assert max(abs(one - other) for one, other in zip(before, after, strict=True)) > 1e-3
    assert plain.reranker is not made.reranker
    assert plain.reranker.cache is made.reranker.cache
    assert plain.reranker.cache.stats().encoded == len(TEXTS), "both use the same states"
    assert made != plain
    for same in (adapter.make(**given, lora=str(folder)), adapter.saved(made), pickle.loads(pickle.dumps(made))):
        assert same == made
        assert same.reranker is made.reranker
    for make in adapter.others:
        assert make(**given, lora=folder).reranker is made.reranker


@MODES
def test_what_a_document_left_is_forgotten(adapter: Adapter, given: dict[str, Any], mode: str) -> None:
    documents = adapter.documents(TEXTS)
    made = adapter.make(**given, keep="prefilled")
    adapter.rank(made, documents)
    made.reranker.cache.flush()
    if mode == "sync":
        report = made.forget(documents[:2])
    else:
        report = asyncio.run((getattr(made, "aforget", None) or made.forget_async)(documents[:2]))
    assert (report.texts, report.store.states, report.store.prefilled) == (2, 2, 2)
    assert (report.memory.states, report.memory.prefilled, report.memory.scores) == (2, 2, 2)
    assert len(made.reranker.unknown(documents)) == 2
    for make in adapter.others:  # what ingests documents forgets them too
        assert make(**given, keep="prefilled").forget(documents[2:3]).store.total == (
            2 if make is adapter.others[0] else 0
        )


def test_the_compact_form_is_read_from_the_folder(adapter: Adapter, given: dict[str, Any]) -> None:
    documents = adapter.documents(TEXTS)
    made = adapter.make(**given, keep="compact")
    adapter.rank(made, documents)
    made.reranker.cache.flush()
    reader = KaLMReranker(given["model"], cache=PassageCache(given["cache"], keep="compact", memory=0), device="cpu")
    reader.rank(QUERY, documents)
    assert reader.cache.stats().encoded == 0
    stats = reader.prefill_stats()
    assert stats is not None
    assert stats.counters.stored == len(TEXTS)


class TestBudgets:
    """A call that leaves documents out; those that the cache holds are known."""

    KNOWN = (1, 3)

    @pytest.fixture
    def known(self, adapter: Adapter, given: dict[str, Any]) -> dict[str, Any]:
        """Arguments of an adapter whose cache holds two of the documents and gets no more by itself."""
        documents = adapter.documents(TEXTS)
        plain = adapter.make(**given)
        plain.reranker.encode([documents[number] for number in self.KNOWN])
        plain.reranker.cache.flush()
        return {**given, "options": {"encode_in_background": False}}

    def test_what_was_not_reached_follows_without_a_score(self, adapter: Adapter, known: dict[str, Any]) -> None:
        documents = adapter.documents(TEXTS)
        found = adapter.rank(adapter.make(**known, on_unknown="skip"), documents)
        plain = KaLMReranker(known["model"], cache=None, device="cpu")
        wanted = plain.rank(QUERY, [documents[number] for number in self.KNOWN])
        assert [score_of(document) for document in found[:2]] == pytest.approx([hit.score for hit in wanted], abs=1e-5)
        assert [adapter.metadata(document)["relevance_margin"] for document in found[:2]] == pytest.approx(
            [hit.margin for hit in wanted], abs=1e-5
        )
        assert [text_of(document) for document in found[2:]] == [TEXTS[number] for number in (0, 2, 4)]
        for document in found[2:]:
            metadata = adapter.metadata(document)
            assert set(metadata) == {"mine", *HIT_KEYS}, "LangChain has no relevance_score"
            assert getattr(document, "score", None) is None
            assert {name for name in HIT_KEYS if metadata[name] is not None} == {
                "relevance_scored", "query_truncated", "passage_repaired", "query_repaired",
            }  # fmt: skip
        assert [adapter.metadata(document)["relevance_scored"] for document in found] == [True] * 2 + [False] * 3
        assert all(set(adapter.metadata(document)) == {"mine"} for document in documents), "the input is untouched"

    def test_nothing_of_an_earlier_ranking_is_left(
        self, adapter: Adapter, given: dict[str, Any], tmp_path: Path
    ) -> None:
        before = adapter.rank(adapter.make(**given), adapter.documents(TEXTS))
        elsewhere = {**given, "cache": str(tmp_path / "empty"), "options": {"encode_in_background": False}}
        found = adapter.rank(adapter.make(**elsewhere, on_unknown="skip"), before)
        assert [text_of(document) for document in found] == [text_of(document) for document in before]
        for document in found:
            assert set(adapter.metadata(document)) == {"mine", *HIT_KEYS}
            assert adapter.metadata(document)["relevance_margin"] is None
            assert getattr(document, "score", None) is None

    def test_a_threshold_does_not_cut_them_and_the_number_counts_them(
        self, adapter: Adapter, known: dict[str, Any]
    ) -> None:
        documents = adapter.documents(TEXTS)
        best = score_of(adapter.rank(adapter.make(**known, on_unknown="skip"), documents)[0])
        limited = adapter.make(**known, on_unknown="skip", score_threshold=best - 1e-5)
        found = adapter.rank(limited, documents)
        assert [adapter.metadata(document)["relevance_scored"] for document in found] == [True] + [False] * 3
        for name, made in first_three(known).items():
            ranked = ADAPTERS[name].rank(made, ADAPTERS[name].documents(TEXTS))
            assert len(ranked) == 3
            assert ADAPTERS[name].metadata(ranked[-1])["relevance_scored"] is False

    def test_a_budget(self, adapter: Adapter, given: dict[str, Any]) -> None:
        documents = adapter.documents(TEXTS)
        given = {**given, "options": {"encode_in_background": False, "score_memory": 0}}
        plain = adapter.rank(adapter.make(**given), documents)
        found = adapter.rank(adapter.make(**given, budget_ms=60_000_000), documents)
        assert [score_of(document) for document in found] == pytest.approx(
            [score_of(document) for document in plain], abs=1e-5
        )
        found = adapter.rank(adapter.make(**given, budget_ms=1e-6), documents)
        assert [text_of(document) for document in found] == TEXTS
        assert not any(adapter.metadata(document)["relevance_scored"] for document in found)

    def test_they_survive_a_file(self, adapter: Adapter, known: dict[str, Any]) -> None:
        made = adapter.make(**known, budget_ms=250, on_unknown="skip")
        for same in (adapter.saved(made), pickle.loads(pickle.dumps(made))):
            assert same == made
            assert (same.budget_ms, same.on_unknown) == (250.0, "skip")
            assert type(same.budget_ms) is float
        default = adapter.saved(adapter.make(**known))
        assert (default.budget_ms, default.on_unknown) == (None, None)
        assert default != made

    @MODES
    def test_for_one_call(self, adapter: Adapter, known: dict[str, Any], mode: str) -> None:
        documents = adapter.documents(TEXTS)
        made = adapter.make(**known)
        for options, scored in (({"on_unknown": "skip"}, 2), ({"budget_ms": 1e-6}, 0), ({}, 5)):
            query = f"{QUERY} {scored}"  # no score is remembered
            found: Any
            if isinstance(made, KalmReranker):
                step, call = made.as_runnable(), {"query": query, "documents": documents, **options}
                found = step.invoke(call) if mode == "sync" else asyncio.run(step.ainvoke(call))
            elif isinstance(made, KalmRerank):
                bundle: Any = KalmQueryBundle(query, **options)
                found = (
                    made.postprocess_nodes(documents, bundle)
                    if mode == "sync"
                    else asyncio.run(made.apostprocess_nodes(documents, bundle))
                )
            else:
                run = made.run if mode == "sync" else lambda *given, **more: asyncio.run(made.run_async(*given, **more))
                found = run(query, documents, **options)["documents"]
            flags = [adapter.metadata(document)["relevance_scored"] for document in found]
            assert flags == [True] * scored + [False] * (5 - scored)

    @pytest.mark.parametrize("wrong", [0, -5, float("nan"), float("inf"), "100", True, [1]])
    def test_what_is_no_budget(self, adapter: Adapter, wrong: Any) -> None:
        with pytest.raises((ValueError, TypeError), match=r"budget_ms must be (above 0 mill|a number|a finite number)"):
            adapter.make(budget_ms=wrong)

    @pytest.mark.parametrize("wrong", ["drop", "", 1, True])
    def test_what_is_no_way(self, adapter: Adapter, wrong: Any) -> None:
        with pytest.raises((ValueError, TypeError), match=r"on_unknown must be one of \('wait', 'skip'\), got"):
            adapter.make(on_unknown=wrong)


def first_three(given: dict[str, Any]) -> dict[str, Any]:
    """Adapters that return three documents, of which two are known."""
    given = {**given, "on_unknown": "skip"}
    return {
        "langchain": KalmReranker(**given, top_n=3),
        "llama-index": KalmRerank(**given, top_n=3),
        "haystack": on_haystack(KalmRanker)(**given, top_k=3),
    }


def text_of(document: Any) -> str:
    """The content without metadata."""
    if isinstance(document, LangChainDocument):
        return document.page_content
    return str(document.node.text if isinstance(document, NodeWithScore) else document.content)


class TestThresholds:
    @pytest.fixture
    def file(self, adapter: Adapter, given: dict[str, Any], tmp_path: Path) -> Path:
        """A profile that lets 2 of the adapter's texts through."""
        return profile_of(adapter, given).save(tmp_path / "p.json")

    def test_a_number_a_profile_and_its_path(self, adapter: Adapter, given: dict[str, Any], file: Path) -> None:
        documents, profile = adapter.documents(TEXTS), ThresholdProfile.load(file)
        plain = adapter.rank(adapter.make(**given), documents)
        margins = [adapter.metadata(document)["relevance_margin"] for document in plain[:2]]
        for threshold in (profile, file, str(file), profile.score):
            found = adapter.rank(adapter.make(**given, score_threshold=threshold), documents)
            assert [adapter.metadata(document)["relevance_margin"] for document in found] == pytest.approx(
                margins, abs=1e-5
            )
        made = adapter.make(**given, score_threshold=file, calibrated=True)
        found = adapter.rank(made, documents)
        assert [score_of(document) for document in found] == pytest.approx(
            [profile.calibrated(margin) for margin in margins], abs=1e-5
        )
        assert [score_of(document) for document in plain[:2]] != pytest.approx(
            [score_of(one) for one in found], abs=1e-5
        )
        for same in (adapter.saved(made), pickle.loads(pickle.dumps(made))):
            assert same == made
            assert len(adapter.rank(same, documents)) == 2

    def test_what_is_no_threshold_of_this_model(
        self, adapter: Adapter, given: dict[str, Any], file: Path, tmp_path: Path
    ) -> None:
        documents = adapter.documents(TEXTS)
        with pytest.raises(Exception, match="was made for ratio 4, not 8"):
            adapter.rank(adapter.make(**given, ratio=8, score_threshold=file), documents)
        with pytest.raises(Exception, match="was made for the instruction 'Given a query.*, not 'Find code"):
            adapter.rank(adapter.make(**given, instruction="Find code.", score_threshold=file), documents)
        with pytest.raises(Exception, match="was made for the model with digest 0123456789ab"):
            adapter.rank(adapter.make(**given, score_threshold=make_profile()), documents)
        with pytest.raises(Exception, match="calibrated=True needs a threshold profile"):
            adapter.rank(adapter.make(**given, score_threshold=0.5, calibrated=True), documents)
        with pytest.raises(Exception, match=r"score_threshold must be .*got '.*none\.json', and there is no such file"):
            adapter.make(**given, score_threshold=tmp_path / "none.json")
        with pytest.raises(Exception, match="calibrated must be True or False, got 1"):
            adapter.make(**given, calibrated=1)
        with pytest.raises(Exception, match="it is an argument of its own, outside of options"):
            adapter.make(**given, options={"calibrated": True})
        file.write_text(file.read_text().replace("0.95", "0.96"))
        with pytest.raises(Exception, match=r"p\.json' is not a valid threshold profile .its content was changed"):
            adapter.make(**given, score_threshold=file)

    def test_a_profile_without_a_path_is_not_saved(self, adapter: Adapter, given: dict[str, Any]) -> None:
        made = adapter.make(**given, score_threshold=make_profile())
        with pytest.raises(Exception, match=r"only a number or the path of a profile can be serialised .*save\(path\)"):
            adapter.saved(made)

    def test_for_one_call(self, given: dict[str, Any], tmp_path: Path) -> None:
        profiles = {name: profile_of(adapter, given) for name, adapter in ADAPTERS.items()}
        files = {name: profile.save(tmp_path / name) for name, profile in profiles.items()}
        documents = {name: adapter.documents(TEXTS) for name, adapter in ADAPTERS.items()}
        chain = KalmReranker(**given, top_n=None).as_runnable()
        call = {"query": QUERY, "documents": documents["langchain"], "calibrated": True}
        bundle = KalmQueryBundle(QUERY, score_threshold=files["llama-index"], calibrated=True)
        ranker = on_haystack(KalmRanker)(**given)
        found = {
            "langchain": chain.invoke({**call, "score_threshold": files["langchain"]}),
            "llama-index": KalmRerank(**given, top_n=None).postprocess_nodes(documents["llama-index"], bundle),
            "haystack": ranker.run(QUERY, documents["haystack"], score_threshold=files["haystack"], calibrated=True)[
                "documents"
            ],
        }
        for name, ranked in found.items():
            margins = [ADAPTERS[name].metadata(document)["relevance_margin"] for document in ranked]
            assert [score_of(document) for document in ranked] == pytest.approx(
                [profiles[name].calibrated(margin) for margin in margins], abs=1e-5
            )
            assert len(ranked) == 2


def profile_of(adapter: Adapter, given: dict[str, Any]) -> ThresholdProfile:
    """A profile that lets 2 of the adapter's texts through."""
    made, documents = adapter.make(**given), adapter.documents(TEXTS)
    margins = [adapter.metadata(document)["relevance_margin"] for document in adapter.rank(made, documents)]
    return make_profile(made.reranker.scorer.identity.mark, (margins[1] + margins[2]) / 2)


def score_of(document: Any) -> float:
    """The score where the framework has it."""
    found = document.metadata["relevance_score"] if isinstance(document, LangChainDocument) else document.score
    assert isinstance(found, float)
    return found


def test_settings_of_one_query_in_llama_index(given: dict[str, Any]) -> None:
    made, nodes = KalmRerank(**given, top_n=None), ADAPTERS["llama-index"].documents(TEXTS)
    texts = [node.node.get_content(MetadataMode.EMBED) for node in nodes]
    wanted = made.reranker.rank(QUERY, texts, instruction="Find code.")
    bundle = KalmQueryBundle(QUERY, instruction="Find code.", top_n=2)
    found = made.postprocess_nodes(nodes, query_bundle=bundle)
    assert [node.score for node in found] == pytest.approx([hit.score for hit in wanted[:2]], abs=1e-5)
    cut = wanted[1].score - 1e-5
    for reranker, query in (
        (made, KalmQueryBundle(QUERY, instruction="Find code.", score_threshold=cut)),
        (KalmRerank(**given, score_threshold=cut, instruction="Find code."), KalmQueryBundle(QUERY)),
    ):
        assert len(reranker.postprocess_nodes(nodes, query_bundle=query)) == 2
    for wrong in ({"top_n": True}, {"score_threshold": 50}, {"instruction": 7}):
        with pytest.raises((ValueError, TypeError), match=f"{next(iter(wrong))} must be"):
            made.postprocess_nodes(nodes, query_bundle=KalmQueryBundle(QUERY, **wrong))


def test_the_page_lists_every_argument_and_its_default() -> None:
    page = (Path(__file__).parent.parent / "docs" / "frameworks" / "index.md").read_text("utf-8")
    rows = {
        cells[0].strip().strip("`"): cells[1].strip().strip("`")
        for cells in (line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| `"))
        if len(cells) > 1
    }
    for option in dataclasses.fields(Options):
        default = option.default
        shown = "the model cards'" if option.name == "system_prompt" else json.dumps(default)
        assert rows[option.name].replace("\u2009", "") == shown, option.name
