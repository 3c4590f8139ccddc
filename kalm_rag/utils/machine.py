"""What a figure or a fault report needs to know about the machine: processor, memory, threads, GPUs and versions.

Processor features come from the operating system (`/proc/cpuinfo`, `sysctl`), else from torch, of which only newer
releases tell them; py-cpuinfo takes a second and starts processes. Nothing chooses how to compute by this list:
`kalm_rag.model.cpu_kernels` measures, because environment variables and virtual machines can limit what runs.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import os
import platform
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

PACKAGES = (
    "kalm-rag",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "diskcache",
    "huggingface-hub",
    "numpy",
)
"""Packages that can change a score or a time."""

FRAMEWORKS = (
    "langchain-kalm",
    "langchain-core",
    "llama-index-postprocessor-kalm-rerank",
    "llama-index-core",
    "kalm-haystack",
    "haystack-ai",
    "mteb",
)
"""The adapters, what they adapt to, and the reference implementation."""

CAPS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS")
"""Environment variables that keep libraries from using all instructions of the processor."""

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Environment variables that set how many threads torch uses."""

_FEATURES = (
    *("avx2", "fma", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_int8", "amx_bf16", "amx_fp16"),
    *("asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2", "svei8mm", "svebf16", "sme"),
)
"""Features that decide the speed of matrix products, as Linux calls them."""

_OTHER_NAMES = {"fma3": "fma", "avx512_f": "avx512f", "avx2.0": "avx2", "dotprod": "asimddp", "fp16": "asimdhp"}
"""What torch and macOS call them."""


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine as this process sees it.

    Attributes:
        system: operating system and release.
        architecture: of the processor.
        cpu: the processor's name.
        features: the instruction sets that decide the speed of matrix products.
        torch_cpu: the instruction set that torch's own kernels use.
        cpus: processors that this process may use: its affinity and the quota of its container count.
        threads: threads that torch uses.
        memory: bytes of memory, or None where the system does not tell.
        memory_limit: bytes that the container may use, or None without a limit.
        gpus: GPUs that torch can use.
        environment: the variables that are set and limit instructions or threads.
    """

    system: str
    architecture: str
    cpu: str
    features: tuple[str, ...]
    torch_cpu: str
    cpus: int
    threads: int
    memory: int | None
    memory_limit: int | None
    gpus: tuple[str, ...]
    environment: dict[str, str]

    def as_json(self) -> dict[str, Any]:
        """Return all fields."""
        return asdict(self)


def this_machine() -> Machine:
    """Look at the machine; imports torch."""
    import torch

    name, features = _processor()
    return Machine(
        system=f"{platform.system()} {platform.release()}",
        architecture=platform.machine(),
        cpu=name,
        features=features,
        torch_cpu=torch.backends.cpu.get_cpu_capability(),
        cpus=usable_cpus(),
        threads=torch.get_num_threads(),
        memory=_memory(),
        memory_limit=memory_limit(),
        gpus=_gpus(),
        environment={name: os.environ[name] for name in (*CAPS, *THREAD_VARIABLES) if os.environ.get(name)},
    )


def versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """Return the versions of Python and of the packages that are installed."""
    found = {name: version_of(name) for name in packages}
    return {"python": platform.python_version(), **{name: text for name, text in found.items() if text is not None}}


def version_of(package: str) -> str | None:
    """Return a package's version, or None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def utc_now() -> str:
    """Return date and time in UTC to the second, such as `2026-09-01T12:00:00Z`."""
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def usable_cpus(root: Path = Path("/")) -> int:
    """Return how many processors this process may use.

    Args:
        root: where `proc` and `sys` are.
    """
    try:
        count = len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS and Windows
        count = os.cpu_count() or 1
    quota = math.inf
    for group, is_v2 in _groups(root, "cpu"):
        with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
            if is_v2:
                allowed, period = (group / "cpu.max").read_text("ascii").split()
            else:
                allowed = (group / "cpu.cfs_quota_us").read_text("ascii")
                period = (group / "cpu.cfs_period_us").read_text("ascii")
            share = int(allowed) / int(period)  # "max" is no integer, and -1 is no quota
            quota = min(quota, share) if share > 0 else quota
    return count if quota >= count else max(1, math.ceil(quota))


def memory_limit(root: Path = Path("/")) -> int | None:
    """Return the bytes that this process's control groups allow, or None without a limit.

    Args:
        root: where `proc` and `sys` are.
    """
    limits = [
        _number(group / ("memory.max" if is_v2 else "memory.limit_in_bytes"))
        for group, is_v2 in _groups(root, "memory")
    ]
    least = min((limit for limit in limits if limit is not None), default=_NO_LIMIT)
    return least if 0 < least < _NO_LIMIT else None


_NO_LIMIT = 1 << 60
"""Version 1 of control groups writes a number near 2**63 for no limit."""


def available_memory(root: Path = Path("/")) -> int | None:
    """Return the bytes that this process may still take at most, or None where the system does not tell.

    A control group leaves its limit less what it uses now; file cache that nothing has touched lately counts as free.

    Args:
        root: where `proc` and `sys` are.
    """
    host = _meminfo("MemAvailable", root)
    if host is None:
        host = _memory()
    found = [] if host is None else [host]
    for group, is_v2 in _groups(root, "memory"):
        limit = _number(group / ("memory.max" if is_v2 else "memory.limit_in_bytes"))
        if limit is not None and 0 <= limit < _NO_LIMIT:
            used = _number(group / ("memory.current" if is_v2 else "memory.usage_in_bytes")) or 0
            found.append(min(limit, max(0, limit - used + _idle_file_cache(group, is_v2=is_v2))))
    return min(found, default=None)


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text("ascii"))
    except (OSError, ValueError):  # "max" is no integer
        return None


