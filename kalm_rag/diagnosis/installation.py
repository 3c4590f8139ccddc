"""Checks packages, processor, threads, memory and GPUs."""

from __future__ import annotations

import multiprocessing
import shutil
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from kalm_rag.diagnosis.findings import Finding, Level
from kalm_rag.diagnosis.precision import Precisions
from kalm_rag.model.cpu_kernels import has_fast_bfloat16
from kalm_rag.utils.budget import MemoryBudget
from kalm_rag.utils.display import size_text
from kalm_rag.utils.machine import CAPS, THREAD_VARIABLES, Machine, version_of

OURS = ("kalm-rag", "langchain-kalm", "llama-index-postprocessor-kalm-rerank", "kalm-haystack")
"""The distributions of this project."""

_A_QUERY = 150_000_000
"""Bytes of 32 prefilled passages of 300 tokens of Nano in float32."""

EXTRAS = ("demo", "eval", "tune", "mteb")
"""Extras of `kalm-rag` that are not adapters."""


def check_packages() -> list[Finding]:
    """Compare the installed packages with the versions that this project's distributions ask for."""
    findings = []
    for name in OURS:
        if version_of(name) is None:
            continue
        for requirement in _requirements(name):
            found = _unmet(requirement)
            if found is not None:
                text = (
                    f"{name} needs {requirement.name}{requirement.specifier}, and {found} is installed: "
                    f"pip install '{requirement.name}{requirement.specifier}'."
                )
                findings.append(Finding("error", "packages", text))
    return findings


def installed_extras() -> dict[str, list[str]]:
    """Return the packages that each extra of `kalm-rag` still needs; an empty list is an extra that is complete."""
    missing = {}
    for extra in EXTRAS:
        wanted = _requirements("kalm-rag", extra) if version_of("kalm-rag") is not None else []
        missing[extra] = [requirement.name for requirement in wanted if _unmet(requirement) is not None]
    return missing


def _requirements(name: str, extra: str = "") -> Sequence[Requirement]:
    found = [Requirement(text) for text in metadata.requires(name) or ()]
    plain = [item for item in found if item.marker is None or item.marker.evaluate({"extra": ""})]
    if not extra:
        return plain
    return [
        item
        for item in found
        if item not in plain and item.marker is not None and item.marker.evaluate({"extra": extra})
    ]


def _unmet(requirement: Requirement) -> str | None:
    """Return what is installed instead of a requirement, or None if it is met."""
    version = version_of(requirement.name)
    if version is None:
        return "nothing"
    return None if requirement.specifier.contains(version, prereleases=True) else f"version {version}"


def check_machine(machine: Machine, precisions: Precisions, budget: MemoryBudget) -> list[Finding]:
    """Find what makes this machine slower than it has to be, or too small.

    Args:
        machine: the machine.
        precisions: times of each precision.
        budget: what `prefill_memory="auto"` comes to before a model is loaded.
    """
    return [
        *_check_threads(machine),
        *_check_caps(machine),
        *_check_gpu(machine),
        *_check_memory(budget),
        *_check_bfloat16(precisions),
    ]


def _finding(level: Level, text: str) -> list[Finding]:
    return [Finding(level, "machine", text)]


def _check_threads(machine: Machine) -> list[Finding]:
    if machine.threads <= machine.cpus:
        return []
    return _finding(
        "warning",
        f"torch uses {machine.threads} threads, and this process may use {machine.cpus} processors: threads that wait "
        f"for each other are slow. Set {THREAD_VARIABLES[0]}={machine.cpus}.",
    )


def _check_caps(machine: Machine) -> list[Finding]:
    caps = [f"{name}={machine.environment[name]}" for name in CAPS if name in machine.environment]
    if not caps:
        return []
    return _finding(
        "warning",
        f"{' and '.join(caps)} may keep torch from using all instructions of this processor; unset "
        f"{'it' if len(caps) == 1 else 'them'} for full speed.",
    )


def _check_gpu(machine: Machine) -> list[Finding]:
    import torch

    has_cuda_build = torch.version.cuda is not None or getattr(torch.version, "hip", None) is not None
    if machine.gpus:
        if multiprocessing.get_all_start_methods()[0] == "fork" and torch.cuda.is_available():
            return _finding(
                "note",
                "Python starts processes with 'fork' here, and a forked process cannot use a model that was loaded on "
                "a GPU: load it after the fork, or use the start method 'spawn'.",
            )
        return []
    if has_cuda_build:
        return _finding(
            "warning",
            f"torch {torch.__version__} is built for GPUs, and it sees none: everything runs on the CPU. Check the "
            "driver (nvidia-smi), CUDA_VISIBLE_DEVICES, and that the container was started with its GPUs.",
        )
    if Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi"):
        return _finding(
            "warning",
            f"This machine has an NVIDIA driver, but torch {torch.__version__} is built for CPUs only: install a build "
            "for CUDA (https://pytorch.org/get-started/locally/).",
        )
    return []


def _check_memory(budget: MemoryBudget) -> list[Finding]:
    if budget.bytes >= _A_QUERY:
        return []
    return _finding(
        "warning",
        f"Prefilled passages may take {size_text(budget.bytes)} of memory here ({budget.source}), less than the "
        f"{size_text(_A_QUERY)} that 32 of Nano take in float32, and a loaded model leaves less: known passages are "
        "computed again. Free memory or raise the container's limit, or use dtype='bfloat16' and "
        "prefill_storage='compact', which keep more passages in it.",
    )


def _check_bfloat16(precisions: Precisions) -> list[Finding]:
    if precisions.device != "cpu" or has_fast_bfloat16():
        return []
    return _finding(
        "note",
        "This CPU multiplies bfloat16 more slowly than float32: with dtype='bfloat16', products are computed in "
        "float32, which saves memory and no time.",
    )
