"""What a reranker tells about its calls: where passages came from, and where the time went."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass, field, fields

from kalm_rag.utils import forks
from kalm_rag.utils.display import Shown
from kalm_rag.utils.recording import Recording


@dataclass(frozen=True, slots=True, repr=False)
class RankCounts(Shown):
    """Counts the passages of a call, or of all calls.

    With `long_passages="windows"`, the windows count where passages come from.

    Attributes:
        passages: that were given.
        scored: that have a score.
        skipped: that have none, because the budget ended or they were not encoded.
        cut: that were scored, but are not returned because of `threshold`, or are not because of `top_k`.
        truncated: whose tail was not read.
        remembered: pairs whose score was remembered.
        prefilled: found prefilled in memory.
        stored: found prefilled in the cache's store.
        states: whose encoder states were found in the cache.
        remote: found in the tier that several machines share; they are among `stored` and `states` too.
        encoded: that the encoder read for the call.
    """

    passages: int = 0
    scored: int = 0
    skipped: int = 0
    cut: int = 0
    truncated: int = 0
    remembered: int = 0
    prefilled: int = 0
    stored: int = 0
    states: int = 0
    remote: int = 0
    encoded: int = 0


@dataclass(frozen=True, slots=True, repr=False)
class Timings(Shown):
    """Seconds of a call, or of all calls.

    Attributes:
        queue: waiting for the model, which other calls had.
        read: reading the cache.
        encode: running the encoder.
        prefill: computing keys and values of passages.
        score: running the decoder on the query.
        total: all of the call, with loading the model, tokenising and whatever is not above.
    """

    queue: float = 0.0
    read: float = 0.0
    encode: float = 0.0
    prefill: float = 0.0
    score: float = 0.0
    total: float = 0.0


@dataclass(frozen=True, slots=True, repr=False)
class BackgroundStats(Shown):
    """What became of the passages that calls left out, of one loaded model.

    Attributes:
        pending: passages that wait.
        encoded: passages that were encoded, or were found encoded already.
        dropped: passages that were not encoded because the queue was full, the model was closed, or
            passages were forgotten before their turn.
        failed: passages that could not be encoded.
        abandoned: batches that were given up for a call, and taken up again later.
    """

    pending: int = 0
    encoded: int = 0
    dropped: int = 0
    failed: int = 0
    abandoned: int = 0


@dataclass(frozen=True, slots=True, repr=False)
class RerankerStats(Shown):
    """Sums over the calls of `rank` and `predict` since a reranker was made.

    Attributes:
        calls: how many ended.
        counts: their passages.
        timings: their seconds. Calls run side by side, so that the sum may be more than the time that went by.
        background: the passages that calls left out, since the model was loaded.
    """

    calls: int = 0
    counts: RankCounts = field(default_factory=RankCounts)
    timings: Timings = field(default_factory=Timings)
    background: BackgroundStats = field(default_factory=BackgroundStats)


_SOURCES = {
    "remembered": "remembered",
    "prefilled": "hits",
    "stored": "stored",
    "states": "states",
    "remote": "remote",
    "encoded": "encode",
}
"""What the recorded counts are called where they arise."""


def timings_of(recorded: Recording) -> Timings:
    """Return the seconds that were recorded."""
    return Timings(**{part.name: recorded.seconds[part.name] for part in fields(Timings)})


def counts_of(recorded: Recording, **others: int) -> RankCounts:
    """Return where the passages of a call came from, and further counts by name."""
    return RankCounts(**{name: max(0, recorded.counts[own]) for name, own in _SOURCES.items()}, **others)


class Totals:
    """Sums over calls, which may end in any thread."""

    def __init__(self) -> None:
        self._lock = forks.Lock()  # of the next line
        self._sums: defaultdict[str, float] = defaultdict(float)

    def add(self, counts: RankCounts, timings: Timings) -> None:
        """Add a call."""
        with self._lock:
            self._sums["calls"] += 1
            for name, number in asdict(counts).items():
                self._sums[name] += number
            for name, seconds in asdict(timings).items():
                self._sums[f"{name} seconds"] += seconds

    def stats(self, background: BackgroundStats) -> RerankerStats:
        """Return the sums."""
        with self._lock:
            sums = dict(self._sums)
        counts = RankCounts(**{part.name: int(sums.get(part.name, 0)) for part in fields(RankCounts)})
        timings = Timings(**{part.name: float(sums.get(f"{part.name} seconds", 0.0)) for part in fields(Timings)})
        return RerankerStats(int(sums.get("calls", 0)), counts, timings, background)
