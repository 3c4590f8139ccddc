"""Reads judgements and makes the lists to train on: a relevant passage and hard negatives."""

from __future__ import annotations

import json
import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kalm_rag.documents import REPAIRED, TextCounter, repair_text
from kalm_rag.evaluation.candidates import Candidates
from kalm_rag.retrieval.corpus import Corpus, read_beir, text_lines
from kalm_rag.tuning.recipe import Recipe

FEW = 20
"""Judged queries below which little can be learned, and nothing measured."""


@dataclass(frozen=True, slots=True)
class Example:
    """A query, and what lists are drawn from.

    Attributes:
        query: its text.
        positives: relevant passages.
        judged: passages judged irrelevant, which are drawn first.
        found: what else the first stage found, best first; random passages where it found too little.
    """

    query: str
    positives: tuple[str, ...]
    judged: tuple[str, ...]
    found: tuple[str, ...]

    def draw(self, size: int, chooser: random.Random) -> list[str]:
        """Return the passages of a list, the relevant one first."""
        judged, found = ([*texts] for texts in (self.judged, self.found))
        chooser.shuffle(judged)
        chooser.shuffle(found)
        return [chooser.choice(self.positives), *[*judged, *found][: size - 1]]


@dataclass(frozen=True, slots=True)
class Split:
    """Ids of the queries that train, that decide when to stop, and that measure.

    Attributes:
        dropped: queries that are in none of them, because they share relevant passages with those that measure.
    """

    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]
    dropped: tuple[str, ...] = ()


def read_judgements(
    source: str | Path, queries: str | Path | None = None, qrels: str | Path | None = None, split: str = "train"
) -> Corpus:
    """Read a BEIR folder, or JSON lines that each hold `query`, `positive` and, optionally, `negatives`.

    Args:
        source: the folder, a corpus with `queries` and `qrels` given (see `read_beir`), or the file of JSON lines.
            `positive` and `negatives` are a text or a list of texts.
        queries: as in `read_beir`.
        qrels: as in `read_beir`.
        split: which judgements of a BEIR folder: `qrels/<split>.tsv`, else `qrels.tsv`.

    Returns:
        Passages, queries and judgements; of JSON lines, a relevant passage has 1 and a negative 0.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a line cannot be read; the message names file and line.
    """
    path = Path(source)
    if path.is_file() and queries is None and qrels is None:
        return _read_lines(path)
    return read_beir(source, queries, qrels, split)


def _read_lines(path: Path) -> Corpus:
    passages: dict[str, str] = {}
    ids: dict[str, str] = {}
    query_ids: dict[str, str] = {}
    qrels: dict[str, dict[str, int]] = {}
    repaired = 0

    def passage_id(text: str) -> str:
        found = ids.setdefault(text, f"p{len(ids) + 1}")
        passages[found] = text
        return found

    for number, line in text_lines(path):
        if not line.strip():
            continue
        query, positives, negatives = _line(line, f"{path}, line {number}")
        both = set(positives) & set(negatives)
        if both:
            msg = f"{path}, line {number}: {min(both)[:60]!r} is both positive and negative; keep one of them"
            raise ValueError(msg)
        query, changed = repair_text(query)
        repaired += changed
        judged = qrels.setdefault(query_ids.setdefault(query, f"q{len(query_ids) + 1}"), {})
        for value, texts in ((1, positives), (0, negatives)):
            for text in texts:
                clean, changed = repair_text(text)
                repaired += changed
                judged[passage_id(clean)] = max(value, judged.get(passage_id(clean), 0))
    TextCounter(REPAIRED).add(repaired)
    if not qrels:
        msg = f"{path} holds no judgement; each line is an object with query, positive and negatives"
        raise ValueError(msg)
    return Corpus(passages, {name: query for query, name in query_ids.items()}, qrels)


def _line(line: str, where: str) -> tuple[str, list[str], list[str]]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        msg = f"{where}: not JSON ({error}); each line is an object with query, positive and negatives"
        raise ValueError(msg) from None
    if not isinstance(value, dict):
        msg = f"{where}: expected an object with query, positive and negatives, got {type(value).__name__}"
        raise ValueError(msg)
    query = value.get("query")
    if not isinstance(query, str) or not query.strip():
        msg = f"{where}: query must be a text, got {query!r:.60}"
        raise ValueError(msg)
    positives, negatives = (_texts(value.get(name), name, where) for name in ("positive", "negatives"))
    if not positives:
        msg = f"{where}: positive must be a text or a list of texts, got none; leave out queries without an answer"
        raise ValueError(msg)
    return query, positives, negatives


