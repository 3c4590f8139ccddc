"""The clients that are tried against `kalm-rag serve`, as their users set them up. Nothing here imports kalm_rag.

Each client is imported where it is called, because not all of them can be installed side by side. The documentation has
the same table, and a test compares the two.
"""

from __future__ import annotations

import json
import subprocess
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
COHERE_5, COHERE_7, NODE = "cohere5", "cohere7", "node"
"""Environments. LangChain and LlamaIndex need a version of cohere before 6, the others run with the newest."""
MODEL = "kalm"

Found = list[tuple[int, float]]
Rank = Callable[[str, str, str, Sequence[str], int], Found]
"""Takes URL and key of a server, query, documents and top_n; returns places of documents with scores, best first."""


@dataclass(frozen=True)
class Client:
    """A client.

    Attributes:
        name: in the documentation.
        package: that its version is of.
        environments: that have it.
        setting: what its user writes to reach `http://HOST:8000`, in the documentation.
        path: where its requests go.
        rank: ranks with it.
        margins: whether its scores are margins; else they are P(yes).
        tries: how often it asks a server whose queue is full before it gives up.
        shows: what its user sees of an error instead of the server's text, by kind: `key`, `many` or `busy`.
    """

    name: str
    package: str
    environments: tuple[str, ...]
    setting: str
    path: str
    rank: Rank
    margins: bool = False
    tries: int = 1
    shows: Mapping[str, str] = field(default_factory=dict)


def _results(response: Any) -> Found:
    return [(result.index, result.relevance_score) for result in response.results]


def _cohere_v2(url: str, key: str, query: str, documents: Sequence[str], top_n: int) -> Found:
    import cohere

    client = cohere.ClientV2(api_key=key, base_url=url)
    return _results(client.rerank(model=MODEL, query=query, documents=documents, top_n=top_n))


def _cohere_v1(url: str, key: str, query: str, documents: Sequence[str], top_n: int) -> Found:
    import cohere

    client = cohere.Client(api_key=key, base_url=url)
    return _results(client.rerank(model=MODEL, query=query, documents=documents, top_n=top_n, return_documents=True))


def _langchain(compressor: Any, query: str, documents: Sequence[str]) -> Found:
    from langchain_core.documents import Document

    given = [Document(page_content=text, metadata={"place": place}) for place, text in enumerate(documents)]
    found = compressor.compress_documents(given, query)
    return [(hit.metadata["place"], hit.metadata["relevance_score"]) for hit in found]


def _langchain_cohere(url: str, key: str, query: str, documents: Sequence[str], top_n: int) -> Found:
    from langchain_cohere import CohereRerank

    return _langchain(CohereRerank(base_url=url, cohere_api_key=key, model=MODEL, top_n=top_n), query, documents)


def _langchain_jina(url: str, key: str, query: str, documents: Sequence[str], top_n: int) -> Found:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of langchain-community itself
        from langchain_community.document_compressors import jina_rerank

    jina_rerank.JINA_API_URL = f"{url}/v1/rerank"
    return _langchain(jina_rerank.JinaRerank(jina_api_key=key, model=MODEL, top_n=top_n), query, documents)


def _langchain_nvidia(url: str, key: str, query: str, documents: Sequence[str], top_n: int) -> Found:
    from langchain_nvidia_ai_endpoints import NVIDIARerank

    return _langchain(NVIDIARerank(base_url=f"{url}/v1", api_key=key, model=MODEL, top_n=top_n), query, documents)


def _llama_index(postprocessor: Any, query: str, documents: Sequence[str]) -> Found:
    from llama_index.core.schema import NodeWithScore, TextNode

    nodes = [NodeWithScore(node=TextNode(text=text, id_=str(place))) for place, text in enumerate(documents)]
    return [(int(hit.node.id_), hit.score) for hit in postprocessor.postprocess_nodes(nodes, query_str=query)]


def _llama_index_cohere(url: str, key: str, query: str, documents: Sequence[str], top_n: int) -> Found:
    from llama_index.postprocessor.cohere_rerank import CohereRerank

    # By default it asks ten times, with at least 4 seconds between them, each time as often as cohere's client does.
    reranker = CohereRerank(base_url=url, api_key=key, model=MODEL, top_n=top_n, max_retries=2)
    return _llama_index(reranker, query, documents)


def _llama_index_jina(url: str, key: str, query: str, documents: Sequence[str], top_n: int) -> Found:
    from llama_index.postprocessor.jinaai_rerank import JinaRerank

    return _llama_index(JinaRerank(base_url=f"{url}/v1", api_key=key, model=MODEL, top_n=top_n), query, documents)


