"""The pickle hole of diskcache (CVE-2025-69872) and its neighbours: a row written by an attacker runs nothing."""

from __future__ import annotations

import os
import pickle
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import diskcache
import pytest
from cachekit import frames, key_of, lookup

from kalm_rag.cache import DiskStore, StoreError

KEY = key_of(0)


class Payload:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def mark(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "code-ran"
    assert not (tmp_path / "code-ran").exists(), "the attacker's code ran"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "store"
    store = DiskStore(folder)
    store.put_many(frames(4))
    store.close()
    return folder


def write_row(folder: Path, **columns: object) -> None:
    row = {
        "key": KEY,
        "raw": 1,
        "store_time": 0.0,
        "access_time": 0.0,
        "size": 0,
        "mode": 1,
        "filename": None,
        "value": b"",
    }
    row |= columns
    with sqlite3.connect(folder / "cache.db") as connection:
        names, marks = ", ".join(row), ", ".join("?" * len(row))
        connection.execute(f"INSERT INTO Cache ({names}) VALUES ({marks})", list(row.values()))
    connection.close()


def exercise(folder: Path, read_only: bool) -> None:
    """Everything a user can do with a folder; whatever is ours is still right."""
    store = DiskStore(folder, read_only=read_only)
    right, wrong, cache = lookup(store, 4)
    assert (right, wrong) == (4, 0)
    assert store.get_many([KEY]) == {}
    assert KEY not in cache.store.get_many([KEY])
    assert len(list(store.keys())) >= 4
    store.check()
    store.stats()
    if not read_only:
        store.put_many({KEY: b"mine"})
        assert store.get_many([KEY]) == {KEY: b"mine"}
        store.delete([KEY])
        store.check(fix=True, orphan_age=0)
        assert store.check().clean
        store.clear()
    store.close()


@pytest.mark.parametrize("read_only", [False, True])
class TestRows:
    def test_pickled_value(self, folder: Path, mark: Path, read_only: bool) -> None:
        write_row(folder, mode=4, value=pickle.dumps(Payload(mark)))
        exercise(folder, read_only)

    def test_pickled_value_in_a_file(self, folder: Path, mark: Path, read_only: bool) -> None:
        (folder / "ab" / "cd").mkdir(parents=True)
        name = f"ab/cd/{'e' * 28}.val"
        (folder / name).write_bytes(pickle.dumps(Payload(mark)))
        write_row(folder, mode=4, filename=name, value=None)
        exercise(folder, read_only)

    def test_pickled_key(self, folder: Path, mark: Path, read_only: bool) -> None:
        write_row(folder, key=pickle.dumps(Payload(mark)), raw=0)
        exercise(folder, read_only)

    def test_pickle_under_our_key(self, folder: Path, mark: Path, read_only: bool) -> None:
        write_row(folder, value=pickle.dumps(Payload(mark)))
        store = DiskStore(folder, read_only=read_only)
        assert store.check().corrupt == 1
        store.close()

    @pytest.mark.parametrize(
        "name",
        [
            "/etc/hostname",
            "../victim",
            "ab/cd/../../../victim",
            f"ab/cd/{'e' * 28}.val/../../../../victim",
            "",
            "C:\\x",
            7,
        ],
    )
    def test_file_names_outside_of_the_folder(
        self, folder: Path, tmp_path: Path, read_only: bool, name: object
    ) -> None:
        victim = tmp_path / "victim"
        victim.write_bytes(b"precious")
        write_row(folder, mode=2, filename=name, value=None)
        exercise(folder, read_only)
        assert victim.read_bytes() == b"precious"
        assert Path("/etc/hostname").exists()

    def test_links_and_pipes_in_the_place_of_a_file(self, folder: Path, tmp_path: Path, read_only: bool) -> None:
        victim = tmp_path / "victim"
        victim.write_bytes(b"precious")
        (folder / "ab" / "cd").mkdir(parents=True)
        link, pipe = f"ab/cd/{'1' * 28}.val", f"ab/cd/{'2' * 28}.val"
        (folder / link).symlink_to(victim)
        os.mkfifo(folder / pipe)
        write_row(folder, key=key_of(5), mode=2, filename=link, value=None)
        write_row(folder, key=key_of(6), mode=2, filename=pipe, value=None)
        store = DiskStore(folder, read_only=read_only)
        assert store.get_many([key_of(5), key_of(6)]) == {}
        store.close()
        exercise(folder, read_only)
        assert victim.read_bytes() == b"precious"

    def test_folder_that_is_a_link_elsewhere(self, folder: Path, tmp_path: Path, read_only: bool) -> None:
        (tmp_path / "elsewhere" / "cd").mkdir(parents=True)
        victim = tmp_path / "elsewhere" / "cd" / f"{'3' * 28}.val"
        victim.write_bytes(b"precious")
        (folder / "ab").symlink_to(tmp_path / "elsewhere")
        write_row(folder, mode=2, filename=f"ab/cd/{'3' * 28}.val", value=None)
        exercise(folder, read_only)
        assert victim.read_bytes() == b"precious"

    @pytest.mark.parametrize(
        "columns", [{"mode": 3, "value": "text"}, {"mode": 1, "value": 7}, {"mode": 1, "value": None}, {"mode": 99}]
    )
    def test_values_of_another_kind(self, folder: Path, read_only: bool, columns: dict[str, object]) -> None:
        write_row(folder, **columns)
        exercise(folder, read_only)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("disk_evil", 1),
        ("get", "x"),
        ("eviction_policy", 7),
        ("sqlite_writable_schema", 1),
        ("size_limit", "1; DROP TABLE Cache"),
    ],
)
def test_settings_that_diskcache_would_execute(folder: Path, key: str, value: object) -> None:
    with sqlite3.connect(folder / "cache.db") as connection:
        connection.execute("INSERT OR REPLACE INTO Settings VALUES (?, ?)", (key, value))
    connection.close()
    with pytest.raises(StoreError, match="setting"):
        DiskStore(folder).get_many([KEY])


