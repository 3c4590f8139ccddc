"""One cache for two frameworks: LangChain encodes while it ingests, Haystack finds everything encoded."""

from common import CACHE, PASSAGES, QUESTIONS, model, timed
from haystack import Document as HaystackDocument
from haystack_integrations.components.rankers.kalm import KalmRanker
from langchain_core.documents import Document
from langchain_kalm import KalmPassageEncoder

name, cache = model(), CACHE / "passages"

encoder = KalmPassageEncoder(model=name, cache=cache)
timed("LangChain encodes", encoder.transform_documents, [Document(page_content=text) for text in PASSAGES])
encoded = encoder.reranker.cache.stats().encoded

ranker = KalmRanker(
    model=name, cache=cache
)  # equal arguments share one loaded model; another process shares the folder
documents = [HaystackDocument(content=text) for text in PASSAGES]
timed("Haystack's first query", ranker.run, QUESTIONS[0], documents)
print(f"passages encoded by Haystack: {ranker.reranker.cache.stats().encoded - encoded}")
