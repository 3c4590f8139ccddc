"""Looking at the cache's folder: nothing is created, and every fault is told with its way out."""

from __future__ import annotations

import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
from rawframes import key_of, value_of

from kalm_rag.cache import DiskStore
from kalm_rag.cache.place import Place
from kalm_rag.diagnosis import place
from kalm_rag.diagnosis.place import look_at_cache, try_folder


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache with one entry."""
    store = DiskStore(tmp_path / "cache")
    store.put_many({key_of(1): value_of(key_of(1), 400)})
    store.close()
    return tmp_path / "cache"


def test_a_folder_that_does_not_exist_is_tried_and_not_created(tmp_path: Path) -> None:
    seen, findings = look_at_cache(str(tmp_path / "a" / "b"))
    assert (seen.exists, seen.writable, findings) == (False, True, [])
    assert f"written to {tmp_path}," in seen.tried
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_is_tried_and_stays_empty(tmp_path: Path) -> None:
    seen, findings = look_at_cache(str(tmp_path))
    assert (seen.exists, seen.writable, findings) == (False, True, [])
    assert list(tmp_path.iterdir()) == []


def test_a_cache_is_measured_and_keeps_its_entries(cache: Path) -> None:
    seen, findings = look_at_cache(str(cache))
    assert (seen.exists, seen.writable, seen.entries, findings) == (True, True, 1, [])
    assert seen.limit == 10_000_000_000
    assert seen.free is not None
    assert seen.free > 0
    assert list(DiskStore(cache).keys()) == [key_of(1)]


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for where in (tmp_path / "file" / "below", tmp_path / "file"):
        seen, (finding,) = look_at_cache(str(where))
        assert (finding.level, finding.area, seen.writable) == ("error", "cache", False)
        assert str(tmp_path / "file") in finding.text


def test_a_folder_without_permission_is_an_error_with_its_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_args: object, **_options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(place.tempfile, "TemporaryDirectory", refuse)
    seen, (finding,) = look_at_cache(str(tmp_path / "new"))
    assert not seen.writable
    assert finding.level == "error"
    assert "cannot be created (Permission denied)" in finding.text
    assert "--cache or KALM_RAG_CACHE" in finding.text


def test_a_read_only_cache_is_a_warning(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Place, "cannot_write", lambda self: True)
    seen, (finding,) = look_at_cache(str(cache))
    assert (seen.writable, seen.entries, finding.level) == (False, 1, "warning")
    assert "is read-only" in finding.text
    assert "What it holds is still used." in finding.text


def test_a_cache_that_keeps_nothing_is_an_error(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DiskStore, "get_many", lambda self, keys: {})
    seen, (finding,) = look_at_cache(str(cache))
    assert (seen.writable, finding.level) == (False, "error")
    assert "does not keep what is written to it" in finding.text


def test_a_folder_of_another_program_is_an_error_and_left_alone(tmp_path: Path, cache: Path) -> None:
    (cache / "kalm-rag-cache.json").unlink()
    before = sorted(path.name for path in cache.iterdir())
    _, (finding,) = look_at_cache(str(cache))
    assert finding.level == "error"
    assert "belongs to another program" in finding.text
    assert {path.name for path in cache.iterdir()} <= {*before, "cache.db-wal", "cache.db-shm"}


def test_a_damaged_database_is_an_error(cache: Path) -> None:
    database = cache / "cache.db"
    database.write_bytes(b"x" * database.stat().st_size)
    _, findings = look_at_cache(str(cache))
    assert [finding.level for finding in findings] == ["error"]


def test_a_network_file_system_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kalm_rag.cache.folder.filesystem_of", lambda folder: "nfs4")
    _, (finding,) = look_at_cache(str(tmp_path))
    assert finding.level == "error"
    assert "network file system (nfs4)" in finding.text


def test_a_limit_above_the_free_space_is_a_warning(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(20_000_000_000, 0, 2_000_000_000))
    seen, (finding,) = look_at_cache(str(cache))
    assert seen.free == 2_000_000_000
    assert finding.level == "warning"
    assert "only 2.0 GB left" in finding.text
    assert "--limit-gb 1.6" in finding.text


def test_a_folder_that_others_can_write_to_is_a_warning(cache: Path) -> None:
    os.chmod(cache, 0o777)
    _, (finding,) = look_at_cache(str(cache))
    assert finding.level == "warning"
    assert "every user of this machine" in finding.text


def test_a_variable_that_names_no_folder_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KALM_RAG_CACHE", "$NO_SUCH_VARIABLE/x")
    seen, (finding,) = look_at_cache()
    assert seen.folder is None
    assert finding.level == "error"
    assert "names the variable NO_SUCH_VARIABLE" in finding.text


def test_a_user_without_a_home_folder_gets_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(place, "passages_dir", lambda: None)
    seen, (finding,) = look_at_cache()
    assert (seen.folder, finding.level) == (None, "warning")
    assert "kept in memory only" in finding.text


def test_a_link_that_leads_nowhere_is_not_followed_to_its_parent(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(OSError):
        try_folder(tmp_path / "link")
