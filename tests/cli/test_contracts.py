"""What the commands promise about files, terminals and exit codes, whatever they are given."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cachekit import frames, key_of, reseal, unpack, value_of
from safetensors.torch import save_file

from kalm_rag.cache import DiskStore, MemoryStore, StoreError, StoreStats
from kalm_rag.cache.frame import FrameError
from kalm_rag.cache.preflight import check_room, check_writable
from kalm_rag.cache.transfer import export_shards, import_shards
from kalm_rag.evaluation.outputs import MANIFEST, claim, replace_files
from kalm_rag.retrieval.corpus import Corpus, Record, read_passages

SECRET = b"0123456789abcdef"


def kalm(*arguments: object, stdin: bytes = b"", **environment: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "kalm_rag", *map(str, arguments)]
    return subprocess.run(
        command, input=stdin, capture_output=True, env={**os.environ, "COLUMNS": "80", **environment}, check=False
    )


class TestReading:
    @pytest.mark.parametrize(
        ("name", "content", "expected"),
        [
            ("a.JSONL", b'{"_id": "x", "text": "one"}\n"two"\n', [("x", "one"), (None, "two")]),
            ("a.json", b'["one", {"id": 7, "contents": "two"}]', [(None, "one"), ("7", "two")]),
            ("a.csv", b'\xef\xbb\xbfid,text\n1,"one, and a\nline"\n2,two\n', [("1", "one, and a\nline"), ("2", "two")]),
            ("a.TSV", b"id\ttitle\ttext\r\n1\tA\tone\r\n", [("1", "A one")]),
            ("a.txt", b'{"text": "stays text"}\nplain\r\n', [(None, '{"text": "stays text"}'), (None, "plain")]),
            ("a", "caf\u00e9\n\n".encode(), [(None, "caf\u00e9")]),
        ],
    )
    def test_formats_by_their_ending(
        self, tmp_path: Path, name: str, content: bytes, expected: list[tuple[str | None, str]]
    ) -> None:
        (tmp_path / name).write_bytes(content)
        assert list(read_passages(tmp_path / name)) == [Record(*item) for item in expected]

    def test_parquet(self, tmp_path: Path) -> None:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        table = pyarrow.table({"docid": [1, 2], "body": ["one", "two"]})
        parquet.write_table(table, tmp_path / "a.parquet")
        assert list(read_passages(tmp_path / "a.parquet", text_field="body")) == [
            Record("1", "one"),
            Record("2", "two"),
        ]
        (tmp_path / "b.parquet").write_bytes(b"PAR1 and nothing more")
        with pytest.raises(ValueError, match="b.parquet cannot be read as Parquet"):
            list(read_passages(tmp_path / "b.parquet"))

    def test_parquet_without_its_reader_names_the_way_out(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "pyarrow", None)
        (tmp_path / "a.parquet").write_bytes(b"PAR1")
        with pytest.raises(ValueError, match="needs the package pyarrow: pip install pyarrow"):
            list(read_passages(tmp_path / "a.parquet"))

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("a.pdf", b"%PDF-1.7 ...", "a.pdf is not text: it begins with b'%PDF-1.7'"),
            ("a.txt", b"\x1f\x8b\x08 gz", "is not text"),
            ("a.txt", b"a\x00b\n", "is not text"),
            ("a.txt", "text".encode("utf-16"), "is UTF-16 text; convert it to UTF-8"),
            ("a.txt", b"fine\nfine\nbad \xe9\n", r"a.txt, line 3: not UTF-8 text .* at byte 4 of the line"),
            ("a.json", b'{"text": "a"}', "expected an array of strings or objects, got dict; one object a line is"),
            ("a.json", b"[" * 100_000, "a.json: not JSON"),
            ("a.jsonl", b"[" * 100_000, "a.jsonl, line 1: not JSON"),
            ("a.csv", b"id,text\n1\n", "a.csv, line 2: 2 columns are expected"),
            (
                "a.csv",
                b"id,body\n1,a\n",
                r"no text under text or .*; its fields are \['body'",
            ),
            ("a.csv", b'id,text\n1,"never closed', "line 2: cannot be read as a table"),
            ("a.csv", b"text," + b"x" * 200_000, "line 1: cannot be read as a table"),
        ],
    )
    def test_what_cannot_be_read_is_refused_by_name(
        self, tmp_path: Path, name: str, content: bytes, message: str
    ) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            list(read_passages(tmp_path / name))

    def test_fields_can_be_named(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_text('{"key": "x", "body": "one", "text": "other"}')
        assert list(read_passages(tmp_path / "a.jsonl", "auto", "body", "key")) == [Record("x", "one")]
        with pytest.raises(ValueError, match="no id under name; its fields are"):
            list(read_passages(tmp_path / "a.jsonl", id_field="name"))
        with pytest.raises(ValueError, match=r"file_format must be one of auto, jsonl, .*, got 'xml'"):
            list(read_passages(tmp_path / "a.jsonl", "xml"))

    @pytest.mark.parametrize(
        ("stdin", "arguments", "texts"),
        [
            ("\ufeffcaf\u00e9 one\n".encode(), (), ["caf\u00e9 one"]),
            (b'"a string"\n{"text": "an object"}\n', (), ["a string", "an object"]),
            (b'"quoted" and more\n', (), ['"quoted" and more']),
            (b"text\none\n", ("--format", "csv"), ["one"]),
            (b'["one", {"text": "two"}]', (), ["one", "two"]),
            (b'[\n  "one",\n  "two"\n]\n', (), ["one", "two"]),
            (b"[1] a reference\n", (), ["[1] a reference"]),
            (b'["no json\n', ("--format", "text"), ['["no json']),
        ],
    )
    def test_standard_input_is_read_like_a_file_whatever_the_locale(
        self, stdin: bytes, arguments: tuple[str, ...], texts: list[str]
    ) -> None:
        environment = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "latin-1"}
        done = kalm("rank", "q", "-", "--model", "mini", "--json", *arguments, stdin=stdin, **environment)
        assert done.returncode == 0, done.stderr
        assert sorted(hit["text"] for hit in json.loads(done.stdout)) == sorted(texts)


HOSTILE = "\x1b]0;title\x07 \x1b[2J \x9b31m \u202eabc\u2066 \x7f end"


class TestTerminal:
    def test_control_characters_are_written_out(self, tmp_path: Path) -> None:
        corpus = tmp_path / "a.jsonl"
        corpus.write_text(json.dumps({"_id": f"id{HOSTILE}", "text": HOSTILE}) + "\n")
        shown = kalm("rank", "q", corpus, "--model", "mini").stdout.decode()
        machine = kalm("rank", "q", corpus, "--model", "mini", "--json").stdout.decode()
        failed = kalm("rank", "q", tmp_path / "none\x1b[2J", "--model", "mini").stderr.decode()
        for text in (shown, machine, failed):
            assert not [
                letter for letter in text if (letter < " " and letter != "\n") or letter in "\x7f\x9b\u202e\u2066"
            ]
        assert "\\x1b" in shown
        assert "\\x1b" in failed
        [hit] = json.loads(machine)
        assert (hit["text"], hit["id"]) == (HOSTILE, f"id{HOSTILE}")

    def test_text_from_a_file_stays_in_its_cell(self, tmp_path: Path) -> None:
        ids = ["a\nFAKE 0.9999 x", "b\ty"]
        (tmp_path / "a.jsonl").write_text("".join(json.dumps({"_id": name, "text": "t"}) + "\n" for name in ids))
        shown = kalm("rank", "q", tmp_path / "a.jsonl", "--model", "mini").stdout.decode().splitlines()
        assert len(shown) == 1 + len(ids)
        assert [line for line in shown if "a\\nFAKE 0.9999 x" in line]
        assert [line for line in shown if "b\\ty" in line]

    def test_names_of_folders_are_no_markup_and_steer_nothing(self, tmp_path: Path) -> None:
        DiskStore(tmp_path / "[bold]\x1b[2J").put_many(frames(1))
        place = tmp_path / "[bold]\x1b[2J"
        (place / "passages-1.safetensors").write_bytes(b"no shard")
        target = tmp_path / "other"
        for arguments in (
            ("cache", "info", "--cache", place),
            ("cache", "clear", "--cache", place),
            ("cache", "import", place, "--any-model", "--cache", target),
        ):
            done = kalm(*arguments, stdin=b"n\n")
            shown = (done.stdout + done.stderr).decode()
            assert "\x1b" not in shown
            assert "[bold]\\x1b[2J" in shown

    def test_json_holds_half_characters_as_escapes(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_text('{"text": "half \\ud800 character"}\n')
        done = kalm("rank", "q", tmp_path / "a.jsonl", "--model", "mini", "--json", PYTHONIOENCODING="utf-8")
        assert json.loads(done.stdout)[0]["text"] == "half \ud800 character"

    @pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
    def test_a_stream_that_cannot_hold_the_text_is_not_fatal(self, tmp_path: Path, encoding: str) -> None:
        (tmp_path / "a.txt").write_text("\u4e2d\u6587 \U0001f99c\n", "utf-8")
        environment = {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
        shown = kalm("rank", "q", tmp_path / "a.txt", "--model", "mini", **environment)
        machine = kalm("rank", "q", tmp_path / "a.txt", "--model", "mini", "--json", **environment)
        assert (shown.returncode, machine.returncode) == (0, 0), shown.stderr + machine.stderr
        assert json.loads(machine.stdout)[0]["text"] == "\u4e2d\u6587 \U0001f99c"


class TestEncode:
    @pytest.fixture
    def corpus(self, tmp_path: Path) -> Path:
        path = tmp_path / "corpus.txt"
        path.write_text("".join(f"passage number {number} about nothing\n" for number in range(40)))
        return path

    def test_the_last_line_says_what_is_held(self, corpus: Path, tmp_path: Path) -> None:
        for _ in range(2):
            done = kalm("encode", corpus, "--model", "mini", "--cache", tmp_path / "cache")
            assert done.returncode == 0, done.stderr
            assert done.stdout.decode().splitlines()[-1] == "40 of 40 passages held"

    def test_a_place_that_cannot_be_written_to_is_known_before_the_model_loads(
        self, corpus: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "file").write_text("in the way")
        for place in ("/proc/none", tmp_path / "file"):
            done = kalm("encode", corpus, "--model", "no/such-model", "--cache", place)
            assert done.returncode == 2
            assert b"such-model" not in done.stderr
            assert str(place).encode() in done.stderr

    def test_a_corpus_above_the_limit_is_refused(self, corpus: Path, tmp_path: Path) -> None:
        done = kalm("encode", corpus, "--model", "mini", "--cache", tmp_path / "cache", "--limit-gb", "0.00005")
        assert done.returncode == 2
        assert b"more than the limit of the cache, 50.0 KB" in done.stderr
        assert b"--limit-gb" in done.stderr
        assert DiskStore(tmp_path / "cache").stats().entries == 0

    @pytest.mark.parametrize("limit", ["-1", "0", "nan", "inf"])
    def test_a_limit_is_refused_in_the_unit_it_was_given_in(self, corpus: Path, limit: str) -> None:
        done = kalm("encode", corpus, "--model", "mini", "--limit-gb", limit)
        assert done.returncode == 2
        rule = "--limit-gb must be a number of GB above 0 and at most 1,000,000,000"
        assert f"{rule}, got {limit}".encode() in done.stderr

    def test_a_corpus_that_is_missing_is_known_before_the_model_loads(self, tmp_path: Path) -> None:
        for options in ((), ("--dry-run",)):
            done = kalm("encode", tmp_path / "none.txt", "-m", "no/such-model", "--cache", tmp_path / "cache", *options)
            assert done.returncode == 2
            assert b"none.txt" in done.stderr
            assert b"such-model" not in done.stderr

    @staticmethod
    def encode(
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object
    ) -> tuple[int, str, str]:
        """The exit status, the last line, and the errors of the command, run in this process."""
        from kalm_rag import cli

        monkeypatch.setattr(sys, "argv", ["kalm-rag", "encode", *map(str, arguments), "-m", "mini"])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        shown = capsys.readouterr()
        return int(stopped.value.code or 0), shown.out.splitlines()[-1], shown.err

    def test_a_full_cache_takes_a_corpus_that_fits(
        self, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        place = tmp_path / "cache"
        assert self.encode(monkeypatch, capsys, corpus, "--cache", place)[0] == 0
        store = DiskStore(place)
        full = store.stats().bytes or 0
        before = set(store.keys())
        store.close()
        other = tmp_path / "other.txt"
        other.write_text(corpus.read_text().replace("nothing", "something"))
        limit = ("--limit-gb", 1.5 * full / 1e9)
        assert self.encode(monkeypatch, capsys, other, "--cache", place, *limit)[:2] == (0, "40 of 40 passages held")
        assert before - set(DiskStore(place).keys()), "the first corpus made room"

    def test_what_leaves_while_the_corpus_is_encoded_is_not_held(
        self, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        from kalm_rag.cache import preflight

        place = tmp_path / "cache"
        assert self.encode(monkeypatch, capsys, corpus, "--cache", place)[0] == 0
        limit = ("--limit-gb", 1.2 * (DiskStore(place).stats().bytes or 0) / 1e9)
        both = tmp_path / "both.txt"  # its first half is what the cache stored first, and is found there
        more = "".join(f"{number} another passage about something\n" for number in range(200))
        both.write_text(corpus.read_text() + more)
        monkeypatch.setattr(preflight, "check_room", lambda *_: None)  # an estimate may be wrong
        for source in (both, "-"):
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(both.read_bytes())))
            status, last, errors = self.encode(monkeypatch, capsys, source, "--cache", place, *limit)
            assert status == 1
            assert "the cache reached its limit" in errors
            assert "--limit-gb" in errors
            if source != "-":
                held = DiskStore(place).stats().entries
                assert last == f"{held} of 240 passages held"
            else:
                assert last.startswith("at most ")

    def test_what_was_not_kept_is_an_exit_status(
        self, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        from kalm_rag import cli

        put, calls = DiskStore.put_many, 0

        def put_many(store: DiskStore, items: Any) -> int:
            nonlocal calls
            calls += 1
            if calls > 1:  # the probe is kept
                raise StoreError("the disk is on fire")
            return put(store, items)

        monkeypatch.setattr(DiskStore, "put_many", put_many)
        monkeypatch.setattr(sys, "argv", ["kalm-rag", "encode", str(corpus), "-m", "mini", "--cache", str(tmp_path)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code == 1
        shown = capsys.readouterr()
        assert shown.out.splitlines()[-1] == "0 of 40 passages held"
        assert "the cache did not keep 32 passages" in shown.err, "it stops after the first few"

    def test_half_characters_are_read_and_told(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_text('{"text": "half \\ud800 character"}\n{"text": "whole"}\n')
        done = kalm("encode", tmp_path / "a.jsonl", "--model", "mini", "--cache", tmp_path / "cache")
        assert done.returncode == 0, done.stderr
        assert "1 hold half a surrogate pair" in done.stdout.decode()


class Forgetful(MemoryStore):
    """Says that it keeps, and does not."""

    def put_many(self, items: Any) -> int:
        return len(items)


class TestPreflight:
    def test_a_store_that_keeps_nothing(self, tmp_path: Path) -> None:
        for store in (Forgetful(1 << 20), MemoryStore(0)):
            with pytest.raises(StoreError, match="does not keep what is written to it"):
                check_writable(store)
        DiskStore(tmp_path).put_many(frames(1))
        with pytest.raises(StoreError, match="is read-only, so it would keep nothing"):
            check_writable(DiskStore(tmp_path, read_only=True))

    def test_a_probe_leaves_nothing_behind(self, tmp_path: Path) -> None:
        store = DiskStore(tmp_path)
        check_writable(store)
        assert store.stats().entries == 0

    def test_a_disk_without_room(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        store = DiskStore(tmp_path)
        check_writable(store)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
        check_room(store, 2000, 1000)
        with pytest.raises(StoreError, match="the new passages take about 2.5 KB, and the disk .* has 1.0 KB left"):
            check_room(store, 3000, 2500)


class TestImport:
    def test_entries_that_verify_are_not_replaced(self, tmp_path: Path) -> None:
        plain = frames(4)
        export_shards(_holding(plain), tmp_path)
        tagged = {key: reseal(data, key, SECRET) for key, data in list(plain.items())[:2]}
        store = _holding(tagged)
        report = import_shards(store, [tmp_path])
        assert (report.known, report.passages, report.lost) == (2, 2, 0)
        assert store.get_many(list(tagged)) == tagged

    def test_a_secret_seals_what_is_imported(self, tmp_path: Path) -> None:
        plain = frames(3)
        export_shards(_holding(plain), tmp_path)
        store = _holding(dict(list(plain.items())[:1]))
        assert import_shards(store, [tmp_path], secret=SECRET).passages == 3, "one without a tag is replaced"
        for key, data in store.get_many(list(plain)).items():
            assert unpack(data, key, SECRET).payload == unpack(plain[key], key).payload
            with pytest.raises(FrameError, match="wrong tag"):
                unpack(data, key, b"another-secret-16")

    def test_tensors_that_are_no_frames_are_counted_and_what_follows_is_read(self, tmp_path: Path) -> None:
        import torch

        values = frames(3)
        odd: dict[str, torch.Tensor] = {
            key_of(100): torch.zeros(4, dtype=torch.bfloat16),
            key_of(101): torch.zeros(4).to(torch.float8_e4m3fn),
            key_of(102): torch.zeros(2, 2, dtype=torch.uint8),
            key_of(103): torch.zeros(0, dtype=torch.uint8),
        }
        good = {key: torch.frombuffer(bytearray(data), dtype=torch.uint8) for key, data in values.items()}
        save_file({**odd, **good}, tmp_path / "passages-00001.safetensors")
        save_file({key_of(104): torch.zeros(4)}, tmp_path / "passages-00002.safetensors")
        more = frames(5)
        last = {key: torch.frombuffer(bytearray(more[key]), dtype=torch.uint8) for key in more if key not in values}
        save_file(last, tmp_path / "passages-00003.safetensors")
        report = import_shards(MemoryStore(1 << 30), [tmp_path], model=unpack(*next(iter(values.items()))[::-1]).model)
        assert (report.passages, report.corrupt, report.bad_shards) == (5, 5, ())

    def test_a_tensor_with_a_name_that_is_no_key_is_counted(self, tmp_path: Path) -> None:
        import torch

        save_file({"encoder.weight": torch.zeros(4)}, tmp_path / "passages-00001.safetensors")
        assert import_shards(MemoryStore(1 << 20), [tmp_path]).corrupt == 1
        done = kalm("cache", "import", tmp_path, "--any-model", "--cache", tmp_path / "cache")
        assert done.returncode == 1
        assert b"left out: 1 that are damaged or not encoded passages" in done.stdout

    def test_an_entry_in_two_shards_counts_once(self, tmp_path: Path) -> None:
        items = frames(5)
        export_shards(_holding(items), tmp_path / "one")
        export_shards(_holding(dict(list(items.items())[:3])), tmp_path / "two")
        report = import_shards(MemoryStore(1 << 30), [tmp_path / "one", tmp_path / "two"])
        assert (report.passages, report.known, report.held, report.verified) == (5, 0, 5, 5)

    def test_what_is_given_up_during_the_import_is_not_held(self, tmp_path: Path) -> None:
        items = frames(200, tokens=400)
        size = sum(map(len, items.values()))
        export_shards(_holding(items), tmp_path / "shards", shard_bytes=size // 4)
        small = DiskStore(tmp_path / "small", limit=size // 2)
        with pytest.raises(StoreError, match="reached its limit of .* and gave up entries of this import, which stops"):
            import_shards(small, [tmp_path / "shards"])
        # A full store makes room for the import by giving up what it held before.
        full = DiskStore(tmp_path / "full")
        full.put_many({key_of(number): value_of(key_of(number), 40_000) for number in range(100)})
        full.close()
        full = DiskStore(tmp_path / "full", limit=full.stats().bytes)
        report = import_shards(full, [tmp_path / "shards"])
        assert full.stats().evicted > 0
        assert (report.passages, report.held, report.verified) == (200, 200, 200)

    def test_entries_known_before_that_leave_during_the_import_are_not_held(self, tmp_path: Path) -> None:
        store = _Evicting(1 << 30)
        items = frames(150)
        export_shards(_holding(items), tmp_path)
        known = dict(list(items.items())[:100])
        store.put_many(known)
        store.doomed = [key for key in sorted(items)[:64] if key in known]  # among the first that the import meets
        lost = len(store.doomed)
        report = import_shards(store, [tmp_path])
        assert lost > 0
        assert (report.verified, report.held) == (150, 150 - lost)

    def test_shards_above_the_limit_are_refused_before_anything_is_stored(self, tmp_path: Path) -> None:
        export_shards(_holding(frames(50, tokens=400)), tmp_path / "shards")
        command = ("cache", "import", tmp_path / "shards", "--any-model", "--cache", tmp_path / "cache")
        done = kalm(*command, "--limit-gb", "0.0001")
        assert done.returncode == 2
        assert b"more than the limit of the cache, 100.0 KB" in done.stderr
        assert DiskStore(tmp_path / "cache").stats().entries == 0
        assert kalm(*command, "--limit-gb", "1").stdout.endswith(b"50 of 50 passages held\n")

    def test_every_source_is_looked_for_first(self, tmp_path: Path) -> None:
        export_shards(_holding(frames(3)), tmp_path)
        store = MemoryStore(1 << 30)
        with pytest.raises(FileNotFoundError):
            import_shards(store, [tmp_path, tmp_path / "none"])
        assert list(store.keys()) == []

    def test_an_error_of_the_store_is_none_of_the_shard(self, tmp_path: Path) -> None:
        export_shards(_holding(frames(3)), tmp_path)
        with pytest.raises(StoreError, match="the store cannot be written to .*no space"):
            import_shards(_Full(1 << 30), [tmp_path])

    @pytest.mark.parametrize("name", ["mine.txt", "kalm-rag-cache.json", "passages-00001.safetensors"])
    def test_an_export_goes_into_an_empty_folder_only(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).write_text("mine")
        with pytest.raises(FileExistsError, match="is not empty .*; export into an empty folder"):
            export_shards(_holding(frames(3)), tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [name]

    def test_a_store_that_keeps_nothing_stops_it(self, tmp_path: Path) -> None:
        export_shards(_holding(frames(3)), tmp_path)
        with pytest.raises(StoreError, match="the store kept none of 3 entries; it holds 0, and the import stops here"):
            import_shards(Forgetful(1 << 30), [tmp_path])

    def test_the_command_says_what_is_held(self, tmp_path: Path) -> None:
        export_shards(_holding(frames(3)), tmp_path / "shards")
        for _ in range(2):
            done = kalm("cache", "import", tmp_path / "shards", "--any-model", "--cache", tmp_path / "cache")
            assert done.returncode == 0, done.stderr
            assert done.stdout.decode().splitlines()[-1] == "3 of 3 passages held"
        done = kalm("cache", "import", tmp_path / "shards", "--any-model", "--cache", "/proc/none")
        assert done.returncode == 2


class _Full(MemoryStore):
    """Cannot be written to."""

    def put_many(self, items: Any) -> int:
        raise OSError("no space left on the device")


class _Evicting(MemoryStore):
    """Gives up some of its older entries when it is written to after `doomed` was set."""

    doomed: Sequence[str] = ()
    gone = 0

    def put_many(self, items: Any) -> int:
        kept = super().put_many(items)
        self.gone += self.delete(self.doomed)
        self.doomed = ()
        return kept

    def stats(self) -> StoreStats:
        return replace(super().stats(), evicted=self.gone)


def _holding(items: dict[str, bytes]) -> MemoryStore:
    store = MemoryStore(1 << 30)
    store.put_many(items)
    return store


class TestOutputFolder:
    def test_a_folder_with_other_files_is_refused_and_left_alone(self, tmp_path: Path) -> None:
        (tmp_path / "plots").mkdir()
        (tmp_path / "plots" / "mine.png").write_text("mine")
        with pytest.raises(ValueError, match=r"holds no evaluation of kalm-rag \(it has \['plots'\]\)"):
            claim(tmp_path)
        assert [path.name for path in tmp_path.rglob("*")] == ["plots", "mine.png"]

    def test_only_its_own_files_are_replaced_and_deleted(self, tmp_path: Path) -> None:
        claim(tmp_path)
        replace_files(tmp_path, "page", {"report.html": b"1", "plots/a.png": b"1", "plots/b.png": b"1"})
        replace_files(tmp_path, "numbers", {"runs/a.trec": b"1"})
        (tmp_path / "plots" / "mine.png").write_text("mine")
        (tmp_path / "runs" / "my.trec").write_text("mine")
        claim(tmp_path)
        replace_files(tmp_path, "page", {"report.html": b"2", "plots/a.png": b"2"})
        names = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
        assert names == {MANIFEST, "report.html", "plots/a.png", "plots/mine.png", "runs/a.trec", "runs/my.trec"}
        with pytest.raises(FileExistsError, match=r"my.trec was not written by this evaluation; move it"):
            replace_files(tmp_path, "numbers", {"runs/my.trec": b"3"})
        assert (tmp_path / "runs" / "my.trec").read_text() == "mine"

    def test_nothing_is_written_through_a_link(self, tmp_path: Path) -> None:
        elsewhere, out = tmp_path / "elsewhere", tmp_path / "out"
        elsewhere.mkdir()
        claim(out)
        (out / "plots").symlink_to(elsewhere)
        with pytest.raises(FileExistsError, match="plots/a.png leads out of the folder of this evaluation"):
            replace_files(out, "page", {"plots/a.png": b"1"})
        assert list(elsewhere.iterdir()) == []

    def test_a_file_is_no_place_for_results(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("mine")
        with pytest.raises(ValueError, match="the place for results '.*file' is a file; give a folder"):
            claim(tmp_path / "file")

    def test_a_list_edited_by_hand_deletes_nothing_outside(self, tmp_path: Path) -> None:
        victim = tmp_path / "victim"
        victim.write_text("precious")
        out = tmp_path / "out"
        claim(out)
        (out / "link").symlink_to(victim)
        names = ["../victim", str(victim), "link/../../victim"]
        (out / MANIFEST).write_text(json.dumps({"what": "", "files": {"page": names}}))
        replace_files(out, "page", {})
        assert victim.read_text() == "precious"

    def test_inputs_are_never_in_it(self, tmp_path: Path) -> None:
        claim(tmp_path / "out")
        run = tmp_path / "out" / "runs" / "first.trec"
        for given in (run, tmp_path / "out"):
            with pytest.raises(ValueError, match="holds the input"):
                claim(tmp_path / "out", [None, given])
        claim(tmp_path / "out", [tmp_path / "corpus"])

    def test_files_of_a_run_that_was_killed_are_its_own(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from kalm_rag.evaluation import outputs

        claim(tmp_path)
        replace, written = outputs.replace_file, []

        def killed(path: Path, content: bytes) -> None:
            if len(written) == 2:
                raise KeyboardInterrupt
            written.append(path)
            replace(path, content)

        with monkeypatch.context() as patched:
            patched.setattr(outputs, "replace_file", killed)
            with pytest.raises(KeyboardInterrupt):
                replace_files(tmp_path, "page", {"a.png": b"1", "b.png": b"1"})
        replace_files(tmp_path, "page", {"b.png": b"2"})
        assert not (tmp_path / "a.png").exists()


@pytest.fixture
def collection(tmp_path: Path) -> Callable[[dict[str, str]], Path]:
    def make(queries: dict[str, str]) -> Path:
        folder = tmp_path / "collection"
        folder.mkdir()
        texts = {
            "p1": "\u6771\u4eac\u306f\u65e5\u672c\u306e\u9996\u90fd\u3067\u3042\u308b",
            "p2": "a cat sat on the mat",
        }
        for name, values in (("corpus", texts), ("queries", queries)):
            lines = [json.dumps({"_id": key, "text": value}) for key, value in values.items()]
            (folder / f"{name}.jsonl").write_text("\n".join(lines))
        judged = "\n".join(f"{key}\tp1\t1" for key in queries)
        (folder / "qrels.tsv").write_text(f"query-id\tcorpus-id\tscore\n{judged}\n")
        return folder

    return make


def test_a_first_stage_that_finds_nothing_is_told_before_any_work(collection: Any, tmp_path: Path) -> None:
    folder = collection({"q": "\uc11c\uc6b8\uc740 \uc5b4\ub514"})
    done = kalm("eval", folder, "--out", tmp_path / "out", "--ratio", "4")
    assert done.returncode == 2
    assert b"BM25 finds no candidate for any of the 1 queries, so there is nothing to rerank" in done.stderr
    assert not (tmp_path / "out").exists()


def test_queries_without_candidates_are_told_and_count_as_nothing_found(collection: Any, tmp_path: Path) -> None:
    folder = collection({"q": "\uc11c\uc6b8\uc740 \uc5b4\ub514", "r": "cat"})
    done = kalm("eval", folder, "--out", tmp_path / "out", "--ratio", "4", "--json")
    assert done.returncode == 0, done.stderr
    assert b"1 of 2 queries have no candidates of BM25; they count as 0" in done.stderr
    assert json.loads(done.stdout)["queries"] == 2


def test_eval_refuses_a_folder_that_is_not_its_own(collection: Any, tmp_path: Path) -> None:
    folder = collection({"r": "cat"})
    (tmp_path / "out" / "plots").mkdir(parents=True)
    (tmp_path / "out" / "plots" / "mine.png").write_text("mine")
    (tmp_path / "out" / "report.html").write_text("mine")
    for out in (tmp_path / "out", folder):
        done = kalm("eval", folder, "--out", out, "--ratio", "4")
        assert done.returncode == 2, done.stderr
    assert (tmp_path / "out" / "report.html").read_text() == "mine"
    assert (tmp_path / "out" / "plots" / "mine.png").exists()
    assert sorted(path.name for path in folder.iterdir()) == ["corpus.jsonl", "qrels.tsv", "queries.jsonl"]


@pytest.mark.parametrize("package", ["ir_measures", "bm25s"])
def test_demo_without_its_extra_names_it(
    package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from kalm_rag import cli

    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(sys, "argv", ["kalm-rag", "demo"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "pip install 'kalm-rag[demo]'" in capsys.readouterr().err


def test_cache_commands_without_a_home_folder_name_the_way_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from kalm_rag import cli

    monkeypatch.setattr("kalm_rag.cache.local.passages_dir", lambda: None)
    monkeypatch.setattr(sys, "argv", ["kalm-rag", "cache", "info"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "no home folder, so there is no default cache; name a folder with --cache" in capsys.readouterr().err


def test_eval_without_its_first_stage_names_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from kalm_rag import cli

    monkeypatch.setitem(sys.modules, "bm25s", None)
    monkeypatch.setattr(sys, "argv", ["kalm-rag", "eval", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit):
        cli.main()
    assert "pip install 'kalm-rag[eval]'" in capsys.readouterr().err


def test_an_experiment_without_queries_is_refused_when_it_is_made() -> None:
    from kalm_rag.evaluation import Candidates, Experiment, Metrics, System

    empty = Candidates("none", {}, {}, ())
    with pytest.raises(ValueError, match="candidates must hold at least one query, got none"):
        Experiment(Corpus({"p": "a"}, {}, {}), empty, [System("mini")], Metrics(["nDCG@10"]))


def test_eval_shows_its_folder_without_control_characters(collection: Any, tmp_path: Path) -> None:
    done = kalm("eval", collection({"r": "cat"}), "--out", tmp_path / "o\x1b[2J", "--ratio", "4")
    assert done.returncode == 0, done.stderr
    assert b"\x1b" not in done.stdout
    assert b"o\\x1b[2J" in done.stdout


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="makes a named pipe")
def test_a_pipe_among_shards_does_not_block(tmp_path: Path) -> None:
    export_shards(_holding(frames(3)), tmp_path / "shards")
    os.mkfifo(tmp_path / "shards" / "passages-00000.safetensors")
    report = import_shards(MemoryStore(1 << 30), [tmp_path / "shards"])
    assert (report.passages, len(report.bad_shards)) == (3, 1)


@pytest.mark.parametrize(
    "arguments",
    [("cache", "export", "", "--cache", "CACHE"), ("eval", "--out", ""), ("eval", "--cache", ""), ("rank", "q", "")],
)
def test_an_empty_path_is_an_error_and_writes_nothing(
    tmp_path: Path, arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")]))
    DiskStore(tmp_path / "cache").put_many(frames(1))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    done = kalm(*(str(tmp_path / "cache") if part == "CACHE" else part for part in arguments))
    assert done.returncode == 2
    assert b"got ''" in done.stderr or b"is empty" in done.stderr
    assert not list((tmp_path / "here").glob("*.db")) + list((tmp_path / "here").glob("*.safetensors"))


def test_rank_tells_what_it_repaired(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "half \\ud800 character"}\n{"text": "whole"}\n')
    shown = kalm("rank", "q", tmp_path / "a.jsonl", "--model", "mini")
    assert "1 passages hold half a surrogate pair" in shown.stdout.decode()
    hits = json.loads(kalm("rank", "q", tmp_path / "a.jsonl", "--model", "mini", "--json").stdout)
    assert {hit["passage_repaired"] for hit in hits} == {True, False}
