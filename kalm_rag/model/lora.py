"""Low-rank adapters (LoRA) of the decoder: finds one, checks that it fits, and adds it to the weights.

The files are those of the library `peft`, in safetensors. Only matrices inside of the decoder's layers are adapted: the
encoder, whose states are in caches, and the embeddings and the output matrix, which share a tensor, stay as they are.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kalm_rag.errors import CheckpointError
from kalm_rag.model.json_file import read_json
from kalm_rag.utils.digests import tagged_digest
from kalm_rag.utils.paths import user_path

if TYPE_CHECKING:
    import torch

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

TARGETS = r"model\.decoder\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
"""The modules that an adapter may change, as a regular expression of their whole name."""

BASE = ("kalm_rag.base_encoder", "kalm_rag.base_decoder")
"""Metadata of the weights' file: the digests of the model that the adapter was trained on."""

SIZES = ("kalm_rag.r", "kalm_rag.lora_alpha")
"""Metadata of the weights' file: rank and alpha, which must be those of the configuration. The files are replaced one
after the other, so that one of them can be of an earlier adapter."""

PREFIX = "base_model.model."
"""What `peft` puts before the name of a module."""

_PAIR = re.compile(rf"{re.escape(PREFIX)}({TARGETS})\.lora_([AB])\.weight")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_AGAIN = "train it again with `kalm-rag tune`"
_UNSUPPORTED = (
    "use_dora", "use_rslora", "use_qalora", "use_bdlora", "rank_pattern", "alpha_pattern", "lora_bias",
    "fan_in_fan_out", "modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication",
    "alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config", "velora_config",
)  # fmt: skip
"""Settings of `peft` under which an adapter is more than a product of two matrices."""


