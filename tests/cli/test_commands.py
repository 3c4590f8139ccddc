"""The command line, as a process."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kalm_rag import cli
from kalm_rag.cache import DiskStore, StoreError
from kalm_rag.latency.background import Background


def run(*arguments: str, stdin: str = "", columns: str = "80") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kalm_rag", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": columns},
    )


def test_rank_from_jsonl_as_json(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "passages.jsonl"
    file.write_text("\n".join(json.dumps({"_id": name, "text": f"about {name}"}) for name in "abc"))
    done = run("rank", "query", str(file), "--model", str(checkpoint), "--json", "--top-k", "2")
    assert done.returncode == 0, done.stderr
    hits = json.loads(done.stdout)
    assert len(hits) == 2
    assert hits[0]["margin"] >= hits[1]["margin"]
    assert hits[0]["id"] == "abc"[hits[0]["index"]]
    assert done.stderr == ""


def test_rank_from_standard_input_in_a_table(checkpoint: Path) -> None:
    done = run("rank", "query", "--model", str(checkpoint), stdin="first [red]passage[/red]\nsecond " + "long " * 80)
    assert done.returncode == 0, done.stderr
    assert "first [red]passage[/red]" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_rank_lists_what_was_not_reached_without_a_score(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "known.txt").write_text("about c\n")
    (tmp_path / "all.txt").write_text("".join(f"about {name}\n" for name in "abc"))

    def ranked(file: str, *options: str) -> str:
        given = [str(tmp_path / file), "--model", str(checkpoint), "--cache", str(tmp_path / "cache"), *options]
        monkeypatch.setattr(sys, "argv", ["kalm-rag", "rank", "query", *given])
        with pytest.raises(SystemExit) as done:
            cli.main()
        assert done.value.code == 0
        return capsys.readouterr().out

    [alone] = json.loads(ranked("known.txt", "--json"))
    assert alone["scored"] is True
    # What waits in the background is not encoded, so that the next command does not find it.
    monkeypatch.setattr(Background, "add", lambda *_: None)
    hits = json.loads(ranked("all.txt", "--on-unknown", "skip", "--json"))
    assert [(hit["index"], hit["scored"]) for hit in hits] == [(2, True), (0, False), (1, False)]
    assert hits[0]["score"] == pytest.approx(alone["score"], abs=1e-5)
    for hit in hits[1:]:
        assert hit.keys() == alone.keys()
        assert [hit[name] for name in ("score", "margin", "exact", "span", "passage_truncated")] == [None] * 5
    lines = ranked("all.txt", "--on-unknown", "skip").splitlines()
    assert re.fullmatch(r" +1 +0\.\d{4} +2 +about c *", lines[1])
    assert re.fullmatch(r" +2 +0 +about a *", lines[2])
    assert "2 of 3 passages were not reached and have no score." in lines[4]
    assert ranked("all.txt", "--budget-ms", "0.000001").count("0.") == 0
    monkeypatch.undo()
    ranked("all.txt", "--on-unknown", "skip")
    found = json.loads(ranked("all.txt", "--on-unknown", "skip", "--json"))
    assert all(hit["scored"] for hit in found), "the command before encoded what it left out"
    assert len(json.loads(ranked("all.txt", "--budget-ms", "1e9", "--json"))) == 3
    assert "loaded within a call" not in caplog.text, "the budget is about ranking"


def test_demo_says_which_model_runs_what_it_gains_and_fits_80_columns() -> None:
    done = run("demo")
    assert done.returncode == 0, done.stderr
    assert "Model: mini" in done.stdout
    assert "not a KaLM release" in done.stderr
    before, after = map(float, re.search(r"BM25 (0\.\d+), reranked (0\.\d+)", done.stdout).groups())  # type: ignore[union-attr]
    assert after > before > 0.5
    assert "rerank, all passages known" in done.stdout
    requested, encoded, served = map(int, re.findall(r"(\d+) (?:passages requested|encoded|served from)", done.stdout))
    assert requested == encoded + served
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_info(checkpoint: Path) -> None:
    facts = json.loads(run("info", "--model", str(checkpoint), "--json").stdout)
    assert {"python", "torch", "transformers", "device", "cache", "model_digest"} <= facts.keys()
    assert facts["model_digest"] in run("info", "--model", str(checkpoint)).stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rank", "q", "/no/such/file"], "no file or folder '/no/such/file'"),
        (["rank", "q", "--model", "/no/such/model"], "--model /no/such/model is neither an alias"),
        (["rank", "q", "--model", "MODEL", "--top-k", "0"], "error: --top-k must be at least 1, got 0"),
        (["rank", "q", "--model", "MODEL", "--ratio", "0"], "error: --ratio must be at least 1, got 0"),
        (["rank", "q", "--model", "MODEL", "--device", "warp"], "unknown device 'warp'"),
        (["cache", "info", "--cache", "/tmp"], "no cache exists in /tmp"),
        (
            ["encode", "-", "--model", "MODEL", "--limit-gb", "inf"],
            "--limit-gb must be a number of GB above 0 and at most 1,000,000,000, got inf",
        ),
        (["info", "--model", "nano"], "could not get 'KaLM-Embedding/KaLM-Reranker-V1-Nano-R2' from the hub"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(checkpoint: Path, arguments: list[str], message: str) -> None:
    arguments = [str(checkpoint) if argument == "MODEL" else argument for argument in arguments]
    done = run(*arguments, stdin="passage\n")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    traced = run("--debug", *arguments, stdin="passage\n")
    assert "Traceback" in traced.stderr


def test_help_and_version() -> None:
    from kalm_rag import __version__

    assert run("--version").stdout.strip() == f"kalm-rag {__version__}"
    assert {"rank", "demo", "info"} <= set(run("--help").stdout.split())
    assert run("rank").returncode == 2


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    lines = [{"_id": str(number), "title": f"T{number}", "text": f"passage {number} " * 20} for number in range(30)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path


def test_encode_estimates_encodes_and_resumes(checkpoint: Path, corpus: Path, tmp_path: Path) -> None:
    options = ["--model", str(checkpoint), "--cache", str(tmp_path / "cache"), "--json"]
    guess = json.loads(run("encode", str(corpus), *options, "--dry-run").stdout)
    assert (guess["passages"], guess["to_encode"]) == (30, 30)
    done = json.loads(run("encode", str(corpus), *options).stdout)
    assert (done["new"], done["known"], done["cache_entries"]) == (30, 0, 30)
    assert guess["bytes"] <= done["cache_bytes"] <= 2 * guess["bytes"] + 500_000
    nothing = json.loads(run("encode", str(corpus), *options, "--dry-run").stdout)
    assert (nothing["known"], nothing["to_encode"], nothing["bytes"]) == (30, 0, 0)
    again = json.loads(run("encode", "-", *options, stdin=(corpus / "corpus.jsonl").read_text()).stdout)
    assert (again["new"], again["known"]) == (0, 30)
    assert "30 served from the cache" in run("encode", str(corpus), *options[:-1]).stdout


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_encode_interrupted_keeps_what_it_did(checkpoint: Path, tmp_path: Path) -> None:
    lines = [{"text": f"a passage number {number} " * 60} for number in range(20_000)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(map(json.dumps, lines)))
    cache = tmp_path / "cache"
    command = ["encode", str(tmp_path / "corpus.jsonl"), "--model", str(checkpoint), "--cache", str(cache)]
    child = subprocess.Popen([sys.executable, "-m", "kalm_rag", *command], stderr=subprocess.PIPE, text=True)
    store = DiskStore(cache, read_only=True)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and (store_size(store) or 0) < 2:  # the first one is the test entry
        time.sleep(0.1)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=120)
    assert child.returncode == 130, err
    kept = int(re.search(r"interrupted: (\d+) passages encoded by this run are kept", err)[1])
    assert 0 < kept < 20_000
    assert "Traceback" not in err
    assert store_size(DiskStore(cache)) == kept


def store_size(store: DiskStore) -> int | None:
    try:
        return store.stats().entries
    except StoreError:
        store._reader.backoff.worked()
        return None


def test_cache_commands(checkpoint: Path, corpus: Path, tmp_path: Path) -> None:
    at = ["--cache", str(tmp_path / "cache")]
    run("encode", str(corpus), "--model", str(checkpoint), *at)
    info = json.loads(run("cache", "info", "--models", "--json", *at).stdout)
    assert info["entries"] == 30
    [(model, row)] = info["models"].items()
    assert row["entries"] == 30
    assert f"model {model}: 30 passages" in run("cache", "info", "--models", *at).stdout
    assert json.loads(run("cache", "check", "--json", *at).stdout)["corrupt"] == 0
    assert "30 passages" in run("cache", "export", str(tmp_path / "shards"), "--model", str(checkpoint), *at).stdout
    other = ["--cache", str(tmp_path / "other")]
    refused = run("cache", "import", str(tmp_path / "shards"), *other)
    assert refused.returncode == 2
    assert "give --model MODEL" in refused.stderr
    assert "30 passages" in run("cache", "import", str(tmp_path / "shards"), "--model", str(checkpoint), *other).stdout
    assert run("cache", "clear", *at, stdin="n\n").returncode == 1
    assert "30 passages deleted" in run("cache", "clear", "--yes", "--model", str(checkpoint), *at).stdout
    assert json.loads(run("cache", "info", "--json", *at).stdout)["entries"] == 0
    assert "no cache exists in" in run("cache", "info", "--cache", str(tmp_path / "none")).stderr


def test_cache_check_finds_and_fixes_damage(checkpoint: Path, corpus: Path, tmp_path: Path) -> None:
    at = ["--cache", str(tmp_path / "cache")]
    run("encode", str(corpus), "--model", str(checkpoint), *at)
    store = DiskStore(tmp_path / "cache")
    key = next(store.keys())
    store.put_many({key: b"damaged"})
    store.close()
    done = run("cache", "check", *at)
    assert done.returncode == 1
    assert "30 entries read: 1 damaged" in done.stdout
    assert run("cache", "check", "--fix", *at).returncode == 0
    assert "29 entries read: 0 damaged" in run("cache", "check", *at).stdout


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("top_k must be at least 1, got 0", "--top-k must be at least 1, got 0"),
        (
            "dtype='int8' runs only on the CPU: use dtype='bfloat16'",
            "--dtype int8 runs only on the CPU: use --dtype bfloat16",
        ),
        ("keep passages in PassageCache(..., storage='int8')", "keep passages in PassageCache(..., storage='int8')"),
        ("max_length=9000 is more than 8192", "--max-length 9000 is more than 8192"),
        ("unknown device 'warp'; available: cpu", "--device: unknown device 'warp'; available: cpu"),
        ("device 'mps' is not on this machine", "--device: device 'mps' is not on this machine"),
        ("unknown metric 'best'", "--metrics: unknown metric 'best'"),
        ("unknown fruit 'pear'", "unknown fruit 'pear'"),
        ("a passage must be text", "a passage must be text"),
        ("fruit='pear' is unknown", "fruit='pear' is unknown"),
    ],
)
def test_errors_name_options_as_the_command_line_does(message: str, expected: str) -> None:
    from kalm_rag.cli import _flags
    from kalm_rag.cli.options import with_flags

    assert with_flags(message, _flags()) == expected
