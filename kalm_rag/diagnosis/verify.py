"""Compares every path from a passage to a score, and the reference implementation, for one model."""

from __future__ import annotations

import gc
import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kalm_rag.diagnosis.card import EXAMPLES, TOLERANCE, CardExample, CardResult, check_card
from kalm_rag.diagnosis.paths import PATHS, STOCK, NotTakenError, Pairs, ScorePath, demo_pairs, scratch_folder, take
from kalm_rag.diagnosis.precision import PRECISIONS, why_not
from kalm_rag.diagnosis.reference import reference_scores, why_no_reference
from kalm_rag.errors import KaLMError, ScoringError
from kalm_rag.model.checkpoint import UNUSED, Checkpoint
from kalm_rag.model.loading import LoadedModel, load_model
from kalm_rag.settings import Settings
from kalm_rag.utils.machine import free_memory
from kalm_rag.utils.margins import probability
from kalm_rag.utils.progress import Progress

if TYPE_CHECKING:
    import torch

_ROOM = 1_000_000_000
"""Bytes for everything but the weights."""

_FAULTS = (KaLMError, ValueError, RuntimeError, OSError, MemoryError, AttributeError)
"""What a path that does not work raises."""

_LEAST_SPREAD = 0.05
"""Margins that are closer together than this tell right from wrong paths too badly."""


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far a path may be from plain float32, on any pair.

    Attributes:
        margin: of the margin.
        score: of `P(yes)`.
    """

    margin: float
    score: float


EXACT = Tolerance(1e-3, 1e-5)
"""Paths that compute the same in another order."""
ROUNDED = Tolerance(0.3, 0.04)
"""Numbers of 16 bits, or passages kept in 8 bits: twice what the largest change was that was measured."""
COARSE = Tolerance(0.5, 0.08)
"""Weights in 8 bits."""


def tolerance_of(precision: str, path: ScorePath, base: str = "float32") -> Tolerance:
    """Return how far a path may be from the plain path of `base`."""
    if precision in ("int8", "int8-all"):
        return COARSE
    return EXACT if precision == base == "float32" and path.storage == "native" else ROUNDED


@dataclass(slots=True)
class PathResult:
    """What became of one path.

    Attributes:
        precision: as `dtype`.
        path: its name.
        computes: what really computes.
        verdict: `base` for the path that others are compared with, `agrees`, `differs`, `failed` if it raised,
            `not taken` if the scores came by another path, or `not run`.
        why: for all but the first two.
        margin_change: largest change of a margin from the base.
        score_change: largest change of `P(yes)` from the base.
        own_change: largest change of a margin from the plain path of the same precision.
        reference_change: largest change of `P(yes)` from the reference implementation.
        tolerance: what is allowed of the first two.
        margins: of every pair.
    """

    precision: str
    path: str
    computes: str = ""
    verdict: str = "not run"
    why: str = ""
    margin_change: float | None = None
    score_change: float | None = None
    own_change: float | None = None
    reference_change: float | None = None
    tolerance: Tolerance | None = None
    margins: list[float] = field(default_factory=list)


@dataclass(slots=True)
class Verification:
    """What was verified of a model.

    Attributes:
        pairs: how many pairs of the bundled corpus were scored.
        device: where.
        base: the precision whose plain path the others are compared with; empty if none ran.
        spread: the largest margin of the base less the smallest.
        paths: every path.
        reference: `agrees`, `differs`, `failed` or `not run`: the base against the reference implementation.
        reference_why: for the last two.
        reference_change: largest change of `P(yes)` between them.
        card: the model card's example, if it has one.
        card_why: why it was not scored.
        largest_between: the largest difference of a margin between any two paths, and their names.
    """

    pairs: int
    device: str
    base: str = ""
    spread: float = 0.0
    paths: list[PathResult] = field(default_factory=list)
    reference: str = "not run"
    reference_why: str = ""
    reference_change: float | None = None
    card: list[CardResult] = field(default_factory=list)
    card_why: str = "this model's card publishes no example that kalm-rag knows"
    largest_between: tuple[float, str, str] | None = None

    @property
    def is_informative(self) -> bool:
        """Whether scores of different pairs differ enough for a comparison to tell something."""
        return self.spread >= _LEAST_SPREAD

    @property
    def gaps(self) -> list[str]:
        """What could not be verified although it should run here, a sentence each."""
        found = [
            f"Not verified: {result.precision}, {result.path}: {result.why}."
            for result in self.paths
            if result.verdict == "not taken"
        ]
        if self.base and not self.is_informative:
            found.append(
                f"The margins of all {self.pairs} pairs lie within {self.spread:.2g}: a wrong path would hardly show."
            )
        return found

    @property
    def faults(self) -> list[str]:
        """What is wrong, a sentence each."""
        found = [
            f"{result.precision}, {result.path}: {result.why}."
            for result in self.paths
            if result.verdict in ("differs", "failed")
        ]
        if self.reference in ("differs", "failed"):
            found.append(f"Reference implementation: {self.reference_why}.")
        found += [
            f"The model card's example, {result.path}: the margin of {result.passage!r} is {result.margin:.4f}, and "
            f"the card prints {result.expected:.4f} (tolerance {TOLERANCE})."
            for result in self.card
            if not result.agrees
        ]
        if not self.base and not found:
            reasons = "; ".join(f"{result.precision}: {result.why}" for result in self.paths)
            found.append(f"No precision could be run: {reasons}.")
        return found

    def as_json(self) -> dict[str, Any]:
        """Return everything that was found."""
        card = [{**asdict(result), "agrees": result.agrees, "tolerance": TOLERANCE} for result in self.card]
        return {**asdict(self), "informative": self.is_informative, "card": card}


def verify(
    checkpoint: Checkpoint, device: torch.device, *, card: str | None = None, show_progress: bool | None = None
) -> Verification:
    """Score the same pairs by every path that runs here, and compare.

    Args:
        checkpoint: the model.
        device: where to run it.
        card: the hub id whose published example the model must reproduce, or None for none.
        show_progress: as in `KaLMReranker`.
    """
    pairs = demo_pairs()
    found = Verification(len(pairs), str(device))
    examples = EXAMPLES.get(card or "")
    if checkpoint.lora is not None:
        examples, found.card_why = None, "an adapter changes the margins that the card prints"
    numbers = _text_numbers(checkpoint)
    with Progress(len(PRECISIONS) + 1, "verify", unit="step", show=show_progress) as progress:
        for precision in PRECISIONS:
            runs = _Precision(precision, checkpoint, device, pairs)
            why = why_not(precision, device) or _too_large(precision, numbers, device)
            found.paths += [runs.skip(why)] if why else runs.all()
            if examples and precision == "bfloat16":
                found.card, found.card_why = runs.card(examples, why)
            runs.close()
            progress.advance(1)
        _compare(found)
        _ask_reference(found, checkpoint, pairs, numbers, device)
        progress.advance(1)
    return found


class _Precision:
    """One precision: loads the model once, and takes every path with it.

    Args:
        name: as `dtype`.
        checkpoint: the model.
        device: where.
        pairs: what is scored.
    """

    def __init__(self, name: str, checkpoint: Checkpoint, device: torch.device, pairs: Pairs) -> None:
        self._name = name
        self._checkpoint = checkpoint
        self._device = device
        self._pairs = pairs
        self._loaded: LoadedModel | None = None

    def skip(self, why: str) -> PathResult:
        """Return the row of a precision that does not run."""
        return PathResult(self._name, "all paths", why=why)

    def all(self) -> list[PathResult]:
        """Take every path."""
        try:
            self._loaded = self._load(fast=True)
        except _FAULTS as error:
            return [self._failed("loading", error)]
        with scratch_folder() as folder:
            found = [self._take(path, self._loaded, folder) for path in PATHS]
        if self._name == "float32" and self._device.type == "cpu":
            self._loaded = None  # its memory may be needed
            found.insert(1, self._stock())
        return found

    def card(self, examples: Sequence[CardExample], why: str) -> tuple[list[CardResult], str]:
        """Score a card's example with the model that `all` loaded; otherwise say why not."""
        if self._loaded is None:
            return [], why or "the model could not be loaded in bfloat16"
        try:
            return check_card(examples, self._loaded, self._checkpoint), ""
        except _FAULTS as error:
            return [], _reason(error)

    def close(self) -> None:
        """Free the model's memory."""
        self._loaded = None
        gc.collect()
        if self._device.type == "cuda":
            import torch

            torch.cuda.empty_cache()

    def _load(self, *, fast: bool) -> LoadedModel:
        return load_model(self._checkpoint, settings=Settings(), device=self._device, dtype=self._name, fast=fast)

    def _stock(self) -> PathResult:
        try:
            loaded = self._load(fast=False)
        except _FAULTS as error:
            return self._failed(STOCK.name, error)
        return self._take(STOCK, loaded, None)

    def _take(self, path: ScorePath, loaded: LoadedModel, folder: Path | None) -> PathResult:
        try:
            scores = take(path, loaded, self._checkpoint, self._pairs, folder)
        except NotTakenError as error:
            return PathResult(self._name, path.name, loaded.precision, "not taken", str(error))
        except _FAULTS as error:
            return self._failed(path.name, error)
        margins = [score.margin for score in scores]
        return PathResult(self._name, path.name, loaded.precision, "taken", tolerance=None, margins=margins)

    def _failed(self, path: str, error: BaseException) -> PathResult:
        """Return the row of a path that raised; float16 overflows on real weights, which is known."""
        verdict = "not run" if self._name == "float16" and isinstance(error, ScoringError) else "failed"
        return PathResult(self._name, path, verdict=verdict, why=_reason(error))


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}".rstrip(".")


