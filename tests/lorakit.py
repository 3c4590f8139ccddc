"""Adapters with given numbers, written without training and without `peft`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from kalm_rag.model.checkpoint import find_checkpoint
from kalm_rag.model.identity import identify
from kalm_rag.settings import Settings
from kalm_rag.tuning.adapter import save_adapter
from kalm_rag.tuning.recipe import Recipe

SCALE = 2.0
RANK = 2


def write_lora(model: Path | str, folder: Path, spread: float, *, matrix: str = "q_proj", **changed: Any) -> Path:
    """Write an adapter for two of a model's matrices per layer, with random numbers; a spread of 0 changes nothing.

    `changed` replaces what identifies the base model, and `scale`.
    """
    from kalm_rag.model.loading import load_model

    checkpoint = find_checkpoint(model)
    loaded = load_model(checkpoint, settings=Settings(), device=torch.device("cpu"), dtype="float32", fast=False)
    generator = torch.Generator().manual_seed(7)
    matrices = {}
    for name, weight in loaded.model.named_parameters():
        if "decoder.layers" in name and name.endswith((f"{matrix}.weight", "down_proj.weight")):
            stem = "base_model.model." + name.removesuffix(".weight")
            outputs, inputs = weight.shape
            matrices[f"{stem}.lora_A.weight"] = torch.randn(RANK, inputs, generator=generator)
            matrices[f"{stem}.lora_B.weight"] = spread * torch.randn(outputs, RANK, generator=generator)
    identity = identify(checkpoint)
    base = changed.get("base", (identity.encoder, identity.decoder))
    folder.mkdir(parents=True, exist_ok=True)
    scale = changed.get("scale", SCALE)
    save_adapter(folder, matrices, Recipe(rank=RANK, alpha=int(scale * RANK)), str(model), base)
    return folder
