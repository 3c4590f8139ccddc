"""Chooses a score threshold on one half of the judged queries, and checks it on the other half."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from kalm_rag._version import __version__
from kalm_rag.documents import repair_text
from kalm_rag.evaluation.judged_scores import Floats, JudgedScores
from kalm_rag.evaluation.metrics import Qrels
from kalm_rag.evaluation.reliability import Reliability, calibrated_scores, monotone_fit
from kalm_rag.evaluation.trec import Ranking
from kalm_rag.model.identity import identify
from kalm_rag.reranker import KaLMReranker
from kalm_rag.settings import DEFAULT_INSTRUCTION, DEFAULT_SYSTEM_PROMPT
from kalm_rag.thresholds import Aim, Figures, Scope, ThresholdProfile
from kalm_rag.utils.machine import utc_now
from kalm_rag.utils.margins import probability

_FEW_QUERIES = 50
_FEW_PASSAGES = 20
_SCORES = (0.001, 0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999)
_STEPS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0)
_MOST_STEPS = 10
_LEAST_GAP = 1e-3


@dataclass(frozen=True, slots=True)
class ThresholdRow:
    """A threshold and what it does, see `Figures`.

    Attributes:
        margin: the threshold as a margin.
        figures: what it does to all queries.
    """

    margin: float
    figures: Figures

    @property
    def score(self) -> float:
        """The threshold as `P(yes)`."""
        return probability(self.margin)


@dataclass(frozen=True, slots=True, eq=False)
class ThresholdStudy:
    """What thresholds do to judged candidates.

    Attributes:
        choosing: the half of the queries that a threshold is chosen on.
        checking: the other half.
        table: what thresholds do to both halves together, by falling margin.
        fit: the monotone fit from margins to shares of relevant candidates, made on `choosing`.
        raw: the reliability curve of `P(yes)`, on `checking`.
        calibrated: that of the fit, on `checking`.
        notes: sentences about what limits these figures.
    """

    choosing: JudgedScores
    checking: JudgedScores
    table: tuple[ThresholdRow, ...]
    fit: tuple[tuple[float, float], ...]
    raw: Reliability
    calibrated: Reliability
    notes: tuple[str, ...]

    def choose(self, aim: str | Aim, scope: Scope, model_name: str = "") -> ThresholdProfile:
        """Choose the threshold that reaches an aim on one half of the queries, and check it on the other.

        Args:
            aim: `recall=0.95`: the highest threshold with that recall; `precision=0.8`: of those with that precision
                the one with the highest recall; `f1`: the one with the largest F1.
            scope: which scores these are.
            model_name: what to call the model in messages.

        Raises:
            ValueError, TypeError: the aim is wrong, or cannot be reached; the message says what can.
        """
        wanted = Aim.parse(aim)
        margin, rests_on = _cut(self.choosing, wanted)
        notes = list(self.notes)
        if rests_on < _FEW_PASSAGES:
            notes.append(f"only {rests_on} passages reach the threshold where it was chosen: expect it to do otherwise")
        (chosen,), (checked,) = (half.figures([margin]) for half in (self.choosing, self.checking))
        return ThresholdProfile(
            scope,
            repair_text(model_name)[0],
            str(wanted),
            margin,
            chosen,
            checked,
            self.fit,
            tuple(repair_text(note)[0] for note in notes),
            utc_now(),
            __version__,
        )

    def as_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "table": [{"score": row.score, "margin": row.margin, **asdict(row.figures)} for row in self.table],
            "reliability": {"P(yes)": self.raw.as_json(), "calibrated": self.calibrated.as_json()},
            "notes": list(self.notes),
        }


def calibrate(
    rankings: Mapping[str, Ranking],
    qrels: Qrels,
    scope: Scope | KaLMReranker,
    aim: str | Aim = "f1",
    *,
    model_name: str = "",
    seed: int = 0,
) -> ThresholdProfile:
    """Choose a score threshold on one half of the judged queries, and check it on the other half.

    Args:
        rankings: query id to `(passage id, margin)`, as `SystemResult.rankings`.
        qrels: query id to the relevance of passage ids; above 0 is relevant. Queries whose judgements are all 0 say how
            often a query without an answer rightly gets nothing.
        scope: which scores these are: the reranker that made them with its own ratio and instruction, or a `Scope`.
        aim: `recall=SHARE`, `precision=SHARE` or `f1`, see `ThresholdStudy.choose`.
        model_name: what to call the model in messages; by default the reranker's.
        seed: of the division into halves.

    Raises:
        ValueError, TypeError: an argument is wrong, the queries cannot tell thresholds apart, or the aim cannot be
            reached; the message says what can.
        MissingExtraError: scikit-learn is not installed.
    """
    wanted = Aim.parse(aim)
    if isinstance(scope, KaLMReranker):
        model_name = model_name or str(scope.model)
        scope = scope_of(scope)
    return study_thresholds(rankings, qrels, seed=seed).choose(wanted, scope, model_name)


def scope_of(reranker: KaLMReranker, instruction: str | None = None, ratio: int | None = None) -> Scope:
    """Return the scope of a reranker's scores; its weights are not loaded.

    Args:
        reranker: the reranker.
        instruction: the one that was given to `rank`, if any.
        ratio: the same.

    Raises:
        CheckpointError: the model cannot be found.
    """
    settings = reranker.settings
    return make_scope(
        identify(reranker.checkpoint()).mark,
        settings.ratio if ratio is None else ratio,
        settings.instruction if instruction is None else instruction,
        settings.system_prompt,
    )


def make_scope(
    model: str, ratio: int, instruction: str | None = None, system_prompt: str = DEFAULT_SYSTEM_PROMPT
) -> Scope:
    """Return a scope with texts as the model reads them; no instruction is the default one."""
    task, _ = repair_text(DEFAULT_INSTRUCTION if instruction is None else instruction)
    return Scope(model, ratio, task, system_prompt)


@dataclass(frozen=True, slots=True)
class Halves:
    """Judged queries in two halves with as many answered and unanswered ones each.

    Attributes:
        choosing: queries that a threshold is chosen on.
        checking: queries that it is checked on.
        answered: those of both that have a relevant candidate.
    """

    choosing: list[str]
    checking: list[str]
    answered: list[str]


def divide_queries(rankings: Mapping[str, Ranking], qrels: Qrels, *, seed: int = 0) -> Halves:
    """Divide judged queries; arguments are those of `calibrate`. The margins do not matter.

    Raises:
        ValueError: there are too few queries, or nothing to leave out.
    """
    counted = [query for query in sorted(rankings) if rankings[query] and qrels.get(query)]
    answered = [query for query in counted if any(_is_relevant(qrels, query, name) for name, _ in rankings[query])]
    if len(answered) < 2:
        msg = (
            f"a threshold is chosen on one half of the queries and checked on the other, which takes at least 2 "
            f"queries with a relevant candidate, got {len(answered)} of {len(rankings)}; judge more queries"
        )
        raise ValueError(msg)
    known = set(answered)
    halves = Halves([], [], answered)
    for group in (list(answered), [query for query in counted if query not in known]):
        random.Random(seed).shuffle(group)  # noqa: S311 - nothing secret
        halves.choosing.extend(group[::2])
        halves.checking.extend(group[1::2])
    names = [(query, name) for query in halves.choosing for name, _ in rankings[query]]
    if all(_is_relevant(qrels, query, name) for query, name in names):
        msg = (
            f"all {len(names)} candidates of the {len(halves.choosing)} queries that the threshold is chosen on are "
            "judged relevant, so there is nothing to leave out; add candidates that are not (a larger depth)"
        )
        raise ValueError(msg)
    return halves


def study_thresholds(rankings: Mapping[str, Ranking], qrels: Qrels, *, seed: int = 0) -> ThresholdStudy:
    """Compute what thresholds do to judged candidates; arguments and errors are those of `calibrate`."""
    for query, ranking in rankings.items():
        for passage, margin in ranking:
            if not math.isfinite(margin):
                msg = f"margins must be finite, got {margin} for query {query!r} and passage {passage!r}"
                raise ValueError(msg)
    halves = divide_queries(rankings, qrels, seed=seed)
    counted = halves.choosing + halves.checking
    choosing, checking, both = (
        JudgedScores.of(queries, rankings, qrels) for queries in (halves.choosing, halves.checking, counted)
    )
    cuts = _grid(both.margins)
    fit = monotone_fit(choosing)
    raw = np.array([probability(margin) for margin in checking.margins])
    return ThresholdStudy(
        choosing,
        checking,
        tuple(map(ThresholdRow, cuts, both.figures(cuts))),
        fit,
        Reliability.of(checking, raw),
        Reliability.of(checking, calibrated_scores(fit, checking.margins)),
        tuple(_notes(rankings, qrels, counted, halves.answered)),
    )


def _is_relevant(qrels: Qrels, query: str, passage: str) -> bool:
    return qrels[query].get(passage, 0) > 0


def _notes(rankings: Mapping[str, Ranking], qrels: Qrels, counted: Sequence[str], answered: Sequence[str]) -> list[str]:
    """Say what limits the figures."""
    notes = []
    skipped = len(rankings) - len(counted)
    if skipped:
        notes.append(f"{skipped} queries without candidates or without judgements are left out of the thresholds")
    if len(answered) < 2 * _FEW_QUERIES:
        notes.append(
            f"only {len(answered)} queries have a relevant candidate; with fewer than {2 * _FEW_QUERIES} the intervals "
            "are wide, and may still be too narrow"
        )
    if len(answered) == len(counted):
        notes.append("every query has a relevant candidate: how often one without an answer gets nothing is unknown")
    names = {name for query in answered for name, _ in rankings[query] if _is_relevant(qrels, query, name)}
    if len(names) == 1:
        notes.append(
            f"all answers are in one passage ({next(iter(names))!r}), which both halves share: the check says nothing "
            "about other passages"
        )
    candidates = sum(len(rankings[query]) for query in counted)
    unjudged = sum(name not in qrels[query] for query in counted for name, _ in rankings[query])
    if unjudged:
        notes.append(
            f"{unjudged} of {candidates} candidates are not judged and count as irrelevant: the true precision may be "
            "higher"
        )
    return notes


def _grid(margins: Floats) -> list[float]:
    """Return the thresholds of the table: round values of `P(yes)` and of the margin among the candidates', falling."""
    low, high = float(margins.min()), float(margins.max())
    step = next((step for step in _STEPS if (high - low) / step <= _MOST_STEPS), (high - low) / _MOST_STEPS)
    cuts = {step * number for number in range(math.ceil(low / step), math.floor(high / step) + 1)}
    cuts |= {math.log(score / (1 - score)) for score in _SCORES}
    return sorted((cut for cut in cuts if low <= cut <= high), reverse=True) or [high]


