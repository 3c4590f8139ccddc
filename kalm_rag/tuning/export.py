"""Writes a model with its adapter as one checkpoint in the released format."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from kalm_rag.model.checkpoint import TOKENIZER_FILES, Checkpoint, find_checkpoint
from kalm_rag.model.identity import identify
from kalm_rag.model.json_file import read_json
from kalm_rag.model.loading import weight_name
from kalm_rag.model.lora import Lora
from kalm_rag.utils.paths import user_path

if TYPE_CHECKING:
    import torch

_INDEX = "model.safetensors.index.json"


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
    vision tower among them, and all other files are those of the model. The encoder keeps its digest: encoded passages
    in caches are found by the new checkpoint too.

    Args:
        model: as in `KaLMReranker`.
        lora: folder of the adapter.
        folder: where to; it must be new or empty.
        revision: as in `KaLMReranker`.
        token: as in `KaLMReranker`.
        local_files_only: as in `KaLMReranker`.

    Returns:
        The folder.

    Raises:
        CheckpointError: the model or the adapter cannot be found or used, or do not fit each other.
        ValueError: the folder holds something.
        OSError: it cannot be written.
    """
    import safetensors.torch
    from safetensors import safe_open

    target = user_path(folder, "folder")
    checkpoint = find_checkpoint(
        model, revision=revision, token=token, local_files_only=local_files_only, lora=user_path(lora, "lora")
    )
    assert checkpoint.lora is not None  # noqa: S101 - for type checkers
    identify(checkpoint)  # it refuses an adapter of another model
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        msg = f"{str(target)!r} is not an empty folder; give a new one to export to"
        raise ValueError(msg)
    target.mkdir(parents=True, exist_ok=True)
    merged = _merged(checkpoint, checkpoint.lora)
    size = 0
    for shard in checkpoint.shards:
        with safe_open(shard, framework="pt") as file:
            metadata = file.metadata()
            tensors = {key: merged.get(key, file.get_tensor(key)) for key in file.keys()}  # noqa: SIM118 - no mapping
        size += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        safetensors.torch.save_file(tensors, target / shard.name, metadata=metadata)
    for name in ("config.json", "generation_config.json", *TOKENIZER_FILES):
        if (checkpoint.folder / name).is_file():
            shutil.copyfile(checkpoint.folder / name, target / name)
    if (checkpoint.folder / _INDEX).is_file():
        index = read_json(checkpoint.folder / _INDEX)
        index.setdefault("metadata", {})["total_size"] = size
        (target / _INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")
    checkpoint.check_unchanged()
    return target


def _merged(checkpoint: Checkpoint, lora: Lora) -> dict[str, torch.Tensor]:
    """Return the adapted weights by their name in the checkpoint's files."""
    from safetensors import safe_open

    expected = {f"{name}.weight" for name in lora.matrices()}
    weights, keys = {}, {}
    for shard in checkpoint.shards:
        with safe_open(shard, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - a safetensors file is not a mapping
                name = weight_name(key, expected)
                if name is not None:
                    weights[name], keys[name] = file.get_tensor(key), key
    lora.add_to(weights, {name: tensor.shape for name, tensor in weights.items()})
    return {keys[name]: tensor.contiguous() for name, tensor in weights.items()}
