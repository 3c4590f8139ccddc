"""Entries that were kept before there was a secret: adopted by choice, misses until then."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from cachekit import frames

from kalm_rag import PassageCache
from kalm_rag.cache import DiskStore, StoreError
from kalm_rag.cache.adopting import AdoptReport, adopt
from kalm_rag.cli import main

SECRET = b"s" * 32


def secret_frames(count: int, secret: bytes) -> dict[str, bytes]:
    from kalm_rag.cache.frame import Frame

    return {key: Frame.from_bytes(data, key).to_bytes(secret) for key, data in frames(count).items()}


def hits(folder: Path, secret: bytes | None) -> int:
    from kalm_rag.cache.frame import Frame, FrameError

    found = DiskStore(folder).get_many(list(frames(6)))
    good = 0
    for key, data in found.items():
        try:
            Frame.from_bytes(data, key, secret)
        except FrameError:
            continue
        good += 1
    return good


def test_entries_from_before_are_adopted_once(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    given = frames(6)
    own, other = secret_frames(6, SECRET), secret_frames(6, b"o" * 32)
    keys = list(given)
    store.put_many({key: given[key] for key in keys[:3]})
    store.put_many({keys[3]: own[keys[3]], keys[4]: other[keys[4]]})
    store.put_many({keys[5]: given[keys[5]][:-1]})
    assert adopt(store, SECRET) == AdoptReport(adopted=3, known=1, other=1, damaged=1)
    assert hits(tmp_path, SECRET) == 4
    assert adopt(store, SECRET) == AdoptReport(adopted=0, known=4, other=1, damaged=1)
    assert store.get_many([keys[4]]) == {keys[4]: other[keys[4]]}, "somebody else's entries stay as they are"


def test_the_log_says_how_to_adopt(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    DiskStore(tmp_path).put_many(frames(2))
    cache = PassageCache(tmp_path, secret=SECRET)
    with caplog.at_level(logging.WARNING):
        assert cache.get_many("states", list(frames(2)), lambda frame: frame) == {}
    assert "kalm-rag cache adopt" in caplog.text


def test_a_folder_that_may_not_be_written_to_is_refused(tmp_path: Path) -> None:
    DiskStore(tmp_path).put_many(frames(2))
    with pytest.raises(StoreError, match="read-only"):
        adopt(DiskStore(tmp_path, read_only=True), SECRET)
    assert hits(tmp_path, SECRET) == 0


def test_what_is_forgotten_meanwhile_does_not_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = DiskStore(tmp_path)
    store.put_many(frames(3))
    gone = next(iter(frames(3)))
    put = DiskStore.get_many
    asked = []

    def get_many(self: DiskStore, keys: list[str]) -> dict[str, bytes]:
        asked.append(keys)
        if len(asked) == 2:  # the look just before writing
            DiskStore(tmp_path).delete([gone])
        return put(self, keys)

    monkeypatch.setattr(DiskStore, "get_many", get_many)
    assert adopt(store, SECRET).adopted == 2
    assert gone not in set(store.keys())


def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = DiskStore(tmp_path)
    store.put_many(frames(3))
    monkeypatch.setattr(DiskStore, "put_many", lambda self, items: 1)
    with pytest.raises(StoreError, match="kept 1 of 3 entries; run it again once there is room"):
        adopt(store, SECRET)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    DiskStore(tmp_path / "cache").put_many(frames(2))
    file = tmp_path / "secret"
    file.write_bytes(SECRET + b"\n")

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["kalm-rag", "cache", "adopt", "--cache", str(tmp_path / "cache"), *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        output = capsys.readouterr()
        return int(ended.value.code or 0), output.out + output.err

    code, text = run()
    assert code != 0
    assert "adopt needs a secret" in text
    code, text = run("--secret-file", str(file))
    assert (code, text) == (0, "2 entries adopted, 0 had this secret already\n")
    assert hits(tmp_path / "cache", SECRET) == 2
    file.write_bytes(b"")
    code, text = run("--secret-file", str(file))
    assert code != 0
    assert "empty file" in text
