"""Loads the text part of a checkpoint into memory.

transformers' `from_pretrained` replaces functions and defaults of the whole process while it runs, and puts back what
it found: two loads at once can leave the process with the replacements. So the module is built here, without weights,
and each weight is put in its place. Nothing outside of the new model is changed.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from typing import TYPE_CHECKING, Any, TypeVar

from kalm_rag.errors import CheckpointError
from kalm_rag.model.checkpoint import UNUSED, Checkpoint, MappedFiles, check_tensor
from kalm_rag.model.deferred import Deferred
from kalm_rag.model.identity import identify
from kalm_rag.model.lora import Lora
from kalm_rag.model.tokenization import Tokenizer
from kalm_rag.settings import Settings
from kalm_rag.utils import computing
from kalm_rag.utils.checks import check_dtype

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

logger = logging.getLogger(__name__)

_ENCODER_LAYERS = "encoder.text_model.layers."
"""Part of the names of the weights that only the encoder reads; the embeddings are the decoder's too."""

INT8_ENCODER = "float32, int8 encoder"
"""Precision of an encoder with int8 matrices in the cache's keys, so it must not change."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to run.

    Attributes:
        model: `T5Gemma2ForConditionalGeneration` without its vision tower, in evaluation mode.
        tokenizer: its tokenizer.
        device: where it runs.
        dtype: what weights and states are kept in.
        int8: whether the decoder's matrices are int8 where `kalm_rag.model.cpu_kernels` says; all else is `dtype`.
        int8_encoder: whether the encoder's are as well.
        computes: what activations are in, if not in `dtype`: float32 on a CPU that multiplies bfloat16 slowly.
        files: those that weights are mapped from; none where all weights were converted or copied to a device.
        encoder: its layers; they must be `ready` before the encoder runs.
    """

    model: Any
    tokenizer: Tokenizer
    device: torch.device
    dtype: torch.dtype
    int8: bool = False
    int8_encoder: bool = False
    computes: torch.dtype | None = None
    files: MappedFiles = field(default_factory=lambda: MappedFiles(()))
    encoder: Deferred = field(default_factory=Deferred)

    def compute(self, action: Callable[..., T], *arguments: Any) -> T:
        """Call `action` inside of `computing`; on a CPU in the thread that `kalm_rag.utils.computing` chooses."""
        return computing.compute(partial(self.computing()(action), *arguments), self.device)

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """Compute without gradients, in the model's precision and on its device, whatever the caller's defaults are."""
        import torch

        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode())
            stack.enter_context(torch.autocast(self.device.type, enabled=False))
            stack.enter_context(_own_device(self.device))
            yield

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of activations.

        Where it is wider than `dtype`, states are computed in float32 from the same bfloat16 weights and then rounded.
        They differ from states that were computed in bfloat16 by less than those differ from one batch size or CPU to
        another, so both are the same entries of a cache.
        """
        return self.computes or self.dtype

    @property
    def precision(self) -> str:
        """What really computes, for people: `float32`, `bfloat16 weights, float32 products`, ..."""
        weights, products = (str(dtype).removeprefix("torch.") for dtype in (self.dtype, self.compute_dtype))
        if self.int8:
            return "int8 decoder and encoder" if self.int8_encoder else f"int8 decoder, {weights} encoder"
        return weights if weights == products else f"{weights} weights, {products} products"

    @property
    def encoder_precision(self) -> str:
        """What the encoder computes in, as part of the cache's keys."""
        name = str(self.dtype).removeprefix("torch.")
        return INT8_ENCODER if self.int8_encoder else name

    @property
    def attention_dtype(self) -> torch.dtype:
        """The dtype in which a query's attention multiplies prefilled keys and values."""
        import torch

        if self.device.type != "cpu" or self.prefill_dtype != torch.bfloat16:
            return self.prefill_dtype
        from kalm_rag.model.cpu_kernels import has_fast_bfloat16

        return torch.bfloat16 if has_fast_bfloat16() else torch.float32

    @property
    def prefill_dtype(self) -> torch.dtype:
        """The dtype in which prefilled keys and values are kept; bfloat16 with int8 weights."""
        import torch

        return torch.bfloat16 if self.int8 else self.dtype


