"""What a cache forgets: by text in every key space, by key, and by model; and what it records to be able to."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sqlite3
import threading
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from cachekit import DictByteStore, frames, key_of, passage, put, space, value_of

from kalm_rag.cache import ByteStoreAdapter, DiskStore, MemoryStore, PassageCache, StoreError, database
from kalm_rag.cache.heads import heads, keys_of_models, unsearchable
from kalm_rag.cache.records import MOST_RECORDS, MOST_SLOTS, RECORDS, SLOT
from kalm_rag.cache.spaces import LARGEST_RECORD, Behind, Space, SpaceError, record, recorded_spaces
from kalm_rag.cache.strict_disk import StrictDisk
from kalm_rag.cache.transfer import export_shards, import_shards
from kalm_rag.model.identity import ModelIdentity
from kalm_rag.utils.control_tokens import ControlTokens

TOKENS = ControlTokens(["<eos>", "<unk>"])


def states_space(**changes: Any) -> Space:
    return Space(space(**changes), TOKENS)


def keep(cache: PassageCache, *texts: str) -> None:
    """Keep texts as a `StatesSource` does."""
    cache.use(states_space(), kept=True)
    put(cache, {text: passage(number) for number, text in enumerate(texts)})
    cache.flush()


def held(store: Any) -> int:
    return len(list(store.keys()))


def records(folder: Path) -> list[Path]:
    return sorted((folder / RECORDS).iterdir())


class TestRecords:
    @pytest.mark.parametrize("behind", [None, Behind(4, (1, 2, 3), "bfloat16, int8 weights, Matrix")])
    def test_a_record_gives_the_same_keys_and_cleans_as_the_tokenizer_does(self, behind: Behind | None) -> None:
        before = Space(space(), TOKENS, behind)
        after = Space.from_bytes(before.to_bytes())
        assert (after.id, after.behind, after.keys.model) == (before.id, behind, before.keys.model)
        texts = ["plain", "forged <end_of_turn> <eos>"]
        assert after.keys_of(texts) == before.keys_of(texts)
        assert len(after.keys_of(texts)) == 3  # the second one as it is, and broken

    def test_every_field_makes_another_space(self) -> None:
        spaces = [
            Space(space(**change), TOKENS) for change in ({}, {"max_length": 9}, {"dtype": "x"}, {"storage": "y"})
        ]
        spaces += [Space(space(), ControlTokens(["<other>"]))]
        spaces += [Space(space(), TOKENS, Behind(*one)) for one in ((4, (1,), "a"), (8, (1,), "a"), (4, (2,), "a"))]
        assert len({one.id for one in spaces}) == len(spaces)

    def test_a_changed_byte_is_noticed(self) -> None:
        data = states_space().to_bytes()
        for place in range(len(data)):
            changed = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
            with pytest.raises(SpaceError):
                Space.from_bytes(changed)

    @pytest.mark.parametrize(
        "text",
        [
            b"{}",
            b"[]",
            b"not json",
            b"[" * 100_000,
            b'{"format": 2}',
            b'{"format":1,"model":"","fields":{},"control":[],"prefilled":null}',
            b'{"format":1,"model":"xy","fields":{"encoder":"","tokenizer":"","template":"","decoder":"","dtype":"",'
            b'"storage":"","max_length":1},"control":[],"prefilled":null}',
            b'{"format":1,"model":"","fields":{"encoder":"","tokenizer":"","template":"","decoder":"","dtype":"",'
            b'"storage":"","max_length":"1"},"control":[],"prefilled":null}',
            b'{"format":1,"model":"","fields":{"encoder":"","tokenizer":"","template":"","decoder":"","dtype":"",'
            b'"storage":"","max_length":1,"more":1},"control":[],"prefilled":null}',
            b'{"format":1,"model":"","fields":{"encoder":"","tokenizer":"","template":"","decoder":"","dtype":"",'
            b'"storage":"","max_length":1},"control":[],"prefilled":[4,[-1],"a"]}',
            b" " * (LARGEST_RECORD + 1),
        ],
    )
    def test_a_forged_record_with_a_valid_checksum_is_an_error_of_its_own_kind(self, text: bytes) -> None:
        with pytest.raises(SpaceError):
            Space.from_bytes(b"KaLMkeys" + hashlib.sha256(text).digest() + zlib.compress(text))

    def test_a_space_that_no_record_can_hold_is_a_failure_that_is_counted(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        with PassageCache(tmp_path) as cache:
            cache.use(Space(space(), ControlTokens([f"<{'x' * LARGEST_RECORD}>"])), kept=True)
            cache.flush()
            assert cache.stats().unrecorded == 1
        assert "cannot record a key space" in caplog.text

    def test_a_folder_records_a_space_once_and_the_database_stays_as_it_was(self, tmp_path: Path) -> None:
        for _ in range(2):
            with PassageCache(tmp_path) as cache:
                keep(cache, "a")
        [file] = records(tmp_path)
        assert file.name == f"{states_space().id}.space"
        connection, _ = database.connect_reading(tmp_path)  # this inspects the schema
        connection.close()
        assert DiskStore(tmp_path).check().clean

    def test_a_lookup_records_nothing_and_makes_no_folder(self, tmp_path: Path) -> None:
        with PassageCache(tmp_path / "store") as cache:
            cache.use(states_space())
        assert not (tmp_path / "store").exists()

    def test_a_folder_that_cannot_take_a_record_keeps_passages_and_counts(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        with PassageCache(tmp_path) as cache:
            cache.store.put_many({})
            (tmp_path / RECORDS).write_text("in the way")
            keep(cache, "a")
            assert cache.stats().unrecorded == 1
            assert "cannot record a key space" in caplog.text
            assert held(cache.store) == 1
            (tmp_path / RECORDS).unlink()
            keep(cache, "b")  # it is tried again
            assert cache.stats().unrecorded == 0
        assert len(recorded_spaces(DiskStore(tmp_path))[0]) == 1

    def test_links_and_files_of_others_are_neither_followed_nor_changed(self, tmp_path: Path) -> None:
        store, other = DiskStore(tmp_path / "store"), tmp_path / "other"
        store.put_many({})
        other.mkdir()
        (tmp_path / "store" / RECORDS).symlink_to(other)
        with pytest.raises(StoreError, match="follows no links"):
            record(store, [states_space()])
        assert not list(other.iterdir())
        (tmp_path / "store" / RECORDS).unlink()
        record(store, [states_space()])
        (tmp_path / "store" / RECORDS / "notes.txt").write_text("mine")
        os.mkfifo(tmp_path / "store" / RECORDS / f"{'0' * 64}.space")
        (tmp_path / "store" / RECORDS / f"{'1' * 64}.space").symlink_to(other)
        assert (len(recorded_spaces(store)[0]), recorded_spaces(store)[1]) == (1, 2)
        assert (tmp_path / "store" / RECORDS / "notes.txt").read_text() == "mine"

    def test_a_folder_takes_a_bounded_number_and_reads_no_more(self, tmp_path: Path) -> None:
        store = DiskStore(tmp_path)
        record(store, [states_space()])
        for number in range(MOST_RECORDS):
            (tmp_path / RECORDS / f"{number:064x}.space").write_bytes(b"")
        with pytest.raises(StoreError, match="takes no more"):
            record(store, [states_space(max_length=7)])
        found, unreadable = recorded_spaces(store)
        assert len(found) + unreadable == MOST_RECORDS + 1

    def test_a_damaged_record_is_written_again(self, tmp_path: Path) -> None:
        store = DiskStore(tmp_path)
        record(store, [states_space()])
        [file] = records(tmp_path)
        file.write_bytes(file.read_bytes()[:-3])
        assert recorded_spaces(store) == ({}, 1)
        record(store, [states_space()])
        assert len(recorded_spaces(store)[0]) == 1

    def test_a_record_that_a_crash_left_unfinished_is_swept(self, tmp_path: Path) -> None:
        store = DiskStore(tmp_path)
        record(store, [states_space()])
        (tmp_path / RECORDS / ".partial-x").write_bytes(b"half")
        assert store.check(orphan_age=-10).orphans == 1
        store.check(fix=True, orphan_age=-10)
        assert [file.suffix for file in records(tmp_path)] == [".space"]

    def test_a_byte_store_keeps_records_under_names_that_are_no_passages(self) -> None:
        inner = DictByteStore()
        store = ByteStoreAdapter(inner)
        with PassageCache(store) as cache:
            keep(cache, "a")
        assert len(list(store.keys())) == 1
        assert sum(SLOT in name for name in inner.items) == 1
        assert PassageCache(ByteStoreAdapter(inner)).forget(["a"]).store.states == 1
        assert list(store.keys()) == []

    def test_a_byte_store_takes_a_bounded_number(self) -> None:
        store = ByteStoreAdapter(DictByteStore())
        record(store, [states_space(max_length=number) for number in range(MOST_SLOTS)])
        assert len(recorded_spaces(store)[0]) == MOST_SLOTS
        assert record(store, [states_space(max_length=0)]) == 1
        with pytest.raises(StoreError, match="takes no more"):
            record(store, [states_space(max_length=9999)])

    def test_a_byte_store_that_loses_a_record_is_a_failure(self) -> None:
        class Forgetful(DictByteStore):
            def mset(self, key_value_pairs: Sequence[tuple[str, bytes]]) -> None:
                pass

        with pytest.raises(StoreError, match="does not keep"):
            record(ByteStoreAdapter(Forgetful()), [states_space()])


class TestForget:
    def test_every_level_forgets_and_other_texts_stay(self, tmp_path: Path) -> None:
        with PassageCache(tmp_path) as cache:
            keep(cache, "a", "b", "c")
            report = cache.forget(["a", {"text": "b", "id": 1}, "a", "never seen"])
            assert (report.texts, report.spaces, report.total) == (4, 1, 4)
            assert (report.memory.states, report.store.states) == (2, 2)
            assert held(cache.store) == cache.stats().memory.size.entries == 1
            assert cache.forget(["a", "b"]).total == 0

    def test_another_process_finds_the_texts_by_the_records(self, tmp_path: Path) -> None:
        with PassageCache(tmp_path) as cache:
            keep(cache, "a <eos>", "b")
            put(cache, {"a < eos>": passage(1)})  # as a reranker with escape keeps the first one
        report = PassageCache(tmp_path).forget(["a <eos>"])
        assert report.store.states == 2
        assert held(DiskStore(tmp_path)) == 1

    def test_without_a_record_only_named_spaces_are_searched(self, tmp_path: Path) -> None:
        put(cache := PassageCache(tmp_path), {"a": passage(0)})
        cache.close()
        assert PassageCache(tmp_path).forget(["a"]).total == 0
        assert PassageCache(tmp_path).forget(["a"], [states_space()]).store.states == 1

    def test_half_a_surrogate_pair_is_repaired_as_in_ranking(self, tmp_path: Path) -> None:
        with PassageCache(tmp_path) as cache:
            keep(cache, "broken \ufffd")
            assert cache.forget(["broken \ud83d"]).store.states == 1

    @pytest.mark.parametrize("texts", ["one text", {"text": "a"}, [1], [b"x"], None, 5])
    def test_what_is_no_list_of_texts_is_an_error(self, texts: Any) -> None:
        with pytest.raises(TypeError, match="documents"):
            PassageCache(None).forget(texts)

    @pytest.mark.parametrize("texts", [{"a"}, (text for text in "a"), ("a",)])
    def test_any_collection_of_texts_will_do(self, texts: Any, tmp_path: Path) -> None:
        with PassageCache(tmp_path) as cache:
            keep(cache, "a")
            assert cache.forget(texts).store.states == 1

    def test_a_pending_write_does_not_bring_a_text_back(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The write waits until `forget` waits for it."""
        gate = threading.Event()

        class Slow(MemoryStore):
            def put_many(self, items: Mapping[str, bytes]) -> int:
                gate.wait()
                return super().put_many(items)

        cache = PassageCache(Slow(1 << 20))
        wait = cache._writer.flush

        def flush() -> None:
            gate.set()
            wait()

        monkeypatch.setattr(cache._writer, "flush", flush)
        cache.use(states_space(), kept=True)
        put(cache, {"a": passage(0)})
        report = cache.forget(["a"])
        gate.set()
        wait()
        assert held(cache.store) == 0
        assert report.store.states == 1

    def test_memory_only(self) -> None:
        cache = PassageCache(None)
        keep(cache, "a")
        report = cache.forget(["a"])
        assert (report.memory.states, report.store.total, report.unrecorded) == (1, 0, 0)
        assert cache.stats().memory.size.entries == 0

    def test_a_folder_that_does_not_exist_is_not_made(self, tmp_path: Path) -> None:
        assert PassageCache(tmp_path / "none").forget(["a"], [states_space()]).total == 0
        assert not (tmp_path / "none").exists()

    def test_a_read_only_folder_refuses_and_nothing_is_forgotten(self, tmp_path: Path) -> None:
        with PassageCache(tmp_path) as cache:
            keep(cache, "a")
        cache = PassageCache(tmp_path, read_only=True)
        for action in (lambda: cache.forget(["a"]), lambda: cache.delete(space().states_keys(["a"]))):
            with pytest.raises(StoreError, match="is read-only, so nothing can be deleted"):
                action()
        assert held(cache.store) == 1

    def test_a_folder_that_became_read_only_refuses(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with PassageCache(tmp_path) as cache:
            keep(cache, "a")
            monkeypatch.setattr(type(cache.store.place), "cannot_write", lambda self: True)
            with pytest.raises(StoreError, match="is read-only"):
                cache.forget(["a"])

    def test_a_store_that_cannot_delete_says_so(self) -> None:
        class Refuses(MemoryStore):
            def delete(self, keys: Iterable[str]) -> int:
                raise NotImplementedError("append only")

        class Ignores(MemoryStore):
            def delete(self, keys: Iterable[str]) -> int:
                return 0

        for kind, message in ((Refuses, "Refuses did not delete .*append only"), (Ignores, "Ignores still holds 1 of")):
            cache = PassageCache(kind(1 << 20))
            keep(cache, "a")
            with pytest.raises(StoreError, match=message):
                cache.forget(["a"])

    def test_a_store_without_a_place_for_records_is_said_in_the_report(self) -> None:
        cache = PassageCache(MemoryStore(1 << 20))
        keep(cache, "a")
        report = cache.forget(["a"])
        assert (report.unrecorded, report.store.states) == (1, 1)
        assert cache.stats().unrecorded == 1

    def test_an_unreadable_record_is_said_in_the_report(self, tmp_path: Path) -> None:
        with PassageCache(tmp_path) as cache:
            keep(cache, "a")
        [file] = records(tmp_path)
        file.write_bytes(b"damaged")
        report = PassageCache(tmp_path).forget(["a"])
        assert (report.unreadable, report.total) == (1, 0)

    def test_more_spaces_than_are_remembered_forget_all_that_is_prefilled_in_memory(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from kalm_rag.cache import spaces
        from kalm_rag.cache.sieve import BudgetSieve

        monkeypatch.setattr(spaces, "_MOST_USED", 1)
        cache = PassageCache(None)
        memory: BudgetSieve[str, bytes] = BudgetSieve(1000, len, "test")
        cache.attach(memory)
        first, second = (Space(space(), TOKENS, Behind(4, (number,), "x")) for number in (1, 2))
        for one in (first, second):
            cache.use(one)
            memory.put(one.keys_of(["a"])[0], b"x")
        assert cache.forget(["a"]).memory.prefilled == 2
        assert memory.stats().entries == 0

    def test_a_fork_forgets_too(self, tmp_path: Path) -> None:
        cache = PassageCache(tmp_path)
        keep(cache, "a", "b")
        child = os.fork()
        if not child:
            code = 1
            try:
                code = 0 if cache.forget(["a"]).store.states == 1 else 2
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert held(cache.store) == 1
        assert cache.forget(["b"]).store.states == 1
        cache.close()

    def test_deleted_bytes_are_overwritten(self, tmp_path: Path) -> None:
        """States say much about a text, and SQLite leaves deleted bytes in free pages."""
        items = {key_of(number): value_of(key_of(number), 3000) for number in range(40)}
        store = DiskStore(tmp_path)
        store.put_many(items)
        store.delete(list(items))
        left = b"".join(file.read_bytes() for file in tmp_path.rglob("cache.db*"))
        store.close()
        assert not any(value[200:232] in left for value in items.values())


class TestDelete:
    def test_entries_go_by_key_at_every_level(self, tmp_path: Path) -> None:
        with PassageCache(tmp_path) as cache:
            keep(cache, "a", "b")
            keys = space().states_keys(["a", "a", "never seen"])
            assert cache.delete(keys) == 2  # in memory and in the store
            assert cache.delete(iter(keys)) == 0
            assert (held(cache.store), cache.stats().store.counters.corrupt) == (1, 0)

    @pytest.mark.parametrize("key", ["text", "A" * 64, 5, None])
    def test_what_is_no_key_is_an_error_and_nothing_goes(self, tmp_path: Path, key: Any) -> None:
        with PassageCache(tmp_path) as cache:
            keep(cache, "a")
            with pytest.raises(ValueError, match="64 hexadecimal digits.*forget"):
                cache.delete([*space().states_keys(["a"]), key])
            assert held(cache.store) == 1

    def test_discarded_entries_count_as_corrupt(self, tmp_path: Path) -> None:
        with PassageCache(tmp_path) as cache:
            keep(cache, "a")
            cache.discard(space().states_keys(["a"]))
            assert (held(cache.store), cache.stats().store.counters.corrupt) == (0, 1)


def two_models(folder: Path, size: int = 3000) -> tuple[DiskStore, dict[str, bytes], dict[str, bytes]]:
    """A store with entries of `space()` and of the model whose digest is zeros, in the database or in files."""
    store = DiskStore(folder)
    ours = frames(5)
    theirs = {key_of(number): value_of(key_of(number), size) for number in range(7)}
    store.put_many({**ours, **theirs})
    return store, ours, theirs


class TestModels:
    @pytest.mark.parametrize("size", [3000, 300_000])
    def test_heads_are_read_from_the_database_and_from_files(self, tmp_path: Path, size: int) -> None:
        store, ours, theirs = two_models(tmp_path, size)
        found = dict(heads(store))
        assert found.keys() == ours.keys() | theirs.keys()
        assert {key for key, head in found.items() if head and head.model == bytes(32)} == theirs.keys()
        assert {head.tokens for key, head in found.items() if head and key in ours} == {40}

    def test_of_a_file_only_the_head_is_read(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        store, _, _ = two_models(tmp_path, 300_000)
        read = StrictDisk._read
        sizes: list[int] = []

        def counting(path: str, count: int = -1) -> bytes:
            data = read(path, count)
            sizes.append(len(data))
            return data

        monkeypatch.setattr(StrictDisk, "_read", staticmethod(counting))
        assert len(list(heads(store))) == 12
        assert len(sizes) == 7
        assert max(sizes) < 1000

    def test_rows_that_are_gone_or_hold_no_bytes_have_no_head(self, tmp_path: Path) -> None:
        store, _, _ = two_models(tmp_path)
        store.close()
        with contextlib.closing(sqlite3.connect(tmp_path / "cache.db")) as connection, connection:
            connection.execute("UPDATE Cache SET value = NULL WHERE rowid = 1")
            connection.execute("UPDATE Cache SET value = 'text' WHERE rowid = 2")
        listing = heads(store)
        first = [next(listing)]
        assert store.delete(list(store.keys())) == 12
        found = dict([*first, *listing])
        assert len(found) == 12
        assert not any(found.values())
        store.put_many({key_of(1): value_of(key_of(1), 300_000)})
        [file] = tmp_path.glob("??/??/*.val")
        file.unlink()
        assert dict(heads(store)) == {key_of(1): None}

    def test_other_models_are_found_and_damaged_entries_belong_to_none(self, tmp_path: Path) -> None:
        store, ours, theirs = two_models(tmp_path)
        store.put_many({key_of(99): b"damaged"})
        mine = space().model
        assert keys_of_models(store, [mine]).keys() == {mine}
        assert sorted(keys_of_models(store, [mine])[mine]) == sorted(ours)
        others = keys_of_models(store, [mine], others=True)
        assert {model: sorted(keys) for model, keys in others.items()} == {bytes(32): sorted(theirs)}

    def test_any_store_can_tell(self) -> None:
        store = ByteStoreAdapter(DictByteStore())
        store.put_many(frames(100))
        record(store, [states_space()])
        assert len(keys_of_models(store, [space().model])[space().model]) == 100

    def test_what_cannot_be_read_stops_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        store, _, _ = two_models(tmp_path, 300_000)

        def fail(path: str, count: int = -1) -> bytes:
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(StrictDisk, "_read", staticmethod(fail))
        with pytest.raises(StoreError, match="Input/output error"):
            keys_of_models(store, [space().model], others=True)
        assert held(store) == 12

    def test_a_live_writer_loses_nothing(self, tmp_path: Path) -> None:
        """Another store writes entries of the model that stays, before and while the others are deleted."""
        store, ours, _ = two_models(tmp_path)
        more = frames(60)
        writer = DiskStore(tmp_path)
        began = threading.Event()

        def write() -> None:
            for key, data in more.items():
                writer.put_many({key: data})
                began.set()

        thread = threading.Thread(target=write)
        thread.start()
        began.wait()
        doomed = [key for keys in keys_of_models(store, [space().model], others=True).values() for key in keys]
        assert store.delete(doomed) == 7
        thread.join()
        assert set(store.keys()) == ours.keys() | more.keys()

    def test_entries_of_no_known_space_are_counted_by_model(self, tmp_path: Path) -> None:
        store, _, theirs = two_models(tmp_path)
        mine = space().model
        assert unsearchable(store, []) == {mine: 5, bytes(32): len(theirs)}
        assert unsearchable(store, [states_space()]) == {bytes(32): len(theirs)}
        for other in (states_space(dtype="bfloat16"), states_space(storage="int8"), states_space(max_length=39)):
            assert unsearchable(store, [other])[mine] == 5
        assert unsearchable(store, [Space(space(), TOKENS, Behind(4, (1,), "float32"))])[mine] == 5


class TestTransfer:
    def exported(self, tmp_path: Path) -> Path:
        with PassageCache(tmp_path / "from") as cache:
            keep(cache, "a", "b")
            report = export_shards(cache.store, tmp_path / "shards")
        assert (report.passages, report.spaces) == (2, 1)
        return tmp_path / "shards"

    def test_a_folder_that_imports_shards_can_forget(self, tmp_path: Path) -> None:
        shards = self.exported(tmp_path)
        store = DiskStore(tmp_path / "to")
        report = import_shards(store, [shards])
        assert (report.held, report.spaces, report.corrupt) == (2, 1, 0)
        assert PassageCache(tmp_path / "to").forget(["a"]).store.states == 1

    def test_records_of_other_models_stay_behind(self, tmp_path: Path) -> None:
        store = DiskStore(tmp_path / "from")
        store.put_many(frames(2))
        other = ModelIdentity(encoder="f" * 64, tokenizer="a" * 64, template="b" * 64)
        record(store, [states_space(), states_space(identity=other)])
        assert export_shards(store, tmp_path / "all").spaces == 2
        assert export_shards(store, tmp_path / "one", model=space().model).spaces == 1
        assert import_shards(DiskStore(tmp_path / "to"), [tmp_path / "all"], model=space().model).spaces == 1

    def test_a_forged_record_in_a_shard_is_left_out(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        import numpy as np
        from safetensors.numpy import save_file

        [(key, data)] = frames(1).items()
        file = tmp_path / "passages-00001.safetensors"
        save_file(
            {key: np.frombuffer(data, dtype=np.uint8)}, file, metadata={"key-space-x": "?", "key-space-y": "AAAA"}
        )
        report = import_shards(DiskStore(tmp_path / "to"), [file])
        assert (report.held, report.spaces, report.bad_shards) == (1, 0, ())
        assert caplog.text.count("is not kept") == 2

    def test_a_store_that_cannot_take_a_record_gets_the_entries(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        shards = self.exported(tmp_path)
        store = DiskStore(tmp_path / "to")
        store.put_many({})
        (tmp_path / "to" / RECORDS).write_text("in the way")
        report = import_shards(store, [shards])
        assert (report.held, report.spaces) == (2, 0)
        assert "cannot record a key space" in caplog.text
