"""What the machine that runs the tests can do. Tests that need more are skipped, and say what they need."""

from __future__ import annotations

import platform

import pytest

from kalm_rag.model import cpu_kernels as kernels

ON_X86 = platform.machine().lower() in ("x86_64", "amd64")
HAS_BFLOAT16 = kernels.has_fast_bfloat16()

needs_x86 = pytest.mark.skipif(not ON_X86, reason="matrices are replaced on x86")
needs_bfloat16 = pytest.mark.skipif(not HAS_BFLOAT16, reason="this CPU has no bfloat16 instructions")
needs_int8 = pytest.mark.skipif(
    not (ON_X86 and kernels.has_exact_int8()), reason="this CPU has no instructions (VNNI) for sums of 8-bit products"
)
