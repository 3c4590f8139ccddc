"""What `replay.py` makes of its measurements: changes of scores, break-even, and tables."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from joint import missing
from report import percentiles, print_table

if TYPE_CHECKING:
    from replay import Stream


def add_changes(cells: list[dict[str, Any]]) -> None:
    """Replace the scores of each line by the largest change from the form "states" in the same precision."""
    base = {cell["dtype"]: cell["scores"] for cell in cells if cell["form"] == "states"}
    for cell in cells:
        other = base.get(cell["dtype"])
        scores = cell.pop("scores")
        cell["change"] = None if other is None else max(abs(a - b) for a, b in zip(scores, other, strict=True))


def break_even(
    stream: Stream, encoded: Sequence[dict[str, Any]], cells: Sequence[dict[str, Any]], peers: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """From how many times that a passage is a candidate kalm-rag takes less time in all than a peer.

    What encoding and prefilling a passage takes, over what the peer spends on a pair beyond what kalm-rag does. Over
    the whole corpus that is so many queries if each passage is a candidate equally often.
    """
    spent = {(item["dtype"], item["form"]): item["seconds_each"] for item in encoded}
    depth = statistics.mean(map(len, stream.candidates))
    found = []
    for cell in cells:
        if cell["score_memory"]:
            continue
        dtype, form = cell["dtype"], cell["form"]
        each = spent[dtype, "states"] + (spent[dtype, form] if form != "states" else 0.0)
        ours = percentiles(cell["samples"])["p50"]
        for peer in peers:
            saved = None if peer["p50"] is None else (peer["p50"] - ours) / depth
            times = each / saved if saved is not None and saved > 0 else None
            found.append(
                {
                    "peer": peer["peer"],
                    "dtype": dtype,
                    "form": form,
                    "memory": cell["memory"],
                    "seconds_each": each,
                    "ours": ours,
                    "theirs": peer["p50"],
                    "candidacies": times,
                    "queries": None if times is None else math.ceil(times * stream.corpus / depth),
                }
            )
    return found


def show(result: dict[str, Any]) -> None:
    """Print the tables."""
    what = "processor seconds of one thread" if result["counted"] == "cpu" else "seconds"
    print(f"\nencoding and prefilling, {what}; bytes are those of the folder, states included")
    rows = [
        [
            f"{item['dtype']} {item['form']}",
            f"{item['seconds_each'] * item['passages']:.1f}",
            f"{1 / item['seconds_each']:.1f}" if item["seconds_each"] else "",
            f"{item['reference_seconds']:.1f}",
            f"{item['disk_bytes'] / 1e6:,.0f}",
            f"{item['disk_bytes'] / item['passages']:,.0f}",
        ]
        for item in result["encoded"]
    ]
    print_table(["", "seconds", "passages/s", "reference s", "disk MB", "bytes each"], rows)
    print(f"\na query has {result['new_tokens']:.1f} tokens behind the prompt's prefix on average")
    print(f"replay; {what} of a query, and the share of candidates by level in percent")
    rows = []
    for cell in result["cells"]:
        total = sum(cell["levels"].values())
        rows.append(
            [
                f"{cell['dtype']} {cell['form']}{' + scores' if cell['score_memory'] else ''}",
                cell["memory"],
                f"{cell['memory_limit'] / 1e6:,.0f}",
                f"{cell['memory_bytes'] / 1e6:,.0f}",
                *(f"{percentiles(cell['samples'])[share]:.3f}" for share in ("p50", "p95", "p99")),
                f"{len(cell['samples']) / sum(cell['samples']):.2f}",
                f"{percentiles(cell['wall'])['p50']:.3f}",
                *(f"{100 * number / total:.0f}" for number in cell["levels"].values()),
                "" if cell["change"] is None else f"{cell['change']:.4f}",
                "" if cell["gflops"] is None else f"{cell['gflops']:.0f}",
            ]
        )
    levels = list(result["cells"][0]["levels"])
    header = [
        "",
        "memory",
        "limit MB",
        "used MB",
        "p50",
        "p95",
        "p99",
        "queries/s",
        "wall p50",
        *levels,
        "change",
        "GFLOP/s",
    ]
    print_table(header, rows)
    if not result["peers"]:
        return
    print(f"\njoint models; {what}: milliseconds of a pair in each runtime, and p50 of a query in the fastest")
    names = list(dict.fromkeys(name for peer in result["peers"] for name in peer["runtimes"]))
    rows = []
    for peer in result["peers"]:
        tried = [peer["runtimes"].get(name, {}).get("seconds") for name in names]
        rows.append(
            [
                peer["peer"],
                *("" if value is None else f"{1000 * value:.1f}" for value in tried),
                peer["fastest"] or "none",
                "" if peer["p50"] is None else f"{peer['p50']:.3f}",
                f"{peer['mean_tokens']:.0f}",
            ]
        )
    print_table(["", *names, "fastest", "p50", "tokens"], rows)
    for line in missing(result["peers"]):
        print(f"did not run: {line}")
    print("\nbreak-even; theirs / ours, candidacies of a passage, and queries over the whole corpus")
    rows = [
        [
            f"{item['peer']} / {item['dtype']} {item['form']}",
            item["memory"],
            "" if item["theirs"] is None else f"{item['theirs']:.3f}",
            f"{item['ours']:.3f}",
            "" if item["theirs"] is None else f"{item['theirs'] / item['ours']:.2f}x",
            "never" if item["candidacies"] is None else f"{item['candidacies']:.1f}",
            "never" if item["queries"] is None else f"{item['queries']:,}",
        ]
        for item in result["break_even"]
        if item["form"] in ("states", "compact")
    ]
    print_table(["", "memory", "theirs", "ours", "ratio", "candidacies", "queries"], rows)