def _own_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Set the default device for what transformers creates without naming one.

    It is set only when necessary, because it makes every torch call a little slower.
    """
    import torch

    if torch.get_default_device() in (torch.device("cpu"), device):
        return contextlib.nullcontext()
    return device


def resolve_device(device: str | torch.device | None) -> torch.device:
    """Return the requested device, or CUDA if available, else the CPU.

    Raises:
        ValueError: no such device, or it is not on this machine; the message lists what is.
    """
    import torch

    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    here = ["cpu"] + [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    here += ["mps"] if torch.backends.mps.is_available() else []
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        msg = f"unknown device {str(device)!r}; available: {', '.join(here)}"
        raise ValueError(msg) from None
    name = f"cuda:{found.index or 0}" if found.type == "cuda" else found.type
    if name not in here:
        msg = (
            f"device {str(device)!r} is not on this machine; available: {', '.join(here)}. "
            "Leave device out for the best one"
        )
        raise ValueError(msg)
    return found


def resolve_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """Return the requested dtype, or bfloat16 on CUDA and float32 elsewhere (the defaults of the model cards).

    Raises:
        ValueError: not one of `DTYPES`.
    """
    import torch

    if dtype is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    found: torch.dtype = getattr(torch, check_dtype(dtype))
    return found


def load_model(
    checkpoint: Checkpoint,
    *,
    settings: Settings,
    device: torch.device,
    dtype: str | torch.dtype | None,
    fast: bool = True,
    encoder_later: bool = False,
) -> LoadedModel:
    """Read the text part of a checkpoint.

    The vision tower (about 417M parameters in the released files) is never read: its tensors are left out of the
    state dict and its module is built at a toy size and dropped.

    Args:
        checkpoint: its files; its adapter, if it has one, is added to the weights.
        settings: how user text is tokenised.
        device: where to.
        dtype: as in `KaLMReranker`.
        fast: on a CPU, the modules of `kalm_rag.model.cpu_kernels`; otherwise those of transformers.
        encoder_later: read the encoder's layers when they are first needed. Their names and shapes are checked now.

    Raises:
        ValueError: no such dtype, or not on this device.
        CheckpointError: a file is damaged, a weight is missing or has another shape than the config says, or the
            adapter is another model's.
    """
    import torch

    with _own_device(torch.device("cpu")):
        return _load(checkpoint, settings, device, dtype, fast=fast, encoder_later=encoder_later)


def _load(
    checkpoint: Checkpoint,
    settings: Settings,
    device: torch.device,
    dtype: str | torch.dtype | None,
    *,
    fast: bool,
    encoder_later: bool,
) -> LoadedModel:
    import torch

    name = str(dtype).lower()
    int8, int8_encoder = name.removeprefix("torch.") in ("int8", "int8-all"), name == "int8-all"
    if int8 and device.type != "cpu":
        msg = f"dtype={name!r} runs only on the CPU, not on {device}: use bfloat16 there"
        raise ValueError(msg)
    dtype = resolve_dtype(dtype, device)
    tokenizer = load_tokenizer(checkpoint, escape=settings.control_tokens == "escape")
    if checkpoint.lora is not None:
        identify(checkpoint)  # it refuses an adapter of another model
    try:
        model = _build(checkpoint, dtype)
        tensors = _text_tensors(checkpoint)
        is_mapped = device.type == "cpu" and any(tensor.dtype == dtype for tensor in tensors.values())
        later: dict[str, Any] = {}
        faulty = _fill(model, tensors, device, dtype, checkpoint.lora, later if encoder_later else None)
    except CheckpointError:
        raise
    except Exception as error:
        msg = f"cannot load {checkpoint.name!r} from {str(checkpoint.folder)!r}: {type(error).__name__}: {error}"
        raise CheckpointError(msg) from error
    if faulty:
        msg = (
            f"{checkpoint.name!r} lacks {len(faulty)} weights of the text model, or has them in another shape "
            f"(first: {faulty[0]}); download the checkpoint again"
        )
        raise CheckpointError(msg)
    computes = dtype
    faster = fast and device.type == "cpu" and dtype in (torch.float32, torch.bfloat16)
    if faster:
        parts = ("decoder",) if later else ("encoder", "decoder")
        computes = _optimize_for_cpu(model, int8=int8, int8_encoder=int8_encoder, parts=parts)
    elif device.type == "cpu" and dtype == torch.float16:
        _warn_of_float16()
    logger.info("loaded %s on %s in %s", checkpoint.name, device, name if int8 else dtype)
    files = MappedFiles(checkpoint.shards if is_mapped else ())
    shards = MappedFiles(checkpoint.shards)

    def load_encoder() -> None:
        began = time.perf_counter()
        with _own_device(torch.device("cpu")):
            _place(model, later, device, dtype)
            shards.check()
            if faster:
                _optimize_for_cpu(model, int8=int8, int8_encoder=int8_encoder, parts=("encoder",))
        logger.info("loaded the encoder of %s in %.1f s", checkpoint.name, time.perf_counter() - began)
        later.clear()

    deferred = Deferred(partial(computing.apart, load_encoder, device) if later else None)
    return LoadedModel(model, tokenizer, device, dtype, int8, int8_encoder, computes, files, deferred)


def _build(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """Build the text part of the model without weights, in evaluation mode."""
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False)
    config.encoder.vision_config = type(config.encoder.vision_config)(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=8, patch_size=4
    )
    configs = [config, config.encoder, config.encoder.text_config, config.encoder.vision_config, config.decoder]
    for part in configs:
        part.dtype = None  # transformers would make a dtype that it finds here the default of the process
    with torch.device("meta"):
        model = transformers.T5Gemma2ForConditionalGeneration(config)
    for part in configs:
        part.dtype = dtype
    encoder = model.get_encoder()
    for name in UNUSED:
        delattr(encoder, name.rstrip("."))
    return model.eval().requires_grad_(False)


def _fill(
    model: Any,
    tensors: dict[str, Any],
    device: torch.device,
    dtype: torch.dtype,
    lora: Lora | None,
    later: dict[str, Any] | None = None,
) -> list[str]:
    """Set weights and computed constants; return the weights that are missing or do not fit.

    With `later`, the tensors of the encoder's layers are put there instead.
    """
    expected = {name: weight.shape for name, weight in model.named_parameters(remove_duplicate=False)}
    found = {}
    for key in list(tensors):
        tensor, name = tensors.pop(key), weight_name(key, expected)
        if name is not None:
            found[name] = tensor
    _share_tied(found, model.all_tied_weights_keys)
    faulty = sorted(name for name, shape in expected.items() if name not in found or found[name].shape != shape)
    if faulty:
        return faulty
    if lora is not None:
        lora.add_to(found, expected)
    wanted = {name: found[name] for name in expected}
    if later is not None:
        later |= {name: wanted.pop(name) for name in expected if _ENCODER_LAYERS in name}
    _place(model, wanted, device, dtype)
    _fill_constants(model, device, dtype)
    named = [*model.named_parameters(), *model.named_buffers()]
    left = [name for name, tensor in named if tensor.is_meta and name not in (later or ())]
    if left:
        msg = f"transformers {metadata.version('transformers')} has parts that kalm-rag does not fill: {left[:3]}"
        raise RuntimeError(msg)
    return []


def _place(model: Any, tensors: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> None:
    """Set weights by name."""
    import torch

    made: dict[int, torch.nn.Parameter] = {}
    for name, tensor in tensors.items():
        if id(tensor) not in made:
            made[id(tensor)] = torch.nn.Parameter(tensor.to(device=device, dtype=dtype), requires_grad=False)
        parent, _, leaf = name.rpartition(".")
        # Not by `setattr`, which goes through functions that other libraries replace while they load.
        model.get_submodule(parent)._parameters[leaf] = made[id(tensor)]


def weight_name(key: str, expected: Collection[str]) -> str | None:
    """Return the name in the model of a tensor in a file, if it is an expected one; releases differ in nesting."""
    whole = key if key.startswith(("model.", "lm_head.")) else f"model.{key}"
    names = (whole, whole.replace("model.encoder.", "model.encoder.text_model.", 1))
    return next((name for name in names if name in expected), None)


def _share_tied(found: dict[str, Any], tied: Mapping[str, str]) -> None:
    """Give weights that share a tensor the one in the file; where the file holds two that differ, each keeps its own.

    Args:
        found: tensors by name; names are added.
        tied: by name, the name of the weight that it shares, if the file holds that one.
    """
    for source in dict.fromkeys(tied.values()):
        group = [source, *(name for name, other in tied.items() if other == source)]
        present = next((found[name] for name in group if name in found), None)
        for name in group:
            if present is not None and (name not in found or _equal(found[name], present)):
                found[name] = present


def _equal(left: Any, right: Any) -> bool:
    import torch

    return left.shape == right.shape and left.dtype == right.dtype and torch.equal(left, right)


def _fill_constants(model: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Fill in what no file holds: embedding scales and rotary frequencies."""
    import torch

    for module in model.modules():
        if "embed_scale" in module._buffers:
            module._buffers["embed_scale"] = torch.tensor(module.scalar_embed_scale, dtype=dtype, device=device)
        elif type(module).__name__.endswith("RotaryEmbedding"):
            with torch.device("cpu"):
                fresh = type(module)(module.config)
            for name, buffer in fresh._buffers.items():
                module._buffers[name] = buffer.to(device)