@dataclass(frozen=True, slots=True)
class Lora:
    """An adapter on this disk.

    Attributes:
        folder: where its files are.
        scale: what the product of its matrices is multiplied by.
        base: digests of the encoder and the decoder that it was trained on.
        digest: of its content, SHA-256 in hexadecimal.
    """

    folder: Path
    scale: float
    base: tuple[str, str]
    digest: str

    def check_base(self, encoder: str, decoder: str, model: str) -> None:
        """Refuse a model that is not the one that the adapter was trained on.

        Raises:
            CheckpointError: its digests differ.
        """
        for part, own, expected in (("encoder", encoder, self.base[0]), ("decoder", decoder, self.base[1])):
            if own != expected:
                msg = (
                    f"lora={str(self.folder)!r} was trained on another model than {model!r}: its {part} has the digest "
                    f"{expected[:12]}, this one {own[:12]}; name the model it was trained on, or {_AGAIN}"
                )
                raise CheckpointError(msg)

    def add_to(self, weights: MutableMapping[str, torch.Tensor], shapes: Mapping[str, Any]) -> None:
        """Replace the adapted weights by new tensors: W + B A scale, computed in float32.

        Args:
            weights: by parameter name, as stored. Tensors are replaced, never changed.
            shapes: shape by parameter name.

        Raises:
            CheckpointError: the adapter cannot be read, has changed, does not fit, or gives weights that are NaN or
                infinite.
        """
        for name, (down, up) in self.matrices().items():
            key = f"{name}.weight"
            if key not in weights or (up.shape[0], down.shape[1]) != tuple(shapes[key]) or len(down) != up.shape[1]:
                msg = (
                    f"the adapter in {str(self.folder)!r} does not fit the model: it changes {name!r} by "
                    f"{tuple(up.shape)} times {tuple(down.shape)}; {_AGAIN}"
                )
                raise CheckpointError(msg)
            merged = weights[key].float() + (up @ down) * self.scale
            if not merged.isfinite().all() and weights[key].isfinite().all():
                msg = f"the adapter in {str(self.folder)!r} makes {name!r} NaN or infinite; {_AGAIN}"
                raise CheckpointError(msg)
            weights[key] = merged

    def matrices(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Return the matrices A, shape `(rank, inputs)`, and B, shape `(outputs, rank)`, in float32, by module.

        Raises:
            CheckpointError: the adapter cannot be read, or has changed since it was found.
        """
        tensors, _ = _read(self.folder)
        if _digest(self.scale, tensors) != self.digest:
            msg = f"the adapter in {str(self.folder)!r} changed while it was loaded; load it again"
            raise CheckpointError(msg)
        return _pairs(self.folder, tensors)


def read_lora(folder: str | Path) -> Lora:
    """Find an adapter.

    Raises:
        CheckpointError: there is none, its weights are a pickle, it is of a kind that cannot be merged, or its files
            are not of the same adapter.
        TypeError, ValueError: `folder` is not a path.
    """
    place = user_path(folder, "lora")
    if not place.is_dir():
        msg = f"lora={str(folder)!r} is no folder; give the folder that `kalm-rag tune --out` wrote"
        raise CheckpointError(msg)
    if not (place / WEIGHTS).is_file():
        pickles = pickles_in(place)
        if pickles:
            msg = (
                f"{str(place)!r} holds the adapter as a pickle ({', '.join(pickles[:3])}), which can run code when it "
                f"is read and is refused; save it as {WEIGHTS}, or {_AGAIN}"
            )
            raise CheckpointError(msg)
        there = sorted(entry.name for entry in place.iterdir())[:8]
        msg = (
            f"lora={str(folder)!r} holds no {WEIGHTS}, so it is not an adapter; it holds {there}. Give the folder that "
            "`kalm-rag tune --out` wrote"
        )
        raise CheckpointError(msg)
    config = read_json(place / CONFIG, _AGAIN)
    rank, alpha, scale = _scale(config, place)
    tensors, metadata = _read(place)
    if any(name not in metadata for name in BASE):
        msg = f"the adapter in {str(place)!r} does not say which model it was trained on; {_AGAIN}"
        raise CheckpointError(msg)
    said = tuple(metadata.get(name) for name in SIZES)
    if said != (str(rank), str(float(alpha))):
        msg = (
            f"{CONFIG} and {WEIGHTS} in {str(place)!r} are not of the same adapter: r={rank} and lora_alpha={alpha} in "
            f"the first, {said[0]} and {said[1]} in the second, as after a write that was cut short; {_AGAIN}"
        )
        raise CheckpointError(msg)
    for name, (down, up) in _pairs(place, tensors).items():
        if not len(down) == up.shape[1] == rank:
            msg = (
                f"the adapter in {str(place)!r} has r={rank}, but changes {name!r} by {tuple(up.shape)} times "
                f"{tuple(down.shape)}; {_AGAIN}"
            )
            raise CheckpointError(msg)
    return Lora(place, scale, (metadata[BASE[0]], metadata[BASE[1]]), _digest(scale, tensors))


def pickles_in(folder: Path) -> list[str]:
    """Names of the files in a folder that may be pickles."""
    return sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))


def _scale(config: Mapping[str, Any], folder: Path) -> tuple[int, float, float]:
    """Return rank, alpha, and what the product of the matrices is multiplied by."""
    rank: Any = config.get("r")
    alpha: Any = config.get("lora_alpha")
    wrong = [f"{name}={config[name]!r:.40}" for name in _UNSUPPORTED if config.get(name)]
    expected = {"peft_type": "LORA", "bias": "none"}
    wrong += [f"{name}={config.get(name)!r:.40}" for name, value in expected.items() if config.get(name) != value]
    if wrong:
        msg = f"the adapter in {str(folder)!r} is of a kind that kalm-rag does not merge ({', '.join(wrong)}); {_AGAIN}"
        raise CheckpointError(msg)
    if type(rank) is int and rank > 0 and type(alpha) in (int, float):
        with contextlib.suppress(OverflowError):  # of a number that no float can hold
            if math.isfinite(alpha):
                return rank, alpha, float(alpha) / rank
    msg = f"{str(folder / CONFIG)!r} has r={rank!r:.40} and lora_alpha={alpha!r:.40}; {_AGAIN}"
    raise CheckpointError(msg)


def _read(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read all of the weights' file into memory, tensors and metadata: a mapped file could change later."""
    import safetensors.torch
    from safetensors import SafetensorError

    try:
        content = (folder / WEIGHTS).read_bytes()
        tensors = safetensors.torch.load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    except (SafetensorError, OSError, ValueError, TypeError, RuntimeError) as error:
        msg = f"cannot read {str(folder / WEIGHTS)!r} ({error}); {_AGAIN}"
        raise CheckpointError(msg) from error
    except KeyError as error:
        msg = f"{str(folder / WEIGHTS)!r} holds numbers of the type {error}, which torch cannot read; {_AGAIN}"
        raise CheckpointError(msg) from error
    return tensors, header.get("__metadata__") or {}


def _pairs(folder: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return A and B in float32, by module."""
    halves: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        match = _PAIR.fullmatch(key)
        if match is None or tensor.ndim != 2 or not tensor.is_floating_point():
            msg = (
                f"the adapter in {str(folder)!r} changes {key!r}; only matrices of the decoder's layers may "
                f"be adapted, so that encoded passages stay valid: {_AGAIN}"
            )
            raise CheckpointError(msg)
        halves.setdefault(match[1], {})[match[4]] = tensor.float()
    single = [name for name, pair in halves.items() if len(pair) < 2]
    if single or not halves:
        msg = f"the adapter in {str(folder)!r} lacks a matrix of {single[:1] or 'every module'}; {_AGAIN}"
        raise CheckpointError(msg)
    return {name: (pair["A"], pair["B"]) for name, pair in halves.items()}


def _digest(scale: float, tensors: Mapping[str, torch.Tensor]) -> str:
    """Digest of names, shapes and numbers; the file itself holds its metadata in any order."""
    import torch

    digest = tagged_digest("kalm-rag lora", repr(scale))
    for name in sorted(tensors):
        tensor = tensors[name]
        head = tagged_digest(name, str(tensor.dtype), *map(str, tensor.shape)).digest()
        digest.update(head + tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
