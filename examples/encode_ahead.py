"""The core alone: encode a corpus ahead of its queries, then rank."""

from common import CACHE, PASSAGES, QUESTIONS, model, timed

from kalm_rag import KaLMReranker

with KaLMReranker(model(), cache=CACHE / "passages") as reranker:
    report = timed("encode", reranker.encode, PASSAGES)
    print(f"{report.new} new, {report.known} known, {report.truncated} truncated")
    timed("first query", reranker.rank, QUESTIONS[0], PASSAGES)
    for hit in timed("second query", reranker.rank, QUESTIONS[1], PASSAGES)[:3]:
        print(f"{hit.score:.4f}  {hit.document[:60]}")
