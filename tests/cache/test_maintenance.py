"""What looks after a cache folder trusts only a whole and sound view of it, and what reads one needs no writer."""

from __future__ import annotations

import errno
import json
import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cachekit import LOCKER, frames, key_of, value_of

from kalm_rag import PassageCache
from kalm_rag.cache import DiskStore, StoreError, database
from kalm_rag.cache import connections as connections_module
from kalm_rag.cache.place import Place
from kalm_rag.cache.strict_disk import StrictDisk

LARGE = 300_000
"""Bytes of a value that becomes a file."""


def filled(folder: Path, count: int = 6, size: int = LARGE, **options: Any) -> tuple[DiskStore, dict[str, bytes]]:
    items = {key_of(number): value_of(key_of(number), size) for number in range(count)}
    store = DiskStore(folder, **options)
    assert store.put_many(items) == count
    return store, items


def change(folder: Path, *statements: str) -> None:
    connection = sqlite3.connect(folder / "cache.db")
    with connection:
        for statement in statements:
            connection.execute(statement)
    connection.close()


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_a_new_folder_has_the_documented_limit(tmp_path: Path) -> None:
    assert PassageCache(tmp_path / "new").stats().store.size.limit == 10_000_000_000
    filled(tmp_path / "new")[0].close()
    for options in ({}, {"read_only": True}):
        assert PassageCache(tmp_path / "new", **options).stats().store.size.limit == 10_000_000_000


@pytest.mark.parametrize("limit", [3_000_000, 1 << 30])
def test_a_limit_that_was_asked_for_is_kept(tmp_path: Path, limit: int) -> None:
    """1 GiB too, which is what diskcache would take by itself."""
    filled(tmp_path / "store", 1, limit=limit)[0].close()
    DiskStore(tmp_path / "store").put_many({key_of(9): value_of(key_of(9), 100)})
    assert DiskStore(tmp_path / "store").stats().limit == limit


@pytest.mark.parametrize("limit", [0, -5])
def test_a_limit_that_nobody_can_have_set_is_refused(tmp_path: Path, limit: int) -> None:
    """It would empty the cache at the next write."""
    store, items = filled(tmp_path / "store")
    store.close()
    change(tmp_path / "store", f"UPDATE Settings SET value = {limit} WHERE key = 'size_limit'")
    for action in (lambda: store.get_many(list(items)), lambda: store.put_many(items)):
        with pytest.raises(StoreError, match=f"has the setting 'size_limit' = {limit}"):
            action()


