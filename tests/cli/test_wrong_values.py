"""What a command says about a wrong value: the option, the rule and the value, in the option's own unit."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from kalm_rag import cli

WHOLE = "it must be a whole number, got 'some'"
NUMBER = "it must be a number, got 'some'"
LIMIT = "--limit-gb must be a number of GB above 0 and at most 1,000,000,000, got "
DTYPES = "--dtype must be one of "
ALIASES = "is neither an alias (mini, nano, small, large) nor a folder here nor a hub id of the form owner/name"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a collection (`beir`), a text (`file`) and a cache (`cache`)."""
    from cachekit import frames

    from kalm_rag.cache import DiskStore

    (tmp_path / "beir").mkdir()
    for name in ("corpus", "queries"):
        (tmp_path / "beir" / f"{name}.jsonl").write_text(json.dumps({"_id": name, "text": "a cat"}))
    (tmp_path / "beir" / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\nqueries\tcorpus\t1\n")
    (tmp_path / "file").write_text("a passage\n")
    DiskStore(tmp_path / "cache").put_many(frames(1))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def said(arguments: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What a command that must fail prints on standard error."""
    monkeypatch.setattr(sys, "argv", ["kalm-rag", *("" if part == "''" else part for part in arguments.split())])
    with pytest.raises(SystemExit) as done:
        cli.main()
    assert done.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("rank q file -m mini --top-k 0", "--top-k must be at least 1, got 0"),
        ("rank q file -m mini --ratio 0", "--ratio must be at least 1, got 0"),
        ("rank q file -m mini --threshold 2", "--threshold must be a number between 0 and 1, got 2.0"),
        ("rank q file -m mini --threshold nan", "--threshold must be a number between 0 and 1, got nan"),
        ("rank q file -m mini --threshold some", "path of a threshold profile, got 'some', and there is no such file"),
        ("rank q file -m mini --threshold beir/qrels.tsv", "qrels.tsv' is not a valid threshold profile (Expecting"),
        ("rank q file -m mini --budget-ms 0", "--budget-ms must be above 0 milliseconds, got 0.0; leave it out"),
        ("rank q file -m none --budget-ms -1", "--budget-ms must be above 0 milliseconds, got -1.0"),
        ("rank q file -m none --budget-ms nan", "--budget-ms must be a finite number, got nan"),
        ("rank q file -m none --on-unknown drop", "--on-unknown must be one of ('wait', 'skip'), got 'drop'"),
        ("rank q file -m mini --calibrated", "--calibrated needs a threshold profile, whose fit it maps"),
        ("eval beir --out out --ratio 4 --calibrate --aim most", "--aim must be recall=SHARE, precision=SHARE or f1"),
        ("eval beir --out out --ratio 4 --aim f1", "--aim f1 says what --calibrate chooses a threshold for; give"),
        ("eval beir --out out --calibrate", "a threshold is chosen for one model, precision, instruction and"),
        ("eval beir --out out --ratio 4 --calibrate", "takes at least 2 queries with a relevant candidate, got 1 of 1"),
        ("rank q file -m mini --dtype int4", DTYPES),
        ("rank q file -m mini --device warp", "--device: unknown device 'warp'; available: cpu"),
        ("rank q file -m mini --format xml", "--format must be one of auto, jsonl, "),
        ("rank q file -m mini --revision v9", "--revision v9 was given for 'mini', which comes with this package"),
        ("rank q file -m mini --cache ''", "--cache must be a path, got ''"),
        ("rank q file -m none", f"--model none {ALIASES}"),
        ("rank q file -m ''", "--model must be an alias (mini, nano, small, large), a folder or a hub id, got ''"),
        ("rank q none -m mini", "no file or folder 'none'; give a file, a folder, or - for standard input"),
        ("rank q beir/corpus.jsonl -m mini --text-field body", "no text under body; its fields are ['_id', 'text']"),
        ("rank q beir/corpus.jsonl -m mini --id-field body", "no id under body; its fields are ['_id', 'text']"),
        ("encode file -m mini --cache new --limit-gb -1", f"{LIMIT}-1"),
        ("encode file -m mini --cache new --limit-gb 0", f"{LIMIT}0"),
        ("encode file -m mini --cache new --limit-gb nan", f"{LIMIT}nan"),
        ("encode file -m mini --cache new --limit-gb 1e300", f"{LIMIT}1e+300"),
        ("encode file -m mini --cache new --limit-gb 1e12", f"{LIMIT}1e+12"),
        ("encode file -m mini --cache new --shard 3", "--shard must be k/n with k from 1 to n, such as 3/16, got '3'"),
        (
            "encode file -m mini --cache new --shard 3/2",
            "--shard must be k/n with k from 1 to n, such as 3/16, got 3/2",
        ),
        ("encode file -m mini --cache new --engine spark", "--engine must be ray, got 'spark'"),
        ("encode file -m mini --cache new --workers 2", "--workers and --gpus-per-worker apply only to an engine"),
        ("encode file -m mini --cache new --address x:1", "--workers and --gpus-per-worker apply only to an engine"),
        (
            "encode file -m mini --cache new --engine ray --dry-run",
            "--dry-run estimates for one process on this machine",
        ),
        (
            "encode file -m mini --cache new --engine ray --address 127.0.0.1:9",
            "no Ray cluster answers at '127.0.0.1:9'",
        ),
        ("encode file -m mini --cache new --base-ratio 0", "--base-ratio must be at least 1, got 0"),
        ("encode file -m mini --cache new --storage int4", "--storage must be one of ('native', 'int8'), got 'int4'"),
        (
            "encode file -m mini --cache new --keep all",
            "--keep must be one of ('states', 'prefilled', 'compact'), got 'all'",
        ),
        ("encode file -m mini --cache new --max-length 0", "--max-length must be at least 1, got 0"),
        ("encode file -m mini --cache new --max-length 9999", "--max-length 9999 is more than the 8192 positions"),
        ("encode file -m mini --cache file", "file is a file; give a folder"),
        ("encode file -m none --cache new", f"--model none {ALIASES}"),
        ("encode none -m mini --cache new", "no file or folder 'none'"),
        ("eval beir --out out --queries none", "no file of queries 'none'; name one (--queries)"),
        ("eval beir --out out --qrels none", "no judgements: looked for none; name a file (--qrels)"),
        ("eval beir --out out --run none", "no file of candidates 'none'; name a TREC run (--run)"),
        ("eval beir --out out --run beir", "no file of candidates 'beir'; name a TREC run (--run)"),
        ("eval beir --out out --depth 0", "--depth must be at least 1, got 0"),
        ("eval beir --out out --limit-queries 0", "--limit-queries must be at least 1, got 0"),
        ("eval beir --out out --max-length 0", "--max-length must be at least 1, got 0"),
        ("eval beir --out out --model none", f"--model none {ALIASES}"),
        ("eval beir --out out --ratio x", "--ratio takes whole numbers separated by commas, for example 1,4,32; got"),
        ("eval beir --out out --ratio 0", "--ratio must be at least 1, got 0"),
        ("eval beir --out out --ratio 4 --dtype int4", DTYPES),
        ("eval beir --out out --ratio 4 --device warp", "--device: unknown device 'warp'; available: cpu"),
        ("eval beir --out out --metrics foo", "--metrics: unknown metric 'foo'"),
        ("eval beir --out out --metrics ''", "--metrics must name at least one metric, for example nDCG@10"),
        ("eval beir --out out --format xml", "--format must be one of auto, jsonl, "),
        ("eval beir --out file", "is a file; give a folder (--out)"),
        ("demo --model none", f"--model none {ALIASES}"),
        ("info --model none", f"--model none {ALIASES}"),
        ("info --revision v1", "--revision v1 belongs to a model: name it with --model"),
        ("cache info --cache none", "no cache exists in "),
        ("cache clear --cache cache --model none", f"--model none {ALIASES}"),
        ("doctor --revision v1", "--revision v1 belongs to a model: name it with --model"),
        ("doctor --card a/b", "--card a/b belongs to a model: name the folder of its copy with --model"),
        ("cache forget file --cache cache --revision v1", "--revision v1 belongs to a model: name it with --model"),
        ("cache clear --cache cache --yes --revision v1", "--revision v1 belongs to a model: name it with --model"),
        ("cache export file --cache cache", "file is a file; export into an empty folder"),
        ("cache export beir --cache cache", "beir is not empty"),
        ("cache export out --cache cache --revision v1", "--revision v1 belongs to a model: name it with --model"),
        ("cache import none --any-model --cache new", "no shard or folder none"),
        ("cache import none --cache new", "give --model MODEL to check that the shards belong to it, or --any-model"),
        ("cache import none --any-model --cache new --limit-gb -2", f"{LIMIT}-2"),
    ],
)
def test_it_is_one_line_that_names_the_option_the_rule_and_the_value(
    arguments: str,
    message: str,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = said(arguments, monkeypatch, capsys).splitlines()
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
    assert message in lines[-1]


@pytest.mark.parametrize(
    ("arguments", "option", "message"),
    [
        ("rank q file --top-k some", "--top-k", WHOLE),
        ("rank q file --top-k 1.5", "--top-k", "it must be a whole number, got '1.5'"),
        ("rank q file --ratio some", "--ratio", WHOLE),
        ("encode file --base-ratio some", "--base-ratio", WHOLE),
        ("encode file --limit-gb some", "--limit-gb", NUMBER),
        ("encode file --max-length some", "--max-length", WHOLE),
        ("compare a b --depth some", "--depth", WHOLE),
        ("eval beir --limit-queries some", "--limit-queries", WHOLE),
        ("eval beir --max-length some", "--max-length", WHOLE),
        ("cache import shards --limit-gb some", "--limit-gb", NUMBER),
        ("rank q --top-k \x1b[2J", "--top-k", "got '\\\\x1b[2J'"),
    ],
)
def test_what_is_no_number_is_told_with_the_usage(
    arguments: str,
    option: str,
    message: str,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shown = said(arguments, monkeypatch, capsys)
    assert shown.startswith("Usage: kalm-rag ")
    last = shown.splitlines()[-1]
    assert f"Invalid value for '{option}'" in last
    assert message in last


def test_a_revision_without_its_model_deletes_nothing(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from kalm_rag.cache import DiskStore

    said("cache clear --cache cache --yes --revision v1", monkeypatch, capsys)
    assert DiskStore(place / "cache").stats().entries == 1


def test_a_place_without_permission_is_told_with_a_way_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", "/data/cache")

    monkeypatch.setattr("kalm_rag.cli.cache.open_folder", refused)
    monkeypatch.setattr("sys.argv", ["kalm-rag", "cache", "info"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        "error: no permission to use /data/cache: run as a user who may use it, or name another place\n"
    )