def _compare(found: Verification) -> None:
    """Give every path that was taken its distances and its verdict."""
    taken = [result for result in found.paths if result.verdict == "taken"]
    plain = {result.precision: result for result in taken if result.path == PATHS[0].name}
    base = next((plain[name] for name in PRECISIONS if name in plain), None)
    if base is None:
        for result in taken:
            result.verdict, result.why = "failed", "no plain path ran to compare it with"
        return
    found.base, found.spread = base.precision, max(base.margins) - min(base.margins)
    kinds = {path.name: path for path in (*PATHS, STOCK)}
    for result in taken:
        limit = tolerance_of(result.precision, kinds[result.path], base.precision)
        result.tolerance = limit
        result.margin_change = largest(result.margins, base.margins)
        result.score_change = largest(_probabilities(result.margins), _probabilities(base.margins))
        if result.precision in plain:
            result.own_change = largest(result.margins, plain[result.precision].margins)
        # Written so that NaN is no agreement.
        agrees = result.margin_change <= limit.margin and result.score_change <= limit.score
        result.verdict = "base" if result is base else "agrees" if agrees else "differs"
        if result.verdict == "differs":
            result.why = (
                f"a margin differs by {result.margin_change:.2g} and a score by {result.score_change:.2g} from plain "
                f"{base.precision}; at most {limit.margin:g} and {limit.score:g} are allowed"
            )
    between = [
        (largest(one.margins, other.margins), f"{one.precision}, {one.path}", f"{other.precision}, {other.path}")
        for one, other in itertools.combinations(taken, 2)
    ]
    found.largest_between = max(between, default=None)


