"""The digest that says which encodings are interchangeable."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from kalm_rag import KaLMReranker
from kalm_rag import scorer as scorer_module
from kalm_rag.errors import CheckpointError
from kalm_rag.model import identity as identity_module
from kalm_rag.model.checkpoint import find_checkpoint
from kalm_rag.model.identity import identify, tagged_digest
from kalm_rag.testing import build_checkpoint


@pytest.fixture(autouse=True)
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that a test has just written count as old, so that digests are remembered."""
    monkeypatch.setattr(identity_module, "_SETTLED_NS", -(10**10), raising=False)


@pytest.fixture
def folder(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "model"))


def edit_tensor(name: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        found = next(key for key in tensors if key.startswith(name))
        tensors[found].view(-1)[-1] += 1e-3
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return edit


def edit_json(file: str, path: list[str], value: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        place = content
        for step in path[:-1]:
            place = place[step]
        assert place.get(path[-1]) != value
        place[path[-1]] = value
        (folder / file).write_text(json.dumps(content))

    return edit


@pytest.mark.parametrize(
    "edit",
    [
        edit_tensor("model.encoder.layers.2.mlp.up_proj.weight"),
        edit_tensor("model.encoder.embed_tokens.weight"),
        edit_tensor("model.encoder.norm.weight"),
        edit_json("config.json", ["encoder", "text_config", "sliding_window"], 7),
        edit_json("config.json", ["encoder", "text_config", "rope_parameters", "full_attention", "factor"], 2.0),
        edit_json("tokenizer.json", ["added_tokens"], []),
        edit_json("tokenizer_config.json", ["bos_token"], "<eos>"),
    ],
)
def test_what_changes_states_changes_the_identity(folder: Path, tmp_path: Path, edit: Callable[[Path], None]) -> None:
    memo = tmp_path / "memo.json"
    before = identify(find_checkpoint(folder), memo)
    edit(folder)
    assert identify(find_checkpoint(folder), memo) != before


@pytest.mark.parametrize(
    ("edit", "touches_decoder"),
    [
        (edit_tensor("model.decoder.layers.2.mlp.up_proj.weight"), True),
        (edit_tensor("model.encoder.vision_tower."), False),
        (edit_json("config.json", ["transformers_version"], "5.99"), False),
        (edit_json("config.json", ["decoder", "sliding_window"], 7), True),
    ],
)
def test_what_does_not_change_states_keeps_the_identity(
    folder: Path, tmp_path: Path, edit: Callable[[Path], None], touches_decoder: bool
) -> None:
    before = identify(find_checkpoint(folder), tmp_path / "memo.json")
    edit(folder)
    after = identify(find_checkpoint(folder), tmp_path / "memo.json")
    assert replace(after, decoder="") == replace(before, decoder="")
    assert (after.decoder != before.decoder) == touches_decoder


def test_place_and_split_do_not_matter(checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    for number, part in enumerate((names[:40], names[40:])):
        save_file({name: tensors[name] for name in part}, folder / f"part-{number}.safetensors")
    index = {name: f"part-{int(name in names[40:])}.safetensors" for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    memo = tmp_path / "memo.json"
    assert identify(find_checkpoint(folder), memo) == identify(find_checkpoint(checkpoint), memo)


def test_digest_is_computed_once_and_remembered(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = identity_module._weight_digests
    monkeypatch.setattr(identity_module, "_weight_digests", lambda *args: calls.append(1) or real(*args))
    memo = tmp_path / "memo.json"
    first = identify(find_checkpoint(folder), memo)
    assert identify(find_checkpoint(folder), memo) == first
    assert len(calls) == 1
    (folder / "model.safetensors").touch()
    assert identify(find_checkpoint(folder), memo) == first
    assert len(calls) == 2
    memo.write_text("{ damaged")
    assert identify(find_checkpoint(folder), memo) == first
    assert len(calls) == 3


def hub_layout(folder: Path) -> Path:
    """Turn a folder into a snapshot of the hub's cache, whose weights are a link to a blob."""
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    blob = blobs / ("ab" * 32)
    (folder / "model.safetensors").rename(blob)
    (folder / "model.safetensors").symlink_to(blob)
    return blob


def test_blob_that_is_overwritten_has_another_identity(folder: Path, tmp_path: Path) -> None:
    """A blob's name is the digest of what was downloaded, not of what is there now."""
    blob, memo = hub_layout(folder), tmp_path / "memo.json"
    first = identify(find_checkpoint(folder), memo)
    tensors = load_file(blob)
    tensors["model.encoder.norm.weight"].view(-1)[-1] += 1e-3
    save_file(tensors, tmp_path / "other.safetensors", metadata={"format": "pt"})
    stat = blob.stat()
    with blob.open("r+b") as file:  # in place: the inode stays
        file.write((tmp_path / "other.safetensors").read_bytes())
    os.utime(blob, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (blob.stat().st_size, blob.stat().st_ino) == (stat.st_size, stat.st_ino)
    assert identify(find_checkpoint(folder), memo) != first


@pytest.mark.parametrize("field", ["st_size", "st_mtime_ns", "st_ctime_ns", "st_ino"])
def test_each_mark_of_a_file_counts(folder: Path, field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each one catches a change that the others miss: a replaced file may keep its times, an edited one its inode."""
    before = find_checkpoint(folder).marks
    real = Path.stat

    def stat(path: Path, **options: Any) -> Any:
        found = real(path, **options)
        names = [name for name in dir(found) if name.startswith("st_")]
        changed = {name: getattr(found, name) for name in names}
        if path.name == "model.safetensors":
            changed[field] += 1
        return SimpleNamespace(**changed)

    monkeypatch.setattr(Path, "stat", stat)
    assert find_checkpoint(folder).marks != before


def test_digest_of_a_file_that_has_just_changed_is_not_remembered(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second change within the tick of the file system's clock would have the marks of the first."""
    monkeypatch.undo()
    memo = tmp_path / "memo.json"
    changed = (folder / "model.safetensors").stat().st_ctime_ns
    monkeypatch.setattr(identity_module.time, "time_ns", lambda: changed + 10**8)
    identify(find_checkpoint(folder), memo)
    assert not memo.exists()
    monkeypatch.setattr(identity_module.time, "time_ns", lambda: changed + 10**10)
    identify(find_checkpoint(folder), memo)
    assert len(json.loads(memo.read_text())) == 1


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json", "added_tokens.json"])
def test_file_that_is_replaced_while_the_model_loads_is_an_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    """Otherwise the states of one model are kept under the name of another, for every process."""
    load = scorer_module.load_model

    def slow(*args: Any, **options: Any) -> Any:
        loaded = load(*args, **options)
        content = (folder / file).read_bytes() if (folder / file).exists() else b"{}"
        (folder / "new").write_bytes(content)
        (folder / "new").rename(folder / file)
        return loaded

    monkeypatch.setattr(scorer_module, "load_model", slow)
    with pytest.raises(CheckpointError, match="changed while it was loaded; load it again"):
        KaLMReranker(folder, cache=None, device="cpu").load()


def test_digest_of_weights_that_change_while_they_are_read_is_not_remembered(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, memo = identity_module._weight_digests, tmp_path / "memo.json"

    def slow(*args: Any) -> Any:
        found = real(*args)
        edit_tensor("model.encoder.norm.weight")(folder)
        return found

    monkeypatch.setattr(identity_module, "_weight_digests", slow)
    with pytest.raises(CheckpointError, match="changed while"):
        identify(find_checkpoint(folder), memo)
    assert not memo.exists()


def test_memo_that_cannot_be_written_is_no_error(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert identify(find_checkpoint(folder), tmp_path / "file" / "memo.json").encoder


def test_tagged_digest_is_golden_and_unambiguous() -> None:
    by_hand = hashlib.sha256(b"\1" + bytes(7) + b"a" + b"\2" + bytes(7) + b"bc").hexdigest()
    assert by_hand == "9a8acca1b6c6c0befd3fbc756aed625da998c998f7252e738c4ef061906b9b21"
    assert tagged_digest("a", b"bc").hexdigest() == by_hand
    assert tagged_digest("ab", "c").digest() != tagged_digest("a", "bc").digest()
    assert tagged_digest("").digest() != tagged_digest().digest()


@pytest.mark.parametrize("prefill_memory", [0, 10**9])
def test_a_file_overwritten_while_its_weights_are_mapped_spoils_no_cache(tmp_path: Path, prefill_memory: int) -> None:
    folder, other = (build_checkpoint(tmp_path / name, seed=seed) for name, seed in (("one", 1), ("other", 2)))
    file = folder / "model.safetensors"
    original, foreign = file.read_bytes(), (other / "model.safetensors").read_bytes()
    assert len(original) == len(foreign)
    pairs = [("query", "a passage"), ("query", "another one")]
    right = KaLMReranker(folder, device="cpu", cache=None).predict(pairs)
    options = {"device": "cpu", "cache": tmp_path / "cache", "prefill_memory": prefill_memory}
    reranker = KaLMReranker(folder, **options)
    reranker.predict(pairs[:1])
    file.write_bytes(foreign)  # in place, as cp does
    for _ in range(2):
        with pytest.raises(CheckpointError, match="was overwritten while its weights were in use"):
            reranker.predict(pairs)
    file.write_bytes(original)
    reranker.close()
    assert reranker.predict(pairs) == pytest.approx(right, abs=1e-5)
    assert KaLMReranker(folder, **options).predict(pairs) == pytest.approx(right, abs=1e-5)


def test_a_file_replaced_by_renaming_does_not_disturb_a_loaded_model(tmp_path: Path) -> None:
    folder, other = (build_checkpoint(tmp_path / name, seed=seed) for name, seed in (("one", 1), ("other", 2)))
    reranker = KaLMReranker(folder, device="cpu", cache=None, score_memory=0)
    right = reranker.predict([("query", "a passage")])
    os.replace(other / "model.safetensors", folder / "model.safetensors")
    assert reranker.predict([("query", "a passage")]) == right
