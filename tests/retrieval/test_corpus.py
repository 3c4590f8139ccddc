"""Reading passages from files."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from kalm_rag.demo_data import load_demo
from kalm_rag.retrieval.corpus import Record, read_beir, read_passages


def test_json_lines(tmp_path: Path) -> None:
    lines = [{"_id": "1", "title": "T", "text": "x"}, {"id": 2, "contents": "y"}, "z", {"text": "w", "title": ""}]
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    assert list(read_passages(file)) == [Record("1", "T x"), Record("2", "y"), Record(None, "z"), Record(None, "w")]


def test_text_folder_beir_folder_and_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "b.txt").write_text("one\n\n  two \n")
    assert [record.text for record in read_passages(tmp_path / "b.txt")] == ["one", "  two "]
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.md").write_text("# whole\nfile")
    assert list(read_passages(tmp_path)) == [Record("b.txt", "one\n\n  two \n"), Record("sub/c.md", "# whole\nfile")]
    (tmp_path / "corpus.jsonl").write_text('{"_id": "d", "text": "beir"}')
    assert list(read_passages(tmp_path)) == [Record("d", "beir")]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b'{"text": "json"}\n')))
    assert list(read_passages("-")) == [Record(None, "json")]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"plain\n")))
    assert list(read_passages("-")) == [Record(None, "plain")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"text"', r"a.jsonl, line 2: not JSON"),
        (b"[1]", r"a.jsonl, line 1: expected a string or an object, got list"),
        (
            b'{"body": "a"}',
            r"a.jsonl, line 1: no text under text or .*; its fields are .*: name the right one",
        ),
        (b'{"text": 3}', "line 1: no text"),
        (b'{"text": "\xff"}', "not UTF-8"),
    ],
)
def test_bad_lines_name_file_and_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(read_passages(tmp_path / "a.jsonl"))


def test_missing_and_empty(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        list(read_passages(tmp_path / "x.jsonl"))
    with pytest.raises(FileNotFoundError, match="neither corpus.jsonl nor any .txt or .md"):
        list(read_passages(tmp_path))


def test_demo_corpus_is_consistent() -> None:
    demo = load_demo()
    assert (len(demo.passages), len(demo.queries)) == (175, 44)
    assert demo.qrels.keys() == demo.queries.keys()
    assert all(passage in demo.passages for judged in demo.qrels.values() for passage in judged)


def test_bad_qrels(tmp_path: Path) -> None:
    for name in ("corpus.jsonl", "queries.jsonl"):
        (tmp_path / name).write_text('{"_id": "1", "text": "a"}')
    (tmp_path / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\n1\t1\tmany\n")
    with pytest.raises(ValueError, match="line 2: expected query-id, corpus-id and an integer score"):
        read_beir(tmp_path)
