"""Which policy keeps the right passages in memory, by replaying a stream of queries through each.

Queries are drawn from a real collection by Zipf's law, and each asks for its candidates, the 32 best of BM25. Halfway,
a scan over the whole corpus may come in between, as a bulk `predict` or an evaluation does. Passages have the bytes
that they take prefilled at Nano's geometry in float32; budgets are shares of what the whole corpus takes. No model
runs.

    python benchmarks/eviction.py [--corpus BEIR_FOLDER] [--queries N] [--small] [--output FILE]

SIEVE is what `kalm_rag.cache` uses. W-TinyLFU is that of moka-py, and is left out where it is not installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from report import environment, print_table

from kalm_rag.cache.sieve import BudgetSieve

SHARES = (0.01, 0.05, 0.1, 0.25, 0.5)
"""Budgets, as shares of the bytes of the corpus."""
EXPONENTS = (0.8, 1.0, 1.1)
"""Of Zipf's law: the larger, the more often the same queries come."""
CANDIDATES = 32
RIGHT_AFTER = 50
"""Queries after the scan that are looked at by themselves."""


class Policy(Protocol):
    """What is kept."""

    def get_many(self, keys: Iterable[int]) -> Collection[int]:
        """Use these, and return those that are kept."""
        ...

    def put(self, key: int, value: int) -> object:
        """Offer a value, which is its own size."""
        ...


class LRU:
    """Evicts what was used least recently."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._sizes: OrderedDict[int, int] = OrderedDict()
        self._bytes = 0

    def get_many(self, keys: Iterable[int]) -> Collection[int]:
        """As in `Policy`."""
        found = [key for key in keys if key in self._sizes]
        for key in found:
            self._sizes.move_to_end(key)
        return found

    def put(self, key: int, value: int) -> None:
        """As in `Policy`."""
        if value > self._limit:
            return
        while self._bytes + value > self._limit:
            self._bytes -= self._sizes.popitem(last=False)[1]
        self._sizes[key] = value
        self._bytes += value


class SegmentedLRU:
    """Two LRU lists: a value that is used again moves to the protected one, which has 80 % of the budget."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._new: OrderedDict[int, int] = OrderedDict()
        self._protected: OrderedDict[int, int] = OrderedDict()
        self._bytes = self._protected_bytes = 0

    def get_many(self, keys: Iterable[int]) -> Collection[int]:
        """As in `Policy`."""
        found = []
        for key in keys:
            if key in self._protected:
                self._protected.move_to_end(key)
                found.append(key)
            elif key in self._new:
                found.append(key)
                self._protected[key] = self._new.pop(key)
                self._protected_bytes += self._protected[key]
                while self._protected_bytes > 0.8 * self._limit:
                    old, size = self._protected.popitem(last=False)
                    self._protected_bytes -= size
                    self._new[old] = size
        return found

    def put(self, key: int, value: int) -> None:
        """As in `Policy`."""
        if value > self._limit:
            return
        while self._bytes + value > self._limit:
            size = (self._new or self._protected).popitem(last=False)[1]
            self._bytes -= size
            self._protected_bytes = min(self._protected_bytes, self._bytes)  # the new ones go first
        self._new[key] = value
        self._bytes += value


class S3FIFO:
    """A small queue that new values pass through, a main one, and the names of what left the small one (SOSP 2023)."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._small: OrderedDict[int, int] = OrderedDict()
        self._main: OrderedDict[int, int] = OrderedDict()
        self._ghosts: OrderedDict[int, int] = OrderedDict()
        self._uses: dict[int, int] = {}
        self._small_bytes = self._main_bytes = self._ghost_bytes = 0

    def get_many(self, keys: Iterable[int]) -> Collection[int]:
        """As in `Policy`."""
        found = [key for key in keys if key in self._uses]
        for key in found:
            self._uses[key] = min(self._uses[key] + 1, 3)
        return found

    def put(self, key: int, value: int) -> None:
        """As in `Policy`."""
        if value > self._limit:
            return
        while self._small_bytes + self._main_bytes + value > self._limit:
            if self._small and (self._small_bytes >= 0.1 * self._limit or not self._main):
                self._evict_small()
            else:
                self._evict_main()
        if key in self._ghosts:
            self._ghost_bytes -= self._ghosts.pop(key)
            self._main[key] = value
            self._main_bytes += value
        else:
            self._small[key] = value
            self._small_bytes += value
        self._uses[key] = 0

    def _evict_small(self) -> None:
        key, size = self._small.popitem(last=False)
        self._small_bytes -= size
        if self._uses[key] > 1:
            self._uses[key] = 0
            self._main[key] = size
            self._main_bytes += size
            return
        del self._uses[key]
        self._ghosts[key] = size
        self._ghost_bytes += size
        while self._ghost_bytes > self._limit:
            self._ghost_bytes -= self._ghosts.popitem(last=False)[1]

    def _evict_main(self) -> None:
        while True:
            key, size = self._main.popitem(last=False)
            if not self._uses[key]:
                del self._uses[key]
                self._main_bytes -= size
                return
            self._uses[key] -= 1
            self._main[key] = size


class TinyLFU:
    """W-TinyLFU of moka-py. Its upkeep, which runs when it likes, is run after every value."""

    def __init__(self, limit: int) -> None:
        import moka_py

        self._cache: Any = moka_py.Moka(limit, weigher=lambda _, value: value)

    def get_many(self, keys: Iterable[int]) -> Collection[int]:
        """As in `Policy`."""
        return [key for key in keys if self._cache.get(key) is not None]

    def put(self, key: int, value: int) -> None:
        """As in `Policy`."""
        self._cache.set(key, value)
        self._cache.run_pending_tasks()


POLICIES: dict[str, Callable[[int], Policy]] = {
    "LRU": LRU,
    "SLRU": SegmentedLRU,
    "S3-FIFO": S3FIFO,
    "SIEVE": lambda limit: BudgetSieve(limit, int, "passages"),
} | ({"W-TinyLFU": TinyLFU} if importlib.util.find_spec("moka_py") else {})


class Replay(NamedTuple):
    """A collection as a replay needs it.

    Attributes:
        sizes: bytes of each passage.
        candidates: by query, the places of its passages.
    """

    sizes: list[int]
    candidates: list[list[int]]


def replay_of(folder: str | None) -> Replay:
    """The demo, or a BEIR folder."""
    from kalm_rag import KaLMReranker
    from kalm_rag.demo_data import load_demo
    from kalm_rag.retrieval.bm25 import BM25
    from kalm_rag.retrieval.corpus import read_beir

    corpus = load_demo() if folder is None else read_beir(Path(folder))
    index = BM25(corpus.passages)
    places = {name: place for place, name in enumerate(corpus.passages)}
    found = [[places[name] for name, _ in index.search(query, CANDIDATES)] for query in corpus.queries.values()]
    tokens = KaLMReranker("mini", cache=None, device="cpu").estimate(list(corpus.passages.values())).tokens
    # Keys and values of 18 layers, one head of 256 numbers, 4 bytes each; 53 positions of the prompt's prefix.
    sizes = [2 * 18 * 256 * 4 * (53 + -(-count // 4)) for count in tokens]
    return Replay(sizes, [places for places in found if places])


def stream(queries: int, exponent: float, length: int) -> list[int]:
    """Queries drawn by Zipf's law, always the same ones; which are frequent is random."""
    chance = random.Random(0)
    order = chance.sample(range(queries), queries)
    weights = [rank**-exponent for rank in range(1, queries + 1)]
    return [order[rank] for rank in chance.choices(range(queries), weights, k=length)]


