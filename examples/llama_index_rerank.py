"""LlamaIndex: from documents to a reranked answer, a cold and a warm query."""

from common import CACHE, PASSAGES, QUESTIONS, model, timed
from llama_index.core import Document, MockEmbedding, VectorStoreIndex
from llama_index.core.llms import MockLLM
from llama_index.postprocessor.kalm_rerank import KalmRerank

documents = [Document(text=text) for text in PASSAGES]
index = VectorStoreIndex.from_documents(documents, embed_model=MockEmbedding(embed_dim=32))  # put your models here

rerank = KalmRerank(model=model(), cache=CACHE / "passages", top_n=3)
engine = index.as_query_engine(llm=MockLLM(), similarity_top_k=20, node_postprocessors=[rerank])
timed("cold query", engine.query, QUESTIONS[0])
for node in timed("warm query", engine.query, QUESTIONS[1]).source_nodes:
    print(f"{node.score:.4f}  {node.text[:60]}")
