"""What the adapters' tests share: one query, its passages, caches of every kind, and arguments that are wrong."""

from __future__ import annotations

from typing import Any

import pytest

from kalm_rag import PassageCache
from kalm_rag.cache import DiskStore

QUERY = "How do I sort a list?"
TEXTS = [
    "list.sort() sorts in place and returns None.",
    "sorted() returns a new list.",
    "A tuple cannot be changed.",
    "Dictionaries keep their insertion order.",
    "Use key= to sort by something else.",
]
ANSWERS = {
    "What is the capital of China?": "The capital of China is Beijing.",
    "Why do things fall to the ground?": "Gravity attracts bodies toward one another.",
    "How do I sort a list in Python?": "list.sort() sorts a list in place and returns None.",
}
"""Queries that the released weights must answer."""

MODES = pytest.mark.parametrize("mode", ["sync", "async"])
CACHES = pytest.mark.parametrize("make", [PassageCache, DiskStore])

WRONG_MODEL_ARGUMENTS: list[dict[str, Any]] = [
    {"model": None},
    {"model": ""},
    {"revision": 7},
    {"lora": 7},
    {"lora": " "},
    {"device": 7},
    {"dtype": 7},
    {"dtype": "int3"},
    {"max_length": 0},
    {"max_length": True},
    {"max_length": 2.0},
    {"max_length": "5"},
    {"ratio": 0},
    {"ratio": "4"},
]
WRONG_CACHES: list[dict[str, Any]] = [{"keep": "all"}, {"keep": None}, {"cache": 7}]


def wrong_types(top: str) -> list[dict[str, Any]]:
    """Arguments of a call with a wrong type; `top` is how a framework names the number of results."""
    return [
        {top: True},
        {top: 2.0},
        {top: "2"},
        {"score_threshold": "0.5"},
        {"score_threshold": float("nan")},
        {"score_threshold": 50},
        {"score_threshold": True},
        {"instruction": 7},
        {"ratio": 2.0},
    ]
