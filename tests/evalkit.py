"""A collection of four passages for tests of the evaluation, in memory and as files."""

from __future__ import annotations

from pathlib import Path

from kalm_rag.retrieval.corpus import Corpus

CORPUS = Corpus(
    {"p1": "apples grow on trees", "p2": "pears are green", "p3": "trees lose leaves", "p4": "cars need fuel"},
    {"q1": "where do apples grow", "q2": "what do cars need", "q3": "green pears"},
    {"q1": {"p1": 2, "p3": 1}, "q2": {"p4": 1}, "q3": {"p2": 1}},
)


def run_file(path: Path, lines: str) -> Path:
    """Write a run file."""
    path.write_text(lines)
    return path


def files(folder: Path, corpus: str, queries: str, qrels: str) -> Path:
    """Write a folder in BEIR layout."""
    folder.mkdir()
    for name, text in (("corpus.jsonl", corpus), ("queries.jsonl", queries), ("qrels.tsv", qrels)):
        (folder / name).write_text(text)
    return folder


GOOD = ('{"_id": "1", "text": "a"}\n', '{"_id": "q", "text": "a"}\n', "query-id\tcorpus-id\tscore\nq\t1\t1\n")