def test_the_attack_works_on_plain_diskcache(tmp_path: Path) -> None:
    """The fixture is not a dud: the library without our guards does run it."""
    mark = tmp_path / "code-ran"
    plain = diskcache.Cache(str(tmp_path / "plain"))
    write_row(tmp_path / "plain", mode=4, value=pickle.dumps(Payload(mark)))
    plain.get(KEY)
    plain.close()
    assert mark.exists()


def test_foreign_folder_is_left_alone(tmp_path: Path, mark: Path) -> None:
    folder = tmp_path / "foreign"
    with diskcache.Cache(str(folder)) as other:
        other["theirs"] = ["data"]
    write_row(folder, mode=4, value=pickle.dumps(Payload(mark)))
    before = sorted((path.name, path.read_bytes()) for path in folder.iterdir())
    store = DiskStore(folder)
    for action in (lambda: store.get_many([KEY]), lambda: store.put_many({KEY: b"x"}), lambda: list(store.keys())):
        with pytest.raises(StoreError, match="belongs to another program"):
            action()
    assert sorted((path.name, path.read_bytes()) for path in folder.iterdir()) == before


@pytest.mark.parametrize(
    "sql",
    [
        "CREATE TRIGGER evil AFTER INSERT ON Cache BEGIN DELETE FROM Cache; END",
        "CREATE VIEW evil AS WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT x FROM n",
        "DROP TRIGGER Settings_count_insert; CREATE TRIGGER Settings_count_insert AFTER INSERT ON Cache BEGIN "
        "INSERT INTO Settings WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT x, x FROM n; END",
    ],
)
@pytest.mark.parametrize("read_only", [False, True])
def test_schema_that_runs_something(folder: Path, sql: str, read_only: bool) -> None:
    with sqlite3.connect(folder / "cache.db") as connection:
        connection.executescript(sql)
    connection.close()
    with pytest.raises(StoreError, match="which kalm-rag did not create"):
        DiskStore(folder, read_only=read_only).get_many([KEY])


def test_pragmas_that_appear_under_a_live_process_are_not_executed(folder: Path) -> None:
    store = DiskStore(folder)
    store.put_many({KEY: b"x"})
    with sqlite3.connect(folder / "cache.db") as connection:
        connection.execute("INSERT INTO Settings VALUES ('sqlite_user_version', 77)")
        connection.execute("UPDATE Settings SET value = 1 << 26 WHERE key = 'sqlite_mmap_size'")
    connection.close()
    seen: list[int] = []

    def look() -> None:
        store.put_many({KEY: b"x"})
        assert store._writer.cache is not None
        seen.append(store._writer.cache._sql("PRAGMA mmap_size").fetchone()[0])
        store.close()

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [0]
    with sqlite3.connect(folder / "cache.db") as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (0,)
    connection.close()


def test_text_that_is_no_text_does_not_stop_maintenance(folder: Path) -> None:
    with sqlite3.connect(folder / "cache.db") as connection:
        connection.execute("UPDATE Cache SET key = CAST(x'ff' || substr(key, 2) AS TEXT) WHERE rowid = 1")
    connection.close()
    store = DiskStore(folder)
    assert len(list(store.keys())) == 3
    assert store.check(fix=True).corrupt == 1
    assert store.check().clean
