"""What the compact form of prefilled passages costs and saves: bytes, changes of the score, and seconds.

Caveats first: scores are those of `mini`, the bundled demonstration checkpoint, and another model may differ; seconds
and bytes are those of random weights in the geometry of KaLM-Reranker-V1-Nano; the file cache is warm.

    python benchmarks/compact.py [--corpus BEIR_FOLDER ...] [--small] [--output FILE]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from report import environment, print_table
from warm import Bench, seconds

FORMS = ("native", "int8", "compact")
CURVE = [(4, count) for count in (0, 1, 2, 4, 8, 12)] + [(bits, 8) for bits in (3, 5, 6, 8)]
"""Bits of a number, and directions of the reference."""


def collection(folder: str | None, queries: int, passages: int) -> tuple[list[str], list[str]]:
    """The first queries and passages of the demo or of a BEIR folder."""
    from kalm_rag.demo_data import load_demo
    from kalm_rag.retrieval.corpus import read_beir

    found = load_demo() if folder is None else read_beir(Path(folder))
    return list(found.queries.values())[:queries], list(found.passages.values())[:passages]


def compared(base: Sequence[float], other: Sequence[float], queries: int) -> dict[str, float]:
    """How far scores moved, and the lowest rank correlation and the mean overlap of the best ten of all queries."""
    import numpy as np

    left, right = (np.array(scores).reshape(queries, -1) for scores in (base, other))
    ranks = [np.argsort(np.argsort(scores, axis=1), axis=1) for scores in (left, right)]
    best = [scores.argsort(axis=1)[:, -10:] for scores in (left, right)]
    overlap = [len(set(one) & set(two)) / len(one) for one, two in zip(*best, strict=True)]
    change = np.abs(left - right)
    return {
        "largest": float(change.max()),
        "mean": float(change.mean()),
        "correlation": float(min(np.corrcoef(one, two)[0, 1] for one, two in zip(*ranks, strict=True))),
        "top10": float(np.mean(overlap)),
    }


def changes(name: str, queries: list[str], passages: list[str], dtypes: Sequence[str]) -> list[dict[str, Any]]:
    """Every form against the native one of the same precision."""
    from kalm_rag import KaLMReranker

    pairs = [(query, text) for query in queries for text in passages]
    found = []
    for dtype in dtypes:
        scores = {}
        for form in FORMS:
            reranker = KaLMReranker("mini", cache=None, device="cpu", dtype=dtype, prefill_storage=form, score_memory=0)
            scores[form] = reranker.predict(pairs)
        found += [
            {"collection": name, "dtype": dtype, "form": form, **compared(scores["native"], scores[form], len(queries))}
            for form in FORMS[1:]
        ]
    return found


def curve(queries: list[str], passages: list[str]) -> list[dict[str, Any]]:
    """Changes of the score in float32 for other numbers of bits and directions than those that are used."""
    import torch

    from kalm_rag import KaLMReranker
    from kalm_rag.model.compact import reference_numbers
    from kalm_rag.model.passage import PassageKV
    from kalm_rag.model.prefill import PrefilledPair
    from kalm_rag.model.reference_texts import reference_texts

    reranker = KaLMReranker("mini", cache=None, device="cpu", dtype="float32", score_memory=0).load()
    scorer, source = reranker.scorer, reranker.scorer.passage_kv
    request = source.request(reranker.settings.instruction, reranker.settings.ratio)
    length = len(request.prefix)

    def prefilled(texts: list[str]) -> list[Any]:
        texts = scorer.clean(texts)
        found = source.get(list(dict.fromkeys(texts)), request)
        return [found[text] for text in texts]

    def shares(kept: list[Any]) -> list[float]:
        prompts = [scorer.prompts.prompt(query, reranker.settings.instruction) for query in queries]
        pairs = [PrefilledPair(prompt, passage) for prompt in prompts for passage in kept]
        found: list[float] = torch.sigmoid(torch.tensor(source.decoder.margins(request.prefix, pairs))).tolist()
        return found

    own = prefilled(passages)
    base = shares(own)
    texts = torch.stack([passage.key_values[:, :, :, :length] for passage in prefilled(reference_texts())])
    found = []
    for bits, directions in CURVE:
        numbers = reference_numbers(texts, directions)
        flat, kept = numbers[1:].flatten(1), []
        for passage in own:
            both = passage.key_values.clone()
            difference = both[:, :, :, :length] - numbers[0]
            rest = difference - (difference.flatten() @ flat.T @ flat).view_as(difference)
            most = 2 ** (bits - 1) - 1
            scales = rest.abs().amax(dim=-1, keepdim=True).clamp(min=1e-30) / most
            both[:, :, :, :length] -= rest - torch.round(rest / scales) * scales
            kept.append(PassageKV(both, None, passage.tokens, passage.ratio, passage.truncated))
        found.append({"bits": bits, "directions": directions, **compared(base, shares(kept), len(queries))})
    return found


def costs(bench: Bench, folder: Path, dtype: str, passages: list[str], repeats: int) -> list[dict[str, Any]]:
    """Bytes of a passage with its states, and seconds of a query from memory and from disk, in turns."""
    from kalm_rag import PassageCache

    query = "does vitamin D reduce the risk of infection"
    readers: dict[str, Any] = {}
    found: dict[str, dict[str, Any]] = {}
    scores: dict[str, list[float]] = {}
    for form in FORMS:
        keep = "compact" if form == "compact" else "prefilled"
        cache = PassageCache(folder / f"{dtype}-{form}", keep=keep, memory=0)
        reader = bench.reranker(dtype, cache=cache, prefill_storage="int8" if form == "int8" else "native")
        source, settings = reader.scorer.passage_kv, reader.settings
        reference = seconds(lambda: source.request(settings.instruction, settings.ratio))  # noqa: B023
        scores[form] = reader.predict([(query, text) for text in passages])
        cache.flush()
        sizes, size = reader.estimate(passages), reader.prefill_stats().size
        states = 0 if form == "compact" else sizes.states_bytes / len(passages)
        found[form] = {
            "dtype": dtype,
            "form": form,
            "memory_bytes": size.bytes / size.entries + states,
            "disk_bytes": (sizes.states_bytes + sizes.prefilled_bytes) / len(passages),
            "reference": reference if form == "compact" else 0.0,
            "change": max(abs(one - two) for one, two in zip(scores[form], scores["native"], strict=True)),
        }
        readers[form] = reader
    for _ in range(repeats):
        for form, reader in readers.items():
            for level in ("disk", "memory"):
                if level == "disk":
                    reader.scorer.passage_kv.cached.memory.clear()
                took = seconds(lambda: reader.rank(query, passages))  # noqa: B023
                found[form][level] = min(took, found[form].get(level, took))
    for reader in readers.values():
        reader.close()
    return list(found.values())


def show(title: str, results: list[dict[str, Any]], formats: dict[str, str]) -> None:
    """Print results as a table."""
    print(f"\n{title}")
    names = [name for name in results[0] if name not in formats]
    rows = [
        [" ".join(str(item[name]) for name in names), *(format(item[name], kind) for name, kind in formats.items())]
        for item in results
    ]
    print_table([" ".join(names), *formats], rows)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", action="append", default=[], help="a BEIR folder; may be given several times")
    parser.add_argument("--small", action="store_true", help="few pairs and a small checkpoint: checks the script")
    parser.add_argument("--output", help="also write the JSON here")
    options = parser.parse_args()
    machine = environment()
    print(json.dumps(machine))
    queries, count, dtypes = (2, 12, ["float32"]) if options.small else (15, 40, ["float32", "bfloat16"])
    quality = []
    for folder in (None, *options.corpus):
        name = "demo" if folder is None else Path(folder).name
        quality += changes(name, *collection(folder, queries, count), dtypes)
    bends = curve(*collection(None, queries, count))
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(Path(name), collection(None, 1, 200)[1], options.small, None)
        passages = bench.passages(4 if options.small else 32, 60 if options.small else 300)
        prices = [
            item for dtype in dtypes for item in costs(bench, Path(name), dtype, passages, 1 if options.small else 5)
        ]
    errors = {"largest": ".4f", "mean": ".5f", "correlation": ".4f", "top10": ".3f"}
    show("changes of P(yes) against native, mini", quality, errors)
    show("other bits and directions, mini in float32, demo", bends, errors)
    show(
        f"{len(passages)} passages: bytes of each with its states, and seconds of a query; random weights",
        prices,
        {
            "memory_bytes": ",.0f",
            "disk_bytes": ",.0f",
            "memory": ".3f",
            "disk": ".3f",
            "reference": ".1f",
            "change": ".4f",
        },
    )
    summary = json.dumps({"environment": machine, "changes": quality, "curve": bends, "costs": prices})
    if options.output:
        Path(options.output).write_text(summary + "\n")
    print(summary)


if __name__ == "__main__":
    main()
