"""What each level costs: bytes per passage, time to have 32 passages ready, and resident memory against the budget.

Caveats first: random weights in the geometry of KaLM-Reranker-V1-Nano; the operating system's file cache is warm;
resident memory is that of the process, and includes what the allocator holds back.

    python benchmarks/memory.py [--corpus FOLDER] [--tokenizer tokenizer.json] [--small] [--output FILE]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from report import environment, print_table
from warm import Bench, seconds


def resident() -> int:
    """Bytes of memory this process holds now."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS"))


def level(bench: Bench, folder: Path, dtype: str, storage: str, passages: list[str]) -> dict[str, Any]:
    """Bytes per passage at each level, and seconds until a query over 32 of them is answered from that level."""
    from kalm_rag import PassageCache

    where = folder / f"{dtype}-{storage}"
    cache = PassageCache(where, keep="prefilled", storage=storage, memory=0)
    writer = bench.reranker(dtype, cache=cache, prefill_storage=storage)
    query, other = "does vitamin D reduce the risk of infection", "which genes are expressed in the liver"
    cold = seconds(lambda: writer.rank(query, passages))
    warm = seconds(lambda: writer.rank(other, passages))
    cache.flush()
    stats, prefilled = cache.stats(), writer.prefill_stats()
    writer.close()
    counts = len(passages)
    result = {
        "dtype": dtype,
        "storage": storage,
        "states_bytes": stats.store.counters.bytes_written / counts,
        "prefilled_bytes": prefilled.size.bytes / prefilled.size.entries,
        "cold": cold,
        "warm": warm,
    }
    for name, keep in (("from_states", "states"), ("from_prefilled", "prefilled")):
        reader = bench.reranker(
            dtype, cache=PassageCache(where, keep=keep, storage=storage, memory=0), prefill_storage=storage
        )
        result[name] = seconds(lambda: reader.rank(query, passages))  # noqa: B023
        reader.close()
    return result


def budgets(bench: Bench, dtype: str, passages: list[str], megabytes: tuple[int, ...]) -> list[dict[str, Any]]:
    """Resident memory that prefilled passages take, under budgets that all of them exceed."""
    found = []
    for budget in megabytes:
        reranker = bench.reranker(dtype, prefill_memory=budget * 1_000_000)
        reranker.rank("warm up", passages[:8])
        reranker.scorer.passage_kv.cached.memory.clear()
        before = resident()
        for start in range(0, len(passages), 8):
            reranker.rank("a query", passages[start : start + 8])
        size = reranker.prefill_stats().size
        found.append(
            {
                "budget": budget * 1_000_000,
                "counted": size.bytes,
                "resident": resident() - before,
                "evicted": size.evicted,
            }
        )
        reranker.close()
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", help="BEIR folder or JSON lines [default: the demo's corpus]")
    parser.add_argument("--tokenizer", help="a tokenizer.json, for lengths at true vocabulary size")
    parser.add_argument("--small", action="store_true", help="small checkpoint: checks the script in seconds")
    parser.add_argument("--output", help="also write the JSON here")
    options = parser.parse_args()
    from kalm_rag.demo_data import load_demo
    from kalm_rag.retrieval.corpus import read_passages

    texts = (
        [record.text for record in read_passages(options.corpus)]
        if options.corpus
        else list(load_demo().passages.values())
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bench = Bench(folder, texts[:200], options.small, options.tokenizer)
        passages = bench.passages(8 if options.small else 32, None)
        kinds = [("float32", "native"), ("bfloat16", "native"), ("bfloat16", "int8")]
        levels = [level(bench, folder, dtype, storage, passages) for dtype, storage in kinds]
        many = bench.passages(24 if options.small else 96, None)
        budget = budgets(bench, "bfloat16", many, (1, 2) if options.small else (50, 100))
    print(f"{len(passages)} passages; bytes per passage, and seconds to answer a query from each level")
    header = ["", "states", "prefilled", "cold", "from states", "from prefilled", "warm"]
    rows = [
        [
            f"{item['dtype']} {item['storage']}",
            f"{item['states_bytes']:,.0f}",
            f"{item['prefilled_bytes']:,.0f}",
            *(f"{item[key]:.3f}" for key in ("cold", "from_states", "from_prefilled", "warm")),
        ]
        for item in levels
    ]
    print_table(header, rows)
    print("\nprefilled passages in memory, MB")
    print_table(
        ["budget", "counted", "resident", "evicted"],
        [
            [*(f"{item[key] / 1e6:.1f}" for key in ("budget", "counted", "resident")), str(item["evicted"])]
            for item in budget
        ],
    )
    summary = json.dumps({"environment": environment(), "levels": levels, "budgets": budget})
    if options.output:
        Path(options.output).write_text(summary + "\n")
    print(summary)


if __name__ == "__main__":
    main()
