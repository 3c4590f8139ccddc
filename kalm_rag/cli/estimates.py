"""What encoding a corpus will take, estimated from a sample of it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from kalm_rag.cli.output import print_json, show
from kalm_rag.utils.display import duration_text, size_text

if TYPE_CHECKING:
    from kalm_rag.reranker import KaLMReranker

_FIRST, _MOST = 32, 512
_SAMPLE = 256
_TIMED = 12


def groups(texts: Iterator[str]) -> Iterator[list[str]]:
    """Yield growing groups: small ones show soon whether the cache works, large ones batch better."""
    size = _FIRST
    while group := list(islice(texts, size)):
        yield group
        size = min(_MOST, 2 * size)


@dataclass(frozen=True, slots=True)
class CorpusEstimate:
    """The cost of encoding a corpus, estimated from a sample.

    Attributes:
        passages: in the corpus.
        known: of them, those that the cache holds; only of the sample unless everything was looked up.
        sampled: size of the sample.
        timed: passages of it that were timed.
        tokens: mean of a passage.
        each: bytes of an encoded passage.
        prefilled: bytes of a prefilled passage.
        seconds: to encode what is new; 0 if nothing was timed.
    """

    passages: int
    known: int
    sampled: int
    timed: int
    tokens: float
    each: float
    prefilled: float
    seconds: float

    def room(self, *, prefilled: bool) -> tuple[int, int]:
        """Bytes of all passages, and of those that are new."""
        each = self.each + (self.prefilled if prefilled else 0)
        return round(each * self.passages), round(each * (self.passages - self.known))


def estimate(reranker: KaLMReranker, texts: Iterator[str], *, everything: bool) -> CorpusEstimate:
    """Count everything and tokenise a sample; with `everything`, also look up everything, and time a few."""
    chooser = random.Random(0)  # noqa: S311 - a reproducible sample
    total = known = drawn = 0
    sample: list[str] = []
    for group in groups(texts):
        total += len(group)
        candidates = reranker.unknown(group) if everything else group
        known += len(group) - len(candidates)
        for text in candidates:
            drawn += 1
            if len(sample) < _SAMPLE:
                sample.append(text)
            elif (place := chooser.randrange(drawn)) < _SAMPLE:
                sample[place] = text
    count = max(1, len(sample))
    if not everything:
        known = round(total * (1 - len(reranker.unknown(sample)) / count))
    sizes = reranker.estimate(sample)
    mean = sum(sizes.tokens) / count
    timed = sample[:_TIMED] if everything else []
    parts = reranker.scorer.windows.expand(timed)
    seconds = reranker.scorer.states.time_encoding(parts) if timed else 0.0
    rate = seconds / max(1, sum(sizes.tokens[: len(timed)]))
    each, prefilled = sizes.states_bytes / count, sizes.prefilled_bytes / count
    return CorpusEstimate(total, known, len(sample), len(timed), mean, each, prefilled, rate * mean * (total - known))


def show_estimate(found: CorpusEstimate, keep: str, as_json: bool) -> None:
    """Print an estimate, as text or as JSON.

    Args:
        found: the estimate.
        keep: what the cache keeps.
        as_json: whether to print JSON.
    """
    new = found.passages - found.known
    facts = {
        "passages": found.passages,
        "known": found.known,
        "to_encode": new,
        "mean_tokens": round(found.tokens, 1),
        "bytes_per_passage": round(found.each),
        "bytes": round(found.each * new),
        "prefilled_bytes": round(found.prefilled * new),
        "seconds": round(found.seconds, 1),
    }
    if as_json:
        print_json(facts)
        return
    show(f"{found.passages} passages, {found.known} known already, {new} to encode.")
    show(
        f"About {found.tokens:.0f} tokens and {size_text(found.each)} each: {size_text(found.each * new)} and "
        f"{duration_text(found.seconds)}."
    )
    show(f"With --keep {keep.replace('states', 'prefilled')}: {size_text(found.prefilled * new)} more, and more time.")
    show(f"Sizes from {found.sampled} of them, time from {found.timed}.")
