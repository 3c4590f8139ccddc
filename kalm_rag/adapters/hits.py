"""What a framework's document says about its place in a ranking."""

from __future__ import annotations

from typing import Any

from kalm_rag.results import RankedPassage, UnscoredPassage

HIT_KEYS = (
    "relevance_margin",
    "relevance_scored",
    "relevance_exact",
    "passage_truncated",
    "query_truncated",
    "passage_repaired",
    "query_repaired",
    "passage_span",
)
"""Keys of `hit_metadata`; the score has a place of its own in each framework."""


def hit_metadata(hit: RankedPassage[Any] | UnscoredPassage[Any]) -> dict[str, Any]:
    """Return what a document's metadata says besides the score, by the keys of `HIT_KEYS`.

    `relevance_margin` is `RankedPassage.margin`, `relevance_scored` its `scored`, `relevance_exact` its `exact`, and
    `passage_span` its `span`, if there is one as a list, which JSON and YAML give back as it was. The other keys are
    fields of `RankedPassage` by their own names. For an `UnscoredPassage`, what is not known of it is None: every key
    is there, so that nothing of an earlier ranking is left in the metadata.
    """
    if isinstance(hit, UnscoredPassage):
        return dict.fromkeys(HIT_KEYS) | {
            "relevance_scored": False,
            "query_truncated": hit.query_truncated,
            "passage_repaired": hit.passage_repaired,
            "query_repaired": hit.query_repaired,
        }
    return {
        "relevance_margin": hit.margin,
        "relevance_scored": True,
        "relevance_exact": hit.exact,
        "passage_truncated": hit.passage_truncated,
        "query_truncated": hit.query_truncated,
        "passage_repaired": hit.passage_repaired,
        "query_repaired": hit.query_repaired,
        "passage_span": None if hit.span is None else list(hit.span),
    }
