"""The benchmark scripts run, end with JSON, and what they compute on the side is right."""

from __future__ import annotations

import importlib.util
import json
import logging
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu
import joint
import pytest
import replay
import replay_report
import report

from kalm_rag.demo_data import load_demo

FOLDER = Path(__file__).parent.parent / "benchmarks"
SLOW = frozenset(
    {
        *("distributed.py", "remote.py", "serve.py", "threads.py", "startup.py", "gpu.py"),
        *("warm.py", "peers.py", "latency.py", "precision.py", "memory.py", "compact.py", "cache.py"),
    }
)
"""They take up to half a minute each, and what they measure has tests of its own."""


def skip_if_slow(script: str, request: pytest.FixtureRequest) -> None:
    if script in SLOW and not request.config.getoption("--scripts"):
        pytest.skip("runs under `make test-scripts`")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """Runs a script in this process: to import torch again and again would take most of the time."""

    def call(script: str, *arguments: str) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", [str(FOLDER / script), "--small", *arguments])
        level = logging.getLogger("kalm_rag").level
        runpy.run_path(sys.argv[0], run_name="__main__")
        found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert found["environment"]["torch"]
        assert logging.getLogger("kalm_rag").level == level, "later tests read the log"
        return found

    return call


@pytest.mark.parametrize(
    "script",
    [
        *("warm.py", "memory.py", "compact.py", "encoder.py", "cache.py", "peers.py", "precision.py", "adapters.py"),
        *(
            "eviction.py",
            "repeats.py",
            "many_queries.py",
            "refine.py",
            "windows.py",
            "highlight.py",
            "bm25.py",
            "threads.py",
            "traffic.py",
            "latency.py",
            "sizing.py",
            "distributed.py",
            "remote.py",
            "serve.py",
        ),
    ],
)
def test_script(
    script: str, tmp_path: Path, request: pytest.FixtureRequest, run: Callable[..., dict[str, Any]]
) -> None:
    skip_if_slow(script, request)
    if script in ("cache.py", "adapters.py"):
        assert run(script).keys() & {"samples", "samples_ms"}
        return
    if script == "distributed.py":
        pytest.importorskip("ray", reason="Ray is not installed")
    written = tmp_path / "out.json"
    assert run(script, "--output", str(written)) == json.loads(written.read_text())
    if script == "warm.py":
        compared = [item for item in json.loads(written.read_text())["results"] if item["dtype"] == "float32"]
        assert all(item["largest_difference"] <= 1e-5 for item in compared)
    if script == "eviction.py":
        found = json.loads(written.read_text())["results"]
        assert {"LRU", "SLRU", "S3-FIFO", "SIEVE"} <= {item["policy"] for item in found}
        for policy in ("SLRU", "S3-FIFO", "SIEVE"):
            ratios = [item["no_scan"] for item in found if item["policy"] == policy]
            assert ratios == sorted(ratios), "more memory, more hits"
    if script == "highlight.py":
        found = json.loads(written.read_text())["results"]
        assert [(item["choice"], item["queries"]) for item in found] == [("BM25", 4), ("model", 4), ("both", 4)]
    if script == "windows.py":
        found = json.loads(written.read_text())["results"]
        assert [item["system"] for item in found] == ["BM25", "truncate 48", "windows 48"]
        assert found[1]["encoded"] == found[1]["documents"] < found[2]["encoded"]
    if script == "latency.py":
        found = json.loads(written.read_text())
        assert [(item["start"], item["budget_ms"]) for item in found["results"]] == [
            (start, budget) for start in ("cold", "half") for budget in (None, 100.0)
        ]
        assert all(item["scored"] == 1.0 for item in found["results"] if item["budget_ms"] is None)
        assert len(found["small_calls"]) == 3
    if script == "remote.py":
        found = json.loads(written.read_text())
        assert all(item["wrong"] == item["raised"] == 0 for item in found["faults"])
        assert all(item["from_tier"] + item["misses"] == item["passages"] for item in found["faults"])
        assert {"own encoding", "local disk"} <= found["first_query_ms"].keys()
    if script == "many_queries.py":
        found = json.loads(written.read_text())["results"]
        assert len(found) == 5
        assert all(item["difference"] <= 1e-5 for item in found)
    if script == "distributed.py":
        found = json.loads(written.read_text())["results"]
        assert [item["workers"] for item in found] == [0, 1]
        assert all(item["per_second"] > 0 for item in found)
    if script == "refine.py":
        assert [item["changed"] for item in json.loads(written.read_text())["quality"]] == [0]


