"""A first stage for the demo and for evaluation: collections, and BM25 over them."""
