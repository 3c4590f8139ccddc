"""Writes what an evaluation found: JSON, TREC runs, PNG plots and one self-contained HTML page."""

from __future__ import annotations

import base64
import importlib.util
import json
import os
from pathlib import Path

from kalm_rag.errors import MissingExtraError
from kalm_rag.evaluation.plots import THEMES, draw_all
from kalm_rag.evaluation.summary import Summary
from kalm_rag.evaluation.trec import write_run

_CAPTIONS = {
    "ratio": "Quality against compression ratio",
    "bytes": "Quality against size of an encoded passage",
    "latency": "Time per passage against its length",
    "moved-up": "The query that gained most",
    "moved-down": "The query that lost most",
}


def check_extras() -> None:
    """See that a report can be made before the work for it is done.

    Raises:
        MissingExtraError: matplotlib, Jinja2 or SciPy is not installed.
    """
    for package in ("matplotlib", "jinja2", "scipy"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(package, "eval")


def write_numbers(summary: Summary, out: Path) -> list[Path]:
    """Write `results.json` and the TREC runs, and remove runs of systems that are no longer among the results.

    Args:
        summary: the result.
        out: the folder; made if need be.

    Returns:
        What was written.
    """
    (out / "runs").mkdir(parents=True, exist_ok=True)
    written = [out / "results.json"]
    _replace(written[0], (json.dumps(summary.as_json(), indent=1) + "\n").encode())
    runs = {"first-stage": summary.rankings}
    runs |= {result.system.slug: result.rankings for result in summary.results}
    for slug, rankings in runs.items():
        written.append(out / "runs" / f"{slug}.trec")
        write_run(written[-1], rankings, slug)
    _sweep(out / "runs", "*.trec", written)
    return written


def write_page(summary: Summary, out: Path, title: str) -> list[Path]:
    """Write the plots and `report.html`, and remove plots that are no longer drawn.

    Args:
        summary: the result.
        out: the folder; made if need be.
        title: heading of the page, for example the collection's name.

    Returns:
        What was written, the page first.

    Raises:
        MissingExtraError: matplotlib, Jinja2 or SciPy is not installed.
    """
    check_extras()
    plots = {theme.name: draw_all(summary, theme) for theme in THEMES}
    page = _page(summary, plots, title)
    (out / "plots").mkdir(parents=True, exist_ok=True)
    written = [out / "report.html"]
    _replace(written[0], page.encode("utf-8", "replace"))
    for theme, images in plots.items():
        for name, image in images.items():
            written.append(out / "plots" / f"{name}-{theme}.png")
            _replace(written[-1], image)
    _sweep(out / "plots", "*.png", written)
    return written


def _sweep(folder: Path, pattern: str, keep: list[Path]) -> None:
    for path in set(folder.glob(pattern)) - set(keep):
        path.unlink()


def _replace(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content)
    os.replace(partial, path)


def _page(summary: Summary, plots: dict[str, dict[str, bytes]], title: str) -> str:
    import jinja2

    heading, rows = summary.columns()
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((Path(__file__).parent / "report.html.j2").read_text("utf-8"))
    pictures = [
        {"caption": _CAPTIONS[name], **{theme: _data_url(images[name]) for theme, images in plots.items()}}
        for name in _CAPTIONS
        if name in plots[THEMES[0].name]
    ]
    return template.render(
        title=title,
        queries=len(summary.rankings),
        metric=summary.metrics[0],
        first=summary.first_name,
        heading=heading,
        rows=rows,
        encodings=summary.encodings,
        warnings=summary.warnings,
        pictures=pictures,
        version=summary.as_json()["kalm_rag"],
    )


def _data_url(image: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(image).decode()
