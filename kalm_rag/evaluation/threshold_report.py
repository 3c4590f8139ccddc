"""What an evaluation shows and writes of thresholds: two JSON files, a table, and a section of the page."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kalm_rag.evaluation.experiment import Experiment, SystemResult
from kalm_rag.evaluation.outputs import claim, replace_files
from kalm_rag.evaluation.reliability import Reliability, check_fit
from kalm_rag.evaluation.thresholds import ThresholdStudy, divide_queries, make_scope, study_thresholds
from kalm_rag.thresholds import MEASURES, Aim, Figure, Figures, ThresholdProfile
from kalm_rag.utils.margins import probability

PROFILE = "threshold-profile.json"
"""The file of the profile in an evaluation's folder."""

_LABELS = {
    "precision": "precision",
    "recall": "recall of the candidates",
    "f1": "F1",
    "kept": "passages kept per query",
    "emptied": "answerable queries left empty",
    "abstained": "unanswerable ones left empty",
}
_SIZE = 300
_RADIUS = 7


@dataclass(frozen=True, slots=True, eq=False)
class Calibrated:
    """Thresholds of a system.

    Attributes:
        study: what thresholds do.
        aim: what one was chosen for.
        profile: the one that was chosen; None if the aim cannot be reached.
        failure: why there is none, and what can be reached.
    """

    study: ThresholdStudy
    aim: Aim
    profile: ThresholdProfile | None
    failure: str = ""

    def as_json(self) -> dict[str, Any]:
        """Return plain values."""
        profile = None if self.profile is None else json.loads(self.profile.to_json())
        return {"aim": str(self.aim), "failure": self.failure, **self.study.as_json(), "profile": profile}


def check_calibration(experiment: Experiment) -> None:
    """Check that a threshold can be chosen, before any work.

    Raises:
        ValueError: there are several systems, or the queries cannot tell thresholds apart.
        MissingExtraError: scikit-learn is not installed.
    """
    check_fit()
    if len(experiment.systems) != 1:
        msg = (
            f"a threshold is chosen for one model, precision, instruction and ratio, got {len(experiment.systems)} "
            "combinations; name one of each, for example --calibrate --model nano --ratio 4"
        )
        raise ValueError(msg)
    divide_queries(experiment.candidates.every_ranking(), _judgements(experiment))


def _judgements(experiment: Experiment) -> dict[str, dict[str, int]]:
    """Return the judgements of the queries, those without an answer included."""
    candidates = experiment.candidates
    return {**candidates.qrels, **{query: experiment.corpus.qrels[query] for query in candidates.unanswered}}


def calibrate_system(experiment: Experiment, result: SystemResult, digest: str, aim: Aim) -> Calibrated:
    """Study the thresholds of a system and choose one.

    Args:
        experiment: what was done; its candidates should have been found with `unanswered=True`.
        result: of the system.
        digest: of its model, see `Encoding.digest`.
        aim: what the threshold is for.

    Raises:
        ValueError: the queries cannot tell thresholds apart.
        MissingExtraError: scikit-learn is not installed.
    """
    system = result.system
    study = study_thresholds({**result.rankings, **result.unanswered}, _judgements(experiment))
    scope = make_scope(digest, system.ratio, system.instruction)
    try:
        return Calibrated(study, aim, study.choose(aim, scope, system.name))
    except ValueError as error:
        return Calibrated(study, aim, None, str(error))


def write_thresholds(found: Calibrated, out: Path) -> list[Path]:
    """Write `thresholds.json` and, if a threshold was chosen, `threshold-profile.json`; an older one is deleted.

    Raises:
        ValueError, FileExistsError: as `write_numbers`.
    """
    files = {"thresholds.json": (json.dumps(found.as_json(), indent=1) + "\n").encode()}
    if found.profile is not None:
        files[PROFILE] = found.profile.to_json().encode()
    claim(out)
    return replace_files(out, "thresholds", files)


def figure_text(figure: Figure | None) -> str:
    """Write a figure and its interval."""
    if figure is None:
        return "none"
    return f"{figure.value:.3f} ({figure.low:.3f} to {figure.high:.3f})"


def halves_table(profile: ThresholdProfile) -> tuple[list[str], list[list[str]]]:
    """Heading and rows of the table that compares both halves."""
    halves = profile.chosen, profile.checked
    rows = [[_LABELS[name], *(figure_text(getattr(half, name)) for half in halves)] for name in MEASURES]
    rows.insert(0, ["queries (unanswerable ones)", *(f"{half.queries} ({half.unanswered})" for half in halves)])
    return ["", "chosen on", "checked on"], rows


def threshold_text(margin: float) -> str:
    """Write a threshold."""
    return f"P(yes) {probability(margin):.4g}, margin {margin:.2f}"


def threshold_section(found: Calibrated) -> str:
    """Return the section of the page: the threshold on both halves, a table over thresholds, reliability curves."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((Path(__file__).parent / "thresholds.html.j2").read_text("utf-8"))
    study, profile = found.study, found.profile
    return template.render(
        aim=str(found.aim),
        failure=found.failure,
        threshold=None if profile is None else threshold_text(profile.margin),
        halves=None if profile is None else halves_table(profile),
        labels=[_LABELS[name] for name in MEASURES],
        rows=[[f"{row.score:.4g}", f"{row.margin:.2f}", *_cells(row.figures)] for row in study.table],
        curves=[("P(yes)", study.raw, _points(study.raw)), ("calibrated", study.calibrated, _points(study.calibrated))],
        size=_SIZE,
        notes=study.notes if profile is None else profile.notes,
    )


def _cells(figures: Figures) -> list[str]:
    return [figure_text(getattr(figures, name)) for name in MEASURES]


def _points(curve: Reliability) -> list[dict[str, float]]:
    """Return places of the curve's points in the drawing, whose y axis points down."""
    most = max((item.count for item in curve.bins), default=1)
    return [
        {
            "x": _SIZE * item.score,
            "y": _SIZE * (1 - item.relevant.value),
            "top": _SIZE * (1 - item.relevant.high),
            "bottom": _SIZE * (1 - item.relevant.low),
            "radius": 2 + _RADIUS * (item.count / most) ** 0.5,
            "count": item.count,
        }
        for item in curve.bins
    ]
