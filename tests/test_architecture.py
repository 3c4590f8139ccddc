"""The rooms of the package, and what may stand in them; `CONTRIBUTING.md` draws the map."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import kalm_rag

ROOT = Path(kalm_rag.__file__).parent
MODULES = {
    ".".join(("kalm_rag", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in ROOT.rglob("*.py")
}
TREES = {name: ast.parse(path.read_text("utf-8")) for name, path in MODULES.items()}
MANY_METHODS = {"DiskStore", "KaLMReranker", "PassageCache", "RerankerClient"}
"""Classes whose further methods are a call each."""


def imports_of(name: str) -> Iterator[str]:
    """Modules of the package that a module imports, wherever it does; imports for type checking alone do not run."""
    tree = TREES[name]
    unrun = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and id(node) not in unrun and (node.module or "") in MODULES:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else str(node.module)


def room(name: str) -> str:
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and (ROOT / parts[1]).is_dir() else ""


def test_the_rooms_know_only_what_they_stand_on() -> None:
    allowed = {
        "utils": {"utils"},
        "model": {"model", "utils"},
        "cache": {"cache", "utils"},
        "retrieval": {"retrieval", "utils"},
        "thresholds": {"thresholds", "utils"},
    }
    base = {"kalm_rag.errors", "kalm_rag.settings", "kalm_rag.documents"}
    for name in MODULES:
        for other in imports_of(name):
            if room(name) in allowed:
                assert room(other) in allowed[room(name)] or other in base, f"{name} imports {other}"


def test_no_circle_of_imports() -> None:
    done: set[str] = set()

    def walk(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for other in imports_of(name):
                walk(other, (*path, name))
            done.add(name)

    for name in MODULES:
        walk(name, ())


def test_no_private_name_of_another_module_is_imported() -> None:
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kalm_rag."):
                private = [alias.name for alias in node.names if alias.name.startswith("_") and alias.name[1] != "_"]
                assert not private, name


def test_the_root_is_small() -> None:
    """Beside the entry points `__init__`, `__main__` and `_version`."""
    assert len([path for path in ROOT.glob("*.py") if not path.name.startswith("_")]) <= 12


def test_no_class_has_more_than_twelve_methods() -> None:
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and node.name not in MANY_METHODS:
                methods = [part for part in node.body if isinstance(part, (ast.FunctionDef, ast.AsyncFunctionDef))]
                assert len(methods) <= 12, f"{name}.{node.name} has {len(methods)}"


def test_no_module_has_more_than_three_hundred_lines_of_code() -> None:
    """Docstrings, comments and blank lines do not count."""
    for name, path in MODULES.items():
        texts = [
            node
            for node in ast.walk(TREES[name])
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        ]
        skipped = {line for node in texts for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)}
        lines = path.read_text("utf-8").splitlines()
        code = [line for number, line in enumerate(lines, 1) if number not in skipped and line.strip()]
        count = sum(not line.lstrip().startswith("#") for line in code)
        assert count <= 300, f"{name} has {count}"