def _cut(judged: JudgedScores, aim: Aim) -> tuple[float, int]:
    """Return the threshold that reaches an aim, as a margin, and how many passages reach it.

    It lies halfway to the next margin below, so that rounding on another machine does not move a passage over it.
    """
    margins = judged.margins
    last = np.append(margins[1:] < margins[:-1], True)  # of equal margins all stay, or none
    places = np.flatnonzero(last)
    kept, hits = places + 1.0, np.cumsum(judged.relevant)[places]
    precision, recall = hits / kept, hits / judged.relevant.sum()
    if aim.value is None:
        chosen = int(np.argmax(2 * precision * recall / np.maximum(precision + recall, 1e-300)))
    elif aim.measure == "recall":
        chosen = int(np.flatnonzero(recall >= aim.value - 1e-12)[0])
    else:
        reached = np.flatnonzero(precision >= aim.value - 1e-12)
        if not len(reached):
            best = int(np.argmax(precision))
            at = float(margins[places[best]])
            msg = (
                f"aim {aim} cannot be reached on the {judged.queries} queries that the threshold is chosen on: the "
                f"highest precision is {precision[best]:.3f}, with a recall of {recall[best]:.3f}, at P(yes) >= "
                f"{probability(at):.4g} (margin {at:.2f}); aim at "
                f"precision={_rounded_down(float(precision[best])):g} or less, or at a recall"
            )
            raise ValueError(msg)
        chosen = int(reached[-1])
    place = int(places[chosen])
    own = float(margins[place])
    below = float(margins[place + 1]) if place + 1 < len(margins) else own - 2 * _LEAST_GAP
    middle = (own + below) / 2
    return (middle if below < middle else own), place + 1


def _rounded_down(share: float) -> float:
    """Return the largest share of three digits that is not above one."""
    unit = 10.0 ** (math.floor(math.log10(share)) - 2)
    return math.floor(share / unit) * unit
