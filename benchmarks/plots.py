"""The plots of the documentation, from what the benchmark scripts wrote to `benchmarks/results`.

python benchmarks/plots.py
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
TARGET = Path(__file__).parent.parent / "docs" / "assets"
INK = "<style>text{fill:#374151!important}@media(prefers-color-scheme:dark){text{fill:#d1d5db!important}}</style>"
"""Labels that are dark on a light page and light on a dark one; no single grey is readable on both."""

GREY, BLUE, ORANGE, GREEN = "#808895", "#3b82f6", "#f59e0b", "#10b981"
COLOURS = (("float32", BLUE), ("bfloat16", ORANGE))


def axes(title: str, height: float = 2.6) -> Any:
    """An empty figure that is readable on a light and on a dark page."""
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams |= {"svg.hashsalt": "kalm-rag", "font.size": 9, "svg.fonttype": "none"}
    plt.rcParams |= dict.fromkeys(
        ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"), GREY
    )
    figure, ax = plt.subplots(figsize=(6.4, height))
    figure.patch.set_alpha(0)
    ax.patch.set_alpha(0)
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_title(title, loc="left", fontsize=10)
    return figure, ax


def save(figure: Any, name: str) -> None:
    """Write an SVG without a date, so that equal data gives an equal file."""
    figure.tight_layout()
    figure.savefig(TARGET / name, metadata={"Date": None})
    (TARGET / name).write_text((TARGET / name).read_text("utf-8").replace("<defs>", f"{INK}\n<defs>", 1), "utf-8")
    print(TARGET / name)


def engines(results: list[dict[str, Any]]) -> None:
    """One candidate list on every engine."""
    figure, ax = axes("32 passages of about 300 tokens, one query (seconds, logarithmic)")
    names = [
        ("reference", "reference"),
        ("states_kept", "states kept"),
        ("cold", "kalm-rag, cold"),
        ("warm", "kalm-rag, warm"),
    ]
    base = [item for item in results if "reference" in item]
    for offset, (item, colour) in enumerate(zip(base, (BLUE, ORANGE), strict=False)):
        values = [item[key]["p50"] if key == "warm" else item[key] for key, _ in names]
        places = [place + 0.38 * offset for place in range(len(names))]
        bars = ax.barh(places, values, 0.36, color=colour, label=item["dtype"])
        ax.bar_label(bars, [f"{value:.2f}" for value in values], padding=3, color=GREY, fontsize=8)
    ax.set_yticks([place + 0.19 for place in range(len(names))], [label for _, label in names])
    ax.invert_yaxis()
    ax.set_xscale("log")
    ax.margins(x=0.12)
    ax.legend(frameon=False, loc="lower right")
    save(figure, "bench-engines.svg")


def growth(results: list[dict[str, Any]]) -> None:
    """Warm time against candidates, new tokens and passage length."""
    import matplotlib.pyplot as plt

    figure, ax = axes("")
    plt.close(figure)
    figure, panels = plt.subplots(1, 3, figsize=(6.8, 2.6), sharey=True)
    figure.patch.set_alpha(0)
    middle = [item for item in results if item["ratio"] == 4]
    kinds = (("float32", BLUE), ("bfloat16", ORANGE), ("int8", GREEN))
    for ax, axis, label in zip(
        panels, ("candidates", "new", "tokens"), ("candidates", "new tokens", "passage tokens (r = 32)"), strict=True
    ):
        ax.patch.set_alpha(0)
        ax.spines[["top", "right"]].set_visible(False)
        for dtype, colour in kinds:
            if axis == "tokens":
                items = [item for item in results if item["ratio"] == 32 and item["dtype"] == dtype]
            else:
                other = "new" if axis == "candidates" else "candidates"
                fixed = {"new": 15, "candidates": 32}[other]
                items = [item for item in middle if item["dtype"] == dtype and item[other] == fixed]
            items = sorted(items, key=lambda item: item[axis])
            if items:
                ax.plot(
                    [item[axis] for item in items],
                    [item["warm"]["p50"] for item in items],
                    "o-",
                    ms=3,
                    color=colour,
                    label=dtype,
                )
        ax.set_xlabel(label)
        ax.set_ylim(bottom=0)
    panels[0].set_ylabel("warm seconds")
    panels[0].legend(frameon=False, fontsize=8)
    save(figure, "bench-growth.svg")


def replayed(found: dict[str, Any]) -> None:
    """The median query of a replay by form and budget, and of joint models."""
    ours = [cell for cell in found["cells"] if not cell["score_memory"]]
    forms = list(dict.fromkeys((cell["form"], cell["memory"]) for cell in ours))
    theirs = [peer for peer in found["peers"] if peer["p50"] is not None]
    clock = "processor seconds of one thread" if found["counted"] == "cpu" else "seconds"
    figure, ax = axes(f"Median query over 32 passages, {clock} (logarithmic)", 0.7 + 0.27 * (len(forms) + len(theirs)))
    dtypes = [(dtype, colour) for dtype, colour in COLOURS if any(cell["dtype"] == dtype for cell in ours)]
    for offset, (dtype, colour) in enumerate(dtypes):
        medians = {
            (cell["form"], cell["memory"]): statistics.median(cell["samples"])
            for cell in ours
            if cell["dtype"] == dtype
        }
        places = [
            place + (0.4 * offset if len(dtypes) > 1 else 0.2) for place, form in enumerate(forms) if form in medians
        ]
        values = [medians[form] for form in forms if form in medians]
        bars = ax.barh(places, values, 0.38 if len(dtypes) > 1 else 0.6, color=colour, label=f"kalm-rag, {dtype}")
        ax.bar_label(bars, [f"{value:.2f}" for value in values], padding=3, color=GREY, fontsize=7)
    places = [len(forms) + number + 0.2 for number in range(len(theirs))]
    bars = ax.barh(places, [peer["p50"] for peer in theirs], 0.6, color=GREY, label="joint models")
    ax.bar_label(bars, [f"{peer['p50']:.2f}" for peer in theirs], padding=3, color=GREY, fontsize=7)
    names = [f"{form}, memory {memory}" for form, memory in forms]
    names += [f"{peer['peer']}, {peer['fastest']}" for peer in theirs]
    ax.set_yticks([place + 0.2 for place in range(len(names))], names)
    ax.invert_yaxis()
    ax.set_xscale("log")
    ax.margins(x=0.12)
    ax.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1.06), ncols=3, fontsize=8)
    save(figure, "bench-replay.svg")


def main() -> None:
    """Draw what there are results for."""
    for name, draw in (("warm", (engines, growth)), ("replay", (replayed,))):
        file = RESULTS / f"{name}.json"
        if file.is_file():
            found = json.loads(file.read_text())
            for function in draw:
                function(found if name == "replay" else found["results"])


if __name__ == "__main__":
    main()
