"""What a user does first, with what `pip install` gave: `python -I -W error smoke.py`, from outside of the repository.

`make test-newest` runs it with the built wheels and the newest release of everything else. Each framework ranks two
documents through a pipeline of its own. A warning is an error, so that what a release deprecates is seen here first.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

BIN = Path(sys.executable).parent
DISTRIBUTIONS = ("kalm-rag", "langchain-kalm", "llama-index-postprocessor-kalm-rerank", "kalm-haystack")
QUERY = "How do I sort a list in place?"
ANSWER = "list.sort() sorts a list in place and returns None."
OTHER = "sorted() returns a new sorted list from any iterable."


def core() -> list[str]:
    """The reranker itself."""
    from kalm_rag import KaLMReranker

    return [str(hit.document) for hit in KaLMReranker("mini").rank(QUERY, [OTHER, ANSWER])]


def langchain() -> list[str]:
    """A chain: the documents and the query, then the reranker."""
    from langchain_core.documents import Document
    from langchain_core.runnables import RunnableLambda, RunnablePassthrough
    from langchain_kalm import KalmReranker

    found = RunnableLambda(lambda _: [Document(page_content=text) for text in (OTHER, ANSWER)])
    chain = {"documents": found, "query": RunnablePassthrough()} | KalmReranker(model="mini").as_runnable()
    return [document.page_content for document in chain.invoke(QUERY)]


def llama_index() -> list[str]:
    """A query engine over an index."""
    from llama_index.core import Document, MockEmbedding, VectorStoreIndex
    from llama_index.core.llms import MockLLM
    from llama_index.postprocessor.kalm_rerank import KalmRerank

    documents = [Document(text=text) for text in (OTHER, ANSWER)]
    index = VectorStoreIndex.from_documents(documents, embed_model=MockEmbedding(8))
    engine = index.as_query_engine(llm=MockLLM(), node_postprocessors=[KalmRerank(model="mini")])
    return [node.text for node in engine.query(QUERY).source_nodes]


def haystack() -> list[str]:
    """A pipeline: a retriever, then the ranker."""
    from haystack import Document, Pipeline
    from haystack.components.retrievers.in_memory import InMemoryBM25Retriever
    from haystack.document_stores.in_memory import InMemoryDocumentStore
    from haystack_integrations.components.rankers.kalm import KalmRanker

    store = InMemoryDocumentStore()
    store.write_documents([Document(content=text) for text in (OTHER, ANSWER)])
    pipeline = Pipeline()
    pipeline.add_component("retriever", InMemoryBM25Retriever(store))
    pipeline.add_component("ranker", KalmRanker(model="mini"))
    pipeline.connect("retriever.documents", "ranker.documents")
    found = pipeline.run({"retriever": {"query": QUERY}, "ranker": {"query": QUERY}})
    return [document.content for document in found["ranker"]["documents"]]


def command(*arguments: str) -> str:
    """The command line, as the installed script, under the same rule for warnings."""
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"PYTHONWARNINGS": "error"}
    done = subprocess.run([str(BIN / "kalm-rag"), *arguments], capture_output=True, text=True, env=own, check=False)
    if done.returncode:
        sys.exit(f"kalm-rag {' '.join(arguments)} failed:\n{done.stderr}")
    return done.stdout


def main() -> None:
    """Run each, and show that it ran."""
    from importlib.metadata import version

    import kalm_rag

    assert Path(kalm_rag.__file__).is_relative_to(sys.prefix), f"not the installed package: {kalm_rag.__file__}"
    versions = {name: version(name) for name in DISTRIBUTIONS}
    assert set(versions.values()) == {kalm_rag.__version__}, versions
    assert command("--version").split() == ["kalm-rag", kalm_rag.__version__]
    for way in (core, langchain, llama_index, haystack):
        ranked = way()
        assert ranked == [ANSWER, OTHER], f"{way.__name__}: {ranked}"
        print(f"{way.__name__} ranks", flush=True)
    assert "nDCG@10" in command("demo")
    print("the demo runs")


if __name__ == "__main__":
    main()
