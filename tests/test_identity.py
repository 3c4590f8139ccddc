"""The digest that says which encodings are interchangeable."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from kalm_rag import identity as identity_module
from kalm_rag.checkpoint import find_checkpoint
from kalm_rag.identity import identify, tagged_digest


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


def test_hub_blob_hash_serves_instead_of_reading(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    blob = blobs / ("ab" * 32)
    (folder / "model.safetensors").rename(blob)
    (folder / "model.safetensors").symlink_to(blob)
    memo = tmp_path / "memo.json"
    first = identify(find_checkpoint(folder), memo)
    blob.touch()
    monkeypatch.setattr(identity_module, "_weight_digests", lambda *_: pytest.fail("the weights were read again"))
    assert identify(find_checkpoint(folder), memo) == first


def test_memo_that_cannot_be_written_is_no_error(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert identify(find_checkpoint(folder), tmp_path / "file" / "memo.json").encoder


def test_tagged_digest_is_golden_and_unambiguous() -> None:
    by_hand = hashlib.sha256(b"\1" + bytes(7) + b"a" + b"\2" + bytes(7) + b"bc").hexdigest()
    assert by_hand == "9a8acca1b6c6c0befd3fbc756aed625da998c998f7252e738c4ef061906b9b21"
    assert tagged_digest("a", b"bc").hexdigest() == by_hand
    assert tagged_digest("ab", "c").digest() != tagged_digest("a", "bc").digest()
    assert tagged_digest("").digest() != tagged_digest().digest()
