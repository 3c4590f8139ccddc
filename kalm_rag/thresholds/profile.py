"""The profile of a threshold: what it is, for which scores it holds, what it did on judged queries, and its file.

A file is untrusted text: every field is checked, and a digest over the content shows changes.
"""

from __future__ import annotations

import hashlib
import json
import re
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

from kalm_rag.thresholds.aim import Aim
from kalm_rag.thresholds.fields import json_count, json_list, json_number, json_object, json_text, once
from kalm_rag.thresholds.records import MEASURES, Figure, Figures, Scope
from kalm_rag.utils.checks import check_positive
from kalm_rag.utils.display import Shown
from kalm_rag.utils.files import replace_file
from kalm_rag.utils.margins import probability
from kalm_rag.utils.paths import user_path

SCHEMA = 1
"""Version of the file's layout."""

_WHAT = "a score threshold of kalm-rag, made by `kalm-rag eval --calibrate`; a change makes it invalid"
_MOST_BYTES = 2_000_000
_MOST_POINTS = 20_000
_DIGEST = re.compile(r"[0-9a-f]{24}")
_WAY_OUT = "make a profile with `kalm-rag eval --calibrate`, or give a number"


@dataclass(frozen=True, slots=True, repr=False)
class ThresholdProfile(Shown):
    """A threshold that was chosen for an aim on some judged queries and checked on others.

    Give it, or the path of its file, as `threshold=` or `score_threshold=`. It is refused for scores of another model,
    ratio or instruction.

    Attributes:
        scope: the scores it holds for.
        model_name: what the model was called when the profile was made, for people.
        aim: what the threshold was chosen for, such as `recall=0.95`.
        margin: passages with a lower margin (`RankedPassage.margin`) are left out.
        chosen: what the threshold did to the queries that it was chosen on.
        checked: what it did to other queries, which is what to expect.
        fit: margins, rising, and the share of relevant candidates at each, never falling: the monotone fit behind
            `calibrated=True`, made on the queries of `chosen`.
        notes: what to know about the queries it was made on.
        date: when it was made, in UTC.
        version: of kalm-rag.
    """

    scope: Scope
    model_name: str
    aim: str
    margin: float
    chosen: Figures
    checked: Figures
    fit: tuple[tuple[float, float], ...]
    notes: tuple[str, ...] = ()
    date: str = ""
    version: str = ""

    @property
    def score(self) -> float:
        """The threshold as `P(yes)`."""
        return probability(self.margin)

    def calibrated(self, margin: float) -> float:
        """Return the share of candidates of such a margin that was relevant, between 0 and 1.

        Between two points of the fit it is interpolated; beyond them it stays as it is.
        """
        place = bisect_right(self.fit, margin, key=lambda point: point[0])
        if place in (0, len(self.fit)):
            return self.fit[min(place, len(self.fit) - 1)][1]
        (left, low), (right, high) = self.fit[place - 1 : place + 1]
        return low + (high - low) * (margin - left) / (right - left)

    def check(self, scope: Scope) -> None:
        """Refuse scores that the threshold was not chosen on.

        Raises:
            ValueError: model, ratio, instruction or system prompt differ; the message names both.
        """
        differences = self.scope.differences(scope)
        if differences:
            msg = (
                f"the threshold profile of {self.model_name!r} was made for {'; and for '.join(differences)}: its "
                f"threshold means nothing here. Score with what it was made for, or {_WAY_OUT}"
            )
            raise ValueError(msg)

    def to_json(self) -> str:
        """Return the content of a file."""
        content: dict[str, Any] = {"what": _WHAT, "schema": SCHEMA, **asdict(self)}
        return json.dumps({**content, "digest": _digest(content)}, indent=1) + "\n"

    def save(self, path: str | Path) -> Path:
        """Write a file, whole or not at all, and return its path.

        Raises:
            OSError: it cannot be written.
        """
        target = user_path(path, "path")
        replace_file(target, self.to_json().encode())
        return target

    @classmethod
    def load(cls, path: str | Path) -> ThresholdProfile:
        """Read a file.

        Raises:
            ValueError: there is none, it is not a profile, it was changed after it was written, or a newer version of
                kalm-rag wrote it.
        """
        file = user_path(path, "path")
        try:
            with file.open("rb") as opened:
                data = opened.read(_MOST_BYTES + 1)
        except OSError as error:
            msg = f"cannot read the threshold profile {str(file)!r} ({error.strerror or error}); {_WAY_OUT}"
            raise ValueError(msg) from None
        return cls.from_json(data, str(file))

    @classmethod
    def from_json(cls, data: str | bytes, name: str = "profile") -> ThresholdProfile:
        """Read the content of a file; `name` is what messages call it.

        Raises:
            ValueError: as in `load`.
        """
        try:
            if len(data) > _MOST_BYTES:
                msg = f"it has more than {_MOST_BYTES} bytes"
                raise ValueError(msg)
            return _profile(json.loads(data, object_pairs_hook=once))
        except (ValueError, TypeError, OverflowError, RecursionError) as error:
            why = "it is nested too deeply" if isinstance(error, RecursionError) else error
            msg = f"{name!r} is not a valid threshold profile ({why}); {_WAY_OUT}"
            raise ValueError(msg) from None


