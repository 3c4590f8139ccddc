"""What every dialect has: the fields that they share, and how a result is told."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, WithJsonSchema

from kalm_rag.results import RankedPassage
from kalm_rag.serving.asked import Answered, Ask, Asked, Outcome
from kalm_rag.utils.margins import probability


def _text(value: Any) -> str:
    """Accept any string of Python: pydantic refuses half surrogate pairs, which the library reads as U+FFFD."""
    if not isinstance(value, str):
        msg = f"it must be a string, got {type(value).__name__}"
        raise ValueError(msg)  # not a TypeError: pydantic makes this an error of the field
    return value


def _document(value: Any) -> str | dict[str, Any]:
    if isinstance(value, dict):
        return value
    return _text(value)


def _no_null(value: Any) -> Any:
    return False if value is None else value


Text = Annotated[str, PlainValidator(_text), WithJsonSchema({"type": "string"})]
Flag = Annotated[bool, BeforeValidator(_no_null)]
"""True or False; null is False."""
Given = Annotated[
    Any,
    PlainValidator(_document),
    WithJsonSchema(
        {"anyOf": [{"type": "string"}, {"type": "object", "properties": {"text": {"type": "string"}}}]},
    ),
]
"""A document: its text, or an object with the text under `text`."""
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]


class Extensions(BaseModel):
    """Fields that every dialect accepts. Unknown fields are ignored, and a field that is null counts as left out."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())

    model: Text | None = Field(None, description="Any name, unless the server runs with --strict-model.")
    instruction: Text | None = Field(None, description="What makes a passage relevant, instead of the server's.")
    ratio: Count | None = Field(None, description="Compress each passage this many times: 1, 2, 4, 8, 16 or 32.")
    budget_ms: Positive | None = Field(None, description="Milliseconds that the request may take.")
    on_unknown: Text | None = Field(None, description="`wait` encodes unknown passages, `skip` leaves them unscored.")
    threshold: float | None = Field(None, description="Leave out passages with a lower score (P(yes)).")
    long_passages: Text | None = Field(None, description="`truncate`, or `windows`, of which the best one counts.")
    return_margin: Flag = Field(False, description="Give each result its margin too.")
    details: Flag = Field(False, description="Give each result all that the library says of it.")
    return_source: Flag = Field(False, description="Give each result the cache level that its passage came from.")

    def asked(self, asks: Sequence[Ask], **others: Any) -> Asked:
        """Return what is asked for, with the fields that every dialect has."""
        own = {
            name: getattr(self, name)
            for name in (
                "model",
                "instruction",
                "ratio",
                "budget_ms",
                "on_unknown",
                "threshold",
                "long_passages",
                "return_margin",
                "details",
                "return_source",
            )
        }
        return Asked(asks, **own, **others)


@dataclass(frozen=True, slots=True)
class Dialect:
    """How one kind of client speaks.

    Attributes:
        name: in metrics and logs.
        paths: of its endpoints.
        request: the fields of a request.
        asked: turns a request into what it asks for.
        answer: turns the outcome into what the response holds.
        error: turns a status and a message into what an error's response holds.
        busy: the status that a full queue answers: what the clients of these paths try again.
        summary: a sentence for people.
    """

    name: str
    paths: tuple[str, ...]
    request: type[BaseModel]
    asked: Callable[[Any], Asked]
    answer: Callable[[Asked, Outcome], Any]
    error: Callable[[int, str], dict[str, Any]]
    busy: int
    summary: str


_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    413: "invalid_request_error",
    422: "invalid_request_error",
    429: "overloaded_error",
    503: "overloaded_error",
}


def any_error(status: int, message: str) -> dict[str, Any]:
    """Return an error for clients of Cohere (`message`), Jina and NVIDIA (`detail`), and vLLM (`error`)."""
    kind = _KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"message": message, "detail": message, "error": {"message": message, "type": kind, "code": status}}


def score_of(hit: RankedPassage[str], *, margins: bool) -> float:
    """Return the number that a dialect shows."""
    return hit.margin if margins else hit.score


def extras(answer: Answered, hit: RankedPassage[str], asked: Asked) -> dict[str, Any]:
    """Return what a result says besides its score; what is not so is left out, so that strict clients see nothing new.

    `details` tells all that `RankedPassage` holds.
    """
    truncated = hit.passage_truncated or hit.index in answer.cut
    found: dict[str, Any] = {"passage_truncated": True} if truncated else {}
    if asked.return_margin or asked.details:
        found["margin"] = hit.margin
    if asked.details:
        found |= {
            "probability": probability(hit.margin),
            "passage_truncated": truncated,
            "query_truncated": hit.query_truncated or answer.query_cut,
            "passage_repaired": hit.passage_repaired,
            "query_repaired": hit.query_repaired,
            "exact": hit.exact,
        }
        if hit.span is not None:
            start = answer.cut.get(hit.index, 0)
            found["span"] = [hit.span[0] + start, hit.span[1] + start]
    if answer.sources and (source := answer.sources[hit.index]) is not None:
        found["source"] = source
    return found


def scored(answer: Answered) -> list[RankedPassage[str]]:
    """Return the passages that have a score, best first."""
    return [hit for hit in answer.ranking if isinstance(hit, RankedPassage)]


def unscored(answer: Answered) -> list[dict[str, Any]]:
    """Return what is known of passages that were not reached."""
    return [
        {
            "index": hit.index if answer.ask.places is None else answer.ask.places[hit.index],
            "passage_repaired": hit.passage_repaired,
            "query_truncated": hit.query_truncated or answer.query_cut,
            "query_repaired": hit.query_repaired,
        }
        for hit in answer.ranking
        if not isinstance(hit, RankedPassage)
    ]


def about(asked: Asked, outcome: Outcome) -> dict[str, Any]:
    """Return what a response with an object says besides its results: only what is asked for, or went otherwise."""
    found: dict[str, Any] = {}
    left = [one for answer in outcome.answers for one in unscored(answer)]
    if left:
        found["unscored"] = left
    if asked.details:
        found["calls"] = [
            {"counts": plain(answer.ranking.counts), "timings": plain(answer.ranking.timings)}
            for answer in outcome.answers
        ]
    return found


def plain(record: Any) -> dict[str, Any]:
    """Return a record's fields."""
    return {} if record is None else {name: getattr(record, name) for name in record.__dataclass_fields__}


def warnings(outcome: Outcome) -> list[str]:
    """Return sentences about what was not read or not scored, without texts."""
    found = []
    if outcome.truncated:
        found.append(f"{outcome.truncated} passages were longer than what is read; the results say which")
    if outcome.queries_truncated:
        found.append(f"{outcome.queries_truncated} queries were longer than what is read; the rest was not read")
    if outcome.unscored:
        found.append(f"{outcome.unscored} passages were not reached and have no score; `unscored` says which")
    return found


def document_text(document: str | Mapping[str, Any], place: int, fields: Sequence[str] | None = None) -> str:
    """Return the text of a document, or of some of its fields, one a line.

    Raises:
        TypeError: there is none.
    """
    if isinstance(document, str):
        return document
    if fields and (parts := [document[name] for name in fields if name in document]):
        return "\n".join(part if isinstance(part, str) else str(part) for part in parts if part is not None)
    text = document.get("text")
    if not isinstance(text, str):
        msg = f"documents[{place}] must be a string or an object with a string under 'text'; rank_fields names others"
        raise TypeError(msg)
    return text
