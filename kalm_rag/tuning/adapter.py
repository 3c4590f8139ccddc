"""The adapter while it is trained: put into the decoder by `peft`, and written to a folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kalm_rag.errors import MissingExtraError
from kalm_rag.model.lora import BASE, CONFIG, PREFIX, SIZES, TARGETS, WEIGHTS
from kalm_rag.tuning.recipe import Recipe
from kalm_rag.utils.files import replace_files

if TYPE_CHECKING:
    import torch


def insert_adapter(model: Any, recipe: Recipe) -> dict[str, torch.nn.Parameter]:
    """Put an adapter that changes nothing yet into the decoder; only its matrices take gradients.

    Args:
        model: with the modules of transformers. It is changed.
        recipe: rank, alpha and seed.

    Returns:
        The matrices by their name in the file, in float32.

    Raises:
        MissingExtraError: `peft` is not installed.
    """
    import torch

    try:
        import peft
    except ImportError as error:
        raise MissingExtraError("peft", "tune") from error
    config = peft.LoraConfig(r=recipe.rank, lora_alpha=recipe.alpha, target_modules=TARGETS, bias="none")
    cuda = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(recipe.seed)
        peft.inject_adapter_in_model(config, model)
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
            found[PREFIX + name.replace(".default.weight", ".weight")] = parameter
    return found


def save_adapter(
    folder: Path, matrices: Mapping[str, torch.Tensor], recipe: Recipe, model: str, base: tuple[str, str]
) -> None:
    """Write an adapter in the layout of `peft`, which `KaLMReranker(lora=)` reads.

    Args:
        folder: where to.
        matrices: by their name in the file.
        recipe: rank and alpha.
        model: name of the base model, for people.
        base: digests of the base model's encoder and decoder.

    Raises:
        OSError: it cannot be written; an adapter that was there before is left as it was. After a kill between the two
            files, `read_lora` refuses what is not of the same adapter.
    """
    import safetensors.torch

    sizes = str(recipe.rank), str(float(recipe.alpha))
    metadata = {"format": "pt", **dict(zip((*BASE, *SIZES), (*base, *sizes), strict=True))}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in matrices.items()}
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": model,
        "r": recipe.rank,
        "lora_alpha": recipe.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": TARGETS,
        "inference_mode": True,
    }
    replace_files(
        {
            folder / CONFIG: (json.dumps(config, indent=2) + "\n").encode(),
            folder / WEIGHTS: safetensors.torch.save(tensors, metadata),
        }
    )