def _optimize_for_cpu(model: Any, *, int8: bool, int8_encoder: bool, parts: Collection[str]) -> torch.dtype:
    """Install the faster modules; returns the dtype of the model's activations."""
    from kalm_rag.model.cpu_kernels import optimize_for_cpu

    try:
        return optimize_for_cpu(model, int8=int8, int8_encoder=int8_encoder, parts=parts)
    except (RuntimeError, AttributeError) as error:
        if not int8:
            raise
        msg = (
            f"torch {metadata.version('torch')} cannot run dtype={'int8-all' if int8_encoder else 'int8'!r} on this "
            f"machine ({error}): {_instead_of_int8()}"
        )
        raise ValueError(msg) from error


def _warn_of_float16() -> None:
    from kalm_rag.model.cpu_kernels import has_fast_bfloat16, has_fast_float16

    if not has_fast_float16():
        better = "bfloat16" if has_fast_bfloat16() else "float32"
        logger.warning("dtype='float16' is slower than float32 on this CPU: use dtype=%r", better)


def _instead_of_int8() -> str:
    """Return advice for a machine that cannot run int8 matrices."""
    from kalm_rag.model.cpu_kernels import has_fast_bfloat16

    if has_fast_bfloat16():
        return "use dtype='bfloat16'"
    return (
        "use dtype='float32', the fastest here; bfloat16 is not faster on this CPU. To save memory and disk, keep "
        "passages in 8 bits with prefill_storage='int8' and PassageCache(..., storage='int8')"
    )