def _ask_reference(
    found: Verification, checkpoint: Checkpoint, pairs: Pairs, numbers: int, device: torch.device
) -> None:
    """Compare with the reference implementation, if it is here and its copy of the model fits."""
    # It loads the vision tower too, and the file's numbers beside its own for a while.
    found.reference_why = why_no_reference() or _too_large("float32", 2 * numbers, device)
    if checkpoint.lora is not None:
        found.reference_why = "it takes no adapter; check the folder that `kalm-rag tune --export` writes instead"
    if found.reference_why or not found.base:
        return
    try:
        expected = reference_scores(checkpoint, pairs, str(device))
    except Exception as error:  # noqa: BLE001 - another package's code, which may raise anything
        found.reference, found.reference_why = "failed", _reason(error)
        return
    for result in found.paths:
        if result.margins:
            result.reference_change = largest(_probabilities(result.margins), expected)
    base = next(result for result in found.paths if result.verdict == "base")
    found.reference_change = base.reference_change
    limit = (EXACT if found.base == "float32" else ROUNDED).score
    if found.reference_change is not None and found.reference_change <= limit:
        found.reference = "agrees"
        return
    found.reference = "differs"
    found.reference_why = (
        f"a score of plain {found.base} differs by {found.reference_change:.2g} from the reference's; at most "
        f"{limit:g} is allowed"
    )


def largest(left: Sequence[float], right: Sequence[float]) -> float:
    """Return the largest difference of two lists; NaN if any number is."""
    differences = [abs(one - other) for one, other in zip(left, right, strict=True)]
    return math.nan if any(map(math.isnan, differences)) else max(differences)


def _probabilities(margins: Sequence[float]) -> list[float]:
    return [probability(margin) for margin in margins]


def _text_numbers(checkpoint: Checkpoint) -> int:
    """Count the numbers of the text model from the headers of its files."""
    from safetensors import safe_open

    count = 0
    for shard in checkpoint.shards:
        with safe_open(shard, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - a safetensors file is not a mapping
                if not any(part in key for part in UNUSED):
                    count += math.prod(file.get_slice(key).get_shape())
    return count


def _too_large(precision: str, numbers: int, device: torch.device) -> str:
    """Return why a model does not fit in a precision; empty if it does, or if that cannot be known."""
    room, _ = free_memory(device)
    needed = numbers * (4 if precision in ("float32", "int8", "int8-all") else 2) + _ROOM
    if room is None or needed <= room:
        return ""
    return f"it takes about {needed / 1e9:.1f} GB, and {room / 1e9:.1f} GB are free"
