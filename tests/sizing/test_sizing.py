"""What `kalm-rag size` says: bytes against stores that exist, the rest against sums done by hand."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from rawframes import key_of, value_of

from kalm_rag import KaLMReranker, PassageCache
from kalm_rag.cache import DiskStore
from kalm_rag.cache.remote.object_store import ObjectStore
from kalm_rag.cli import main
from kalm_rag.sizing import Costs, Workload, entry_bytes, folder_bytes, measure_costs, plan, redis_bytes
from kalm_rag.sizing.plan import PREFIXES
from kalm_rag.sizing.shapes import RELEASES, Shape, shape_of


def on_disk(folder: Path) -> int:
    """Bytes of all blocks below a folder, the write-ahead log apart."""
    files = [Path(place) / name for place, _, names in os.walk(folder) for name in names]
    return sum(file.stat().st_blocks * 512 for file in files if not file.name.endswith(("-wal", "-shm")))


@pytest.mark.parametrize(("size", "count"), [(1_000, 1_000), (5_000, 400), (98_000, 60), (300_000, 30)])
def test_a_folder_takes_what_is_predicted(tmp_path: Path, size: int, count: int) -> None:
    store = DiskStore(tmp_path, limit=10**10)
    items = {key_of(number): value_of(key_of(number), size) for number in range(count)}
    store.put_many(items)
    store.close()
    value = len(next(iter(items.values())))
    assert folder_bytes((value,), count) == pytest.approx(on_disk(tmp_path), rel=0.05)


@pytest.mark.parametrize("form", ["states", "compact", "prefilled"])
@pytest.mark.parametrize("secret", [None, "s" * 32])
def test_entries_are_as_large_as_predicted(tmp_path: Path, form: Any, secret: str | None) -> None:
    cache = PassageCache(tmp_path, keep=form, secret=secret)
    text = "a passage about cats and dogs that lie in the sun all day"
    with KaLMReranker("mini", cache=cache, device="cpu") as reranker:
        reranker.encode([text])
        cache.flush()
        tokens = reranker.estimate([text]).tokens[0]
        keys = reranker.scorer.states.keys([text], 4)
        if form != "states":
            request = reranker.scorer.passage_kv.request(reranker.settings.instruction, 4)
            keys += reranker.scorer.passage_kv.keys([text], request)
        assert cache.store is not None
        kept = [len(cache.store.get_many([key])[key]) for key in keys]
    found = entry_bytes(shape_of("mini"), tokens, form=form, dtype="float32", secret=secret is not None)
    assert list(found.values) == kept
    cache.close()


def test_redis_counts_its_keys_and_rounds_up() -> None:
    assert redis_bytes((100,), 1) == 112 + 190
    assert redis_bytes((100_000, 40), 10) == 10 * (114_688 + 64 + 2 * 190)


def test_a_plan_adds_up() -> None:
    workload = Workload(1_000_000, 300, 100.0, 50, form="states", local_share=0.8, hours=10)
    found = plan(workload, RELEASES["nano"], Costs(30_000.0, 0.07, 0.002, 0.7))
    assert found.entry_bytes == found.object_bytes // 1_000_000
    assert found.reads_per_second == pytest.approx(100 * 50 * 0.2)
    assert found.read_bytes_per_second == pytest.approx(1000 * found.entry_bytes)
    assert found.object_share == pytest.approx(1000 / (5500 * 256))
    assert found.replicas == math.ceil(100 * 0.07 / 0.7)
    assert found.joint_replicas == 100
    assert found.encode_machine_hours == pytest.approx(1_000_000 * 300 / 30_000 / 3600)
    assert found.encode_machines == 1
    assert found.break_even_queries == pytest.approx(10_000 / 0.63)
    assert found.read_seconds == 0.002


def test_what_a_query_reads_depends_on_the_form() -> None:
    forms: Any = ("states", "compact", "prefilled")
    plans = {form: plan(Workload(10, form=form), RELEASES["nano"], Costs()) for form in forms}
    assert plans["compact"].reads_per_second == 2 * plans["states"].reads_per_second, "the rest and its states"
    assert plans["prefilled"].reads_per_second == plans["states"].reads_per_second, "they hold all that a query needs"
    assert plans["states"].read_bytes_per_second < plans["compact"].read_bytes_per_second
    assert plans["compact"].read_bytes_per_second < plans["prefilled"].read_bytes_per_second


def test_objects_are_spread_over_as_many_prefixes_as_sizing_says(tmp_path: Path) -> None:
    key = key_of(1)
    ObjectStore(f"file://{tmp_path}", "place").put_many({key: b"x"})
    assert (tmp_path / "place" / key[:2] / key).is_file()
    assert 16 ** len(key[:2]) == PREFIXES


def test_nothing_is_made_up() -> None:
    found = plan(Workload(10), RELEASES["large"], Costs())
    unknown = (found.replicas, found.encode_machine_hours, found.break_even_queries, found.read_seconds)
    assert unknown == (None, None, None, None)
    slow = plan(Workload(10), RELEASES["nano"], Costs(1000.0, 2.0, None, 1.0))
    assert slow.break_even_queries == math.inf


def test_shapes_of_checkpoints_are_read_from_them() -> None:
    assert shape_of("mini") == Shape(256, 3, 2, 128, 7)
    assert shape_of("nano").width == 640


def test_measuring_gives_every_cost(tmp_path: Path) -> None:
    workload = Workload(10, tokens=40, candidates=6, form="compact")
    costs = measure_costs("mini", workload, tmp_path, "float32")
    assert all(value for value in (costs.encode_tokens, costs.query_seconds, costs.read_seconds))
    assert "mini" in costs.source
    assert costs.joint_seconds == pytest.approx(6 * (40 + 16) / (costs.encode_tokens or 1))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"passages": 0}, "passages must be at least 1, got 0"),
        ({"passages": 1.5}, "passages must be an integer"),
        ({"tokens": -1}, "tokens must be at least 1"),
        ({"queries_per_second": 0}, "queries_per_second must be above 0"),
        ({"queries_per_second": math.nan}, "queries_per_second must be a finite number"),
        ({"local_share": 1.5}, "local_share must be a number between 0 and 1"),
        ({"form": "int4"}, "form must be one of"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"hours": -1}, "hours must be above 0"),
        ({"ratio": 0}, "ratio must be at least 1"),
    ],
)
def test_a_wrong_workload_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        Workload(**{"passages": 10, **wrong})


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("sys.argv", ["kalm-rag", "size", *arguments])
    code: Any = 0
    try:
        main()
    except SystemExit as ended:
        code = ended.code or 0
    output = capsys.readouterr()
    return int(code), output.out, output.err


def test_the_command_fits_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    given = ("--encode-tokens", "3000", "--query-ms", "400", "--joint-ms", "2000")
    code, text, _ = run(monkeypatch, capsys, "--passages", "50M", "--queries-per-second", "200", *given)
    assert code == 0
    assert max(map(len, text.splitlines())) <= 80
    for row in ("whole corpus on a local disk", "replicas", "115", "58", "1388.9 h"):
        assert row in text
    code, text, _ = run(monkeypatch, capsys, "--passages", "1_000")
    assert "give --encode-tokens, --query-ms" in " ".join(text.split())


def test_the_command_speaks_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, text, _ = run(monkeypatch, capsys, "--passages", "2.5k", "--form", "compact", "--json")
    facts = json.loads(text)
    assert (code, facts["passages"], facts["form"], facts["replicas"]) == (0, 2500, "compact", None)
    assert facts["object_bytes"] == 2500 * facts["entry_bytes"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--passages", "many"], "it must be a number such as 50000, 50k, 50M or 1.5B"),
        (["--passages", "10", "--form", "int4"], "must be one of"),
        (["--passages", "10", "--encode-tokens", "0"], "--encode-tokens must be above 0"),
        (["--passages", "10", "--local-share", "2"], "--local-share must be a number between 0 and 1"),
        (["--passages", "10", "--model", "/nowhere"], "/nowhere"),
    ],
)
def test_a_wrong_option_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    code, _, text = run(monkeypatch, capsys, *arguments)
    assert code == 2
    assert message in " ".join(text.replace("│", " ").split())
