"""What the repository says about itself in several places is said alike."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_pre_commit_runs_the_pinned_ruff() -> None:
    pinned = re.search(r"^ruff==(\S+)", (ROOT / "constraints.txt").read_text("utf-8"), re.MULTILINE)
    configured = re.search(r"ruff-pre-commit\s+rev: v(\S+)", (ROOT / ".pre-commit-config.yaml").read_text("utf-8"))
    assert pinned is not None
    assert configured is not None
    assert pinned[1] == configured[1]


def test_workflow_steps_are_make_targets() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    steps = re.findall(r"- run: (.*)", (ROOT / ".github/workflows/ci.yml").read_text("utf-8"))
    assert steps
    for step in steps:
        command, *names = step.split()
        assert command == "make"
        assert {name for name in names if "=" not in name} <= targets