def _text_tensors(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return every tensor of the text part, memory-mapped: nothing is read yet."""
    from safetensors import SafetensorError, safe_open

    tensors: dict[str, Any] = {}
    shard = checkpoint.folder
    try:
        for shard in checkpoint.shards:
            with safe_open(shard, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 - a safetensors file is not a mapping
                    if not any(part in key for part in UNUSED):
                        check_tensor(shard, key, file.get_slice(key).get_dtype())
                        tensors[key] = file.get_tensor(key)
    except (SafetensorError, OSError) as error:
        msg = f"cannot read {str(shard)!r} ({error}); download the checkpoint again"
        raise CheckpointError(msg) from error
    return tensors


def load_tokenizer(checkpoint: Checkpoint, *, escape: bool) -> Tokenizer:
    """Load the tokenizer of a checkpoint, and nothing else of it.

    Raises:
        CheckpointError: it cannot be read.
    """
    import transformers

    try:
        fast = transformers.AutoTokenizer.from_pretrained(checkpoint.folder, trust_remote_code=False)
    except Exception as error:
        msg = (
            f"cannot read the tokenizer of {checkpoint.name!r} in {str(checkpoint.folder)!r} "
            f"({type(error).__name__}: {error}); the folder must hold tokenizer.json"
        )
        raise CheckpointError(msg) from error
    return Tokenizer(fast, escape=escape, where=repr(checkpoint.name))
