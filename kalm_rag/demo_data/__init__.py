"""The corpus of the demo: questions and answers of the Python 3.11 documentation's FAQ.

Copyright Python Software Foundation, PSF License Version 2 (see `LICENSE-PSF-2.0.txt` in this folder). Each question is
a query whose one relevant passage is its own answer, which does not contain the question.
"""

from __future__ import annotations

from pathlib import Path

from kalm_rag.retrieval.corpus import Corpus, read_beir


def load_demo() -> Corpus:
    """175 passages, 44 queries with one relevant passage each."""
    return read_beir(Path(__file__).parent)