def _llama_index_tei(url: str, key: str, query: str, documents: Sequence[str], top_n: int) -> Found:
    from llama_index.postprocessor.tei_rerank import TextEmbeddingInference

    reranker = TextEmbeddingInference(base_url=url, auth_token=f"Bearer {key}", top_n=top_n)
    return _llama_index(reranker, query, documents)


def _llama_index_nvidia(url: str, key: str, query: str, documents: Sequence[str], top_n: int) -> Found:
    from llama_index.postprocessor.nvidia_rerank import NVIDIARerank

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it takes the server's only model
        reranker = NVIDIARerank(base_url=f"{url}/v1", api_key=key, top_n=top_n)
    return _llama_index(reranker, query, documents)


def _haystack(ranker: Any, query: str, documents: Sequence[str]) -> Found:
    from haystack import Document

    given = [Document(content=text, id=str(place)) for place, text in enumerate(documents)]
    return [(int(hit.id), hit.score) for hit in ranker.run(query=query, documents=given)["documents"]]


def _haystack_cohere(url: str, key: str, query: str, documents: Sequence[str], top_n: int) -> Found:
    from haystack.utils import Secret
    from haystack_integrations.components.rankers.cohere import CohereRanker

    ranker = CohereRanker(api_base_url=url, api_key=Secret.from_token(key), model=MODEL, top_k=top_n)
    return _haystack(ranker, query, documents)


def _haystack_jina(url: str, key: str, query: str, documents: Sequence[str], top_n: int) -> Found:
    from haystack.utils import Secret
    from haystack_integrations.components.rankers.jina import JinaRanker

    ranker = JinaRanker(base_url=f"{url}/v1/rerank", api_key=Secret.from_token(key), model=MODEL, top_k=top_n)
    return _haystack(ranker, query, documents)


def _litellm(provider: str, base: str = "") -> Rank:
    """Return how to rank with a provider's name, and what follows the server's address."""

    def rank(url: str, key: str, query: str, documents: Sequence[str], top_n: int) -> Found:
        import litellm

        asked = {"query": query, "documents": [*documents], "top_n": top_n}
        response = litellm.rerank(model=f"{provider}/{MODEL}", api_base=f"{url}{base}", api_key=key, **asked)
        return [(result["index"], result["relevance_score"]) for result in response.results]

    return rank


def _litellm_router(url: str, key: str, query: str, documents: Sequence[str], top_n: int) -> Found:
    import asyncio

    from litellm import Router

    # The entry of the proxy's `model_list`, and the call that its /rerank makes.
    parameters = {"model": f"cohere/{MODEL}", "api_base": url, "api_key": key}
    router = Router([{"model_name": "reranker", "litellm_params": parameters}], num_retries=0)
    asked = {"query": query, "documents": [*documents], "top_n": top_n}
    response = asyncio.run(router.arerank(model="reranker", **asked))
    return [(result["index"], result["relevance_score"]) for result in response.results]


def _lightrag(url: str, key: str, query: str, documents: Sequence[str], top_n: int) -> Found:
    import asyncio

    from lightrag.rerank import cohere_rerank

    asked = {"query": query, "documents": [*documents], "top_n": top_n}
    found = asyncio.run(cohere_rerank(**asked, base_url=f"{url}/v2/rerank", api_key=key, model=MODEL))
    return [(result["index"], result["relevance_score"]) for result in found]


class NodeError(Exception):
    """An error in JavaScript, as its user sees it."""


def _node(name: str) -> Rank:
    def rank(url: str, key: str, query: str, documents: Sequence[str], top_n: int) -> Found:
        asked = json.dumps({"query": query, "documents": documents, "top_n": top_n})
        command = ["node", "rerank.mjs", name, url, key]
        done = subprocess.run(command, cwd=HERE, input=asked, capture_output=True, text=True, timeout=120)
        if done.returncode:
            raise NodeError(done.stdout or done.stderr)
        return [(index, score) for index, score in json.loads(done.stdout)]

    return rank


_BASE = '`base_url="http://HOST:8000"`'
_BASE_V1 = '`base_url="http://HOST:8000/v1"`'


def _of_litellm(model: str, path: str, base: str = "", *, margins: bool = False) -> Client:
    setting = f'`model="{model}/kalm"`, `api_base="http://HOST:8000{base}"`'
    return Client(f"LiteLLM, `{model}/`", "litellm", (COHERE_7,), setting, path, _litellm(model, base), margins)


