"""Real queries over a real corpus, with repetition: what a query costs by form, memory budget and precision.

Caveats first. Weights are random unless `--model` is given, in the geometry of KaLM-Reranker-V1-Nano with its 262,144
output rows; time does not depend on their values. Queries are drawn by a Zipf law, each is ranked on what BM25 finds
best for it, and only passages that the stream asks for are encoded. The operating system's file cache is warm.
The machine may be shared. So with one thread (OMP_NUM_THREADS=1) seconds are those of processor time, which other
processes change less; with more threads they are those of the clock. "wall" is always the clock. "GFLOP/s" is the
speed of matrix products before and after a line, the smaller of the two.

A form says what the folder keeps and what memory holds: "states" keeps encoder states and prefills from them, the
others keep prefilled passages as well. "scores", "memory", "store", "states" and "encoded" are the levels that
candidates came from. Scores are remembered in the line "+ scores" only; nothing else is held in memory but the
budget. "change" is the largest change of P(yes) from the form "states".
Joint models read at most 512 tokens and are not charged for tokenising; each runs in its fastest runtime.

A run that was killed resumes when it is started again with the same options.

    python benchmarks/replay.py [--corpus BEIR_FOLDER] [--tokenizer tokenizer.json] [--model MODEL] [--queries N|all]
        [--memory 0 10% 500MB] [--forms states compact] [--dtypes float32 bfloat16] [--joint MiniLM] [--small]
        [--work FOLDER] [--output FILE]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from joint import PEERS, Peer, measure_peer, runtime_versions
from replay_report import add_changes, break_even, show
from report import counted, environment, percentiles, spent_on
from warm import Bench, peak

FORMS = {
    "states": ("states", "native"),
    "native": ("prefilled", "native"),
    "int8": ("prefilled", "int8"),
    "compact": ("compact", "native"),
}
"""What the folder keeps, and the storage of prefilled passages."""

_SCORE_MEMORY = 16_000_000
"""Bytes of remembered scores in the one line of each precision that has them."""

_AT_ONCE = 128
"""Passages encoded between two notes in the journal."""

_NO_LIMIT = 10**13
"""Bytes of a folder: nothing may be evicted from it."""


@dataclass(frozen=True)
class Stream:
    """Queries in the order in which they are asked, and what each is ranked on.

    Attributes:
        queries: the texts.
        candidates: the passages of each, best first.
        corpus: how many passages the collection has.
    """

    queries: list[str]
    candidates: list[list[str]]
    corpus: int

    @property
    def distinct(self) -> int:
        """How many different queries there are."""
        return len(set(self.queries))

    @property
    def passages(self) -> list[str]:
        """The different passages that are asked for, in order."""
        return list(dict.fromkeys(text for found in self.candidates for text in found))

    @property
    def repeat_share(self) -> float:
        """Share of (query, passage) pairs that occurred before."""
        pairs = [(query, text) for query, found in zip(self.queries, self.candidates, strict=True) for text in found]
        return 1 - len(set(pairs)) / len(pairs)

    @property
    def passage_repeat_share(self) -> float:
        """Share of candidates that were a candidate before, of whatever query."""
        return 1 - len(self.passages) / sum(map(len, self.candidates))

    def facts(self) -> dict[str, Any]:
        """What the summary says of it."""
        names = ("corpus", "distinct", "repeat_share", "passage_repeat_share")
        return {
            "queries": len(self.queries),
            "passages": len(self.passages),
            "candidates": sum(map(len, self.candidates)),
            **{name: getattr(self, name) for name in names},
        }


def make_stream(corpus: str | None, count: int | None, *, depth: int, zipf: float, seed: int) -> Stream:
    """Draw queries of a collection.

    Args:
        corpus: a BEIR folder; None for the demo.
        count: how many are drawn; None asks every query once and draws as many again.
        depth: passages that BM25 finds for a query.
        zipf: the exponent: the query of rank `r` is drawn in proportion to `r ** -zipf`.
        seed: of the ranks, the draws and the order.
    """
    import numpy as np

    from kalm_rag.demo_data import load_demo
    from kalm_rag.retrieval.bm25 import BM25
    from kalm_rag.retrieval.corpus import read_beir

    found = load_demo() if corpus is None else read_beir(Path(corpus))
    generator = np.random.default_rng(seed)
    texts = [list(found.queries.values())[place] for place in generator.permutation(len(found.queries))]
    weights = np.arange(1, len(texts) + 1) ** -zipf
    draws = generator.choice(len(texts), size=count or len(texts), p=weights / weights.sum())
    asked = [texts[place] for place in draws]
    if count is None:
        asked = [(texts + asked)[place] for place in generator.permutation(2 * len(texts))]
    index = BM25(found.passages)
    best = {query: [found.passages[name] for name, _ in index.search(query, depth)] for query in dict.fromkeys(asked)}
    asked = [query for query in asked if best[query]]  # a query may share no word with any passage
    return Stream(asked, [list(dict.fromkeys(best[query])) for query in asked], len(found.passages))


class Journal:
    """What is finished, a line of JSON each, after a line that says what it depends on.

    Args:
        file: where; a torn last line is what a killed run was writing, and is left out.
        config: what every result depends on.
    """

    def __init__(self, file: Path, config: dict[str, Any]) -> None:
        self._file = file
        self._found: dict[str, Any] = {}
        lines = file.read_text("utf-8").split("\n")[:-1] if file.exists() else []
        if lines and json.loads(lines[0]) != config:
            msg = f"{file} holds results of other options or another machine: give another --work, or delete it"
            raise SystemExit(msg)
        for line in lines[1:]:
            entry = json.loads(line)
            self._found[entry["key"]] = entry["result"]
        kept = [json.dumps(config), *lines[1:]]
        file.write_text("".join(f"{line}\n" for line in kept), "utf-8")

    def once(self, key: str, make: Callable[[], Any]) -> Any:
        """Return the result under a key, which is made now if no earlier run has finished it."""
        if key not in self._found:
            result = json.loads(json.dumps(make()))
            with self._file.open("a", encoding="utf-8") as out:
                out.write(json.dumps({"key": key, "result": result}) + "\n")
            self._found[key] = result
        return self._found[key]


@dataclass(frozen=True)
class Cell:
    """One line of the table.

    Attributes:
        dtype: precision.
        form: of `FORMS`.
        memory: the budget of prefilled passages as given: bytes, or a share of what all take in the form "native".
        score_memory: bytes of remembered scores; 0 remembers none.
    """

    dtype: str
    form: str
    memory: str
    score_memory: int = 0

    @property
    def key(self) -> str:
        """Its name in the journal."""
        return json.dumps(asdict(self))


def budget(text: str, native: int) -> int:
    """Bytes of a budget such as `0`, `500MB`, `2GB` or `10%`, the latter of `native`."""
    units = {"%": native / 100, "KB": 1e3, "MB": 1e6, "GB": 1e9}
    unit = next((unit for unit in units if text.upper().endswith(unit)), "")
    try:
        number = float(text[: len(text) - len(unit)]) * units.get(unit, 1.0)
    except ValueError:
        number = -1.0
    if not 0 <= number < math.inf:
        msg = f"--memory takes bytes or a share, such as 0, 500MB or 10%, got {text!r}"
        raise SystemExit(msg)
    return int(number)


class Replay:
    """One stream on one model.

    Args:
        bench: the model.
        stream: the queries.
        work: where encoded passages are.
        journal: what is finished.
    """

    def __init__(self, bench: Bench, stream: Stream, work: Path, journal: Journal) -> None:
        self.bench = bench
        self.stream = stream
        self._work = work
        self._journal = journal
        self._kind = counted(bench.device)

    def open(self, dtype: str, form: str, memory: int, score_memory: int = 0) -> tuple[Any, Any]:
        """A loaded reranker and its cache; nothing depends on a default."""
        from kalm_rag import PassageCache

        keep, storage = FORMS[form]
        folder = self._work / f"{dtype}-{form}"
        cache = PassageCache(folder, memory=0, limit=_NO_LIMIT, base_ratio=4, keep=keep, storage="native")
        options = {"prefill_memory": memory, "prefill_storage": storage, "score_memory": score_memory}
        return self.bench.reranker(dtype, cache=cache, max_length=1024, ratio=4, **options), cache

    def encode(self, dtype: str, form: str) -> dict[str, Any]:
        """Encode what the stream asks for, or prefill it from encoded states; seconds and bytes."""
        name = json.dumps(["encode", dtype, form])
        folder = self._folder(dtype, form)
        if form != "states" and not folder.exists():
            partial = folder.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(self._folder(dtype, "states"), partial)
            partial.rename(folder)
        return self._journal.once(name, lambda: self._encode(dtype, form))

    def _encode(self, dtype: str, form: str) -> dict[str, Any]:
        reranker, cache = self.open(dtype, form, 0)
        passages, source, settings = self.stream.passages, reranker.scorer.passage_kv, reranker.settings
        reference = spent_on(lambda: source.request(settings.instruction, settings.ratio))

        def encode(part: list[str]) -> dict[str, Any]:
            before, reports = reranker.prefill_stats().counters.misses, []
            took = spent_on(lambda: reports.append(reranker.encode(part, show_progress=False)))
            prefilled = reranker.prefill_stats().counters.misses - before
            return {**asdict(took), "new": reports[0].new if form == "states" else prefilled}

        parts = []
        for start in range(0, len(passages), _AT_ONCE):
            part = passages[start : start + _AT_ONCE]
            name = json.dumps(["encode", dtype, form, start])
            parts.append(self._journal.once(name, lambda part=part: encode(part)))
        estimate = reranker.estimate(passages)
        reranker.close()
        cache.close()
        # A killed run may have kept a few passages that no entry of the journal counts.
        each = sum(part[self._kind] for part in parts) / max(1, sum(part["new"] for part in parts))
        return {
            "dtype": dtype,
            "form": form,
            "passages": len(passages),
            "seconds_each": each,
            "reference_seconds": getattr(reference, self._kind) if form == "compact" else 0.0,
            "disk_bytes": sum(file.stat().st_size for file in self._folder(dtype, form).rglob("*") if file.is_file()),
            "prefilled_bytes": estimate.prefilled_bytes,
            "mean_tokens": statistics.mean(estimate.tokens),
        }

    def _folder(self, dtype: str, form: str) -> Path:
        return self._work / f"{dtype}-{form}"

    def run(self, cell: Cell, memory: int, count: int | None = None) -> dict[str, Any]:
        """Ask the stream's queries, or the first `count` of them, in order."""
        return self._journal.once(f"{cell.key} {count or ''}", lambda: self._run(cell, memory, count))

    def _run(self, cell: Cell, memory: int, count: int | None) -> dict[str, Any]:
        reranker, cache = self.open(cell.dtype, cell.form, memory, cell.score_memory)
        queries, candidates = self.stream.queries[:count], self.stream.candidates[:count]
        config = reranker.scorer.loaded.model.config.decoder
        reranker.rank("a query that comes before the first", candidates[0])
        reranker.scorer.passage_kv.cached.memory.clear()
        start, encoded = reranker.prefill_stats().counters, cache.stats().encoded
        remembered = reranker.score_stats().counters.hits
        speed = [self._speed(len(candidates[0]), config, cell.dtype)]
        samples, scores = [], []
        for query, found in zip(queries, candidates, strict=True):
            hits: list[Any] = []
            samples.append(
                spent_on(lambda query=query, found=found, hits=hits: hits.extend(reranker.rank(query, found)))
            )
            scores += [hit.score for hit in sorted(hits, key=lambda hit: hit.index)]
        speed.append(self._speed(len(candidates[0]), config, cell.dtype))
        end = reranker.prefill_stats()
        asked = {name: getattr(end.counters, name) - getattr(start, name) for name in ("hits", "stored", "misses")}
        encoded = cache.stats().encoded - encoded
        total = sum(map(len, candidates))
        remembered = reranker.score_stats().counters.hits - remembered
        levels = {
            "scores": remembered,
            "memory": asked["hits"],
            "store": asked["stored"],
            "states": total - remembered - asked["hits"] - asked["stored"] - encoded,
            "encoded": encoded,
        }
        reranker.close()
        cache.close()
        return {
            **asdict(cell),
            "memory_limit": memory,
            "memory_bytes": end.size.bytes,
            "memory_entries": end.size.entries,
            "samples": [round(getattr(sample, self._kind), 5) for sample in samples],
            "wall": [round(sample.wall, 5) for sample in samples],
            "levels": levels,
            "gflops": None if None in speed else round(min(speed) / 1e9, 1),
            "scores": [round(score, 5) for score in scores],
        }

    def _speed(self, rows: int, config: Any, dtype: str) -> float | None:
        return peak(15 * rows, config, dtype)[1] if self.bench.device == "cpu" else None

    def peer(self, peer: Peer, count: int, *, small: bool, limit: float) -> dict[str, Any]:
        """Seconds of a joint model on the first `count` different queries, within about `limit` seconds."""
        from tokenizers import Tokenizer

        from kalm_rag.model.checkpoint import find_checkpoint

        tokenizer = Tokenizer.from_file(str(find_checkpoint(self.bench.model).folder / "tokenizer.json"))

        def length(text: str) -> int:
            return len(tokenizer.encode(text, add_special_tokens=False).ids)

        asked = list(dict(zip(self.stream.queries, self.stream.candidates, strict=True)).items())[:count]
        pairs = [(length(query), [length(text) for text in found]) for query, found in asked]

        def measure() -> dict[str, Any]:
            with tempfile.TemporaryDirectory() as folder:
                return measure_peer(peer, pairs, Path(folder), device=self.bench.device, small=small, budget=limit)

        return self._journal.once(json.dumps(["peer", peer.name, count]), measure)


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", help="a BEIR folder [default: the demo's corpus]")
    parser.add_argument("--tokenizer", help="a tokenizer.json, for lengths at true vocabulary size")
    parser.add_argument("--model", help="a model instead of random weights in Nano's geometry: a name or a folder")
    parser.add_argument("--device", default="cpu", help="of torch [default: cpu]")
    parser.add_argument("--queries", default="200", help="how many are drawn, or 'all' [default: 200]")
    parser.add_argument("--candidates", type=int, default=32, help="passages of a query [default: 32]")
    parser.add_argument("--zipf", type=float, default=1.0, help="exponent of the repetition [default: 1]")
    parser.add_argument("--seed", type=int, default=0, help="of the stream [default: 0]")
    parser.add_argument("--memory", nargs="+", default=["0", "10%", "50%"], help="budgets [default: 0 10%% 50%%]")
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=list(FORMS))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--peers", type=int, default=5, help="queries for each joint model, 0 for none [default: 5]")
    parser.add_argument(
        "--joint", nargs="+", help="only joint models whose names begin so, such as MiniLM [default: all]"
    )
    parser.add_argument("--peer-seconds", type=float, default=60, help="for those of one model [default: 60]")
    parser.add_argument("--small", action="store_true", help="few queries and a small checkpoint: checks the script")
    parser.add_argument("--work", help="folder of what is encoded and of the journal, kept at the end")
    parser.add_argument("--output", help="also write the JSON here")
    if "--small" in sys.argv:
        parser.set_defaults(queries="12", candidates=4, peers=1, dtypes=["float32"], memory=["50%"])
        parser.set_defaults(joint=[PEERS[0].name])
    options = parser.parse_args()
    if options.queries != "all" and not (options.queries.isdecimal() and int(options.queries) > 0):
        parser.error(f"--queries takes a number above 0 or 'all', got {options.queries!r}")
    return options


