"""Against joint cross-encoders on the same passages: where each wins, and from which query on.

Caveats first: all weights are random, so only time is compared, not quality; peers read at most 512 tokens; one small
tokenizer is shared by all, so that all read about the same number of tokens. A joint cross-encoder reads every passage
anew for every query; kalm-rag reads it once ("cold" includes that) and then runs "warm". "from query" is the number of
queries over the same candidates at which kalm-rag's total becomes the smaller one.

    python benchmarks/peers.py [--small] [--output FILE]
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any

from report import environment, print_table
from warm import Bench, seconds

PEERS = {
    "XLM-R-base 0.28B": {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
    },
    "MiniLM-L6 22M": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
}


def build_peer(folder: Path, name: str, tokenizer_file: Path, *, small: bool) -> Any:
    """A random cross-encoder of a peer's geometry, or of one layer, loaded through sentence-transformers."""
    import torch
    import transformers
    from sentence_transformers import CrossEncoder

    rows = 16_384 if small else 250_002 if name.startswith("XLM") else 30_522
    geometry = {**PEERS[name], **({"num_hidden_layers": 1} if small else {})}
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer_file), bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )
    fast.model_max_length = 512
    config = transformers.XLMRobertaConfig(
        vocab_size=rows, max_position_embeddings=514, num_labels=1, pad_token_id=fast.pad_token_id, **geometry
    )
    torch.manual_seed(0)
    transformers.XLMRobertaForSequenceClassification(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return CrossEncoder(str(folder), device="cpu", max_length=512)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="few short passages: checks the script")
    parser.add_argument("--output", help="also write the JSON here")
    options = parser.parse_args()
    import torch

    from kalm_rag.demo_data import load_demo

    lengths, count, repeats = ((64,), 4, 2) if options.small else ((150, 304, 500), 32, 3)
    rows, results = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bench = Bench(folder, list(load_demo().passages.values()), options.small, None)
        peers = {
            peer: build_peer(folder / str(number), peer, bench.model / "tokenizer.json", small=options.small)
            for number, peer in enumerate(PEERS)
        }
        for dtype in ("float32", "bfloat16"):
            for tokens in lengths:
                passages = bench.passages(count, tokens)
                reranker = bench.reranker(dtype)
                queries = bench.queries(reranker.scorer, repeats + 1, 40 if options.small else 15)
                cold = seconds(lambda: reranker.rank(queries[0], passages))  # noqa: B023
                warm = min(seconds(lambda query=query: reranker.rank(query, passages)) for query in queries[1:])  # noqa: B023
                reranker.close()
                for peer, model in peers.items():
                    model.to(getattr(torch, dtype))
                    pairs = [(queries[0], text) for text in passages]
                    spent = min(seconds(lambda: model.predict(pairs, batch_size=32)) for _ in range(repeats))  # noqa: B023
                    crossing = math.inf if warm >= spent else max(1, math.ceil((cold - warm) / (spent - warm)))
                    result = {
                        "dtype": dtype,
                        "tokens": tokens,
                        "peer": peer,
                        "peer_seconds": spent,
                        "cold": cold,
                        "warm": warm,
                    }
                    results.append({**result, "from_query": None if crossing == math.inf else crossing})
                    rows.append(
                        [
                            f"{peer}, {dtype}",
                            str(tokens),
                            f"{spent:.2f}",
                            f"{cold:.2f}",
                            f"{warm:.3f}",
                            f"{spent / warm:.1f}x",
                            "never" if crossing == math.inf else str(crossing),
                        ]
                    )
                    print(" ".join(rows[-1]), flush=True)
    print(f"\n{count} passages; seconds per query")
    print_table(["peer", "tokens", "peer", "cold", "warm", "peer/warm", "from query"], rows)
    summary = json.dumps({"environment": environment(), "results": results})
    if options.output:
        Path(options.output).write_text(summary + "\n")
    print(summary)


if __name__ == "__main__":
    main()
