"""What all three adapters promise with `server=`: the local model's results, no torch, no key in a file."""

from __future__ import annotations

import asyncio
import logging
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from adapterkit import QUERY, TEXTS
from haystack import Document as HaystackDocument
from haystack_integrations.components.rankers.kalm import KalmRanker
from langchain_core.documents import Document as LangChainDocument
from langchain_kalm import KalmCrossEncoder, KalmReranker
from llama_index.postprocessor.kalm_rerank import KalmRerank
from servedkit import free_port, served
from test_all_adapters import ADAPTERS, Adapter

from kalm_rag import KaLMReranker, RerankerClient
from kalm_rag.adapters import HIT_KEYS
from kalm_rag.errors import ServerError, ServerUnavailableError

KEY = "a-key-of-a-horse-and-more"
AWAY = {"server_retries": 0, "server_timeout": 5.0}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with served(tmp_path_factory.mktemp("served"), key=KEY) as found:
        yield found


@pytest.fixture(scope="module")
def local() -> Iterator[KaLMReranker]:
    with KaLMReranker("mini", device="cpu", cache=None, show_progress=False) as found:
        yield found


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KALM_RAG_API_KEY", KEY)


def plain(make: Any) -> Any:
    """A class of Haystack without the device that other tests give it."""
    return KalmRanker if make is ADAPTERS["haystack"].make else make


@pytest.fixture(params=ADAPTERS)
def adapter(request: pytest.FixtureRequest) -> Adapter:
    return ADAPTERS[request.param]


def texts_of(documents: list[Any]) -> list[str]:
    found = [getattr(document, "node", document) for document in documents]
    return [getattr(one, "page_content", None) or getattr(one, "content", None) or one.text for one in found]


def test_the_scores_of_the_local_model(adapter: Adapter, url: str, local: KaLMReranker) -> None:
    texts = [*TEXTS, "half a \ud83d pair", "a long passage " * 1500]
    documents = adapter.documents(texts)
    made = plain(adapter.make)(model="mini", server=url)
    found = adapter.rank(made, documents)
    wanted = local.rank(QUERY, documents)
    assert texts_of(found) == [texts[hit.index] for hit in wanted]
    for document, hit in zip(found, wanted, strict=True):
        metadata = adapter.metadata(document)
        assert set(metadata) - {"relevance_score"} == {"mine", *HIT_KEYS}
        score = metadata.get("relevance_score", getattr(document, "score", None))
        assert (score, metadata["relevance_margin"]) == pytest.approx((hit.score, hit.margin), abs=1e-5)
        names = ("passage_truncated", "query_truncated", "passage_repaired", "query_repaired")
        assert [metadata[name] for name in names] == [getattr(hit, name) for name in names]
    assert isinstance(made.reranker, RerankerClient)
    assert made.forget(documents).texts == len(texts)
    made.close()
    assert len(adapter.rank(made, documents)) == len(texts), "the next use connects again"


def test_calls_without_blocking(url: str) -> None:
    documents = [LangChainDocument(page_content=text) for text in TEXTS]
    ranked = asyncio.run(KalmReranker(model="mini", server=url, top_n=2).acompress_documents(documents, QUERY))
    assert len(ranked) == 2
    nodes = ADAPTERS["llama-index"].documents(TEXTS)
    found = asyncio.run(KalmRerank(model="mini", server=url, top_n=2).apostprocess_nodes(nodes, query_str=QUERY))
    assert len(found) == 2
    ranker = KalmRanker(model="mini", server=url, top_k=2)
    asyncio.run(ranker.warm_up_async())
    given = [HaystackDocument(content=text) for text in TEXTS]
    assert len(asyncio.run(ranker.run_async(query=QUERY, documents=given))["documents"]) == 2


def test_pairs_and_encoding(url: str, local: KaLMReranker) -> None:
    pairs = [(QUERY, text) for text in TEXTS]
    scores = KalmCrossEncoder(model="mini", server=url).score(pairs)
    assert scores == pytest.approx(local.predict(pairs), abs=1e-5)
    encoder = ADAPTERS["langchain"].others[1](model="mini", server=url)
    documents = [LangChainDocument(page_content="only of this test")]
    assert encoder.transform_documents(documents) == documents
    assert encoder.forget(documents).total >= 1


def test_equal_arguments_share_a_client(adapter: Adapter, url: str) -> None:
    make = plain(adapter.make)
    first, second = make(model="mini", server=url), make(model="mini", server=f"{url}/")
    assert first == second
    assert first.reranker is second.reranker
    assert first.reranker is not make(model="mini", server=url, options={"server_retries": 1}).reranker
    assert first != make(model="mini", server="http://127.0.0.1:1")


def test_it_survives_a_file_and_a_pickle(adapter: Adapter, url: str) -> None:
    made = plain(adapter.make)(model="mini", server=url, options={"server_timeout": 7.0, "server_on_failure": "raise"})
    for other in (adapter.saved(made), pickle.loads(pickle.dumps(made))):
        assert other == made
        assert other.reranker is made.reranker


