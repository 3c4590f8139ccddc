"""The passage cache: reading against plain files and against encoding again, bytes per passage, and what int8 costs.

Caveats first: the operating system's file cache is warm, one process reads, weights are random in the geometry of
KaLM-Reranker-V1-Nano, and "encode" is one timed run over a sample. Scores of random weights move more with int8 than a
trained model's would say about quality; the figure is an upper bound of a kind, not a loss of quality.

    python benchmarks/cache.py [--corpus FOLDER] [--tokenizer tokenizer.json] [--sample 32] [--small]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import tempfile
import time
from pathlib import Path

from report import environment, percentiles, print_table

PASSAGES, PASSAGE_BYTES, ROUNDS = 100, 100_000, 60


def timed(action: object, rounds: int) -> list[float]:
    """Milliseconds of each call."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        action()  # type: ignore[operator]
        times.append(1000 * (time.perf_counter() - start))
    return times


def reading(folder: Path) -> dict[str, list[float]]:
    """A batch of 100 passages of 100 KB: from the store, verified; from the store alone; from plain files."""
    import torch

    from kalm_rag.cache import DiskStore, PassageCache
    from kalm_rag.cache.frame import Frame
    from kalm_rag.model.pooling import PassageStates
    from kalm_rag.states import from_frame, to_frame

    rows = PASSAGE_BYTES // (640 * 2)
    texts = [f"passage {number}" for number in range(PASSAGES)]
    frames = {}
    for text in texts:
        states = PassageStates(torch.randn(rows, 640).bfloat16(), 4 * rows, 4, truncated=False)
        key = hashlib.sha256(text.encode()).hexdigest()
        frames[key] = to_frame(key, bytes(32), states).to_bytes()
    store = DiskStore(folder / "store")
    store.put_many(frames)
    plain = folder / "plain"
    plain.mkdir()
    for key, data in frames.items():
        (plain / key).write_bytes(data)
    keys = list(frames)
    cache = PassageCache(store, memory=0)
    warm = PassageCache(store)
    read = store.get_many(keys)

    def decode(frame: Frame) -> PassageStates:
        return from_frame(frame, torch.bfloat16).at(4)

    cases = {
        "cache: read, verified, as tensors": lambda: cache.get_many("states", keys, decode),
        "store alone: read": lambda: store.get_many(keys),
        "verification alone": lambda: [Frame.from_bytes(data, key) for key, data in read.items()],
        "plain files: read": lambda: [(plain / key).read_bytes() for key in keys],
        "memory level: verified, as tensors": lambda: warm.get_many("states", keys, decode),
    }
    for action in cases.values():
        action()
    return {name: timed(action, ROUNDS) for name, action in cases.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", help="BEIR folder or JSON lines [default: the demo's corpus]")
    parser.add_argument("--tokenizer", help="a tokenizer.json, for lengths at true vocabulary size")
    parser.add_argument("--sample", type=int, default=32, help="passages to encode")
    parser.add_argument("--small", action="store_true", help="small checkpoint: checks the script in seconds")
    options = parser.parse_args()

    from kalm_rag import KaLMReranker, PassageCache
    from kalm_rag.demo_data import load_demo
    from kalm_rag.retrieval.corpus import read_passages
    from kalm_rag.testing import NANO, TINY, build_checkpoint

    demo = load_demo()
    texts = (
        [record.text for record in read_passages(options.corpus)] if options.corpus else list(demo.passages.values())
    )
    sample = texts[:: max(1, len(texts) // options.sample)][: options.sample]
    queries = list(demo.queries.values())[:4]
    raw: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        times = reading(folder)
        raw["reading_ms"] = times
        geometry = TINY if options.small else NANO
        model = build_checkpoint(folder / "model", geometry=geometry, tokenizer_file=options.tokenizer)
        rows, sizes = [], []
        pairs = [(query, text) for query in queries for text in sample]
        seconds = tokens = 0.0
        for dtype in ("float32", "bfloat16"):
            exact: list[float] = []
            for storage in ("native", "int8"):
                cache = PassageCache(folder / f"{dtype}-{storage}", storage=storage, memory=0)
                reranker = KaLMReranker(model, device="cpu", dtype=dtype, cache=cache, score_memory=0).load()
                start = time.perf_counter()
                report = reranker.encode(sample)
                spent = time.perf_counter() - start
                counters = cache.stats().store.counters
                scores = reranker.predict(pairs)
                change = max(abs(a - b) for a, b in zip(scores, exact or scores, strict=True))
                exact = exact or scores
                each = counters.bytes_written / report.new
                sizes.append([dtype, storage, f"{each:,.0f}", f"{change:.4f}" if storage == "int8" else "0"])
                raw[f"{dtype} {storage}"] = {"bytes": each, "largest_score_change": change, "seconds": spent}
                if (dtype, storage) == ("bfloat16", "native"):
                    seconds = spent / report.new
                    tokens = statistics.mean(reranker.estimate(sample).tokens)
                    raw["encode"] = {"seconds_per_passage": seconds, "mean_tokens": tokens}
        for what, samples in times.items():
            p = percentiles(samples)
            share = p["p50"] / (1000 * seconds * PASSAGES)
            rows.append([what, f"{p['p50']:.2f}", f"{p['p99']:.2f}", f"{100 * share:.4f} %"])
    print(f"{PASSAGES} passages of {PASSAGE_BYTES:,} bytes in one batch, {ROUNDS} times")
    print_table(["what", "p50 ms", "p99 ms", "of encoding them"], rows)
    verify, read = percentiles(times["verification alone"])["p50"], percentiles(times["store alone: read"])["p50"]
    print(f"verification is {100 * verify / read:.1f} % of the read\n")
    print(f"{len(sample)} passages of {tokens:.0f} tokens on average, ratio 4; {1 / seconds:.2f} encoded/s in bfloat16")
    print_table(["dtype", "storage", "bytes/passage", "largest score change"], sizes)
    summary = {"environment": environment(), "reading": {k: percentiles(v) for k, v in times.items()}, "samples": raw}
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
