"""I/O errors under every operation of the store, the commands of maintenance included.

Each operation runs once for every call that it makes, with that call failing, with all from that one on failing, and
with a random share of all failing; beside it another store has the folder open, with entries that stand in the
write-ahead log only. Whatever fails: no other bytes are read, an error is a `StoreError`, what the operation does not
concern is still there, and both stores work again once the disk does.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from faultkit import OPERATIONS

KIT = str(Path(__file__).parents[1] / "faultkit.py")


def libfiu() -> str:
    """Why the C library's calls cannot be made to fail here, or an empty text."""
    if sys.platform != "linux" or shutil.which("fiu-run") is None:
        return "needs fiu-run (Debian's fiu-utils)"
    done = subprocess.run(["fiu-run", "-x", sys.executable, "-c", "pass"], capture_output=True, text=True, timeout=60)
    return "" if done.returncode == 0 and not done.stderr else f"fiu-run does not work here: {done.stderr or done}"


@pytest.mark.skipif(os.name != "posix", reason="faults are injected into POSIX calls")
@pytest.mark.parametrize("kind", ["python", "libc"])
def test_io_errors(kind: str, fast_path: Path, scale: int, tally: Callable[[str, int, int], None]) -> None:
    if kind == "libc" and (reason := libfiu()):
        pytest.skip(reason)
    command = ["fiu-run", "-x"] if kind == "libc" else []
    command += [sys.executable, KIT, kind, str(scale), str(fast_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200 + 20 * scale)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    told = [f"{name}: {text}" for name, texts in result["broken"].items() for text in texts]
    assert not told, "\n".join(told[:20])
    assert set(result["trials"]) == set(OPERATIONS), "some operation met no error at all"
    assert result["errors"] > 0, "no error ever reached the caller"
    for what, count in result["injected"].items():
        tally(f"{kind}, {what}: broken rules", 0, count)