def test_routes_of_ray_serve(request: pytest.FixtureRequest, run: Callable[..., dict[str, Any]]) -> None:
    if not request.config.getoption("--ray-serve"):
        pytest.skip("runs under `make test-ray-serve`")
    found = run("ray_serve.py", "--no-cost", "--forms", "states")["routes"]
    assert [one["route"] for one in found] == ["any", "query", "passage"]
    for one in found:
        sources = sum(one[name] for name in ("remembered", "prefilled", "stored", "states", "encoded"))
        assert (sources, one["encoded"]) == (pytest.approx(1), 0)
    assert found[0]["remembered"] < found[1]["remembered"] == pytest.approx(found[2]["remembered"])


def test_tuning(run: Callable[..., dict[str, Any]]) -> None:
    pytest.importorskip("peft", reason="the extra tune is not installed")
    found = run("tuning.py", "--full")["runs"]
    assert [one["trained"] for one in found] == ["adapter", "full"]
    for one in found:
        assert one["queries"] == [10, 2, 4]
        helped = one["trained"] == "full" or min(loss for _, loss in one["validation"][1:]) < one["validation"][0][1]
        assert [compared["ratio"] for compared in one["comparisons"]] == ([4, 32] if helped else [])
    # The same lists, scored before the first step.
    assert found[0]["validation"][0] == pytest.approx(found[1]["validation"][0], abs=1e-5)
    before = [[compared["before"] for compared in one["comparisons"]] for one in found]
    assert before[0] in ([], before[1])


