"""How a path from a user is read, and where things are kept."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kalm_rag import KaLMReranker, PassageCache
from kalm_rag.adapters import shared_reranker
from kalm_rag.cache import DiskStore
from kalm_rag.utils import paths
from kalm_rag.utils.paths import digests_file, passages_dir, user_path


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PLACE", str(tmp_path / "place"))
    monkeypatch.setenv("ODD", "$PLACE")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.delenv("MISSING", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    paths._say_homeless.cache_clear()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("kc", "kc"),
        (".", "."),
        ("~/kc", "home/kc"),
        ("$PLACE/kc", "place/kc"),
        ("${PLACE}/kc", "place/kc"),
        ("$HOME/kc", "home/kc"),
        (Path("~/kc"), "home/kc"),
        (Path("$PLACE"), "place"),
        ("$ODD/kc", "$PLACE/kc"),  # what comes out of a variable is not read again
        ("a$", "a$"),
    ],
)
def test_one_meaning_everywhere(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str | Path, expected: str
) -> None:
    wanted = tmp_path / expected
    assert user_path(given, "cache") == wanted
    assert user_path(user_path(given, "cache"), "cache") == wanted
    cache = PassageCache(given)
    assert isinstance(cache.store, DiskStore)
    assert cache.store.folder == wanted
    monkeypatch.setenv("KALM_RAG_CACHE", str(given))
    assert passages_dir() == wanted
    assert digests_file() == wanted / "digests.json"
    default = PassageCache()
    assert isinstance(default.store, DiskStore)
    assert default.store.folder == wanted
    assert shared_reranker(checkpoint, cache=given) is shared_reranker(checkpoint)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("", "must be a path, got ''; leave it out for the default"),
        ("  ", "must be a path, got '  '"),
        ("a\0b", r"must be a path, got 'a\\x00b'"),
        ("$EMPTY", "='\\$EMPTY' expands to nothing; set the variable"),
        ("$MISSING/kc", "='\\$MISSING/kc' names the variable MISSING, which is not set"),
        ("/x/${MISSING}", "names the variable MISSING, which is not set"),
        ("~nobody-of-this-name/kc", "names a home folder that this machine does not know"),
    ],
)
def test_what_is_no_path_is_refused_by_name(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, given: str, message: str
) -> None:
    for make in (PassageCache, lambda cache: KaLMReranker("mini", cache=cache)):
        with pytest.raises(ValueError, match=f"^cache.*{message}"):
            make(given)
    with pytest.raises(ValueError, match=message):
        shared_reranker(checkpoint, cache=given)
    if "\0" not in given:
        monkeypatch.setenv("KALM_RAG_CACHE", given)
        with pytest.raises(ValueError, match=f"^KALM_RAG_CACHE.*{message}"):
            PassageCache()
        KaLMReranker("mini", cache=None)  # the place is not asked for


def test_cache_that_the_variable_named_before_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It named the folder above `passages` once."""
    monkeypatch.setenv("KALM_RAG_CACHE", "old")
    DiskStore("old/passages").put_many({"ab" * 32: b"x"})
    assert passages_dir() == tmp_path / "old" / "passages"
    DiskStore("old").put_many({"ab" * 32: b"x"})
    assert passages_dir() == tmp_path / "old"


def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user without a home folder, as a container runs one that no file of users names."""
    import pwd

    def unknown(_: Any) -> Any:
        raise KeyError

    monkeypatch.delenv("HOME")
    monkeypatch.delenv("KALM_RAG_CACHE", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


def test_user_without_a_home_has_no_disk_cache(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    homeless(monkeypatch)
    reranker = KaLMReranker(checkpoint, cache=None, device="cpu")
    assert reranker.rank("query", ["passage"])
    assert not caplog.records
    for _ in range(2):
        reranker = KaLMReranker(checkpoint, device="cpu")
        assert reranker.cache.store is None
        assert reranker.rank("query", ["passage"])
        shared_reranker(checkpoint)
    lines = [record.message for record in caplog.records]
    assert len(lines) == 1
    assert "no home folder, so encoded passages are kept in memory only; set KALM_RAG_CACHE" in lines[0]
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("KALM_RAG_CACHE", str(tmp_path / "kc"))
    assert PassageCache().store is not None


def test_command_of_a_user_without_a_home() -> None:
    program = (
        "import pwd, sys; pwd.getpwuid = {}.__getitem__; import kalm_rag.cli as cli\n"
        "sys.argv = ['kalm-rag', *sys.argv[1:]]; cli.main()"
    )
    environment = {
        name: value for name, value in os.environ.items() if name not in {"HOME", "XDG_CACHE_HOME", "KALM_RAG_CACHE"}
    } | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", program, "info", "--model", "mini"],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "none: this user has no home folder" in done.stdout
