"""Reranking one candidate list: the reference, states kept, cold, and warm, on the same weights in the same process.

Caveats first. The weights are random, in the geometry of KaLM-Reranker-V1-Nano with its 262,144 output rows; time does
not depend on their values. The machine may be shared: read ratios within one table, not seconds across tables.
"reference" is the KaLM wrapper of the package mteb, with passages sorted by length, at the better of two batch sizes.
"kept" has pooled states at hand, skips the encoder and is otherwise the reference. "cold" starts from text, "warm" from
prefilled passages; each warm query is a new one. "peak" is the share of the matrix-multiply speed measured beside it:
the faster of torch's own product and oneDNN's, which differ in float32. Work that is left out is not counted as done.

    python benchmarks/warm.py [--corpus FOLDER] [--tokenizer tokenizer.json] [--full] [--small] [--output FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from report import can_run, environment, percentiles, print_table

CANDIDATES, TOKENS, NEW = (10, 32, 100), (128, 304, 512, 1024, 4096), (8, 15, 30)
BASE = (32, None, 15)
"""Candidates, passage tokens (None: the corpus' own mixed lengths), new tokens."""


class Bench:
    """One checkpoint, and the texts to measure with.

    Args:
        folder: where a checkpoint with random weights is written, or was written before.
        texts: what passages and queries are cut from.
        small: a small geometry instead of Nano's.
        tokenizer: a `tokenizer.json` instead of a small one.
        device: of the rerankers.
        model: a model to use instead.
    """

    def __init__(
        self,
        folder: Path,
        texts: list[str],
        small: bool,
        tokenizer: str | None,
        device: str = "cpu",
        model: str | None = None,
    ) -> None:
        import torch

        from kalm_rag import KaLMReranker
        from kalm_rag.testing import NANO, TINY, build_checkpoint

        self.device = device
        self.model: str | Path = model or folder / "model"
        written = folder / "model.written"
        if model is None and not written.exists():
            build_checkpoint(
                self.model,
                geometry=TINY if small else NANO,
                tokenizer_file=tokenizer,
                rows=None if small else 262_144,
                vocabulary=8192,
                dtype=torch.bfloat16,
            )
            written.touch()
        self.texts = texts
        self.words = " ".join(texts).split()
        self.prompts = KaLMReranker(self.model, cache=None, max_length=8192).scorer.prompts

    def reranker(self, dtype: str, **options: Any) -> Any:
        """A loaded reranker without anything on disk."""
        from kalm_rag import KaLMReranker

        options = {"cache": None, "max_length": 8192, "prefill_memory": 8_000_000_000, "score_memory": 0, **options}
        return KaLMReranker(self.model, device=self.device, dtype=dtype, **options).load()

    def passages(self, count: int, tokens: int | None) -> list[str]:
        """Different passages: the corpus' own, or each of about `tokens` tokens."""
        if tokens is None:
            step = max(1, len(self.texts) // count)
            return (self.texts[::step] * count)[:count]
        found = []
        for number in range(count):
            start = (number * 97) % len(self.words)
            words = (self.words[start:] + self.words)[: 2 * tokens]
            low, high = 1, len(words)
            while low < high:
                middle = (low + high + 1) // 2
                text = " ".join(words[:middle])
                low, high = (middle, high) if len(self.prompts.passages([text])[0].ids) <= tokens else (low, middle - 1)
            found.append(" ".join(words[:low]))
        return found

    def queries(self, engine: Any, count: int, new: int) -> list[str]:
        """Different queries that leave exactly `new` tokens to the decoder."""
        prefix = len(engine.passage_kv.prefix(engine.settings.instruction))
        found: list[str] = []
        for start in range(0, len(self.words), 3):
            for end in range(start + 1, start + new + 1):
                query = " ".join(self.words[start:end])
                if len(engine.prompts.prompt(query).ids) - prefix == new:
                    found.append(query)
                    break
            if len(found) == count:
                return found
        msg = f"the corpus has too few words for {count} queries of {new} tokens"
        raise SystemExit(msg)


def seconds(action: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def peak(rows: int, geometry: Any, dtype: str) -> tuple[float, float]:
    """Best FLOP/s that this process reaches on the decoder's largest matrix products, at `rows` rows: torch's, any."""
    import torch

    from kalm_rag.model.cpu_kernels import Int8Weight, PackedWeight, has_fast_bfloat16

    wide, narrow = geometry.intermediate_size, geometry.hidden_size
    # Where bfloat16 is slow, its products are computed in float32.
    kind = torch.bfloat16 if dtype == "bfloat16" and has_fast_bfloat16() else torch.float32
    layers = [torch.nn.Linear(*sizes, bias=False, dtype=kind) for sizes in ((narrow, wide), (wide, narrow))]
    data = [torch.randn(rows, layer.in_features).to(kind) for layer in layers]
    packed = [(Int8Weight if dtype == "int8" else PackedWeight)(layer) for layer in layers]
    inputs = [matrix.input(part) for matrix, part in zip(packed, data, strict=True)]

    def best(action: Callable[[], object]) -> float:
        return 4 * rows * wide * narrow / min(seconds(action) for _ in range(40))

    with torch.inference_mode():
        stock = best(lambda: [layer(part) for layer, part in zip(layers, data, strict=True)])
        ours = best(lambda: [matrix.product(part) for matrix, part in zip(packed, inputs, strict=True)])
    return stock, ours if dtype == "int8" else max(stock, ours)


def flops(engine: Any, passages: int, new: int) -> float:
    """Multiplications and additions of one warm pass: matrices, and attention over what each passage has.

    The last layer has but one token of each prompt, and keys and values of all.
    """
    config = engine.loaded.model.config.decoder
    heads = config.num_attention_heads * config.head_dim
    kept = config.num_key_value_heads * config.head_dim
    own, shared = 3 * config.intermediate_size + 2 * heads, 2 * kept
    positions = sum(item.positions + new for item in engine.passage_kv.cached.memory.values()[-passages:])
    tokens = (config.num_hidden_layers - 1) * new + 1
    matrices = 2 * passages * config.hidden_size * (tokens * own + config.num_hidden_layers * new * shared)
    return matrices + 4 * heads * tokens * positions


def reference(bench: Bench, dtype: str, query: str, passages: list[str]) -> tuple[float, list[float]]:
    """The mteb wrapper, passages sorted by length, at the better of two batch sizes; seconds and scores."""
    from mteb.models.model_implementations.kalm_reranker import KaLMRerankerWrapper

    wrapper = KaLMRerankerWrapper(str(bench.model), device="cpu", dtype=dtype, max_length=8192)
    ordered = sorted(passages, key=len, reverse=True)
    best, scores = float("inf"), {}
    for size in (16, 32):
        found: list[float] = []

        def run(size: int = size, found: list[float] = found) -> None:
            for start in range(0, len(ordered), size):
                batch = [(query, text) for text in ordered[start : start + size]]
                found.extend(wrapper._predict_batch(batch, [wrapper.instruction] * len(batch)))

        best = min(best, seconds(run))
        scores = dict(zip(ordered, found, strict=True))
    return best, [scores[text] for text in passages]


def states_kept(bench: Bench, engine: Any, dtype: str, query: str, passages: list[str], ratio: int = 4) -> float:
    """Pooled states at hand, the rest as the reference: stock modules, whole prompt, all output rows and positions."""
    import torch
    from transformers.modeling_outputs import BaseModelOutput

    from kalm_rag.model.checkpoint import find_checkpoint
    from kalm_rag.model.loading import load_model
    from kalm_rag.model.padding import right_pad, right_pad_states

    encoded = engine.states.get(passages, ratio)
    device = engine.loaded.device
    stock = load_model(find_checkpoint(bench.model), settings=engine.settings, device=device, dtype=dtype, fast=False)

    def run() -> None:
        with torch.inference_mode():
            for start in range(0, len(passages), 32):
                part = passages[start : start + 32]
                states, mask = right_pad_states([encoded[text].states for text in part], stock)
                prompt = engine.prompts.prompt(query)
                ids, ids_mask = right_pad([prompt.ids] * len(part), 0, engine.loaded.device)
                stock.model(
                    encoder_outputs=BaseModelOutput(last_hidden_state=states),
                    attention_mask=mask,
                    decoder_input_ids=ids,
                    decoder_attention_mask=ids_mask,
                ).logits[:, -1].float()

    return min(seconds(run) for _ in range(2))


def measure(
    bench: Bench, dtype: str, case: tuple[int, int | None, int], *, slow: bool, repeats: int, ratio: int = 4
) -> dict[str, Any]:
    """One case on one precision."""
    count, tokens, new = case
    passages = bench.passages(count, tokens)
    reranker = bench.reranker(dtype, ratio=ratio)
    engine = reranker.scorer
    queries = bench.queries(engine, repeats + 4, new)
    result: dict[str, Any] = {
        "dtype": dtype,
        "candidates": count,
        "tokens": tokens or "mixed",
        "new": new,
        "ratio": ratio,
    }
    result["mean_tokens"] = statistics.mean(reranker.estimate(passages).tokens)
    result["cold"] = seconds(lambda: reranker.rank(queries[0], passages))
    engine.passage_kv.cached.memory.clear()
    result["states_cached"] = seconds(lambda: reranker.rank(queries[1], passages))
    warm = [seconds(lambda query=query: reranker.rank(query, passages)) for query in queries[2 : 2 + repeats]]
    result["warm_samples"] = warm
    result["warm"] = percentiles(warm)
    torch_peak, any_peak = peak(count * new, engine.loaded.model.config.decoder, dtype)
    result["torch_peak_gflops"], result["peak_gflops"] = torch_peak / 1e9, any_peak / 1e9
    result["warm_gflops"] = flops(engine, count, new) / min(warm) / 1e9
    if slow:
        kept = states_kept(bench, engine, dtype, queries[-1], passages, ratio) if dtype != "int8" else None
        result["states_kept"] = kept
    ours = reranker.predict([(queries[-1], text) for text in passages])
    reranker.close()
    if slow and dtype != "int8":
        result["reference"], expected = reference(bench, dtype, queries[-1], passages)
        result["largest_difference"] = max(abs(a - b) for a, b in zip(ours, expected, strict=True))
    return result


HEADER = ["case", "ref", "kept", "cold", "warm", "p99", "ref/warm", "kept/warm", "peak"]
_SHORT = {"float32": "fp32", "bfloat16": "bf16", "int8": "int8"}


def row(result: dict[str, Any]) -> list[str]:
    """A line of the table."""
    warm = result["warm"]["p50"]
    case = f"{result['candidates']}x{result['tokens']}/{result['new']} r{result['ratio']}"
    cells = [f"{_SHORT[result['dtype']]} {case}"]
    for name in ("reference", "states_kept", "cold"):
        value = result.get(name)
        cells.append("" if value is None else f"{value:.2f}")
    cells += [f"{warm:.3f}", f"{result['warm']['p99']:.3f}"]
    for name in ("reference", "states_kept"):
        value = result.get(name)
        cells.append("" if value is None else f"{value / warm:.1f}x")
    return [*cells, f"{100 * result['warm_gflops'] / result['peak_gflops']:.0f}%"]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", help="BEIR folder or JSON lines [default: the demo's corpus]")
    parser.add_argument("--tokenizer", help="a tokenizer.json, for lengths at true vocabulary size")
    parser.add_argument("--full", action="store_true", help="every combination; hours on a CPU")
    parser.add_argument("--small", action="store_true", help="small checkpoint: checks the script in seconds")
    parser.add_argument("--only", help="dtypes, separated by commas")
    parser.add_argument("--output", help="also write the JSON here")
    options = parser.parse_args()
    from kalm_rag.demo_data import load_demo
    from kalm_rag.retrieval.corpus import read_passages

    if options.corpus:
        texts = [record.text for record in read_passages(options.corpus)]
    else:
        texts = list(load_demo().passages.values())
    texts = texts[:200]
    count, tokens, new = (4, None, 40) if options.small else BASE
    dtypes = tuple(dtype for dtype in ("float32", "bfloat16", "int8") if can_run(dtype))
    cases = [(dtype, (count, tokens, new), True, 4) for dtype in dtypes]
    if options.full:
        cases += [(d, (c, t, n), t <= 512, 4) for d in dtypes for c in CANDIDATES for t in TOKENS for n in NEW]
    elif not options.small:
        cases += [(dtype, (other, tokens, new), False, 4) for dtype in dtypes for other in CANDIDATES if other != count]
        cases += [(dtype, (count, tokens, other), False, 4) for dtype in dtypes for other in NEW if other != new]
        cases += [("bfloat16", (count, other, new), False, 32) for other in TOKENS]
    if options.only:
        cases = [case for case in cases if case[0] in options.only.split(",")]
    results = []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), texts, options.small, options.tokenizer)
        for dtype, case, slow, ratio in cases:
            results.append(measure(bench, dtype, case, slow=slow, repeats=3 if options.small else 12, ratio=ratio))
            print(" ".join(row(results[-1])), flush=True)
    print("\ncandidates x passage tokens / new tokens, ratio; seconds; warm is the median")
    print_table(HEADER, [row(result) for result in results])
    for dtype in dtypes:
        found = [result for result in results if result["dtype"] == dtype]
        if found:
            best = {name: max(result[name] for result in found) for name in ("torch_peak_gflops", "peak_gflops")}
            own = "" if dtype == "int8" else f"; torch's own product: {best['torch_peak_gflops']:.0f}"
            print(f"{dtype}: matrix products reach {best['peak_gflops']:.0f} GFLOP/s{own}")
    summary = json.dumps({"environment": environment(), "results": results})
    if options.output:
        Path(options.output).write_text(summary + "\n")
    print(summary)


if __name__ == "__main__":
    main()
