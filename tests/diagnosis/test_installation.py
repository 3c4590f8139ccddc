"""What is told about packages, processor, memory, GPUs and the hub, and what stays private."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from kalm_rag.diagnosis import hub, installation
from kalm_rag.diagnosis.findings import Finding
from kalm_rag.diagnosis.precision import Precisions, Timing, measure_precisions
from kalm_rag.diagnosis.privacy import scrubber
from kalm_rag.utils.budget import MemoryBudget
from kalm_rag.utils.machine import Machine

MACHINE = Machine("Linux 6", "x86_64", "CPU", ("avx2",), "AVX2", 4, 4, 16_000_000_000, None, (), {})
PRECISIONS = Precisions("cpu", (Timing("float32", 2.0), Timing("bfloat16", 1.0), Timing("int8", None, "no VNNI")))
BUDGET = MemoryBudget(4_000_000_000, "auto: a quarter of 16.0 GB of free memory")


@pytest.fixture(autouse=True)
def plain_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """No driver, no build for GPUs, fast bfloat16: the tests do not depend on where they run."""
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None, raising=False)
    monkeypatch.setattr(installation.shutil, "which", lambda name: None)
    monkeypatch.setattr(installation, "has_fast_bfloat16", lambda: True)


def only(machine: Machine, precisions: Precisions = PRECISIONS, budget: MemoryBudget = BUDGET) -> Finding:
    (finding,) = installation.check_machine(machine, precisions, budget)
    return finding


def test_a_good_machine_has_no_finding() -> None:
    assert installation.check_machine(MACHINE, PRECISIONS, BUDGET) == []


def test_more_threads_than_processors() -> None:
    finding = only(replace(MACHINE, threads=16, cpus=2))
    assert finding.level == "warning"
    assert "16 threads" in finding.text
    assert "OMP_NUM_THREADS=2" in finding.text


def test_capped_instructions() -> None:
    finding = only(replace(MACHINE, environment={"ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "4"}))
    assert finding.text.startswith("ONEDNN_MAX_CPU_ISA=AVX2 may keep")
    assert "unset it" in finding.text


def test_a_container_below_the_memory_of_prefilled_passages() -> None:
    finding = only(MACHINE, budget=MemoryBudget(50_000_000, "auto: a quarter of 200.0 MB of free memory"))
    assert finding.level == "warning"
    assert finding.text.startswith("Prefilled passages may take 50.0 MB of memory here (auto: a quarter of 200.0 MB")
    assert "raise the container's limit" in finding.text


def test_a_build_for_gpus_that_sees_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    finding = only(MACHINE)
    assert finding.level == "warning"
    assert "it sees none" in finding.text


def test_a_driver_and_a_build_for_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    assert "built for CPUs only" in only(MACHINE).text


def test_slow_bfloat16_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation, "has_fast_bfloat16", lambda: False)
    assert only(MACHINE).level == "note"


def test_packages_are_those_that_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert installation.check_packages() == []
    monkeypatch.setattr(
        installation,
        "_requirements",
        lambda name, extra="": [Requirement("torch>=99"), Requirement("no-such-package>=1")],
    )
    findings = installation.check_packages()
    assert {finding.level for finding in findings} == {"error"}
    assert f"torch>=99, and version {torch.__version__} is installed: pip install 'torch>=99'" in findings[0].text
    assert "and nothing is installed" in findings[1].text


def test_extras_name_what_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    version_of = installation.version_of
    monkeypatch.setattr(installation, "version_of", lambda name: None if name == "scipy" else version_of(name))
    found = installation.installed_extras()
    assert found["eval"] == ["scipy"]
    assert found["mteb"] == []


def test_precisions_are_measured_and_the_shortest_time_is_the_fastest() -> None:
    found = measure_precisions(torch.device("cpu"))
    assert [timing.precision for timing in found.timings] == ["float32", "bfloat16", "int8", "float16"]
    assert all(timing.milliseconds is not None or timing.note for timing in found.timings)
    ran = {timing.precision: timing.milliseconds for timing in found.timings if timing.milliseconds is not None}
    assert ran[found.fastest] == min(ran.values())
    assert PRECISIONS.fastest == "bfloat16"
    assert json.loads(json.dumps(PRECISIONS.as_json()))["feed_forward_network"]["int8"]["note"] == "no VNNI"


def test_a_cpu_without_bfloat16_says_what_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    from kalm_rag.diagnosis import precision

    monkeypatch.setattr(precision, "has_fast_bfloat16", lambda: False)
    monkeypatch.setattr("kalm_rag.model.cpu_kernels.has_fast_bfloat16", lambda: False)
    timings = {timing.precision: timing for timing in measure_precisions(torch.device("cpu")).timings}
    assert timings["bfloat16"].note.startswith("products in float32")


@pytest.mark.parametrize(("token", "level"), [("hf_caf\u00e9abcdefgh", "warning"), ("  ", "note")])
def test_a_bad_token_is_told_and_not_shown(monkeypatch: pytest.MonkeyPatch, token: str, level: str) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    seen, findings = hub.look_at_hub()
    assert level in [finding.level for finding in findings]
    assert "HF_TOKEN" in str(findings)
    assert token not in str(findings) + str(seen)


def test_offline_without_a_download_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "_is_here", lambda name: False)
    seen, (finding,) = hub.look_at_hub()
    assert (seen.offline, seen.models, finding.level) == (True, ("mini",), "note")


def test_downloads_that_cannot_be_kept_are_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    (tmp_path / "file").write_text("x")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    monkeypatch.setattr(constants, "ENDPOINT", "https://user:password@mirror.example:8080/x")
    seen, (finding,) = hub.look_at_hub()
    assert finding.level == "warning"
    assert "HF_HOME" in finding.text
    assert seen.endpoint == "mirror.example"


def test_reports_hold_no_token_no_password_and_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/alice")
    monkeypatch.setenv("HF_TOKEN", "my-own-token")
    found = scrubber()(
        {
            "/home/alice/x": ["cannot open /home/alice", "/home/alice2 and /data/home", 3, None],
            "error": "401 for hf_abcdefghij and my-own-token at https://me:pw@proxy/x",
        }
    )
    assert found == {
        "~/x": ["cannot open ~", "/home/alice2 and /data/home", 3, None],
        "error": "401 for *** and *** at https://***@proxy/x",
    }
