"""Facts about the machine: limits of containers, processor features, versions."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from kalm_rag.utils import machine


def groups(root: Path, lines: str, **files: str) -> Path:
    """Lay out `proc` and `sys` with the process's groups and limits; `__` in a name is a folder."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(lines)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name.replace("__", "/").replace("--", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_the_tightest_limit_of_the_groups_above_counts(tmp_path: Path) -> None:
    files = {"a__b__memory--max": "max\n", "a__memory--max": "256000000\n", "memory--max": "900000000\n"}
    assert machine.memory_limit(groups(tmp_path, "0::/a/b\n", **files)) == 256_000_000


def test_a_container_whose_path_is_the_hosts_finds_its_limit(tmp_path: Path) -> None:
    files = {"memory--max": "300\n"}
    assert machine.memory_limit(groups(tmp_path, "0::/../docker/0123\n", **files)) == 300


def test_limits_of_the_first_version_of_control_groups(tmp_path: Path) -> None:
    files = {
        "memory__x__memory--limit_in_bytes": "1000\n",
        "memory__memory--limit_in_bytes": "9223372036854771712\n",
        "cpu__x__cpu--cfs_quota_us": "-1\n",
        "cpu__x__cpu--cfs_period_us": "100000\n",
    }
    root = groups(tmp_path, "4:memory:/x\n2:cpu,cpuacct:/x\n", **files)
    assert machine.memory_limit(root) == 1000
    assert machine.usable_cpus(root) == machine.usable_cpus(tmp_path / "none")


@pytest.mark.parametrize("lines", ["", "nonsense\n", "0::/a\n", "4:memory:/x\n"])
def test_no_limit(tmp_path: Path, lines: str) -> None:
    files = {"a__memory--max": "max\n", "memory__x__memory--limit_in_bytes": "9223372036854771712\n"}
    assert machine.memory_limit(groups(tmp_path, lines, **files)) is None
    assert machine.memory_limit(tmp_path / "none") is None


MEMINFO = "MemTotal: 9000 kB\nMemFree: 100 kB\nMemAvailable: 4000 kB\n"


def host(root: Path) -> Path:
    """Lay out `proc` for a machine of which 4,096,000 bytes are available."""
    (root / "proc/meminfo").write_text(MEMINFO)
    return root


@pytest.mark.parametrize(
    ("files", "available"),
    [
        ({}, 4_096_000),
        ({"memory--max": "max\n", "memory--current": "5000000\n"}, 4_096_000),
        ({"memory--max": "3000000\n", "memory--current": "1000000\n"}, 2_000_000),
        ({"memory--max": "9000000\n", "memory--current": "1000000\n"}, 4_096_000),
        ({"memory--max": "3000000\n", "memory--current": "3500000\n"}, 0),
        ({"memory--max": "3000000\n"}, 3_000_000),
        ({"memory--max": "0\n", "memory--current": "0\n"}, 0),
    ],
)
def test_a_container_leaves_what_it_does_not_use(tmp_path: Path, files: dict[str, str], available: int) -> None:
    assert machine.available_memory(host(groups(tmp_path, "0::/\n", **files))) == available


@pytest.mark.parametrize(("stat", "available"), [("anon 7\ninactive_file 500000\n", 1_500_000), ("x\n", 1_000_000)])
def test_file_cache_that_is_not_in_use_is_available(tmp_path: Path, stat: str, available: int) -> None:
    files = {"memory--max": "3000000\n", "memory--current": "2000000\n", "memory--stat": stat}
    assert machine.available_memory(host(groups(tmp_path, "0::/\n", **files))) == available


def test_more_idle_file_cache_than_use_leaves_no_more_than_the_limit(tmp_path: Path) -> None:
    files = {"memory--max": "3000\n", "memory--current": "2000\n", "memory--stat": "inactive_file 9000\n"}
    assert machine.available_memory(host(groups(tmp_path, "0::/\n", **files))) == 3000


def test_the_group_that_leaves_least_counts(tmp_path: Path) -> None:
    files = {
        "a__memory--max": "2000000\n",
        "a__memory--current": "100000\n",
        "memory--max": "3000000\n",
        "memory--current": "2900000\n",
    }
    assert machine.available_memory(host(groups(tmp_path, "0::/a\n", **files))) == 100_000


def test_available_memory_in_the_first_version_of_control_groups(tmp_path: Path) -> None:
    files = {
        "memory__x__memory--limit_in_bytes": "3000000\n",
        "memory__x__memory--usage_in_bytes": "2000000\n",
        "memory__x__memory--stat": "inactive_file 1\ntotal_inactive_file 250000\n",
        "memory__memory--limit_in_bytes": "9223372036854771712\n",
    }
    assert machine.available_memory(host(groups(tmp_path, "4:memory:/x\n", **files))) == 1_250_000


@pytest.mark.parametrize(("quota", "cpus"), [("50000 100000", 1), ("150000 100000", 2), ("max 100000", 8), ("x", 8)])
def test_a_quota_bounds_the_processors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str, cpus: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert machine.usable_cpus(groups(tmp_path, "0::/\n", **{"cpu--max": quota})) == cpus


def test_processors_of_linux_on_x86_and_arm(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {
        "x86": "processor : 0\nmodel name : Some CPU @ 2GHz\nflags : sse avx2 avx512_bf16 fma\n",
        "arm": "processor : 0\nFeatures : fp asimd bf16 i8mm\n",
    }
    read = Path.read_text
    for kind, expected in (("x86", ("avx2", "fma", "avx512_bf16")), ("arm", ("asimd", "i8mm", "bf16"))):
        text = told[kind]
        monkeypatch.setattr(
            Path, "read_text", lambda self, *a, text=text: text if str(self) == "/proc/cpuinfo" else read(self, *a)
        )
        found = machine.this_machine()
        assert found.features == expected
        assert found.cpu == "Some CPU @ 2GHz" if kind == "x86" else found.cpu


def test_a_system_without_proc_asks_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(machine, "_from_proc", lambda: ("", set()))
    monkeypatch.setattr(machine.platform, "system", lambda: "Windows")
    monkeypatch.setattr(
        torch.cpu, "get_capabilities", lambda: {"fma3": True, "avx512_f": True, "avx2": False, "x": 3}, raising=False
    )
    assert machine.this_machine().features == ("fma", "avx512f")
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert machine.this_machine().features == ()


def test_variables_that_limit_instructions_or_threads_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("HF_TOKEN", "secret")
    found = machine.this_machine().environment
    assert found["ONEDNN_MAX_CPU_ISA"] == "AVX2"
    assert found["OMP_NUM_THREADS"] == "3"
    assert "secret" not in str(machine.this_machine().as_json())


def test_versions_name_only_what_is_installed() -> None:
    found = machine.versions(("torch", "no-such-package"))
    assert found.keys() == {"python", "torch"}
    assert machine.version_of("no-such-package") is None


def test_the_date_is_utc() -> None:
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", machine.utc_now())
