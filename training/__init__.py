"""Trains `kalm-rag-mini`, the demonstration checkpoint that the package carries. See README.md."""
