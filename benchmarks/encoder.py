"""How fast passages are encoded: stock modules, faster products, and passages side by side, in each precision.

Caveats first: weights are random, in the geometry of KaLM-Reranker-V1-Nano; the machine may be shared, so read ratios.
All variants of a precision take turns in one process, and the shortest time counts. "stock" is the encoder of
transformers in padded batches, sorted by length. "products" has the matrices and norms that were measured to be
faster, padded too. "packed" is what runs: passages side by side without padding, in batches of 2,048 tokens. "of peak"
is the share of the matrix-multiply speed of this process that the multiplications of matrices and attention reach;
padding does not count as work. "prefill" is passages a second from states to keys and values of the default
instruction.

    python benchmarks/encoder.py [--corpus BEIR_FOLDER] [--passages N] [--small] [--output FILE]
    ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 python benchmarks/encoder.py
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from report import can_run, environment, print_table
from warm import Bench, peak, seconds

BATCHES = (512, 1024, 2048, 4096, 16_384)
"""Tokens of a packed batch that are compared."""


def work(config: Any, lengths: Sequence[int]) -> float:
    """Multiplications and additions of encoding passages: matrices, and attention as far as the window reaches."""
    heads, kept = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    matrices = config.hidden_size * (2 * heads + 2 * kept + 3 * config.intermediate_size)
    total = 2.0 * sum(lengths) * matrices * config.num_hidden_layers
    for kind in config.layer_types:
        reach = config.sliding_window if kind == "sliding_attention" else max(lengths)
        total += sum(4.0 * heads * length * min(length, reach) for length in lengths)
    return total


def stock_encoder(bench: Bench, dtype: str) -> Any:
    """The model as transformers has it."""
    import torch

    from kalm_rag.model.checkpoint import find_checkpoint
    from kalm_rag.model.loading import load_model
    from kalm_rag.settings import Settings

    checkpoint = find_checkpoint(str(bench.model))
    return load_model(checkpoint, settings=Settings(), device=torch.device("cpu"), dtype=dtype, fast=False)


def measure(bench: Bench, texts: Sequence[str], dtype: str, rounds: int) -> dict[str, Any]:
    """All variants of one precision."""
    import torch

    from kalm_rag.model import encoder as module
    from kalm_rag.model.encoder import Encoder

    reranker = bench.reranker(dtype)
    scorer = reranker.scorer
    passages = scorer.prompts.passages(texts)
    lengths = [len(passage.ids) for passage in passages]
    packed = scorer.states.encoder

    def run(encoder: Encoder) -> None:
        for batch in encoder.batches(passages):
            encoder.encode([passages[place] for place in batch], 4)

    def padded(loaded: Any) -> Callable[[], None]:
        encoder = Encoder(loaded, scorer.settings)
        encoder._packed = None  # as in a version of transformers that cannot pack
        return lambda: run(encoder)

    variants: dict[str, Callable[[], None]] = {"products": padded(scorer.loaded), "packed": lambda: run(packed)}
    if dtype != "int8-all":
        variants["stock"] = padded(stock_encoder(bench, dtype))
    best = {name: min(seconds(variants[name]) for _ in range(1)) for name in variants}
    for _ in range(rounds - 1):
        best = {name: min(best[name], seconds(variants[name])) for name in variants}
    default, by_batch = module._CPU_TOKENS, {}
    try:
        for tokens in BATCHES:
            module._CPU_TOKENS = tokens
            by_batch[tokens] = min(seconds(variants["packed"]) for _ in range(rounds))
    finally:
        module._CPU_TOKENS = default
    states = packed.encode(passages[:16], 4)
    prefix = scorer.passage_kv.prefix(scorer.settings.instruction)
    prefiller = scorer.passage_kv.decoder.prefiller
    with torch.inference_mode():
        prefill = min(seconds(lambda: prefiller.prefill(prefix, states)) for _ in range(rounds))
    geometry = scorer.loaded.model.config.encoder.text_config
    speed = peak(256, geometry, "int8" if dtype == "int8-all" else dtype)[1]
    return {
        "dtype": dtype,
        "computes": scorer.loaded.precision,
        "tokens": sum(lengths),
        "passages_per_second": {name: len(texts) / value for name, value in best.items()},
        "of_peak": {name: work(geometry, lengths) / value / speed for name, value in best.items()},
        "peak_gflops": speed / 1e9,
        "passages_per_second_by_batch_tokens": {tokens: len(texts) / value for tokens, value in by_batch.items()},
        "prefilled_per_second": len(states) / prefill,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, help="a BEIR folder; default: the demo's passages")
    parser.add_argument("--tokenizer", help="a tokenizer.json; default: a small one")
    parser.add_argument("--passages", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="few short passages: checks the script")
    parser.add_argument("--output", help="also write the JSON here")
    options = parser.parse_args()
    from kalm_rag.demo_data import load_demo
    from kalm_rag.retrieval.corpus import read_beir

    print(json.dumps(environment()), flush=True)
    corpus = load_demo() if options.corpus is None else read_beir(options.corpus)
    texts = list(corpus.passages.values())
    count, rounds = (4, 1) if options.small else (options.passages, options.rounds)
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(Path(name), texts, options.small, options.tokenizer)
        chosen = bench.passages(count, None)
        results = [
            measure(bench, chosen, dtype, rounds) for dtype in ("float32", "bfloat16", "int8-all") if can_run(dtype)
        ]
    rows = []
    for result in results:
        speeds, shares = result["passages_per_second"], result["of_peak"]
        rows.append(
            [
                result["dtype"],
                *(f"{speeds[key]:.2f}" if key in speeds else "" for key in ("stock", "products", "packed")),
                *(f"{100 * shares[key]:.0f} %" for key in ("products", "packed")),
                f"{result['peak_gflops']:.0f}",
                f"{result['prefilled_per_second']:.1f}",
            ]
        )
    print(f"{count} passages of {results[0]['tokens'] / count:.0f} tokens on average; passages a second")
    print_table(["", "stock", "products", "packed", "of peak", "of peak", "GFLOP/s", "prefill"], rows)
    print("\nPacked, by tokens of a batch")
    batches = [
        [result["dtype"], *(f"{value:.2f}" for value in result["passages_per_second_by_batch_tokens"].values())]
        for result in results
    ]
    print_table(["", *(f"{tokens:,}" for tokens in BATCHES)], batches)
    summary = json.dumps({"environment": environment(), "results": results})
    if options.output:
        Path(options.output).write_text(summary + "\n")
    print(summary)


if __name__ == "__main__":
    main()
