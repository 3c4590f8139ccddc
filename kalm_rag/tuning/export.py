"""Writes a model with its adapter as one checkpoint in the released format."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kalm_rag.errors import CheckpointError
from kalm_rag.model.checkpoint import TOKENIZER_FILES, Checkpoint, find_checkpoint
from kalm_rag.model.identity import identify
from kalm_rag.model.json_file import read_json
from kalm_rag.model.loading import weight_name
from kalm_rag.model.lora import Lora, read_lora
from kalm_rag.utils.paths import user_path

if TYPE_CHECKING:
    import torch

_INDEX = "model.safetensors.index.json"
_COPIED = ("config.json", "generation_config.json", *TOKENIZER_FILES)
_LICENCE = re.compile(r"(licen[cs]e|notice|copying)\b", re.IGNORECASE)


def export_checkpoint(
    model: str | Path,
    lora: str | Path,
    folder: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Path:
    """Write a model with its adapter as a checkpoint that needs neither adapter nor kalm-rag.

    The adapted matrices are written in float32, so that nothing of the adapter is rounded off; all other tensors, the
    vision tower among them, are those of the model. Its configuration, its tokenizer's files and, if it has them, its
    files named LICENSE, NOTICE or COPYING are copied; others, such as a README, are not. The encoder keeps its digest:
    encoded passages in caches are found by the new checkpoint too.

    Args:
        model: as in `KaLMReranker`.
        lora: folder of the adapter.
        folder: where to; it must be new or empty. It is written beside its place and renamed when it is complete.
        revision: as in `KaLMReranker`.
        token: as in `KaLMReranker`.
        local_files_only: as in `KaLMReranker`.

    Returns:
        The folder.

    Raises:
        CheckpointError: the model or the adapter cannot be found or used, or do not fit each other.
        ValueError: the folder holds something, or cannot be used.
        OSError: it cannot be written; nothing is left of it.
    """
    adapter = user_path(lora, "lora")
    target = check_target(folder, adapter)
    own = read_lora(adapter)
    found = find_checkpoint(model, revision=revision, token=token, local_files_only=local_files_only)
    checkpoint = replace(found, lora=own)
    identify(checkpoint)  # it refuses an adapter of another model
    merged = _merged(checkpoint, own)
    place = target.resolve()
    partial = place.with_name(f".{place.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        _write(checkpoint, merged, partial)
        checkpoint.check_unchanged()
        if place.exists():
            place.rmdir()  # it is empty; not every system renames over it
        partial.rename(place)
    except OSError as error:
        msg = f"cannot write the checkpoint to {str(target)!r} ({error}); make room there, or give another folder"
        raise (OSError(msg) if error.errno is None else OSError(error.errno, msg)) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def check_target(folder: str | Path, lora: str | Path) -> Path:
    """Return the folder to export to, as a path; nothing is written.

    Args:
        folder: as in `export_checkpoint`.
        lora: folder of the adapter, which need not be there yet.

    Raises:
        ValueError: it holds something, overlaps with the adapter's folder, or cannot be made.
        TypeError: it is not a path.
    """
    target = user_path(folder, "folder")
    place, other = target.resolve(), user_path(lora, "lora").resolve()
    if place == other or place in other.parents or other in place.parents:
        msg = f"the folder to export to {str(target)!r} overlaps with the adapter's {str(lora)!r}; give another one"
        raise ValueError(msg)
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        msg = f"{str(target)!r} is not an empty folder; give a new one to export to"
        raise ValueError(msg)
    above = next(parent for parent in place.parents if parent.exists())
    if not (above.is_dir() and os.access(above, os.W_OK | os.X_OK)):
        msg = f"no folder can be made in {str(above)!r} for the export {str(target)!r}; give another one"
        raise ValueError(msg)
    return target


def _write(checkpoint: Checkpoint, merged: Mapping[str, torch.Tensor], folder: Path) -> None:
    import safetensors.torch
    from safetensors import SafetensorError

    size = 0
    for shard in checkpoint.shards:
        with _opened(shard) as file:
            metadata, keys = file.metadata(), file.keys()
            tensors = {key: merged[key] if key in merged else file.get_tensor(key) for key in keys}
        size += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        try:
            safetensors.torch.save_file(tensors, folder / shard.name, metadata=metadata)
        except SafetensorError as error:  # of a full disk, too
            raise OSError(str(error)) from error
    for path in checkpoint.folder.iterdir():
        if path.is_file() and (path.name in _COPIED or _LICENCE.match(path.name)):
            shutil.copyfile(path, folder / path.name)
    if (checkpoint.folder / _INDEX).is_file():
        index = read_json(checkpoint.folder / _INDEX)
        index.setdefault("metadata", {})["total_size"] = size
        (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def _merged(checkpoint: Checkpoint, lora: Lora) -> dict[str, torch.Tensor]:
    """Return the adapted weights by their name in the checkpoint's files."""
    expected = {f"{name}.weight" for name in lora.matrices()}
    weights, keys = {}, {}
    for shard in checkpoint.shards:
        with _opened(shard) as file:
            for key in file.keys():  # noqa: SIM118 - a safetensors file is not a mapping
                name = weight_name(key, expected)
                if name is not None:
                    weights[name], keys[name] = file.get_tensor(key), key
    lora.add_to(weights, {name: tensor.shape for name, tensor in weights.items()})
    return {keys[name]: tensor.contiguous() for name, tensor in weights.items()}


@contextlib.contextmanager
def _opened(shard: Path) -> Iterator[Any]:
    """Open a file of weights; a fault while it is read is the checkpoint's."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(shard, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        msg = f"cannot read {str(shard)!r} ({error}); download the checkpoint again"
        raise CheckpointError(msg) from error
