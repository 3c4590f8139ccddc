"""The plots of an evaluation, by matplotlib, for light and for dark pages."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kalm_rag.evaluation.entries import Entry
from kalm_rag.evaluation.experiment import Encoding, SystemResult
from kalm_rag.evaluation.summary import Summary


@dataclass(frozen=True, slots=True)
class Theme:
    """Colours of a page."""

    name: str
    paper: str
    ink: str
    faint: str
    series: tuple[str, ...]


# Distinguishable with the common colour deficiencies (Okabe and Ito), lighter on dark paper.
LIGHT = Theme("light", "#ffffff", "#1f2328", "#8b949e", ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#7a5c00"))
DARK = Theme("dark", "#0d1117", "#e6edf3", "#7d8590", ("#56b4e9", "#ff9a5a", "#2fd0a5", "#e3a6c9", "#f0e442"))
THEMES = (LIGHT, DARK)
_MARKERS = "osD^vPX"  # as many as are prime to the colours
_SHOWN = 25


def draw_all(summary: Summary, theme: Theme) -> dict[str, bytes]:
    """Every plot that the results allow, as PNG.

    Returns:
        Name to image: `ratio`, `bytes`, `pareto`, `latency`, `moved-up`, `moved-down`.
    """
    plots = {}
    series = _series(summary)
    metric = summary.metrics[0]
    if any(len(results) > 1 for results in series.values()):
        plots["ratio"] = _ratio(summary, series, metric, theme)
        plots["bytes"] = _bytes(summary, series, metric, theme)
    if len([entry for entry in summary.entries if entry.milliseconds is not None]) > 1:
        plots["pareto"] = _pareto(summary, metric, theme)
    if any(encoding.lengths for encoding in summary.encodings):
        plots["latency"] = _latency(summary.encodings, theme)
    for name, query in summary.movements().items():
        plots[name] = _moved(summary, summary.results[0], query, theme)
    return plots


def _series(summary: Summary) -> dict[str, list[SystemResult]]:
    """Group results that differ only in the ratio."""
    found: dict[str, list[SystemResult]] = {}
    for result in summary.results:
        found.setdefault(summary.label(result), []).append(result)
    return {name: sorted(group, key=lambda r: r.system.ratio) for name, group in found.items()}


def _plain(text: str, most: int = 80) -> str:
    """Escape a label: a dollar sign would start mathematics, an underscore would hide it from the legend."""
    text = " ".join(text.split()).replace("$", r"\$")
    text = text if len(text) <= most else text[: most - 1] + "…"
    return f" {text}" if text.startswith("_") else text


def _axes(title: str, theme: Theme, size: tuple[float, float] = (7.0, 3.6)) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained", facecolor=theme.paper)
    axes: Any = figure.subplots()
    axes.set_title(title, loc="left", fontsize=11, color=theme.ink)
    _style(axes, theme)
    return figure, axes


def _panels(title: str, theme: Theme, count: int) -> tuple[Any, list[Any]]:
    """Make axes beside each other that share the vertical one."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.0 * count, 4.2), layout="constrained", facecolor=theme.paper)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=theme.ink)
    found = list(figure.subplots(1, count, sharey=True))
    for axes in found:
        _style(axes, theme)
    return figure, found


def _style(axes: Any, theme: Theme) -> None:
    axes.set_facecolor(theme.paper)
    axes.tick_params(which="both", colors=theme.ink, labelsize=9)
    axes.xaxis.label.set_color(theme.ink)
    axes.yaxis.label.set_color(theme.ink)
    for name, spine in axes.spines.items():
        spine.set_visible(name in {"left", "bottom"})
        spine.set_color(theme.faint)
    axes.grid(axis="y", color=theme.faint, alpha=0.25, linewidth=0.8)


def _png(figure: Any, axes: Any, theme: Theme) -> bytes:
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9, labelcolor=theme.ink)
    return _saved(figure)


def _saved(figure: Any) -> bytes:
    target = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # boxes stand for scripts the font lacks
        figure.savefig(target, format="png", dpi=150, metadata={"Software": None})
    return target.getvalue()