def _texts(value: object, name: str, where: str) -> list[str]:
    found = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(found, list) or any(not isinstance(text, str) for text in found):
        msg = f"{where}: {name} must be a text or a list of texts, got {value!r:.60}"
        raise ValueError(msg)
    if not all(text.strip() for text in found):
        msg = f"{where}: {name} must not hold an empty text, got {value!r:.60}; leave out what is empty"
        raise ValueError(msg)
    return found


def split_queries(
    qrels: Mapping[str, Mapping[str, int]],
    recipe: Recipe,
    *,
    by_passages: bool = False,
    held_out: Collection[str] = (),
) -> Split:
    """Divide judged queries at random, reproducibly.

    Args:
        qrels: judgements of the queries.
        recipe: shares and seed.
        by_passages: keep queries that share a relevant passage together, so that none of the three parts has seen the
            relevant passages of another.
        held_out: ids of queries that measure. Default: a share of all. With `by_passages`, queries that share relevant
            passages with them are in no part.

    Raises:
        TypeError: `held_out` is one string.
        ValueError: there are too few queries for three parts, or `held_out` names a query that is not judged.
    """
    held_out = check_held_out(qrels, held_out)
    groups = _groups(qrels) if by_passages else [[query] for query in qrels]
    largest = max(groups, key=len, default=[])
    random.Random(recipe.seed).shuffle(groups)  # noqa: S311 - a reproducible split
    dropped: list[str] = []
    if held_out:
        chosen = set(held_out)
        test = [query for query in qrels if query in chosen]
        touched = [group for group in groups if not chosen.isdisjoint(group)]
        dropped = [query for group in touched for query in group if query not in chosen]
        groups = [group for group in groups if chosen.isdisjoint(group)]
    else:
        test, groups = _take(groups, max(1, round(recipe.test * len(qrels))))
    rest = sum(map(len, groups))
    validation, groups = _take(groups, max(1, round(recipe.validation * rest)))
    train = [query for group in groups for query in group]
    if not (train and validation and test):
        msg = (
            f"{len(qrels)} judged queries cannot be divided into those that train, those that decide when to stop and "
            f"those that measure: {_why(qrels, largest, len(test) if held_out else 0, len(dropped))}"
        )
        raise ValueError(msg)
    return Split(tuple(train), tuple(validation), tuple(test), tuple(dropped))


def check_held_out(qrels: Mapping[str, object], held_out: Collection[str]) -> tuple[str, ...]:
    """Return the ids of the queries that measure.

    Raises:
        TypeError: they are one string.
        ValueError: one is not judged.
    """
    if isinstance(held_out, (str, bytes)):
        msg = f"held_out must be a collection of query ids, got the single text {held_out!r:.60}; put it into a list"
        raise TypeError(msg)
    found = tuple(held_out)
    unknown = [query for query in found if query not in qrels]
    if unknown:
        msg = (
            f"held_out names {len(unknown)} queries without judgements, such as {unknown[0]!r:.60}; judged are "
            f"{len(qrels)}, such as {next(iter(qrels), None)!r:.60}: correct the ids, or leave them out"
        )
        raise ValueError(msg)
    return found


def _why(qrels: Mapping[str, object], largest: Sequence[str], held_out: int, dropped: int) -> str:
    """Say why queries cannot be divided, and the way out."""
    if len(largest) > 1:
        left_out = f", and {dropped} are left out because they share some with those held out" if dropped else ""
        return (
            f"{len(largest)} of them, such as {largest[0]!r:.40} and {largest[-1]!r:.40}, are connected by relevant "
            f"passages that they share, and stay together{left_out}; divide by queries (without by_passages), or judge "
            "queries with other passages"
        )
    if held_out:
        return f"held_out names {held_out}, so {len(qrels) - held_out} are left; hold out fewer"
    return "judge at least 20, better 100"


def _take(groups: list[list[str]], count: int) -> tuple[list[str], list[list[str]]]:
    taken: list[str] = []
    for place, group in enumerate(groups):
        if len(taken) >= count:
            return taken, groups[place:]
        taken += group
    return taken, []


