"""Training data: questions and passages in BEIR layout, tokenised, with hard negatives mined by BM25."""

from __future__ import annotations

import csv
import gzip
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kalm_rag.retrieval.corpus import passage_text
from kalm_rag.retrieval.segment import Segmenter


@dataclass(frozen=True, slots=True)
class Source:
    """One training set.

    Attributes:
        name: its folder.
        qrels: the judgements to train on.
        weight: how often a batch draws from it, relative to the others.
        skip: prefixes of query ids to leave out.
        held_out: queries kept for the development split; 0 trains on all.
    """

    name: str
    qrels: str
    weight: float
    skip: tuple[str, ...] = ()
    held_out: int = 0


SOURCES = (
    Source("nq_mrqa", "qrels_train_clean.tsv", 2.0, held_out=40),
    Source("medquad", "qrels_train_noliveqa.tsv", 1.5, held_out=40),
    Source("stackexchange_small", "qrels_train.tsv", 1.5, held_out=40),
    Source("fairytaleqa", "qrels_train.tsv", 1.2, held_out=0),
    # MultiRC is for research only; DROP's questions seldom name what they ask about.
    Source("ni_qa", "qrels_train_clean.tsv", 2.0, skip=("multirc", "drop"), held_out=40),
    Source("scitldr", "qrels_train.tsv", 1.0, held_out=40),
    Source("squad_sentences", "qrels_train.tsv", 0.8),
    Source("scifact", "qrels_train.tsv", 0.5),
    Source("policyqa", "qrels_train.tsv", 0.1),
    Source("debian_descriptions", "qrels_train.tsv", 0.8),
)
"""What the checkpoint is trained on. README.md says where each set is from and under which licence."""

NEIGHBOURS = 30
"""Passages per query that BM25 proposes as hard negatives."""


@dataclass(slots=True)
class Texts:
    """One set before tokenisation."""

    passages: list[str]
    queries: list[str]
    positives: list[list[int]]
    held_out: list[int]


@dataclass(slots=True)
class Tokens:
    """One set, ready for batches.

    Attributes:
        passages: token ids of each passage, without the prefix.
        queries: token ids of each query.
        positives: relevant passages of each query.
        neighbours: what BM25 finds for each query, best first.
        asked: queries that each passage answers.
        train: queries to train on.
        held_out: queries of the development split.
    """

    passages: list[np.ndarray[Any, Any]]
    queries: list[np.ndarray[Any, Any]]
    positives: list[list[int]]
    neighbours: np.ndarray[Any, Any]
    asked: dict[int, list[int]]
    train: list[int]
    held_out: list[int]


def read_source(root: Path, source: Source, most: int, seed: int) -> Texts:
    """Read one set, at most `most` queries of it."""
    folder = root / source.name
    corpus = {record["_id"]: passage_text(record.get("title"), record["text"]) for record in _lines(folder, "corpus")}
    queries = {record["_id"]: record["text"] for record in _lines(folder, "queries")}
    positives: dict[str, list[str]] = {}
    with (folder / source.qrels).open(encoding="utf-8", newline="") as file:
        for query, passage, score in list(csv.reader(file, delimiter="\t"))[1:]:
            known = passage in corpus and query in queries
            if known and int(score) > 0 and not query.startswith(source.skip or ("\0",)):
                positives.setdefault(query, []).append(passage)
    chosen = sorted(positives)
    random.Random(seed).shuffle(chosen)
    chosen = chosen[:most]
    numbers = {identifier: number for number, identifier in enumerate(corpus)}
    return Texts(
        list(corpus.values()),
        [queries[query] for query in chosen],
        [[numbers[passage] for passage in positives[query]] for query in chosen],
        list(range(source.held_out)),
    )


def _lines(folder: Path, name: str) -> Iterator[dict[str, Any]]:
    plain = folder / f"{name}.jsonl"
    packed = plain.with_name(f"{name}.jsonl.gz")
    with plain.open(encoding="utf-8") if plain.is_file() else gzip.open(packed, "rt", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def tokenise(texts: Texts, tokenizer: Any, longest: int) -> Tokens:
    """Token ids, BM25 neighbours and the queries of each passage."""
    held_out = set(texts.held_out)
    asked: dict[int, list[int]] = {}
    train = [number for number in range(len(texts.queries)) if number not in held_out]
    for query in train:
        for passage in texts.positives[query]:
            asked.setdefault(passage, []).append(query)
    return Tokens(
        _encode(tokenizer, texts.passages, longest),
        _encode(tokenizer, texts.queries, 48),
        texts.positives,
        _neighbours(texts),
        asked,
        train,
        texts.held_out,
    )


def _encode(tokenizer: Any, texts: list[str], longest: int) -> list[np.ndarray[Any, Any]]:
    rows = tokenizer(
        [text[: longest * 12] for text in texts], add_special_tokens=False, return_attention_mask=False
    ).input_ids
    return [np.asarray(row[:longest], dtype=np.int32) for row in rows]


def _neighbours(texts: Texts) -> np.ndarray[Any, Any]:
    import bm25s

    segmenter = Segmenter(passages=texts.passages)
    index = bm25s.BM25()
    index.index(segmenter.numbered(texts.passages), show_progress=False)
    found, _ = index.retrieve(
        segmenter.numbered(texts.queries), k=min(NEIGHBOURS, len(texts.passages)), show_progress=False
    )
    return np.asarray(found, dtype=np.int32)


@dataclass(slots=True)
class Group:
    """Passages that are hard negatives of one another, and queries that some of them answer.

    Attributes:
        source: the set they are from.
        passages: numbers of the passages.
        queries: numbers of the queries.
        labels: shape `(queries, passages)`, 1 where the passage is relevant.
    """

    source: str
    passages: list[int]
    queries: list[int]
    labels: np.ndarray[Any, Any]


def draw_group(name: str, tokens: Tokens, generator: random.Random, passages: int, queries: int) -> Group:
    """One query, its passage, passages that BM25 confuses with it, and the queries of those.

    Every passage is encoded once and scored against every query of the group.
    """
    seed = generator.choice(tokens.train)
    near = [int(number) for number in tokens.neighbours[seed] if number not in tokens.positives[seed]]
    # Half from the top, where BM25 errs; half from the whole list, as reranking meets it.
    top = near[: 2 * passages]
    hard = generator.sample(top, min(len(top), passages // 2))
    rest = [number for number in near if number not in hard]
    hard += generator.sample(rest, min(len(rest), passages - 1 - len(hard)))
    chosen = [generator.choice(tokens.positives[seed]), *hard]
    asked = [seed]
    for passage in chosen[1:]:
        candidates = [query for query in tokens.asked.get(passage, ()) if query not in asked]
        if candidates and len(asked) < queries:
            asked.append(generator.choice(candidates))
    # Always as many, so that every batch has one shape: first queries of near passages outside the group (no
    # passage of the group answers them; the soft targets still order it), then any.
    spare = [query for passage in rest for query in tokens.asked.get(passage, ()) if query not in asked]
    asked += generator.sample(spare, min(len(spare), queries - len(asked)))
    while len(asked) < queries:
        asked.append(generator.choice(tokens.train))
    labels = np.array([[float(p in tokens.positives[q]) for p in chosen] for q in asked], dtype=np.float32)
    return Group(name, chosen, asked, labels)