CLIENTS = (
    Client("Cohere's SDK, `ClientV2`", "cohere", (COHERE_5, COHERE_7), _BASE, "/v2/rerank", _cohere_v2, tries=3),
    Client("Cohere's SDK, `Client`", "cohere", (COHERE_5, COHERE_7), _BASE, "/v1/rerank", _cohere_v1, tries=3),
    Client(
        "LangChain, `CohereRerank`", "langchain-cohere", (COHERE_5,), _BASE, "/v2/rerank", _langchain_cohere, tries=3
    ),
    Client(
        "LangChain, `JinaRerank`",
        "langchain-community",
        (COHERE_5,),
        '`jina_rerank.JINA_API_URL = "http://HOST:8000/v1/rerank"` in its module',
        "/v1/rerank",
        _langchain_jina,
    ),
    Client(
        "LangChain, `NVIDIARerank`",
        "langchain-nvidia-ai-endpoints",
        (COHERE_5,),
        _BASE_V1,
        "/v1/ranking",
        _langchain_nvidia,
        margins=True,
    ),
    Client(
        "LlamaIndex, `CohereRerank`",
        "llama-index-postprocessor-cohere-rerank",
        (COHERE_5,),
        _BASE,
        "/v2/rerank",
        _llama_index_cohere,
        tries=6,
    ),
    Client(
        "LlamaIndex, `JinaRerank`",
        "llama-index-postprocessor-jinaai-rerank",
        (COHERE_5,),
        _BASE_V1,
        "/v1/rerank",
        _llama_index_jina,
    ),
    Client(
        "LlamaIndex, `TextEmbeddingInference`",
        "llama-index-postprocessor-tei-rerank",
        (COHERE_5,),
        '`base_url="http://HOST:8000"`, `auth_token="Bearer KEY"`',
        "/rerank",
        _llama_index_tei,
        shows={"key": "TypeError", "many": "AssertionError", "busy": "AssertionError"},  # it reads errors as scores
    ),
    Client(
        "LlamaIndex, `NVIDIARerank`",
        "llama-index-postprocessor-nvidia-rerank",
        (COHERE_5,),
        _BASE_V1,
        "/v1/ranking",
        _llama_index_nvidia,
        margins=True,
        shows={"key": "401 Unauthorized", "many": "413 Request Entity Too Large", "busy": "503 Service Unavailable"},
    ),
    Client(
        "Haystack, `CohereRanker`",
        "cohere-haystack",
        (COHERE_7,),
        '`api_base_url="http://HOST:8000"`',
        "/v2/rerank",
        _haystack_cohere,
        tries=3,
    ),
    Client(
        "Haystack, `JinaRanker`",
        "jina-haystack",
        (COHERE_5,),
        '`base_url="http://HOST:8000/v1/rerank"`',
        "/v1/rerank",
        _haystack_jina,
    ),
    _of_litellm("cohere", "/v2/rerank"),
    _of_litellm("jina_ai", "/v1/rerank"),
    _of_litellm("hosted_vllm", "/rerank"),
    _of_litellm("infinity", "/infinity/rerank", "/infinity"),
    _of_litellm("huggingface", "/rerank"),
    _of_litellm("nvidia_nim/ranking", "/v1/ranking", margins=True),
    Client(
        "LiteLLM, `Router`",
        "litellm",
        (COHERE_7,),
        "`model: cohere/kalm`, `api_base: http://HOST:8000` in `litellm_params`",
        "/v2/rerank",
        _litellm_router,
    ),
    Client(
        "LightRAG",
        "lightrag-hku",
        (COHERE_7,),
        "`RERANK_BINDING=cohere`, `RERANK_BINDING_HOST=http://HOST:8000/v2/rerank`",
        "/v2/rerank",
        _lightrag,
        tries=3,
    ),
    Client(
        "`cohere-ai`, `CohereClientV2`",
        "cohere-ai",
        (NODE,),
        '`environment: "http://HOST:8000"`',
        "/v2/rerank",
        _node("v2"),
        tries=3,
    ),
    Client(
        "`cohere-ai`, `CohereClient`",
        "cohere-ai",
        (NODE,),
        '`environment: "http://HOST:8000"`',
        "/v1/rerank",
        _node("v1"),
        tries=3,
    ),
    Client(
        "LangChain.js, `CohereRerank`",
        "@langchain/cohere",
        (NODE,),
        '`client: new CohereClient({ environment: "http://HOST:8000", token })`',
        "/v1/rerank",
        _node("langchain"),
        tries=3,
    ),
)