def test_keys_stay_out_of_files_words_and_logs(
    adapter: Adapter, url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.delenv("KALM_RAG_API_KEY")
    made = plain(adapter.make)(model="mini", server=url, options={"server_api_key": KEY})
    assert len(adapter.rank(made, adapter.documents(TEXTS))) == len(TEXTS)
    for shown in (repr(made), str(made), repr(made.options), repr(made.reranker)):
        assert "horse" not in shown
    with pytest.raises(Exception, match="set KALM_RAG_API_KEY in the environment") as error:
        adapter.saved(made)
    assert "horse" not in str(error.value)
    with pytest.raises(ServerError, match="asks for a key"):
        adapter.rank(plain(adapter.make)(model="mini", server=url), adapter.documents(TEXTS))
    wrong = plain(adapter.make)(model="mini", server=url, options={"server_api_key": "another-horse"})
    with pytest.raises(ServerError, match="the one that was given is not accepted") as refused:
        adapter.rank(wrong, adapter.documents(TEXTS))
    assert "horse" not in str(refused.value)
    assert caplog.text
    assert "horse" not in caplog.text


def test_a_server_that_is_away(adapter: Adapter, caplog: pytest.LogCaptureFixture) -> None:
    address = f"http://127.0.0.1:{free_port()}"
    documents = adapter.documents(TEXTS)
    with pytest.raises(ServerUnavailableError, match="cannot be reached"):
        adapter.rank(plain(adapter.make)(model="mini", server=address, options=AWAY), documents)
    made = plain(adapter.make)(model="mini", server=address, options={**AWAY, "server_on_failure": "keep-order"})
    with caplog.at_level(logging.WARNING, "kalm_rag.client"):
        found = adapter.rank(made, documents)
    assert texts_of(found) == TEXTS
    assert [adapter.metadata(document)["relevance_scored"] for document in found] == [False] * len(TEXTS)
    assert "keep their order and have no score" in caplog.text


def test_another_model(adapter: Adapter, url: str) -> None:
    with pytest.raises(ServerError, match="has the model 'mini' .* got model='nano'"):
        adapter.rank(plain(adapter.make)(server=url), adapter.documents(TEXTS))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"server": 7}, "server must be a string"),
        ({"server": "localhost"}, "server must be an address"),
        ({"server": "http://me:horse@localhost"}, "without a user"),
        ({"server": "http://a", "revision": "main"}, "revision does not apply with server="),
        ({"server": "http://a", "lora": "folder"}, "lora does not apply with server="),
        ({"server": "http://a", "cache": None}, "cache does not apply with server="),
        ({"server": "http://a", "keep": "prefilled"}, "keep does not apply with server="),
        ({"server": "http://a", "dtype": "float32"}, "dtype does not apply with server="),
        ({"server": "http://a", "max_length": 7}, "max_length does not apply with server="),
        ({"server": "http://a", "options": {"batch_size": 3}}, "options.batch_size does not apply with server="),
        ({"server": "http://a", "options": {"cache_memory": 3}}, "options.cache_memory does not apply with server="),
        ({"options": {"server_retries": 1}}, "options.server_retries applies only with server="),
        ({"server": "http://a", "options": {"server_retries": -1}}, "server_retries must be"),
        ({"server": "http://a", "options": {"server_timeout": 0}}, "server_timeout must be above 0 seconds"),
        ({"server": "http://a", "options": {"server_on_failure": "no"}}, "server_on_failure must be one of"),
        ({"server": "http://a", "options": {"server_api_key": "a horse"}}, "server_api_key must be a key of visible"),
    ],
)
def test_wrong_arguments(adapter: Adapter, given: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError)) as error:
        plain(adapter.make)(**given)
    assert message in str(error.value)
    assert "horse" not in str(error.value)


PROGRAMS = {
    "langchain": """
from langchain_core.documents import Document
from langchain_kalm import KalmReranker
found = KalmReranker(model="mini", server=url).compress_documents([Document(page_content="a")], "b")
""",
    "llama-index": """
from llama_index.core.schema import NodeWithScore, TextNode
from llama_index.postprocessor.kalm_rerank import KalmRerank
found = KalmRerank(model="mini", server=url).postprocess_nodes([NodeWithScore(node=TextNode(text="a"))], query_str="b")
""",
    "haystack": """
from haystack import Document
from haystack_integrations.components.rankers.kalm import KalmRanker
ranker = KalmRanker(model="mini", server=url)
ranker.warm_up()
found = ranker.run(query="b", documents=[Document(content="a")])["documents"]
""",
}


@pytest.mark.parametrize("framework", PROGRAMS)
def test_torch_is_not_needed(framework: str, url: str) -> None:
    program = f"import sys\nsys.modules['torch'] = sys.modules['transformers'] = None\nurl = {url!r}\n"
    program += PROGRAMS[framework] + "assert len(found) == 1\nassert sys.modules['torch'] is None\n"
    path = os.pathsep.join([entry for entry in sys.path if entry and Path(entry).is_dir()])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def test_what_the_documentation_says_of_waiting() -> None:
    from kalm_rag.client import connection, exchange
    from kalm_rag.utils import breaker

    pages = (Path(__file__).parents[1] / "docs/frameworks/index.md").read_text("utf-8"), RerankerClient.__doc__ or ""
    page, text = (" ".join(page.split()) for page in pages)
    assert (breaker._FAILURES, connection._LEFT_ALONE, exchange._CONNECT_SECONDS) == (3, 5.0, 5.0)
    assert "After three calls in a row that found the server away" in page
    assert "every 5 seconds at most one of them tries the server again" in page
    assert "connecting may take 5 seconds an attempt" in page
    assert (connection._FIRST_PAUSE, connection._LONGEST_PAUSE) == (0.25, 5.0)
    assert "from a quarter of a second to 5 seconds" in text
    assert sorted(exchange._AWAY) == [408, 429, 502, 503, 504]
    assert "answers 408, 429, 502, 503 or 504" in page