def chosen(names: Sequence[str] | None) -> list[Peer]:
    """Joint models whose names begin with one of these, or all."""
    if names is None:
        return list(PEERS)
    unknown = [name for name in names if not any(peer.name.startswith(name) for peer in PEERS)]
    if unknown:
        msg = f"--joint: no model is named {', '.join(unknown)}; known are {', '.join(peer.name for peer in PEERS)}"
        raise SystemExit(msg)
    return [peer for peer in PEERS if peer.name.startswith(tuple(names))]


def replay(options: argparse.Namespace, machine: dict[str, Any], work: Path, stream: Stream) -> dict[str, Any]:
    """Everything on one stream, resuming what `work` holds."""
    from kalm_rag.model.prefiller import find_prompt_prefix
    from kalm_rag.settings import DEFAULT_INSTRUCTION

    config = {name: getattr(options, name) for name in ("model", "device", "queries", "candidates", "zipf", "seed")}
    config |= {name: machine[name] for name in ("cpu", "features", "threads", "torch", "kalm-rag", "gpus")}
    config |= {"small": options.small, "texts": _digest([*stream.queries, *stream.passages])}
    config["tokenizer"] = options.tokenizer and _digest([Path(options.tokenizer).read_text("utf-8")])
    journal = Journal(work / "journal.jsonl", json.loads(json.dumps(config)))
    texts = stream.passages[:200]
    bench = Bench(work, texts, options.small, options.tokenizer, options.device, options.model)
    runner = Replay(bench, stream, work, journal)
    encoded, cells, peers = [], [], []
    for dtype in options.dtypes:
        for form in dict.fromkeys(["states", *options.forms]):
            encoded.append(runner.encode(dtype, form))
            print(f"encoded: {dtype} {form}, {1000 * encoded[-1]['seconds_each']:.1f} ms a passage", flush=True)
    native = {item["dtype"]: item["prefilled_bytes"] for item in encoded if item["form"] == "states"}
    wanted = [Cell(dtype, form, text) for dtype in options.dtypes for text in options.memory for form in options.forms]
    wanted += [Cell(dtype, options.forms[-1], options.memory[-1], _SCORE_MEMORY) for dtype in options.dtypes]
    for cell in wanted:
        cells.append(runner.run(cell, budget(cell.memory, native[cell.dtype])))
        p50 = percentiles(cells[-1]["samples"])["p50"]
        print(f"replayed: {cell.dtype} {cell.form}, memory {cell.memory}: p50 {p50:.3f} s", flush=True)
    if options.peers:
        for peer in chosen(options.joint):
            peers.append(runner.peer(peer, options.peers, small=options.small, limit=options.peer_seconds))
            print(f"measured: {peer.name}, {peers[-1]['fastest']}: {peers[-1]['p50'] or math.nan:.3f} s", flush=True)
    add_changes(cells)
    prefix = len(find_prompt_prefix(bench.prompts, DEFAULT_INSTRUCTION))
    new = [len(bench.prompts.prompt(query).ids) - prefix for query in stream.queries]
    return {
        "counted": counted(options.device),
        "new_tokens": statistics.mean(new),
        "stream": stream.facts(),
        "encoded": encoded,
        "cells": cells,
        "peers": peers,
        "break_even": break_even(stream, encoded, cells, peers),
    }