def test_ranking_of_collections_further_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = load_demo()
    queries = list(corpus.qrels)[:3]
    for language in ("de", "en"):
        folder = tmp_path / "sets" / language
        folder.mkdir(parents=True)
        for name, texts in (("corpus", corpus.passages), ("queries", corpus.queries)):
            lines = [json.dumps({"_id": own, "text": text}) for own, text in texts.items()]
            (folder / f"{name}.jsonl").write_text("\n".join(lines), "utf-8")
        rows = [f"{query}\t{own}\t{value}" for query in queries for own, value in corpus.qrels[query].items()]
        (folder / "qrels.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *rows]))
    chosen = ["--collections", "sets/de", "sets/en", "--ratios", "4", "--depth", "5"]
    arguments = ["ranking.py", "--data", str(tmp_path), *chosen, "--no-bi-encoder", "--no-save"]
    monkeypatch.setattr(sys, "argv", arguments)
    runpy.run_path(str(FOLDER / "ranking.py"), run_name="__main__")
    table = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert table[0] == ["nDCG@10", "sets/de", "sets/en", "mean"]
    assert [row[0] for row in table[1:]] == ["BM25", "mini", "best"]
    assert all(row[-1] == row[-2] == row[-3] for row in table[1:]), "it is the same collection twice"


def test_thresholds(run: Callable[..., dict[str, Any]]) -> None:
    pytest.importorskip("sklearn", reason="the extra eval is not installed")
    found = run("thresholds.py")["collections"]["demo"]["aims"]
    assert found.keys() == {"recall=0.95", "precision=0.5", "f1"}
    profile = found["recall=0.95"]["profile"]
    assert profile["chosen"]["recall"][0] >= 0.95
    assert profile["chosen"]["queries"] + profile["checked"]["queries"] == 12


def test_startup(request: pytest.FixtureRequest, run: Callable[..., dict[str, Any]]) -> None:
    skip_if_slow("startup.py", request)
    assert run("startup.py", "--repeats", "1")["file_bytes"] > 0


def test_paired(run: Callable[..., dict[str, Any]]) -> None:
    root = str(FOLDER.parent)
    assert run("paired.py", root, root)["results"].keys() == {"load", "cold", "warm"}


def test_replay_and_its_resumption(tmp_path: Path, run: Callable[..., dict[str, Any]]) -> None:
    given = ("--work", str(tmp_path / "work"), "--peers", "0")
    first = run("replay.py", *given, "--output", str(tmp_path / "out.json"))
    assert first == json.loads((tmp_path / "out.json").read_text())
    assert first["new_tokens"] > 0
    assert len(first["cells"]) == 5
    for cell in first["cells"]:
        levels = cell["levels"]
        assert sum(levels.values()) == first["stream"]["candidates"]
        assert levels["encoded"] == levels["store" if cell["form"] == "states" else "states"] == 0
        repeated = first["stream"]["repeat_share"] * first["stream"]["candidates"] if cell["score_memory"] else 0
        assert levels["scores"] == pytest.approx(repeated)
        assert levels["memory"] + levels["scores"] > 0
        assert 0 < cell["memory_bytes"] <= cell["memory_limit"]
        if cell["form"] in ("states", "native"):
            assert cell["change"] <= 1e-5
    # Killed while it wrote the last line but one: what was finished before is not measured again, the rest is.
    journal = tmp_path / "work" / "journal.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[:-2]) + lines[-2][:40])
    second = run("replay.py", *given)
    assert second["encoded"] == first["encoded"]
    assert [cell["samples"] for cell in second["cells"][:2]] == [cell["samples"] for cell in first["cells"][:2]]
    assert len(journal.read_text().splitlines()) == len(lines)
    with pytest.raises(SystemExit, match="other options"):
        run("replay.py", *given, "--seed", "1")


def test_stream() -> None:
    options: dict[str, Any] = {"depth": 4, "zipf": 1.0, "seed": 3}
    stream = replay.make_stream(None, 50, **options)
    assert stream == replay.make_stream(None, 50, **options)
    assert stream != replay.make_stream(None, 50, **{**options, "seed": 4})
    assert len(stream.queries) == 50 > stream.distinct
    everything = replay.make_stream(None, None, **options)
    assert everything.distinct == 44
    assert len(everything.queries) == 88
    small = replay.Stream(["a", "b", "a"], [["x", "y"], ["y"], ["x", "y"]], 9)
    assert small.passages == ["x", "y"]
    assert small.repeat_share == pytest.approx(2 / 5)
    assert small.passage_repeat_share == pytest.approx(3 / 5)


def test_budgets() -> None:
    assert [replay.budget(text, 5000) for text in ("0", "10%", "2MB", "0.5gb")] == [0, 500, 2_000_000, 500_000_000]
    for text in ("lots", "-1", "nan", "inf", "%"):
        with pytest.raises(SystemExit, match="--memory takes bytes or a share"):
            replay.budget(text, 5000)


def test_choice_of_joint_models() -> None:
    assert replay.chosen(None) == list(joint.PEERS)
    assert [peer.name for peer in replay.chosen(["MiniLM", "Tiny"])] == [
        "TinyBERT-L2 4M",
        "MiniLM-L6 22M",
        "MiniLM-L12 33M",
    ]
    with pytest.raises(SystemExit, match="no model is named bert; known are TinyBERT"):
        replay.chosen(["bert"])


def test_percentiles() -> None:
    found = report.percentiles([float(number) for number in range(100, 0, -1)])
    assert found == {"p50": 50.5, "p90": 90, "p95": 95, "p99": 99, "max": 100}
    assert set(report.percentiles([3.0]).values()) == {3.0}


def test_break_even() -> None:
    stream = replay.Stream(["a"], [["x", "y"]], 100)
    encoded = [
        {"dtype": "float32", "form": "states", "seconds_each": 2.0},
        {"dtype": "float32", "form": "compact", "seconds_each": 1.0},
    ]
    cell = {"dtype": "float32", "form": "compact", "memory": "0", "samples": [1.0], "score_memory": 0}
    peers = [{"peer": "slow", "p50": 4.0}, {"peer": "fast", "p50": 0.5}, {"peer": "none", "p50": None}]
    slow, fast, none = replay_report.break_even(stream, encoded, [cell, {**cell, "score_memory": 9}], peers)
    # 3 s for a passage once, and 1.5 s saved each time that it is one of two candidates.
    assert (slow["candidacies"], slow["queries"]) == (2.0, 100)
    assert fast["candidacies"] is fast["queries"] is none["candidacies"] is None


def test_pairs_of_joint_models() -> None:
    bert, qwen = joint.PEERS[0], joint.PEERS[-1]
    assert joint.read_lengths(bert, 10, [20, 900]) == [33, 512]
    assert joint.read_lengths(qwen, 10, [900])[0] > 910
    batches = joint.Joint(bert, Path(), small=True).batches([3, 9, 5], 2)
    assert [mask.sum(axis=1).tolist() for _, mask in batches] == [[9, 5], [3]]
    assert [ids.shape for ids, _ in batches] == [(2, 9), (1, 3)]


@pytest.mark.parametrize("family", ["Bert", "ModernBert"])
def test_runtimes_agree(family: str, tmp_path: Path) -> None:
    peer = next(peer for peer in joint.PEERS if peer.family == family)
    found = joint.measure_peer(peer, [(5, [20, 7, 30, 11])], tmp_path, small=True)
    assert found["fastest"] in found["runtimes"]
    needs = {"ONNX Runtime": ("onnx", "onnxruntime"), "OpenVINO": ("onnx", "openvino"), "torch": ()}
    for name, result in found["runtimes"].items():
        packages = next(needed for start, needed in needs.items() if name.startswith(start))
        if all(importlib.util.find_spec(package) for package in packages):
            assert result["difference"] <= (1e-4 if name.endswith(("float32", "f32")) else 0.3)
        else:
            assert "is not installed" in result["reason"]
            assert any(name in line for line in joint.missing([found]))


def test_gpu_on_a_cpu(request: pytest.FixtureRequest, run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    skip_if_slow("gpu.py", request)
    found = run("gpu.py", "--device", "cpu", "--output", str(tmp_path / "out.json"))
    assert found == json.loads((tmp_path / "out.json").read_text())
    assert list(found["parts"]) == list(gpu.SHARES)
    assert all("result" in part and not part["skipped"] for part in found["parts"].values())
    assert found["parts"]["correctness"]["result"]["ok"]


def test_gpu_without_a_gpu(run: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device"):
        run("gpu.py")


_WORKER = """
import json, sys, time
print("not a result", flush=True)
for part in sys.argv[1:]:
    if part == "hangs":
        time.sleep(60)
    if part == "dies":
        sys.exit(7)
    print("part: " + json.dumps({"part": part, "result": {}, "skipped": []}), flush=True)
"""


def test_parts_that_hang_or_die_cost_no_other_part() -> None:
    shares = {"first": 20.0, "hangs": 0.5, "second": 20.0, "dies": 20.0, "last": 20.0}
    found = gpu.supervise(lambda parts: [sys.executable, "-c", _WORKER, *parts], shares, total=60, grace=0)
    assert {name for name, part in found.items() if "result" in part} == {"first", "second", "last"}
    assert "took more than" in found["hangs"]["skipped_because"]
    assert found["dies"]["skipped_because"] == "its process ended with 7"


def test_what_no_time_is_left_for_is_named() -> None:
    shares = {"hangs": 20.0, "next": 20.0}
    found = gpu.supervise(lambda parts: [sys.executable, "-c", _WORKER, *parts], shares, total=1, grace=0)
    assert "took more than" in found["hangs"]["skipped_because"]
    assert found["next"]["skipped_because"] == "no time was left of 1 s"


def test_cases_without_time_are_noted(tmp_path: Path) -> None:
    context = gpu.Context(tmp_path, "cpu", True, {"cold": 1000.0, "warm": 0.0})
    context.begin("cold")
    assert list(context.cases(["a", "b"])) == ["a", "b"]
    context.begin("warm")
    assert list(context.cases(["a", "b"])) == []
    assert context.skipped == ["a", "b"]
