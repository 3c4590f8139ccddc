"""`kalm-rag tune`, and `--lora` of the commands that run a model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from lorakit import write_lora

from kalm_rag import cli
from kalm_rag import tuning as tuning_module
from kalm_rag.tuning import Comparison, Recipe, Tuned


@pytest.fixture(scope="module")
def adapter(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lora(checkpoint, tmp_path_factory.mktemp("lora") / "adapter", 0.05)


def run(
    arguments: list[object], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str, str]:
    """Exit status, standard output and standard error."""
    monkeypatch.setattr(sys, "argv", ["kalm-rag", *map(str, arguments)])
    with pytest.raises(SystemExit) as done:
        cli.main()
    out, err = capsys.readouterr()
    return int(done.value.code or 0), out, err


def made(folder: Path | None, *verdicts: tuple[float, float, float]) -> Tuned:
    comparisons = [Comparison(4, 50, 0.5, 0.6, 0.6 + (low + high) / 2, low, high, p) for low, high, p in verdicts]
    return Tuned(folder, comparisons, 20, 10, [(1, 1.0)], [(0, 1.0)], "all 20 steps are done", (60, 10, 50), 3, 9, 8)


def test_options_reach_the_recipe_and_the_table_is_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    given: dict[str, Any] = {}

    def tune(source: str, out: str, **options: Any) -> Tuned:
        given.update(options, source=source, out=out)
        options["announce"]("Training takes about 9 s at most.")
        return made(tmp_path, (0.01, 0.2, 0.001), (-0.1, 0.1, 0.9))

    monkeypatch.setattr(tuning_module, "tune", tune)
    options = ["--ratio", "8,32", "--list-size", 12, "--epochs", 5, "--rate", 0.01, "--rank", 4, "--seed", 3]
    more = ["--by-passages", "--instruction", "Find code.", "--split", "dev", "-m", "mini", "--out", "here"]
    more += ["--language", "de", "--fold-accents"]
    code, out, err = run(["tune", "judged.jsonl", *options, *more], monkeypatch, capsys)
    assert code == 0
    assert given["recipe"] == Recipe(ratios=(8, 32), list_size=12, epochs=5, rate=0.01, rank=4, alpha=8, seed=3)
    assert (given["source"], given["out"], given["model"], given["split"]) == ("judged.jsonl", "here", "mini", "dev")
    assert (given["by_passages"], given["instruction"]) == (True, "Find code.")
    assert (given["language"], given["fold_accents"]) == ("de", True)
    rows = [line.split() for line in out.splitlines()]
    assert [row for row in rows if row[-1:] == ["gain"]]
    assert [row for row in rows if row[-3:] == ["within", "the", "noise"]]
    assert "60 trained it, 10 decided when to stop, 50 measure it" in " ".join(out.split())
    assert "A change within the noise is no evidence that tuning helped" in " ".join(out.split())
    assert 'KaLMReranker("mini", lora="here")' in out
    assert "Training takes about 9 s" in err


def test_defaults_are_those_of_the_recipe(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(tuning_module, "tune", lambda *_, **options: given.update(options) or made(tmp_path))
    code, out, _ = run(["tune", "judged.jsonl", "--json"], monkeypatch, capsys)
    assert code == 0
    assert given["recipe"] == Recipe()
    assert json.loads(out)["queries"] == [60, 10, 50]


def test_exit_status_and_message_where_nothing_was_gained_or_it_was_interrupted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tuning_module, "tune", lambda *_, **__: made(None))
    code, out, _ = run(["tune", "judged.jsonl"], monkeypatch, capsys)
    assert code == 1
    assert "No step made the model better" in out

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tuning_module, "tune", interrupt)
    code, _, err = run(["tune", "judged.jsonl"], monkeypatch, capsys)
    assert code == 130
    assert "interrupted: rerun the same command to resume in kalm-rag-tuned" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tune"], "name the judgements: a BEIR folder, or a file of JSON lines with query, positive and negatives"),
        (["tune", "x", "--ratio", "4;8"], "--ratio takes whole numbers separated by commas"),
        (["tune", "x", "--rate", "2"], "--rate must be a number above 0 and below 1, got 2.0"),
        (["tune", "x", "--list-size", "1"], "--list-size must be at least 2"),
        (["tune", "x", "--dtype", "int8"], "--dtype must be one of ('float32', 'bfloat16'), got 'int8'"),
        (["tune", "x", "--language", "klingon"], "--language must be one of auto, none, de"),
        (["tune", "nowhere"], "nowhere"),
        (
            ["rank", "q", "-", "-m", "mini", "--lora", "nowhere"],
            "nowhere is no folder; give the folder that `kalm-rag tune --out` wrote",
        ),
        (["doctor", "--lora", "x"], "--lora x belongs to a model"),
    ],
)
def test_wrong_values(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    arguments: list[object],
    message: str,
) -> None:
    if arguments[0] == "tune":
        pytest.importorskip("peft", reason="the extra tune is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", type("In", (), {"buffer": [b"a passage\n"]}))
    code, _, err = run(arguments, monkeypatch, capsys)
    assert code == 2
    assert message in err


def test_an_adapter_is_exported(
    checkpoint: Path,
    adapter: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    place = tmp_path / "whole"
    code, out, _ = run(["tune", "-m", checkpoint, "--out", adapter, "--export", place], monkeypatch, capsys)
    assert code == 0
    assert str(place) in out.replace("\n", "")
    assert (place / "model.safetensors").is_file()


def test_the_place_of_an_export_is_checked_before_training(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(tuning_module, "tune", lambda *_, **__: pytest.fail("it trained"))
    (tmp_path / "mine").write_text("mine")
    for place in (tmp_path, tmp_path / "mine"):
        options = ["--out", tmp_path / "out", "--export", place]
        code, _, err = run(["tune", "judged.jsonl", *options], monkeypatch, capsys)
        assert code == 2
        assert "give another one" in err or "is not an empty folder" in err


def test_rank_scores_with_the_adapter(
    checkpoint: Path,
    adapter: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    (tmp_path / "passages.txt").write_text("list.sort() sorts in place.\nA tuple cannot be changed.\n")
    shared = ["rank", "q", tmp_path / "passages.txt", "-m", checkpoint, "--cache", tmp_path / "cache", "--json"]
    margins = []
    for more in ([], ["--lora", adapter]):
        code, out, _ = run([*shared, *more], monkeypatch, capsys)
        assert code == 0
        margins.append({hit["index"]: hit["margin"] for hit in json.loads(out)})
    assert max(abs(margins[0][index] - margins[1][index]) for index in margins[0]) > 1e-3


def test_eval_measures_with_and_without_the_adapter(
    checkpoint: Path,
    adapter: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    options = ["--ratio", "4", "--depth", "3", "--limit-queries", "2", "--json", "--out", tmp_path / "report"]
    code, out, _ = run(["eval", "-m", checkpoint, "--lora", adapter, *options], monkeypatch, capsys)
    assert code == 0
    systems = json.loads(out)["systems"]
    assert [one["lora"] for one in systems] == [None, str(adapter)]
    encoding = json.loads(out)["encoding"]
    assert encoding[0]["new"] > 0
    assert encoding[1]["new"] == 0, "the adapter's states are the model's"
    assert encoding[0]["digest"] != encoding[1]["digest"]


def test_doctor_verifies_the_model_with_its_adapter(
    checkpoint: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("kalm_rag.diagnosis.verify.PRECISIONS", ("float32",))
    code, out, _ = run(["doctor", "-m", checkpoint, "--lora", adapter, "--json"], monkeypatch, capsys)
    found = json.loads(out)
    assert code == 0, found["findings"]
    assert found["model"]["adapter"].endswith("adapter")
    assert found["model"]["decoder_digest"]
    verified = found["verification"]
    assert {path["verdict"] for path in verified["paths"]} >= {"base", "agrees"}
    assert not {path["verdict"] for path in verified["paths"]} & {"differs", "failed"}
    assert "it takes no adapter" in verified["reference_why"]