def run(make: Callable[[int], Policy], limit: int, replay: Replay, drawn: Sequence[int], *, scan: bool) -> list[int]:
    """Hits of each query of a stream, with or without a scan of the corpus halfway."""

    def ask(places: Sequence[int]) -> int:
        found = set(policy.get_many(places))
        for place in places:
            if place not in found:
                policy.put(place, replay.sizes[place])
        return len(found)

    policy = make(limit)
    hits = []
    for number, query in enumerate(drawn):
        if scan and number == len(drawn) // 2:
            for start in range(0, len(replay.sizes), CANDIDATES):
                ask(range(len(replay.sizes))[start : start + CANDIDATES])
        hits.append(ask(replay.candidates[query]))
    return hits


def measure(replay: Replay, drawn: Sequence[int], exponent: float) -> list[dict[str, Any]]:
    """Every policy under every budget."""
    half = len(drawn) // 2
    asked = [len(replay.candidates[query]) for query in drawn]
    found = []
    for share in SHARES:
        limit = int(share * sum(replay.sizes))
        for name, make in POLICIES.items():
            start = time.perf_counter()
            plain = run(make, limit, replay, drawn, scan=False)
            took = time.perf_counter() - start
            disturbed = run(make, limit, replay, drawn, scan=True)
            after = slice(half, half + RIGHT_AFTER)
            found.append(
                {
                    "exponent": exponent,
                    "budget": share,
                    "policy": name,
                    "no_scan": sum(plain[half:]) / sum(asked[half:]),
                    "scan": sum(disturbed[half:]) / sum(asked[half:]),
                    "undisturbed": sum(plain[after]) / sum(asked[after]),
                    "right_after": sum(disturbed[after]) / sum(asked[after]),
                    "microseconds": 1e6 * took / sum(asked),
                }
            )
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", help="a BEIR folder instead of the demo")
    parser.add_argument("--queries", type=int, default=5000, help="length of the stream")
    parser.add_argument("--small", action="store_true", help="a short stream: checks the script")
    parser.add_argument("--output", help="also write the JSON here")
    options = parser.parse_args()
    machine = environment()
    print(json.dumps(machine))
    replay = replay_of(options.corpus)
    length, exponents = (200, EXPONENTS[1:2]) if options.small else (options.queries, EXPONENTS)
    results: list[dict[str, Any]] = []
    for exponent in exponents:
        results += measure(replay, stream(len(replay.candidates), exponent, length), exponent)
    size = sum(replay.sizes) / 1e9
    print(
        f"\n{len(replay.candidates)} queries, {len(replay.sizes)} passages, {size:.1f} GB; streams of {length} queries"
    )
    print(
        "hits in the second half, in %: without a scan / after a scan / of the "
        f"{RIGHT_AFTER} queries right after it (the same queries without it)"
    )
    rows = []
    for exponent in exponents:
        for share in SHARES:
            cells = [
                f"{100 * item['no_scan']:.1f} / {100 * item['scan']:.1f} / "
                f"{100 * item['right_after']:.1f} ({100 * item['undisturbed']:.1f})"
                for item in results
                if (item["exponent"], item["budget"]) == (exponent, share)
            ]
            rows.append([f"{exponent} {share:.0%}", *cells])
    print_table(["Zipf budget", *POLICIES], rows)
    costs = {
        name: sum(item["microseconds"] for item in results if item["policy"] == name)
        / sum(item["policy"] == name for item in results)
        for name in POLICIES
    }
    print("\nmicroseconds per passage asked for, misses put: " + ", ".join(f"{n} {c:.2f}" for n, c in costs.items()))
    summary = json.dumps({"environment": machine, "passages": len(replay.sizes), "queries": length, "results": results})
    if options.output:
        Path(options.output).write_text(summary + "\n")
    print(summary)


if __name__ == "__main__":
    main()