def _groups(qrels: Mapping[str, Mapping[str, int]]) -> list[list[str]]:
    """Queries that are connected by relevant passages that they share."""
    parents: dict[str, str] = {}
    for query, judged in qrels.items():
        for passage, value in judged.items():
            if value > 0:
                parents[_root(parents, f"query {query}")] = _root(parents, f"passage {passage}")
    groups: dict[str, list[str]] = {}
    for query in qrels:
        groups.setdefault(_root(parents, f"query {query}"), []).append(query)
    return list(groups.values())


def _root(parents: dict[str, str], name: str) -> str:
    """Follow parents to the end; the way there is shortened, as a long chain would be followed again every time."""
    root = name
    while parents.setdefault(root, root) != root:
        root = parents[root]
    while name != root:
        parents[name], name = root, parents[name]
    return root


def make_examples(
    corpus: Corpus, candidates: Candidates, queries: Sequence[str], recipe: Recipe
) -> tuple[list[Example], list[str]]:
    """Return what lists are drawn from, and warnings about queries that were left out.

    Args:
        corpus: the collection.
        candidates: of the first stage, and the judgements.
        queries: ids of the queries to use.
        recipe: how many negatives.

    Raises:
        ValueError: no query is left.
    """
    found: list[Example] = []
    lost = equal = 0
    for query in queries:
        judged = candidates.qrels[query]
        known = {name: value for name, value in judged.items() if name in corpus.passages}
        positives = list(dict.fromkeys(corpus.passages[name] for name, value in known.items() if value > 0))
        # A passage that stands twice in the corpus must not be its own negative.
        taken = set(positives)
        negatives = _fresh((corpus.passages[name] for name, value in known.items() if value <= 0), taken)
        ranked = [corpus.passages[name] for name, _ in candidates.rankings[query][: recipe.negatives]]
        first = _fresh(iter(ranked), taken)
        if len(negatives) + len(first) < recipe.list_size - 1:
            first += _fresh(_random_passages(corpus, f"{recipe.seed} {query}", recipe.list_size), taken)
        if positives and (negatives or first):
            found.append(Example(corpus.queries[query], tuple(positives), tuple(negatives), tuple(first)))
        lost += not positives
        equal += bool(positives) and not (negatives or first)
    warnings = []
    if lost:
        warnings.append(f"{lost} queries have no relevant passage in the corpus and are left out")
    if equal:
        warnings.append(f"{equal} queries have no negative that differs from their relevant passages and are left out")
    if not found:
        msg = (
            f"none of {len(queries)} queries can be trained on: {lost} have no relevant passage in the corpus, {equal} "
            "have no negative that differs from it; give a corpus with other passages"
        )
        raise ValueError(msg)
    return found, warnings


def _fresh(texts: Iterator[str], taken: set[str]) -> list[str]:
    """Return texts that were not taken before, and take them."""
    found = []
    for text in texts:
        if text not in taken:
            taken.add(text)
            found.append(text)
    return found


def _random_passages(corpus: Corpus, seed: str, count: int) -> Iterator[str]:
    chooser = random.Random(seed)  # noqa: S311 - reproducible
    names = list(corpus.passages)
    for name in chooser.sample(names, min(len(names), 4 * count)):
        yield corpus.passages[name]


def notes_on(corpus: Corpus, candidates: Candidates, split: Split) -> list[str]:
    """Return what a user should know about these judgements before waiting for a result."""
    notes = list(candidates.warnings)
    count = len(candidates.qrels)
    if count < FEW:
        notes.append(
            f"only {count} judged queries: {len(split.train)} train and {len(split.test)} measure, which is too few to "
            "show a gain; judge at least 100"
        )
    if split.dropped:
        notes.append(
            f"{len(split.dropped)} queries share relevant passages with held-out queries, also by way of others, and "
            "are left out of training"
        )
    named = {name for judged in corpus.qrels.values() for name in judged}
    all_positive = all(value > 0 for judged in corpus.qrels.values() for value in judged.values())
    if all_positive and named >= corpus.passages.keys():
        notes.append(
            "no negatives are given and the corpus holds only relevant passages: negatives are those of other queries, "
            "which are easy to tell apart; add negatives, or the rest of the corpus"
        )
    return notes