def _plain_log(axis: Any) -> None:
    """Ticks at 1, 2 and 5 times the powers of ten, written as plain numbers."""
    from matplotlib import ticker

    axis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axis.set_minor_locator(ticker.NullLocator())


def _first_stage(axes: Any, summary: Summary, metric: str, theme: Theme) -> None:
    axes.axhline(
        summary.first[metric], color=theme.faint, linestyle="--", linewidth=1.2, label=_plain(summary.first_name)
    )


def _ratio(summary: Summary, series: Mapping[str, list[SystemResult]], metric: str, theme: Theme) -> bytes:
    figure, axes = _axes(f"{metric} against the compression ratio", theme)
    _first_stage(axes, summary, metric, theme)
    for number, (name, results) in enumerate(series.items()):
        axes.plot(
            [result.system.ratio for result in results],
            [result.means[metric] for result in results],
            marker=_MARKERS[number % len(_MARKERS)],
            color=theme.series[number % len(theme.series)],
            label=_plain(name),
        )
    ratios = sorted({result.system.ratio for result in summary.results})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ratios, [str(ratio) for ratio in ratios])
    axes.minorticks_off()
    axes.set_xlabel("encoder states averaged into one (ratio)")
    return _png(figure, axes, theme)


def _bytes(summary: Summary, series: Mapping[str, list[SystemResult]], metric: str, theme: Theme) -> bytes:
    figure, axes = _axes(f"{metric} against the size of an encoded passage", theme)
    _first_stage(axes, summary, metric, theme)
    for number, (name, results) in enumerate(series.items()):
        sizes = [result.passage_bytes / 1000 for result in results]
        values = [result.means[metric] for result in results]
        colour = theme.series[number % len(theme.series)]
        axes.plot(sizes, values, marker=_MARKERS[number % len(_MARKERS)], color=colour, label=_plain(name))
        for result, size, value in zip(results, sizes, values, strict=True):
            axes.annotate(
                f"r {result.system.ratio}",
                (size, value),
                textcoords="offset points",
                xytext=(0, 6),
                ha="center",
                fontsize=8,
                color=theme.ink,
            )
    axes.set_xscale("log")
    _plain_log(axes.xaxis)
    axes.margins(y=0.15)
    axes.set_xlabel("KB per passage (mean, logarithmic)")
    return _png(figure, axes, theme)


def _pareto(summary: Summary, metric: str, theme: Theme) -> bytes:
    """Plot quality against milliseconds and bytes, a point an entry, and join what no other entry beats in both."""
    costs = {
        "ms per query (median, logarithmic)": [entry.milliseconds for entry in summary.entries],
        "KB per encoded passage": [_kilobytes(entry.passage_bytes) for entry in summary.entries],
        "KB per prefilled passage": [_kilobytes(entry.prefilled_bytes) for entry in summary.entries],
    }
    figure, panels = _panels(f"{metric} against what it costs; the line joins what nothing beats", theme, len(costs))
    names = list(dict.fromkeys(entry.name for entry in summary.entries))
    for axes, (label, values) in zip(panels, costs.items(), strict=True):
        _first_stage(axes, summary, metric, theme)
        points = []
        for entry, cost in zip(summary.entries, values, strict=True):
            if cost is None:
                continue
            points.append((cost, entry.means[metric]))
            _point(axes, entry, cost, metric, names.index(entry.name), theme)
        axes.set_xlabel(label)
        if not points:
            continue
        best = frontier(points)
        axes.step([x for x, _ in best], [y for _, y in best], where="post", color=theme.ink, linewidth=1, zorder=1)
        axes.set_xscale("log")
        _plain_log(axes.xaxis)
    handles = panels[0].get_legend_handles_labels()
    unique = dict(zip(handles[1], handles[0], strict=True))
    figure.legend(
        unique.values(),
        unique.keys(),
        loc="outside lower center",
        ncols=2,
        frameon=False,
        fontsize=9,
        labelcolor=theme.ink,
    )
    return _saved(figure)


def frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points of (cost, quality) that no other point beats in one without losing in the other."""
    best: list[tuple[float, float]] = []
    for cost, quality in sorted(points, key=lambda point: (point[0], -point[1])):
        if not best or quality > best[-1][1]:
            best.append((cost, quality))
    return best


def _kilobytes(count: float | None) -> float | None:
    return count / 1000 if count else None


def _point(axes: Any, entry: Entry, cost: float, metric: str, number: int, theme: Theme) -> None:
    value, (low, high) = entry.means[metric], entry.intervals[metric]
    axes.errorbar(
        [cost],
        [value],
        yerr=[[max(0.0, value - low)], [max(0.0, high - value)]],
        fmt=_MARKERS[number % len(_MARKERS)],
        color=theme.series[number % len(theme.series)],
        elinewidth=0.6,
        alpha=0.9,
        label=_plain(entry.name),
    )
    if entry.kind == "system":
        axes.annotate(
            f"r {entry.ratio}",
            (cost, value),
            textcoords="offset points",
            xytext=(5, 4),
            fontsize=7,
            color=theme.ink,
        )


def _latency(encodings: Sequence[Encoding], theme: Theme) -> bytes:
    ratios = " and ".join(sorted({str(encoding.ratio) for encoding in encodings if encoding.lengths}))
    figure, axes = _axes(f"Milliseconds per passage against its length, batches of 16, ratio {ratios}", theme)
    for number, encoding in enumerate(encodings):
        colour = theme.series[number % len(theme.series)]
        name = _plain(" / ".join(filter(None, [encoding.name, encoding.dtype])))
        tokens = [timing.tokens for timing in encoding.lengths]
        axes.plot(tokens, [t.encode_ms for t in encoding.lengths], "--o", color=colour, label=f"{name}: encode, once")
        axes.plot(tokens, [t.rank_ms for t in encoding.lengths], "-s", color=colour, label=f"{name}: each query after")
    axes.set_yscale("log")
    _plain_log(axes.yaxis)
    axes.set_xlabel("tokens")
    return _png(figure, axes, theme)


def _moved(summary: Summary, result: SystemResult, query: str, theme: Theme) -> bytes:
    """Plot each candidate's place before and after reranking, relevant ones in colour."""
    before = {name: place for place, (name, _) in enumerate(summary.rankings[query], start=1)}
    after = {name: place for place, (name, _) in enumerate(result.rankings[query], start=1)}
    judged = summary.qrels[query]
    figure, axes = _axes(_plain(f"{query}: {summary.queries[query]}"), theme, (7.0, 4.6))
    axes.grid(visible=False)
    deepest = min(len(before), 2 * _SHOWN)
    shown = [name for name in before if min(before[name], after[name]) <= _SHOWN or judged.get(name, 0) > 0]
    below = any(max(before[name], after[name]) > deepest for name in shown)
    for name in sorted(shown, key=lambda name: judged.get(name, 0)):
        relevant = judged.get(name, 0) > 0
        # Candidates below the plot start at its lower edge, labelled with their rank.
        places = [min(place, deepest + 1) for place in (before[name], after[name])]
        axes.plot(
            [0, 1],
            places,
            color=theme.series[1] if relevant else theme.faint,
            linewidth=2.4 if relevant else 0.8,
            marker="o",
            markersize=6 if relevant else 3,
            alpha=1.0 if relevant else 0.5,
        )
        if relevant:
            for x, y, place, side in (
                (-0.03, places[0], before[name], "right"),
                (1.03, places[1], after[name], "left"),
            ):
                axes.text(x, y, str(place), ha=side, va="center", fontsize=9, color=theme.ink)
    lowest = max(2, deepest + below)
    axes.set_xlim(-0.15, 1.15)
    axes.set_ylim(lowest + 0.5, 0.5)
    axes.set_yticks([1, *range(5, deepest + 1, 5)])
    axes.set_xticks([0, 1], [_plain(summary.first_name), _plain(f"{result.system.name} r {result.system.ratio}")])
    axes.set_ylabel("rank; relevant passages in colour")
    return _png(figure, axes, theme)
