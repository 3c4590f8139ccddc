"""Writes an evaluation's results: JSON, TREC runs, PNG plots and one self-contained HTML page."""

from __future__ import annotations

import base64
import importlib.util
import json
from pathlib import Path

from kalm_rag._version import __version__
from kalm_rag.errors import MissingExtraError
from kalm_rag.evaluation.examples import examples, per_query, with_intervals
from kalm_rag.evaluation.outputs import claim, replace_files
from kalm_rag.evaluation.plots import THEMES, draw_all
from kalm_rag.evaluation.summary import Summary
from kalm_rag.evaluation.trec import run_text

_CAPTIONS = {
    "ratio": "Quality against compression ratio",
    "bytes": "Quality against size of an encoded passage",
    "pareto": "Quality against time and bytes",
    "latency": "Time per passage against its length",
    "moved-up": "The query that gained most",
    "moved-down": "The query that lost most",
}


def check_extras() -> None:
    """Check that the packages for a report are installed, before any work.

    Raises:
        MissingExtraError: matplotlib, Jinja2 or SciPy is not installed.
    """
    for package in ("matplotlib", "jinja2", "scipy"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(package, "eval")


def write_numbers(summary: Summary, out: Path) -> list[Path]:
    """Write `results.json` and the TREC runs, and delete its own runs of systems that are no longer there.

    Args:
        summary: the result.
        out: the folder; made if need be.

    Returns:
        What was written.

    Raises:
        ValueError, FileExistsError: the folder, or a file in it, is not this evaluation's.
    """
    runs = {"first-stage": summary.rankings}
    runs |= {result.system.slug: result.rankings for result in summary.results}
    runs |= {entry.slug: entry.rankings for entry in summary.entries if entry.kind != "system"}
    files = {"results.json": (json.dumps(summary.as_json(), indent=1) + "\n").encode()}
    files |= {f"runs/{slug}.trec": run_text(rankings, slug).encode() for slug, rankings in runs.items()}
    claim(out)
    return replace_files(out, "numbers", files)


def write_page(summary: Summary, out: Path, title: str, section: str = "") -> list[Path]:
    """Write the plots and `report.html`, and delete its own plots that are no longer drawn.

    Args:
        summary: the result.
        out: the folder; made if need be.
        title: heading of the page, for example the collection's name.
        section: HTML that joins the page, such as `threshold_section` makes; it must be safe.

    Returns:
        What was written, the page first.

    Raises:
        MissingExtraError: matplotlib, Jinja2 or SciPy is not installed.
    """
    check_extras()
    plots = {theme.name: draw_all(summary, theme) for theme in THEMES}
    page = _page(summary, plots, title, section)
    files = {"report.html": page.encode("utf-8", "replace")}
    for theme, images in plots.items():
        files |= {f"plots/{name}-{theme}.png": image for name, image in images.items()}
    claim(out)
    return replace_files(out, "page", files)


def _page(summary: Summary, plots: dict[str, dict[str, bytes]], title: str, section: str) -> str:
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
        rows=with_intervals(summary, rows),
        differences=summary.differences(),
        examples=examples(summary),
        per_query=per_query(summary),
        encodings=summary.encodings,
        warnings=summary.warnings,
        pictures=pictures,
        provenance=summary.provenance(),
        section=section,
        version=__version__,
    )


def _data_url(image: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(image).decode()
