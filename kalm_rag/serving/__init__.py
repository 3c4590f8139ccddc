"""`kalm-rag serve`: rerankers' HTTP dialects in front of one model and its cache. Nothing in the core imports it."""