def _idle_file_cache(group: Path, *, is_v2: bool) -> int:
    """Return the bytes of file cache that a control group gives up when it needs them, 0 if it does not tell."""
    name = "inactive_file" if is_v2 else "total_inactive_file"
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = (group / "memory.stat").read_text("ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{name} "))
    return 0


def free_memory(device: torch.device) -> tuple[int | None, str]:
    """Return the bytes that can still be taken on a device, or None if nothing tells, and what kind of memory it is."""
    import torch

    if device.type == "cuda":
        # Blocks that torch reserved and does not use are free for this process, though not for others.
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached, "GPU memory"
    # Without a figure of what is free, as on macOS, all of the memory is no answer.
    host = available_memory() if _meminfo("MemAvailable", Path("/")) is not None or memory_limit() else None
    if device.type != "mps":
        return host, "memory"
    # Apple's GPUs use the host's memory, up to a limit of their own.
    own = torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return max(0, own if host is None else min(host, own)), "GPU memory"


def _groups(root: Path, controller: str) -> Iterator[tuple[Path, bool]]:
    """Yield the folders of this process's control groups and those above them, and whether they are of version 2."""
    try:
        lines = (root / "proc/self/cgroup").read_text("utf-8", "replace").splitlines()
    except OSError:
        return
    mount = root / "sys/fs/cgroup"
    for line in lines:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        is_v2 = controllers == ""
        if not is_v2 and controller not in controllers.split(","):
            continue
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for depth in range(len(parts), -1, -1):
            # In a container the path may be the host's, whose folders are not there; the topmost one is.
            yield (mount if is_v2 else mount / controller).joinpath(*parts[:depth]), is_v2


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows
        return None


def _meminfo(name: str, root: Path) -> int | None:
    try:
        lines = (root / "proc/meminfo").read_text("ascii").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
    except (OSError, ValueError, StopIteration):
        return None


def _processor() -> tuple[str, tuple[str, ...]]:
    """Return the processor's name and its features."""
    name, flags = _from_proc()
    if not flags and platform.system() == "Darwin":
        name, flags = _from_sysctl()
    if not flags:
        flags = _from_torch()
    known = {_OTHER_NAMES.get(flag, flag) for flag in flags}
    return name or platform.processor() or platform.machine(), tuple(flag for flag in _FEATURES if flag in known)


def _from_proc() -> tuple[str, set[str]]:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        return "", set()
    fields: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        fields.setdefault(key.strip().lower(), value.strip())
    return fields.get("model name", ""), set((fields.get("flags") or fields.get("features") or "").lower().split())


def _from_sysctl() -> tuple[str, set[str]]:
    try:
        done = subprocess.run(
            ["/usr/sbin/sysctl", "machdep.cpu", "hw.optional"], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return "", set()
    name, flags = "", set()
    for line in done.stdout.lower().splitlines():
        key, _, value = line.partition(": ")
        if key == "machdep.cpu.brand_string":
            name = done.stdout[done.stdout.lower().index(value) :][: len(value)]
        elif key in ("machdep.cpu.features", "machdep.cpu.leaf7_features"):
            flags |= set(value.split())
        elif value == "1":
            flags.add(key.rpartition(".")[2].removeprefix("feat_"))
    return name, flags


def _from_torch() -> set[str]:
    import torch

    tell = getattr(torch.cpu, "get_capabilities", None)
    return set() if tell is None else {name for name, value in tell().items() if value is True}


def _gpus() -> tuple[str, ...]:
    import torch

    found = []
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            memory = torch.cuda.get_device_properties(number).total_memory
            found.append(f"{torch.cuda.get_device_name(number)} ({memory / 1e9:.0f} GB)")
    return (*found, "Apple MPS") if torch.backends.mps.is_available() else tuple(found)
