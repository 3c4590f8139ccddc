"""Threshold profiles: their files are untrusted, they hold for the scores they were made on, and `rank` obeys them."""

from __future__ import annotations

import asyncio
import copy
import errno
import json
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lorakit import write_lora
from thresholdkit import FIT, make_profile, sealed

from kalm_rag import KaLMReranker, ThresholdProfile, cli
from kalm_rag.cache import PassageCache
from kalm_rag.evaluation import scope_of
from kalm_rag.thresholds import Aim
from kalm_rag.utils.margins import probability

QUERY = "How do I sort a list?"


class TestFile:
    def test_a_full_disk_leaves_the_file_that_was_there(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        file = make_profile().save(tmp_path / "profile.json")
        before = file.read_bytes()

        def fail(_: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr("os.fsync", fail)
        with pytest.raises(OSError, match="No space left"):
            make_profile().save(file)
        assert [path.name for path in tmp_path.iterdir()] == ["profile.json"]
        assert file.read_bytes() == before

    def test_what_is_saved_is_read(self, tmp_path: Path) -> None:
        profile = make_profile(instruction="Find “code”.\n")
        file = profile.save(tmp_path / "profile.json")
        assert ThresholdProfile.load(file) == ThresholdProfile.load(str(file)) == profile
        assert [path.name for path in tmp_path.iterdir()] == ["profile.json"]
        assert pickle.loads(pickle.dumps(profile)) == copy.deepcopy(profile) == profile

    def test_any_change_by_hand_is_refused(self) -> None:
        content = json.loads(make_profile().to_json())
        places = list(leaves(content))
        assert len(places) > 40
        for path in places:
            changed = copy.deepcopy(content)
            holder = changed
            for step in path[:-1]:
                holder = holder[step]
            value = holder[path[-1]]
            holder[path[-1]] = f"{value}x" if isinstance(value, str) else (value or 0) + 1
            with pytest.raises(
                ValueError, match=r"'mine' is not a valid .* \(its (content was changed|schema must be 1)"
            ):
                ThresholdProfile.from_json(json.dumps(changed), "mine")

    @pytest.mark.parametrize(
        ("path", "value", "message"),
        [
            ("schema", 2, "its schema must be 1, got 2; a newer kalm-rag may have written it"),
            ("schema", True, "its schema must be 1, got True"),
            ("scope", [], "scope must be an object, got list"),
            ("scope.model", "x" * 24, "scope.model must be 24 hexadecimal digits, got 'xxx"),
            ("scope.model", 7, "scope.model must be 24 hexadecimal digits, got 7"),
            ("scope.ratio", 0, "scope.ratio must be at least 1, got 0"),
            ("scope.ratio", 4.0, "scope.ratio must be an integer, got 4.0"),
            ("scope.instruction", None, "scope.instruction must be a string, got NoneType"),
            ("scope.instruction", "\ud800", "scope.instruction holds a lone surrogate"),
            ("scope.system_prompt", "x" * 100_001, "scope.system_prompt must have at most 100000 characters"),
            ("scope.more", 1, "scope must have the fields .*; missing or unknown: more"),
            ("more", 1, "the file must have the fields .*; missing or unknown: more"),
            ("aim", "recall=2", "aim must be recall=SHARE, .*; got 'recall=2'"),
            ("aim", 7, "aim must be recall=SHARE, .*; got 7"),
            ("margin", "0", "margin must be a number between .*, got '0'"),
            ("margin", True, "margin must be a number between .*, got True"),
            ("margin", float("nan"), "margin must be a number between .*, got nan"),
            ("margin", float("inf"), "margin must be a number between .*, got inf"),
            ("margin", 10**400, "margin must be a number between"),
            ("chosen", None, "chosen must be an object, got NoneType"),
            ("chosen.queries", -1, "chosen.queries must be a whole number of at least 0, got -1"),
            ("checked.unanswered", 21, "checked.unanswered must be at most checked.queries, got 21 of 20"),
            ("checked.precision", [0.5, 0.6], "checked.precision must be a list of 3 to 3 items, got 2"),
            ("checked.precision", [1.5, 0.4, 0.6], "checked.precision must be a number between 0 and 1, got 1.5"),
            ("checked.kept", [3.0, 4.0, 2.0], "checked.kept must have an interval that rises, got 4.0 to 2.0"),
            ("fit", [], "fit must be a list of 1 to 20000 items, got 0"),
            ("fit", [[0, 0.1], [0, 0.2]], "fit must rise, got .*0.0, 0.1. before .0.0, 0.2"),
            ("fit", [[0, 0.2], [1, 0.1]], "fit must rise"),
            ("fit", [[0, 1.2]], "a share of fit must be a number between 0 and 1, got 1.2"),
            ("fit", [0], "a point of fit must be a list of 2 to 2 items, got int"),
            ("notes", ["x", 7], "notes must be a string, got int"),
            ("date", {}, "date must be a string, got dict"),
        ],
    )
    def test_a_digest_that_fits_vouches_for_nothing(self, path: str, value: object, message: str) -> None:
        content = json.loads(make_profile().to_json())
        *steps, last = path.split(".")
        holder = content
        for step in steps:
            holder = holder[step]
        holder[last] = value
        with pytest.raises(ValueError, match=rf"is not a valid threshold profile \({message}.*; make a profile with"):
            ThresholdProfile.from_json(sealed(content))

    @pytest.mark.parametrize(
        "data",
        [
            b"",
            b"{",
            b"[]",
            b"7",
            b"\xff\xfe\x00",
            b"\x00" * 64,
            b"[" * 100_000,
            b" " * 2_000_001,
            b'{"schema": 1, "schema": 1}',
            b'{"schema": ' + b"9" * 5000 + b"}",
        ],
        ids=lambda data: repr(data[:12]),
    )
    def test_what_is_no_profile_is_one_error(self, data: bytes, tmp_path: Path) -> None:
        file = tmp_path / "x.json"
        file.write_bytes(data)
        with pytest.raises(ValueError, match=r"x\.json' is not a valid threshold profile .*make a profile with"):
            ThresholdProfile.load(file)

    def test_a_file_that_cannot_be_read(self, tmp_path: Path) -> None:
        for place in (tmp_path, tmp_path / "none"):
            with pytest.raises(ValueError, match="cannot read the threshold profile .*make a profile with"):
                ThresholdProfile.load(place)


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where the plain values of a JSON value are."""
    if isinstance(value, (dict, list)):
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inner, (*path, name))
    else:
        yield path


@pytest.mark.parametrize(
    ("text", "aim"),
    [("f1", Aim("f1")), (" Recall=0.95", Aim("recall", 0.95)), ("precision=1", Aim("precision", 1.0))],
)
def test_aims(text: str, aim: Aim) -> None:
    assert Aim.parse(text) == Aim.parse(aim) == aim
    assert Aim.parse(str(aim)) == aim


@pytest.mark.parametrize("text", ["", "f1=0.5", "recall", "recall=", "recall=0", "recall=95", "recall=nan", "mrr=1", 7])
def test_wrong_aims(text: object) -> None:
    with pytest.raises((ValueError, TypeError), match="aim must be recall=SHARE, precision=SHARE or f1"):
        Aim.parse(text)


def test_the_fit_is_interpolated_and_constant_beyond_its_ends() -> None:
    profile = make_profile()
    places, shares = zip(*FIT, strict=True)
    margins = [-1e6, -6.0, -3.5, -1.0, -0.7, -0.5, 0.0, 1.999, 2.0, 2.5, 3.0, 3.1, 1e6]
    wanted = np.interp(margins, places, shares)
    assert [profile.calibrated(margin) for margin in margins] == pytest.approx(list(wanted), abs=1e-12)


class TestRank:
    @pytest.fixture
    def texts(self, passages: list[str]) -> list[str]:
        return passages[:9]

    @pytest.fixture
    def make(self, reranker: KaLMReranker, texts: list[str]) -> Callable[..., ThresholdProfile]:
        """Makes a profile of this reranker that lets 4 of the texts through."""
        margins = [hit.margin for hit in reranker.rank(QUERY, texts)]
        return lambda **scope: make_profile(reranker.scorer.identity.mark, (margins[3] + margins[4]) / 2, **scope)

    def test_a_profile_and_its_path_are_its_margin(
        self, reranker: KaLMReranker, texts: list[str], make: Callable[..., ThresholdProfile], tmp_path: Path
    ) -> None:
        profile = make()
        file = profile.save(tmp_path / "profile.json")
        whole = reranker.rank(QUERY, texts)
        for threshold in (profile, file, str(file)):
            assert reranker.rank(QUERY, texts, threshold=threshold) == whole[:4]
            assert reranker.rank(QUERY, texts, 2, threshold=threshold) == whole[:2]
        assert asyncio.run(reranker.arank(QUERY, texts, threshold=file)) == whole[:4]
        assert reranker.rank(QUERY, [], threshold=file) == []
        assert profile.score == probability(profile.margin)

    def test_calibrated_scores_change_no_order(
        self, reranker: KaLMReranker, texts: list[str], make: Callable[..., ThresholdProfile]
    ) -> None:
        profile = make()
        plain = reranker.rank(QUERY, texts, threshold=profile)
        found = reranker.rank(QUERY, texts, threshold=profile, calibrated=True)
        assert [(hit.index, hit.margin) for hit in found] == [(hit.index, hit.margin) for hit in plain]
        assert [hit.score for hit in found] == [profile.calibrated(hit.margin) for hit in plain]
        assert [hit.score for hit in found] != [hit.score for hit in plain]
        assert asyncio.run(reranker.arank(QUERY, texts, threshold=profile, calibrated=True)) == found

    def test_scores_that_it_was_not_made_on_are_refused(
        self, reranker: KaLMReranker, texts: list[str], make: Callable[..., ThresholdProfile], tmp_path: Path
    ) -> None:
        rank, own = reranker.rank, reranker.scorer.identity.mark
        profile = make()
        with pytest.raises(ValueError, match=r"of 'tiny' was made for ratio 4, not 8: .*or give a number"):
            rank(QUERY, texts, ratio=8, threshold=profile)
        with pytest.raises(ValueError, match=r"made for the instruction 'Given a query.*', not 'Find code\.'"):
            rank(QUERY, texts, instruction="Find code.", threshold=profile)
        with pytest.raises(
            ValueError, match=rf"the model with digest 0123456789ab0123456789ab, not {own}; and for ratio"
        ):
            rank(QUERY, texts, ratio=2, threshold=make_profile())
        with pytest.raises(ValueError, match=r"the system prompt 'Judge\.', not 'Judge whether"):
            rank(QUERY, texts, threshold=make(system_prompt="Judge."))
        long = "Given a question about a programming language, find what answers it"
        with pytest.raises(
            ValueError, match=r"the instruction …'find what answers it\.', not …'find what answers it!'"
        ):
            rank(QUERY, texts, instruction=f"{long}!", threshold=make(instruction=f"{long}."))
        assert rank(QUERY, texts, instruction="Find code.", threshold=make(instruction="Find code.")) is not None
        folder = write_lora(str(reranker.model), tmp_path / "tuned", 0.05)
        tuned = KaLMReranker(reranker.model, lora=folder, cache=None, device="cpu")
        with pytest.raises(ValueError, match=rf"with digest {own}, not {own[:12]}"):
            tuned.rank(QUERY, texts, threshold=profile)

    def test_the_scope_of_a_reranker(self, reranker: KaLMReranker, texts: list[str]) -> None:
        scope = scope_of(reranker, "half \ud83d a pair", 8)
        assert scope == make_profile(reranker.scorer.identity.mark, instruction="half \ufffd a pair", ratio=8).scope
        profile = make_profile(scope.model, -1e6, instruction=scope.instruction, ratio=8)
        found = reranker.rank(QUERY, texts, instruction="half \ud83d a pair", ratio=8, threshold=profile)
        assert len(found) == len(texts)

    def test_two_passes_find_the_same(self, passages: list[str]) -> None:
        texts, cache = sorted(passages, key=len)[10:50], PassageCache(None)
        whole = KaLMReranker("mini", device="cpu", dtype="float32", cache=cache).rank(QUERY, texts)
        two = KaLMReranker("mini", device="cpu", dtype="float32", cache=cache, refine=True, score_memory=0)
        profile = make_profile(two.scorer.identity.mark, (whole[11].margin + whole[12].margin) / 2)
        for top_k in (5, None):
            found = two.rank(QUERY, texts, top_k, threshold=profile)
            assert {hit.index for hit in found} == {hit.index for hit in whole[: top_k or 12]}
        stats = two.prefill_stats()
        assert stats is not None
        assert stats.counters.approximated > 0

    def test_the_command(
        self, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        file = tmp_path / "passages.txt"
        file.write_text("\n".join(text.replace("\n", " ") for text in texts))
        reranker = KaLMReranker("mini", device="cpu", cache=None)
        whole = reranker.rank(QUERY, file.read_text().splitlines())
        profile = make_profile(reranker.scorer.identity.mark, (whole[2].margin + whole[3].margin) / 2)
        saved = str(profile.save(tmp_path / "profile.json"))

        def rank(*options: str) -> None:
            given = ["kalm-rag", "rank", QUERY, str(file), "-m", "mini", "--cache", str(tmp_path / "cache"), *options]
            monkeypatch.setattr(sys, "argv", given)
            cli.main()

        with pytest.raises(SystemExit):
            rank("--threshold", saved, "--calibrated", "--json", "--device", "cpu")
        found = json.loads(capsys.readouterr().out)
        assert [hit["index"] for hit in found] == [hit.index for hit in whole[:3]]
        wanted = [profile.calibrated(hit.margin) for hit in whole[:3]]
        assert [hit["score"] for hit in found] == pytest.approx(wanted, abs=1e-5)
        with pytest.raises(SystemExit):
            rank("--threshold", saved, "--ratio", "8")
        assert "was made for ratio 4, not 8" in capsys.readouterr().err
