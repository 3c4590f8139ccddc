"""Calls on passages that may be longer than a window: they run on the windows and tell of the passages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

from kalm_rag.latency.limit import TimeLimit
from kalm_rag.results import Estimate
from kalm_rag.scorer import Scorer
from kalm_rag.scoring.score import Score
from kalm_rag.settings import AT_ONCE
from kalm_rag.utils.progress import Progress
from kalm_rag.utils.recording import rename_sources
from kalm_rag.utils.refining import Wanted
from kalm_rag.windows.source import Windows


def score_passages(
    scorer: Scorer,
    pairs: Sequence[tuple[str, str]],
    instruction: str,
    ratio: int,
    show: bool | None = None,
    wanted: Wanted | None = None,
    limit: TimeLimit | None = None,
) -> list[Score]:
    """Score pairs of any number, each distinct one once; a passage gets the score of its best window.

    Args:
        scorer: scores the windows.
        pairs: queries and passages.
        instruction: as in `Scorer.score`.
        ratio: as in `Scorer.score`.
        show: as in `Progress`.
        wanted: as in `Scorer.score`, of passages.
        limit: as in `Scorer.score`; a passage is reached if all of its windows are.
    """
    split = scorer.windows.split(text for _, text in pairs)
    # The queries of a passage or window stay together, so that it is read and prefilled once, whatever memory holds.
    queries: dict[str, dict[str, None]] = {}
    for query, text in pairs:
        for part in split[text].texts:
            queries.setdefault(part, {})[query] = None
    unique = [(query, part) for part, own in queries.items() for query in own]
    if wanted is not None:
        wanted = wanted.of_windows([len(split[text].texts) for _, text in pairs])
    found: dict[tuple[str, str], Score] = {}
    with Progress(len(unique), "reranking", show=show) as progress:
        # Under a limit all known passages are before all unknown ones.
        at_once = AT_ONCE if limit is None else max(1, len(unique))
        for start in range(0, len(unique), at_once):
            some = unique[start : start + at_once]
            found.update(zip(some, scorer.score(some, instruction, ratio, progress, wanted, limit), strict=True))
    best = [_best([found[query, part] for part in split[text].texts], split[text]) for query, text in pairs]
    rename_sources((score.passage, text) for score, (_, text) in zip(best, pairs, strict=True))
    return best


def _best(scores: Sequence[Score], windows: Windows) -> Score:
    """Return the score of a passage; of equal windows the first counts."""
    if windows.spans is None:
        return scores[0]
    if not all(score.reached for score in scores):
        return replace(scores[0], reached=False)
    place = max(range(len(scores)), key=lambda number: scores[number].margin)
    truncated = not windows.complete or any(score.passage_truncated for score in scores)
    return replace(scores[place], passage_truncated=truncated, span=windows.spans[place])


def count_truncated(pairs: Sequence[tuple[str, str]], scores: Sequence[Score]) -> int:
    """Return how many distinct passages and queries were not read to their end."""
    both = list(zip(pairs, scores, strict=True))
    passages = {text for (_, text), score in both if score.passage_truncated}
    return len(passages) + len({query for (query, _), score in both if score.prompt.truncated})


def unknown_passages(scorer: Scorer, texts: Sequence[str]) -> list[str]:
    """Return the distinct passages, cleaned, of which the cache lacks anything that `Scorer.encode` would keep."""
    passages = list(dict.fromkeys(scorer.clean(texts)))
    split = scorer.windows.split(passages)
    parts = list(dict.fromkeys(part for text in passages for part in split[text].texts))
    lacking: set[str] = set()
    for start in range(0, len(parts), AT_ONCE):
        lacking.update(scorer.states.unknown(parts[start : start + AT_ONCE]))
    return [text for text in passages if not lacking.isdisjoint(split[text].texts)]


def estimate_passages(scorer: Scorer, texts: Sequence[str]) -> Estimate:
    """Return how many tokens and bytes passages take, without encoding them."""
    split = scorer.windows.split(texts)
    counts = [len(part.ids) for part in scorer.prompts.passages(scorer.windows.expand(texts))]
    left = iter(counts)
    tokens = tuple(sum(islice(left, len(split[text].texts))) for text in texts)
    return Estimate(tokens, sum(map(scorer.states.bytes_of, counts)), sum(map(scorer.passage_kv.bytes_of, counts)))