def _digest(texts: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()


def main() -> None:
    """Measure and print."""
    options = parse()
    machine = {**environment(), **runtime_versions()}
    print(f"{machine['cpu']}, {machine['threads']} threads: {' '.join(machine['features'])}")
    print(json.dumps(machine))
    count = None if options.queries == "all" else int(options.queries)
    stream = make_stream(options.corpus, count, depth=options.candidates, zipf=options.zipf, seed=options.seed)
    facts = stream.facts()
    print(
        f"{facts['queries']} queries, {facts['distinct']} different; {facts['candidates']} candidates, "
        f"{facts['passages']} different of {facts['corpus']} passages; {100 * facts['repeat_share']:.0f} % of the "
        f"(query, passage) pairs and {100 * facts['passage_repeat_share']:.0f} % of the passages occurred before",
        flush=True,
    )
    # The folder that a killed run left is found whatever forms, budgets, precisions and joint models are asked for now.
    same = ("corpus", "tokenizer", "model", "device", "queries", "candidates", "zipf", "seed", "small")
    named = {name: getattr(options, name) for name in same}
    default = Path(tempfile.gettempdir()) / f"kalm-rag-replay-{_digest([json.dumps(named), stream.queries[0]])[:12]}"
    work = Path(options.work) if options.work else default
    work.mkdir(parents=True, exist_ok=True)
    print(f"working in {work}; a run that is killed resumes from there", flush=True)
    result = replay(options, machine, work, stream)
    show(result)
    summary = json.dumps({"environment": machine, **result})
    if options.output:
        Path(options.output).write_text(summary + "\n")
    if not options.work:
        shutil.rmtree(work)
    print(summary)


if __name__ == "__main__":
    main()