def _profile(content: object) -> ThresholdProfile:
    names = [field.name for field in fields(ThresholdProfile)]
    found = json_object(content, "the file", None)
    schema = found.get("schema")
    if type(schema) is not int or schema != SCHEMA:
        msg = f"its schema must be {SCHEMA}, got {schema!r:.40}; a newer kalm-rag may have written it"
        raise ValueError(msg)
    json_object(content, "the file", ["what", "schema", *names, "digest"])
    digest = found.pop("digest")
    if digest != _digest(found):
        msg = "its content was changed after it was written: its digest does not fit"
        raise ValueError(msg)
    scope = json_object(found["scope"], "scope", [field.name for field in fields(Scope)])
    if not isinstance(scope["model"], str) or not _DIGEST.fullmatch(scope["model"]):
        msg = f"scope.model must be 24 hexadecimal digits, got {scope['model']!r:.80}"
        raise ValueError(msg)
    return ThresholdProfile(
        Scope(
            scope["model"],
            check_positive("scope.ratio", scope["ratio"]),
            json_text("scope.instruction", scope["instruction"]),
            json_text("scope.system_prompt", scope["system_prompt"]),
        ),
        json_text("model_name", found["model_name"]),
        str(Aim.parse(found["aim"])),
        json_number("margin", found["margin"]),
        _figures("chosen", found["chosen"]),
        _figures("checked", found["checked"]),
        _fit(found["fit"]),
        tuple(json_text("notes", note) for note in json_list("notes", found["notes"], 0, 100)),
        json_text("date", found["date"]),
        json_text("version", found["version"]),
    )


def _digest(content: Mapping[str, Any]) -> str:
    """SHA-256 of the content, whatever the order and the spaces."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def _figures(name: str, value: object) -> Figures:
    found = json_object(value, name, [field.name for field in fields(Figures)])
    queries, unanswered = (json_count(f"{name}.{field}", found[field]) for field in ("queries", "unanswered"))
    if unanswered > queries:
        msg = f"{name}.unanswered must be at most {name}.queries, got {unanswered} of {queries}"
        raise ValueError(msg)
    return Figures(queries, unanswered, *(_figure(f"{name}.{field}", found[field]) for field in MEASURES))


def _figure(name: str, value: object) -> Figure | None:
    if value is None:
        return None
    high = 1e9 if name.endswith("kept") else 1.0
    figure = Figure(*(json_number(name, item, 0.0, high) for item in json_list(name, value, 3, 3)))
    if figure.low > figure.high:
        msg = f"{name} must have an interval that rises, got {figure.low} to {figure.high}"
        raise ValueError(msg)
    return figure


def _fit(value: object) -> tuple[tuple[float, float], ...]:
    points = [json_list("a point of fit", point, 2, 2) for point in json_list("fit", value, 1, _MOST_POINTS)]
    found = tuple(
        (json_number("a margin of fit", margin), json_number("a share of fit", share, 0, 1)) for margin, share in points
    )
    for (left, low), (right, high) in pairwise(found):
        if left >= right or low > high:
            msg = f"fit must rise, got {[left, low]} before {[right, high]}"
            raise ValueError(msg)
    return found
