"""The documentation's table of clients is what `make test-clients` tries, with the versions that it installs."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CLIENTS = ROOT / "tests" / "clients"


def rows(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.syspath_prepend(str(CLIENTS))
    monkeypatch.delitem(sys.modules, "tried", raising=False)
    import tried

    node = json.loads((CLIENTS / "package.json").read_text("utf-8"))["dependencies"]
    found = []
    for client in tried.CLIENTS:
        versions = [
            node[client.package] if name == tried.NODE else pinned((CLIENTS / f"{name}.txt"), client.package)
            for name in client.environments
        ]
        package = f"{client.package} {', '.join(versions)}"
        found.append(f"| {client.name} | {package} | {client.setting} | `{client.path}` |")
    return found


def pinned(file: Path, package: str) -> str:
    found = re.search(rf"^{re.escape(package)}==(\S+)$", file.read_text("utf-8"), re.MULTILINE)
    assert found is not None, package
    return found[1]


def test_the_table_is_what_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs/how-to/serve.md").read_text("utf-8")
    table = page.partition("## Clients tried")[2].partition("\n## ")[0]
    assert [line for line in table.splitlines() if line.startswith("| ")][1:] == rows(monkeypatch)