class TestCheck:
    def test_a_value_that_cannot_be_read_now_is_not_removed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store, items = filled(tmp_path / "store")
        reads = 0

        def read(path: str) -> bytes:
            nonlocal reads
            reads += 1
            if reads == 3:
                raise OSError(errno.EIO, "Input/output error")
            return Path(path).read_bytes()

        with monkeypatch.context() as patched:
            patched.setattr(StrictDisk, "_read", staticmethod(read))
            with pytest.raises(StoreError, match=r"stopped, and nothing was removed: OSError.*Input/output error"):
                store.check(fix=True, orphan_age=0)
        assert store.get_many(list(items)) == items
        assert store.check().clean

    @pytest.mark.parametrize("at", [1, 2, 3, 4])
    def test_a_database_that_cannot_be_read_now_loses_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
    ) -> None:
        """The live writer's rows stand in the write-ahead log alone; without it every value file looks orphaned."""
        store, items = filled(tmp_path / "store")
        assert (tmp_path / "store" / "cache.db-wal").stat().st_size > 0
        connect, opened = database.connect, 0

        def failing(folder: Path, options: str = "mode=rw") -> sqlite3.Connection:
            nonlocal opened
            opened += 1
            if opened == at:
                raise sqlite3.OperationalError("disk I/O error")
            return connect(folder, options)

        with monkeypatch.context() as patched:
            patched.setattr(database, "connect", failing)
            with pytest.raises(StoreError, match="disk I/O error"):
                store.check(fix=True, orphan_age=0)
        assert opened == at
        assert store.get_many(list(items)) == items

    def test_a_value_written_again_meanwhile_stays(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        store, items = filled(tmp_path / "store")
        damaged = key_of(2)
        change(tmp_path / "store", "UPDATE Cache SET filename = NULL, mode = 1, value = x'00' WHERE rowid = 3")
        from kalm_rag.cache import check

        locked = check._locked

        def late(folder: Path) -> Any:
            DiskStore(folder).put_many({damaged: items[damaged]})
            return locked(folder)

        monkeypatch.setattr(check, "_locked", late)
        assert store.check(fix=True, orphan_age=0).corrupt == 0
        assert store.get_many(list(items)) == items

    def test_wrong_counters_are_set_right(self, tmp_path: Path) -> None:
        store, _ = filled(tmp_path / "store", 4, size=100)
        change(tmp_path / "store", "UPDATE Settings SET value = 77 WHERE key = 'count'")
        assert store.stats().entries == 77
        assert "the counter 'count' is 77 and should be 4" in store.check().database
        assert not store.check(fix=True).clean
        assert store.check().clean
        assert store.stats().entries == 4

    @pytest.mark.skipif(sys.version_info < (3, 11), reason="before Python 3.11 sqlite3 has no limits")
    @pytest.mark.parametrize("column", ["value = zeroblob(5000000), mode = 1", "key = zeroblob(5000000)"])
    def test_a_row_longer_than_ours_is_removed_and_stops_nothing(self, tmp_path: Path, column: str) -> None:
        store, items = filled(tmp_path / "store", 4, size=100)
        change(tmp_path / "store", f"UPDATE Cache SET {column} WHERE rowid = 2")
        assert key_of(3) in set(store.keys())
        assert store.check().corrupt == 1
        assert store.check(fix=True).corrupt == 1
        assert store.check().clean
        assert set(store.get_many(list(items))) == set(items) - {key_of(1)}

    def test_a_manifest_that_a_crash_left_unfinished_is_swept(self, tmp_path: Path) -> None:
        store, _ = filled(tmp_path / "store", 1)
        (tmp_path / "store" / ".manifest-abcd").write_text("{")
        assert store.check(fix=True, orphan_age=0).orphans == 1
        assert not (tmp_path / "store" / ".manifest-abcd").exists()

    def test_no_cache_yet_is_nothing_wrong(self, tmp_path: Path) -> None:
        assert DiskStore(tmp_path / "none").check(fix=True).clean
        assert not (tmp_path / "none").exists()
        with pytest.raises(StoreError, match="no cache exists in .*; open it without read_only=True to create one"):
            DiskStore(tmp_path / "none", read_only=True).check()


def overwrite_page(folder: Path, page: int) -> None:
    change(folder, "PRAGMA wal_checkpoint(TRUNCATE)")
    with (folder / "cache.db").open("r+b") as file:
        file.seek(4096 * (page - 1))
        file.write(b"\xa5" * 4096)


def root_page(folder: Path, name: str) -> int:
    connection = sqlite3.connect(folder / "cache.db")
    (page,) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = ?", (name,)).fetchone()
    connection.close()
    return int(page)


class TestDamage:
    @pytest.mark.parametrize("size", [5_000, LARGE], ids=["in-database", "in-files"])
    def test_rows_are_saved_from_behind_a_damaged_index(self, tmp_path: Path, size: int) -> None:
        folder = tmp_path / "store"
        store, items = filled(folder, 40, size)
        store.close()
        overwrite_page(folder, root_page(folder, "Cache_key_raw"))
        for action in (lambda: store.get_many(list(items)), lambda: store.put_many(items)):
            with pytest.raises(StoreError, match=rf"is damaged .*: `kalm-rag cache check --fix --cache {folder}`"):
                action()
        report = store.check()
        assert report.database
        assert not report.clean
        report = store.check(fix=True, orphan_age=0)
        assert (report.entries, report.corrupt, report.salvaged) == (40, 0, 40)
        assert store.check(orphan_age=0).clean
        time.sleep(connections_module.FIRST_RETRY)  # a live process tries again by itself
        assert store.get_many(list(items)) == items
        assert store.put_many(items) == 40

    def test_an_index_that_lacks_rows_is_rebuilt_in_its_place(self, tmp_path: Path) -> None:
        folder = tmp_path / "store"
        store, items = filled(folder, 8, 5_000)
        store.close()
        where = "WHERE name = 'Cache_key_raw'"
        connection = sqlite3.connect(folder / "cache.db")
        definition = connection.execute(f"SELECT * FROM sqlite_master {where}").fetchone()
        connection.close()
        change(folder, "PRAGMA writable_schema = ON", f"DELETE FROM sqlite_master {where}")
        extra = value_of(key_of(8), 5_000)
        change(folder, f"INSERT INTO Cache (key, raw, mode, value) VALUES ('{key_of(8)}', 1, 1, x'{extra.hex()}')")
        values = ", ".join(repr(value) for value in definition)
        change(folder, "PRAGMA writable_schema = ON", f"INSERT INTO sqlite_master VALUES ({values})")
        assert key_of(8) not in store.get_many([*items, key_of(8)]), "a row that the index does not know"
        assert store.check().database
        report = store.check(fix=True)
        assert (report.entries, report.corrupt, report.quarantine) == (9, 0, None)
        assert store.check(orphan_age=0).clean
        assert store.get_many([*items, key_of(8)]) == {**items, key_of(8): extra}

    @pytest.mark.parametrize("size", [5_000, LARGE], ids=["in-database", "in-files"])
    def test_a_table_is_moved_aside_and_what_verifies_is_saved(self, tmp_path: Path, size: int) -> None:
        folder = tmp_path / "store"
        store, items = filled(folder, 200, size, limit=100_000_000)
        live = DiskStore(folder)
        assert len(live.get_many(list(items))) == 200
        store.close()
        live.close()
        connection = sqlite3.connect(folder / "cache.db")
        pages = connection.execute("SELECT pageno FROM dbstat WHERE name = 'Cache' AND pagetype = 'leaf'").fetchall()
        connection.close()
        overwrite_page(folder, max(pages)[0])
        report = DiskStore(folder).check(fix=True)
        assert report.quarantine is not None
        assert (Path(report.quarantine) / "cache.db").is_file()
        found = live.get_many(list(items))
        assert 0 < report.salvaged == len(found) < 200
        assert found == {key: items[key] for key in found}
        assert live.stats().limit == 100_000_000
        assert live.put_many(items) == 200

    def test_passages_are_saved_from_beside_damaged_settings(self, tmp_path: Path) -> None:
        folder = tmp_path / "store"
        store, items = filled(folder, 40, 5_000)
        store.close()
        overwrite_page(folder, root_page(folder, "Settings"))
        with pytest.raises(StoreError, match="is damaged"):
            store.get_many(list(items))
        report = DiskStore(folder).check(fix=True)
        assert report.quarantine is not None
        assert report.salvaged == 40
        assert DiskStore(folder).get_many(list(items)) == items

    def test_what_is_no_database_is_moved_aside(self, tmp_path: Path) -> None:
        folder = tmp_path / "store"
        store, items = filled(folder)
        store.close()
        (folder / "cache.db").write_bytes(b"not a database " * 1000)
        report = store.check(fix=True)
        assert (report.salvaged, report.clean) == (0, False)
        assert DiskStore(folder).put_many(items) == len(items)

    @pytest.mark.parametrize("name", ["CAST(x'ff' || substr(filename, 2) AS TEXT)", "'zz' || substr(filename, 3)"])
    def test_a_damaged_row_keeps_to_itself_and_heals(self, tmp_path: Path, name: str) -> None:
        store, items = filled(tmp_path / "store")
        change(tmp_path / "store", f"UPDATE Cache SET filename = {name} WHERE rowid = 2")
        found = store.get_many(list(items))
        assert found == {key: value for key, value in items.items() if key != key_of(1)}
        assert store.put_many(items) == len(items)
        assert store.get_many(list(items)) == items


def plant_sparse_files(folder: Path) -> None:
    for number in range(4):
        name = f"ab/cd/{number:028x}.val"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with (folder / name).open("wb") as file:
            file.truncate(1 << 30)
        change(folder, f"UPDATE Cache SET filename = '{name}', mode = 2, value = NULL WHERE rowid = {number + 1}")


class TestHostileFolders:
    @pytest.mark.parametrize(
        "statements",
        [
            [
                "DROP TABLE Settings",
                "CREATE VIEW Settings AS WITH RECURSIVE n(key) AS (SELECT 1 UNION ALL SELECT key + 1 FROM n) "
                "SELECT key, key AS value FROM n",
            ],
            ["ALTER TABLE Cache ADD COLUMN large BLOB AS (zeroblob(900000000))"],
            ["CREATE INDEX more ON Cache (abs(rowid))"],
            ["CREATE TABLE theirs (x)"],
        ],
        ids=["endless-settings", "generated-column", "expression-index", "table"],
    )
    @pytest.mark.parametrize("action", ["get", "put", "check", "keys"])
    def test_a_schema_that_is_not_ours_is_never_run(self, tmp_path: Path, statements: list[str], action: str) -> None:
        filled(tmp_path / "store", 2)[0].close()
        change(tmp_path / "store", *statements)
        store = DiskStore(tmp_path / "store")
        actions: dict[str, Callable[[], Any]] = {
            "get": lambda: store.get_many([key_of(0)]),
            "put": lambda: store.put_many({key_of(0): b"x"}),
            "check": lambda: store.check(fix=True),
            "keys": lambda: list(store.keys()),
        }
        with pytest.raises(StoreError, match="which kalm-rag did not create"):
            actions[action]()

    def test_the_schema_is_that_of_the_installed_diskcache(self) -> None:
        assert database._installed_schema() == database.SCHEMA

    @pytest.mark.parametrize("name", ["cache.db", "cache.db-wal", "kalm-rag-cache.json"])
    def test_links_in_the_place_of_our_files(self, tmp_path: Path, name: str) -> None:
        folder = tmp_path / "store"
        filled(folder)[0].close()
        victim = tmp_path / "victim"
        (folder / name).rename(victim) if (folder / name).exists() else victim.write_bytes(b"precious")
        (folder / name).symlink_to(victim)
        before = victim.read_bytes()
        for action in (DiskStore(folder).get_many, lambda keys: DiskStore(folder).put_many(frames(1))):
            with pytest.raises(StoreError, match="is a symbolic link"):
                action([key_of(0)])
        assert victim.read_bytes() == before

    def test_pipes_in_the_place_of_our_files(self, tmp_path: Path) -> None:
        folder = tmp_path / "store"
        filled(folder)[0].close()
        for name in ("kalm-rag-cache.json", "cache.db"):
            (folder / name).unlink()
            os.mkfifo(folder / name)
            with pytest.raises(StoreError, match="is not a regular file"):
                DiskStore(folder).get_many([key_of(0)])

    def test_files_that_no_frame_can_fill_are_not_read(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        store, _ = filled(tmp_path / "store", 5)
        plant_sparse_files(tmp_path / "store")
        read: list[int] = []
        fdopen = os.fdopen

        class Counting:
            def __init__(self, file: Any) -> None:
                self.file = file

            def __enter__(self) -> Counting:
                return self

            def __exit__(self, *_: object) -> None:
                self.file.close()

            def read(self, count: int = -1) -> bytes:
                data: bytes = self.file.read(count)
                read.append(len(data))
                return data

        monkeypatch.setattr(os, "fdopen", lambda *args, **options: Counting(fdopen(*args, **options)))
        assert set(store.get_many([key_of(number) for number in range(5)])) == {key_of(4)}
        assert sum(read) < 400_000

    def test_a_value_above_what_a_frame_can_be_is_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr("kalm_rag.cache.strict_disk.LARGEST_VALUE", 400_000)
        store, _ = filled(tmp_path / "store", 2)
        assert store.put_many({key_of(7): bytes(400_001)}) == 0
        assert store.stats().refused == 1
        assert "a passage of 400001 bytes is larger than the cache's limit of 400000" in caplog.text

    def test_a_row_longer_than_ours_is_left_out(self, tmp_path: Path) -> None:
        store, items = filled(tmp_path / "store", 3, size=100)
        change(tmp_path / "store", "UPDATE Cache SET value = zeroblob(50000000) WHERE rowid = 1")
        if sys.version_info < (3, 11):
            pytest.skip("before Python 3.11 sqlite3 has no limits")
        assert set(store.get_many(list(items))) == {key_of(1), key_of(2)}

    @pytest.mark.skipif(os.name != "posix" or os.getuid() != 0, reason="only root can give a folder away")
    @pytest.mark.parametrize(
        ("mode", "owner", "who"), [(0o777, 0, "every user of this machine"), (0o700, 65534, "user 65534, who owns it")]
    )
    def test_a_folder_that_others_can_write_to_draws_a_warning_unless_there_is_a_secret(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: int, owner: int, who: str
    ) -> None:
        folder = tmp_path / "store"
        filled(folder)[0].close()
        os.chown(folder, owner, owner)
        folder.chmod(mode)
        for secret, lines in ((None, 1), ("0123456789abcdef", 0)):
            caplog.clear()
            cache = PassageCache(folder, secret=secret, memory=0)
            assert cache.store.get_many([key_of(0)])
            assert cache.store.put_many(frames(1)) == 1
            assert caplog.text.count(f"can be changed by {who}") == lines
            cache.close()


class TestOrderAndSize:
    def test_a_clock_set_back_does_not_evict_what_is_new(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        store, _ = filled(tmp_path / "store", 60, 40_000, limit=1_000_000)
        now = time.time
        monkeypatch.setattr(time, "time", lambda: now() - 365 * 86400)
        newest = [key_of(number) for number in range(100, 110)]
        for key in newest:
            store.put_many({key: value_of(key, 40_000)})
        assert len(store.get_many(newest)) == 10

    def test_a_limit_lowered_by_another_process_is_learned(self, tmp_path: Path) -> None:
        store, items = filled(tmp_path / "store", 40, 40_000, limit=100_000_000)
        DiskStore(tmp_path / "store", limit=500_000).put_many({key_of(900): b"x"})
        store.put_many(items)
        assert store.stats().limit == 500_000
        assert len(store.get_many(list(items))) < 15

    def test_the_write_ahead_log_counts(self, tmp_path: Path) -> None:
        store, _ = filled(tmp_path / "store", 300, 40_000, limit=3_000_000)
        assert size_of(tmp_path / "store") <= 3_500_000
        stats = store.stats()
        assert stats.bytes is not None
        assert abs(stats.bytes - size_of(tmp_path / "store")) < 100_000

    def test_a_log_that_a_reader_holds_does_not_empty_the_cache(self, tmp_path: Path) -> None:
        store, _ = filled(tmp_path / "store", 60, 40_000, limit=3_000_000)
        reader = sqlite3.connect(tmp_path / "store" / "cache.db", isolation_level=None)
        reader.execute("BEGIN")
        reader.execute("SELECT COUNT(*) FROM Cache").fetchone()
        for number in range(60, 160):
            store.put_many({key_of(number): value_of(key_of(number), 40_000)})
        assert len(store.get_many([key_of(number) for number in range(130, 160)])) >= 20
        reader.close()

    def test_stats_read_counters_and_no_rows(self, tmp_path: Path) -> None:
        store, items = filled(tmp_path / "store", 50, 100)
        store.get_many(list(items))
        statements: list[str] = []
        assert store._reader.connection is not None
        store._reader.connection.set_trace_callback(statements.append)
        stats = store.stats()
        assert stats.entries == 50
        assert statements
        assert not [statement for statement in statements if "Cache" in statement]


class TestLocks:
    @pytest.fixture
    def locked(self, tmp_path: Path) -> Any:
        """A folder whose write lock another process holds."""
        filled(tmp_path / "store")[0].close()
        command = [sys.executable, "-c", "import sys\n" + LOCKER, str(tmp_path / "store")]
        locker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert locker.stdout is not None
        assert locker.stdout.readline() == "locked\n"
        yield tmp_path / "store"
        locker.communicate("")

    def test_reading_needs_no_write_lock(self, locked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(database, "LOCK_SECONDS", 0.1)
        store = DiskStore(locked)
        assert len(store.get_many([key_of(number) for number in range(6)])) == 6
        assert store.stats().entries == 6
        assert len(list(store.keys())) == 6
        assert store.check().clean
        with pytest.raises(StoreError, match=r"is locked: another process has been writing to it for 0\.1 s"):
            store.put_many({key_of(9): b"x"})
        assert 0 < store._writer.backoff.again_at - time.monotonic() <= connections_module.FIRST_RETRY
        assert len(store.get_many([key_of(0)])) == 1

    def test_a_lock_while_writing_is_said_in_words(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(database, "LOCK_SECONDS", 0.1)
        store, items = filled(tmp_path / "store")
        other = sqlite3.connect(tmp_path / "store" / "cache.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        for action in (lambda: store.put_many(items), lambda: store.delete(list(items))):
            with pytest.raises(StoreError, match="is locked: another process has been writing to it"):
                action()
        other.execute("ROLLBACK")
        other.close()
        assert store.put_many(items) == 6, "a lock does not turn the store off"

    def test_retries_wait_longer_each_time(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "file").write_text("in the way")
        store = DiskStore(tmp_path / "file")
        now, waits = 0.0, []
        monkeypatch.setattr(connections_module.time, "monotonic", lambda: now)
        for _ in range(7):
            with pytest.raises(StoreError, match="is a file; give a folder"):
                store.put_many({key_of(0): b"x"})
            waits.append(store._writer.backoff.again_at - now)
            now += waits[-1]
        assert waits == [1, 2, 4, 8, 16, 30, 30]

    def test_a_folder_that_cannot_be_written_to_is_one_line_of_the_log(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        filled(tmp_path / "store")[0].close()
        monkeypatch.setattr(Place, "cannot_write", lambda _: True)
        store = DiskStore(tmp_path / "store")
        for _ in range(2):
            assert len(store.get_many([key_of(0)])) == 1
            assert store.put_many({key_of(9): b"x"}) == 0
            assert store.delete([key_of(0)]) == 0
        assert store.read_only
        [record] = caplog.records
        assert "is read-only (this user may not write to it): new passages are not kept" in record.getMessage()

    def test_clear_beside_close(self, tmp_path: Path) -> None:
        store, items = filled(tmp_path / "store", 12, 5_000)
        errors: list[BaseException] = []

        def work(action: Callable[[], object]) -> None:
            try:
                for _ in range(30):
                    action()
            except BaseException as error:  # noqa: BLE001
                errors.append(error)

        actions = [store.clear, store.close, lambda: store.put_many(items), lambda: store.get_many(list(items))]
        threads = [threading.Thread(target=work, args=(action,)) for action in actions]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []


@pytest.mark.parametrize("content", [b"", bytes(64)])
def test_a_manifest_that_a_loss_of_power_left_empty_heals(tmp_path: Path, content: bytes) -> None:
    folder = tmp_path / "store"
    for heal in (
        lambda store: store.put_many({key_of(9): value_of(key_of(9), 100)}),
        lambda store: store.check(fix=True),
    ):
        store, items = filled(folder, 3, 100)
        store.close()
        (folder / "kalm-rag-cache.json").write_bytes(content)
        assert DiskStore(folder).get_many(list(items)) == items
        assert "has lost its content" in DiskStore(folder).check().database
        heal(DiskStore(folder))
        assert DiskStore(folder).check().clean
        assert json.loads((folder / "kalm-rag-cache.json").read_text())["format"] == 1


def test_an_empty_manifest_does_not_make_another_program_s_database_ours(tmp_path: Path) -> None:
    change(tmp_path, "CREATE TABLE theirs (x)")
    (tmp_path / "kalm-rag-cache.json").write_bytes(b"")
    for action in (lambda store: store.get_many([key_of(0)]), lambda store: store.put_many({key_of(0): b"x"})):
        with pytest.raises(StoreError, match="which kalm-rag did not create"):
            action(DiskStore(tmp_path))
    assert (tmp_path / "kalm-rag-cache.json").read_bytes() == b""
