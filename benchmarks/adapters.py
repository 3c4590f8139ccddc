"""What each adapter adds to a call of the core: 100 candidates, warm.

Caveats first: a small checkpoint, so that the model's own time is short; the overhead is the adapter's median minus the
core's, both measured in turns in one process.

    python benchmarks/adapters.py [--small]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from report import environment, percentiles, print_table


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="few rounds: checks the script")
    options = parser.parse_args()
    from haystack import Document as HaystackDocument
    from haystack_integrations.components.rankers.kalm import KalmRanker
    from langchain_core.documents import Document
    from langchain_kalm import KalmReranker
    from llama_index.core.schema import NodeWithScore, TextNode
    from llama_index.postprocessor.kalm_rerank import KalmRerank

    from kalm_rag import Options
    from kalm_rag.adapters import shared_reranker
    from kalm_rag.testing import Geometry, build_checkpoint

    texts = [f"passage number {number} about something" for number in range(100)]
    with tempfile.TemporaryDirectory() as name:
        model = str(build_checkpoint(Path(name) / "model", geometry=Geometry(num_hidden_layers=2)))
        options_of_all = Options(score_memory=0)  # they share a model, and rank the same queries
        arguments = {"model": model, "cache": str(Path(name) / "cache"), "device": "cpu", "options": options_of_all}
        core = shared_reranker(**arguments, max_length=1024)
        langchain = KalmReranker(**arguments, top_n=None)
        llama = KalmRerank(**arguments, top_n=None)
        haystack = KalmRanker(model=model, cache=arguments["cache"], top_k=100, options=options_of_all)
        documents = [Document(page_content=text) for text in texts]
        nodes = [NodeWithScore(node=TextNode(text=text)) for text in texts]
        pieces = [HaystackDocument(content=text) for text in texts]
        calls: dict[str, Callable[[str], object]] = {
            "core": lambda query: core.rank(query, texts),
            "LangChain": lambda query: langchain.compress_documents(documents, query),
            "LlamaIndex": lambda query: llama.postprocess_nodes(nodes, query_str=query),
            "Haystack": lambda query: haystack.run(query=query, documents=pieces),
        }
        for call in calls.values():
            call("warm up")
        times: dict[str, list[float]] = {name: [] for name in calls}
        for number in range(5 if options.small else 200):
            for label, call in calls.items():
                start = time.perf_counter()
                call(f"query {number}")
                times[label].append(1000 * (time.perf_counter() - start))
    base = percentiles(times["core"])["p50"]
    rows = []
    for label, samples in times.items():
        p = percentiles(samples)
        rows.append([label, f"{p['p50']:.2f}", f"{p['p99']:.2f}", f"{p['p50'] - base:+.2f}"])
    print_table(["", "p50 ms", "p99 ms", "over the core"], rows)
    print(json.dumps({"environment": environment(), "samples_ms": times}))


if __name__ == "__main__":
    main()
