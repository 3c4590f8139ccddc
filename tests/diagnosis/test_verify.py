"""The comparison of paths: right ones agree, a wrong one is found, and what was not taken is not called verified."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from machine import needs_int8

from kalm_rag.diagnosis import card as cards
from kalm_rag.diagnosis import doctor, verify
from kalm_rag.diagnosis.card import CardExample
from kalm_rag.diagnosis.paths import PATHS, demo_pairs, take
from kalm_rag.diagnosis.verify import PathResult, Verification
from kalm_rag.errors import ScoringError
from kalm_rag.model.checkpoint import find_checkpoint
from kalm_rag.model.loading import load_model
from kalm_rag.model.prefill import PrefilledDecoder
from kalm_rag.settings import Settings

CPU = torch.device("cpu")
Check = Callable[..., Verification]


@pytest.fixture
def check(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Check:
    """Verifies the small checkpoint in some precisions, on few and short pairs."""

    def run(*precisions: str, reference: bool = False, paths: int = len(PATHS), **options: Any) -> Verification:
        monkeypatch.setattr(verify, "PRECISIONS", precisions)
        monkeypatch.setattr(verify, "PATHS", PATHS[:paths])
        monkeypatch.setattr(verify, "demo_pairs", lambda: [(query, text[:160]) for query, text in demo_pairs(6)])
        if not reference:
            monkeypatch.setattr(verify, "why_no_reference", lambda: "not asked")
        return verify.verify(find_checkpoint(checkpoint), CPU, show_progress=False, **options)

    return run


def by_path(found: Verification, precision: str = "float32") -> dict[str, PathResult]:
    return {result.path: result for result in found.paths if result.precision == precision}


def test_the_pairs_differ_and_share_their_passages() -> None:
    pairs = demo_pairs()
    assert len(set(pairs)) == 20
    assert len({passage for _, passage in pairs}) == 10
    assert len({query for query, _ in pairs}) == 10


@needs_int8
def test_every_path_of_every_precision_agrees_and_the_reference_too(check: Check) -> None:
    found = check("float32", "bfloat16", "int8", reference=True)
    assert {result.verdict for result in found.paths} == {"base", "agrees"}
    assert len(found.paths) == 3 * len(PATHS) + 1
    assert (found.reference, found.faults, found.gaps) == ("agrees", [], [])
    assert found.reference_change is not None
    assert found.reference_change <= 1e-5
    assert found.is_informative
    for result in found.paths:
        assert result.tolerance is not None
        assert result.margin_change is not None
        assert result.margin_change <= result.tolerance.margin
        if result.path in ("prefilled", "prefilled, from memory", "prefilled, from disk", "states, from disk"):
            assert (result.margin_change <= 1e-3) == (result.precision == "float32")
    assert by_path(found, "int8")["plain"].computes == "int8 decoder, float32 encoder"
    assert found.largest_between is not None
    assert 0 < found.largest_between[0] < 0.5
    json.dumps(found.as_json(), allow_nan=False)


def test_a_wrong_path_is_found_and_named(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    margins = PrefilledDecoder.margins
    monkeypatch.setattr(
        PrefilledDecoder, "margins", lambda self, *args: [value + 0.01 for value in margins(self, *args)]
    )
    found = check("float32")
    wrong = {name for name, result in by_path(found).items() if result.verdict == "differs"}
    assert wrong == {"prefilled", "prefilled, from memory", "prefilled, from disk"}
    assert "float32, prefilled: a margin differs by 0.01" in " ".join(found.faults)


def test_a_wrong_module_of_ours_is_found_beside_transformers(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    load = verify.load_model

    def spoiled(*args: Any, fast: bool, **options: Any) -> Any:
        loaded = load(*args, fast=fast, **options)
        if fast:
            norm = loaded.model.get_decoder().norm
            norm.register_forward_hook(lambda module, given, output: output * 1.1)
        return loaded

    monkeypatch.setattr(verify, "load_model", spoiled)
    found = check("float32", reference=True)
    assert by_path(found)["plain, transformers' modules"].verdict == "differs"
    assert found.reference == "differs"
    assert "Reference implementation: a score of plain float32 differs by" in " ".join(found.faults)


def test_a_path_that_raises_is_a_fault_and_the_others_are_compared(
    check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Any, *args: Any) -> Any:
        msg = "no such kernel"
        raise RuntimeError(msg)

    monkeypatch.setattr(PrefilledDecoder, "margins", fail)
    found = check("float32")
    assert by_path(found)["prefilled"].why == "RuntimeError: no such kernel"
    assert by_path(found)["states, from disk"].verdict == "agrees"
    assert any("prefilled: RuntimeError: no such kernel" in fault for fault in found.faults)


def test_scores_that_came_by_another_path_are_not_called_verified(
    check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kalm_rag.cache import DiskStore

    monkeypatch.setattr(DiskStore, "get_many", lambda self, keys: {})
    found = check("float32")
    assert by_path(found)["states, from disk"].verdict == "not taken"
    assert by_path(found)["prefilled, from disk"].verdict == "not taken"
    assert found.faults == []
    assert any("states, from disk: the passages were not read from disk" in gap for gap in found.gaps)


def test_without_a_temporary_folder_all_else_is_verified(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object, **_options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("kalm_rag.diagnosis.paths.tempfile.TemporaryDirectory", refuse)
    found = by_path(check("float32"))
    assert found["prefilled, from disk"].verdict == "not taken"
    assert "TMPDIR" in found["prefilled, from disk"].why
    assert found["prefilled, from memory"].verdict == "agrees"


def test_float16_that_overflows_is_no_fault(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    def overflow(path: Any, loaded: Any, *args: Any) -> Any:
        if loaded.dtype == torch.float16:
            msg = "the model gave non-finite logits"
            raise ScoringError(msg)
        return take(path, loaded, *args)

    monkeypatch.setattr(verify, "why_not", lambda precision, device: "")
    monkeypatch.setattr(verify, "take", overflow)
    found = check("float32", "float16", paths=2)
    assert {result.verdict for result in found.paths if result.precision == "float16"} == {"not run"}
    assert found.faults == []


def test_a_precision_that_does_not_fit_is_left_out_and_another_is_the_base(
    check: Check, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = 3 * verify._text_numbers(find_checkpoint(checkpoint))
    monkeypatch.setattr(verify, "_ROOM", 0)
    monkeypatch.setattr(verify, "free_memory", lambda device: (needed, "memory"))
    found = check("float32", "bfloat16", reference=True, paths=2)
    assert found.base == "bfloat16"
    assert by_path(found)["all paths"].verdict == "not run"
    assert "GB are free" in by_path(found)["all paths"].why
    assert (found.reference, found.faults) == ("not run", [])
    monkeypatch.setattr(verify, "free_memory", lambda device: (1, "memory"))
    assert check("float32", "bfloat16").faults[0].startswith("No precision could be run: float32: it takes about")


def test_equal_scores_prove_little_and_that_is_told() -> None:
    found = Verification(20, "cpu", base="float32", spread=0.001)
    assert not found.is_informative
    assert "a wrong path would hardly show" in found.gaps[0]


def test_no_number_is_no_agreement() -> None:
    assert math.isnan(verify.largest([1.0, math.nan], [1.0, 2.0]))
    found = Verification(2, "cpu")
    found.paths = [
        PathResult("float32", "plain", verdict="taken", margins=[1.0, 2.0]),
        PathResult("float32", "prefilled", verdict="taken", margins=[1.0, math.nan]),
    ]
    verify._compare(found)
    assert [result.verdict for result in found.paths] == ["base", "differs"]


class TestTheExampleOfAModelCard:
    def test_it_is_that_of_the_first_large_release_alone(self) -> None:
        (name, examples), *rest = cards.EXAMPLES.items()
        assert (name, rest) == ("KaLM-Embedding/KaLM-Reranker-V1-Large", [])
        from kalm_rag.utils.margins import probability

        printed = [probability(margin) for example in examples for margin in example.margins]
        assert printed == pytest.approx([0.99984646, 6.8936e-07, 0.997285, 5.896418e-07], rel=1e-4)

    @pytest.fixture
    def example(self, checkpoint: Path) -> CardExample:
        """What the small checkpoint really gives."""
        passages = ("The capital of China is Beijing.", "Gravity attracts bodies toward one another.")
        example = CardExample("What is the capital of China?", passages, "Find the answer.", (0.0, 0.0))
        loaded = load_model(find_checkpoint(checkpoint), settings=Settings(), device=CPU, dtype="bfloat16")
        results = cards.check_card([example], loaded, find_checkpoint(checkpoint))
        assert [result.path for result in results] == ["plain", "plain", "prefilled", "prefilled"]
        margins = (results[0].margin, results[1].margin)
        assert abs(margins[0] - margins[1]) > 0.05
        return CardExample(example.query, passages, example.instruction, margins)

    def test_published_numbers_that_are_reproduced(
        self, check: Check, example: CardExample, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(verify.EXAMPLES, "owner/release", (example,))
        found = check("float32", "bfloat16", card="owner/release", paths=2)
        assert [result.agrees for result in found.card] == [True] * 4
        assert (found.card_why, found.faults) == ("", [])

    def test_published_numbers_that_are_not_reproduced(
        self, check: Check, example: CardExample, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        far = CardExample(
            example.query, example.passages, example.instruction, (example.margins[0] + 0.2, example.margins[1])
        )
        monkeypatch.setitem(verify.EXAMPLES, "owner/release", (far,))
        found = check("bfloat16", card="owner/release", paths=2)
        assert [result.agrees for result in found.card] == [False, True, False, True]
        assert "The model card's example, plain: the margin of 'The capital of China is Beijing.'" in found.faults[0]

    def test_a_model_without_an_example_says_so(self, check: Check) -> None:
        found = check("float32", card="owner/other", paths=1)
        assert (found.card, found.faults) == ([], [])
        assert "publishes no example" in found.card_why


def test_a_diagnosis_with_a_wrong_path_is_not_usable(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Verification(20, "cpu", base="float32", spread=1.0)
    found.paths = [PathResult("float32", "prefilled", verdict="differs", why="a margin differs by 1")]
    monkeypatch.setattr(doctor, "verify", lambda *args, **options: found)
    seen = doctor.diagnose(str(checkpoint))
    assert not seen.is_usable
    assert seen.findings[0].text == "float32, prefilled: a margin differs by 1."
    assert seen.as_json()["verification"]["paths"][0]["verdict"] == "differs"
