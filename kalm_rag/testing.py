"""Small random checkpoints in the released format, for tests and benchmarks without network.

They have every part of a released checkpoint: a T5Gemma2 encoder-decoder with sliding and full attention, a vision
tower that a reranker must not load, and a tokenizer with control tokens and byte fallback. Their weights are random:
their scores mean nothing, and are exact.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_SPECIAL = (
    "<pad>",
    "<eos>",
    "<bos>",
    "<unk>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<start_of_image>",
    "<end_of_image>",
)


@dataclass(frozen=True, slots=True)
class Geometry:
    """Sizes of a T5Gemma2 text model, encoder and decoder alike; the field names are those of its configuration."""

    num_hidden_layers: int = 8
    hidden_size: int = 64
    intermediate_size: int = 128
    num_attention_heads: int = 4
    num_key_value_heads: int = 1
    head_dim: int = 32
    sliding_window: int = 48
    max_position_embeddings: int = 8192
    query_pre_attn_scalar: int = 32


TINY = Geometry()
"""Loads in milliseconds; more layers than one period of sliding and full attention, and a window of 48 tokens."""

NANO = Geometry(
    num_hidden_layers=18,
    hidden_size=640,
    intermediate_size=2048,
    head_dim=256,
    sliding_window=512,
    max_position_embeddings=131_072,
    query_pre_attn_scalar=256,
)
"""The geometry of KaLM-Reranker-V1-Nano (T5Gemma2 270M-270M)."""


@dataclass(frozen=True, slots=True)
class Vision:
    """Sizes of the SigLIP vision tower that comes along in the file."""

    hidden_size: int = 32
    intermediate_size: int = 64
    num_hidden_layers: int = 1
    num_attention_heads: int = 2
    image_size: int = 28
    patch_size: int = 14


def build_checkpoint(
    folder: str | Path,
    *,
    geometry: Geometry = TINY,
    vision: Vision | None = None,
    tokenizer_file: str | Path | None = None,
    vocabulary: int = 1024,
    rows: int | None = None,
    texts: Iterable[str] | None = None,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    spread: float = 1.0,
) -> Path:
    """Write a checkpoint with random weights.

    Args:
        folder: where to; made if need be.
        geometry: sizes of the text model.
        vision: sizes of the vision tower, default a small one.
        tokenizer_file: a `tokenizer.json` to use instead of training a tokenizer.
        vocabulary: tokens of the tokenizer that is trained.
        rows: rows of the embedding and output matrices, default one per token; 262,144 on the released models.
        texts: what it is trained on, default the corpus of the demo.
        dtype: of the weights in the file, default float32.
        seed: of the random weights.
        spread: scales the random weights; at 1 scores of different passages differ by tenths.

    Returns:
        The folder.
    """
    import torch
    import transformers

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer_file is None:
        train_tokenizer(folder / "tokenizer.json", vocabulary, texts)
    else:
        shutil.copyfile(tokenizer_file, folder / "tokenizer.json")
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side="right",
        model_max_length=geometry.max_position_embeddings,
    )
    fast.save_pretrained(folder)
    config = t5gemma2_config(geometry, vision or Vision(), max(rows or 0, len(fast)), fast)
    state = torch.random.get_rng_state()
    try:
        torch.manual_seed(seed)
        model = transformers.T5Gemma2ForConditionalGeneration(config)
        _spread_weights(model, spread)
    finally:
        torch.random.set_rng_state(state)
    with _no_bars():
        model.to(dtype or torch.float32).save_pretrained(folder)
    return folder


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    from transformers.utils import logging as transformers_logging

    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            transformers_logging.enable_progress_bar()


def t5gemma2_config(geometry: Geometry, vision: Vision, vocabulary: int, fast: Any) -> Any:
    """A `T5Gemma2Config` with the rotary parameters of the released models."""
    import transformers

    text = {
        **asdict(geometry),
        "vocab_size": vocabulary,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        },
        "bos_token_id": fast.bos_token_id,
        "eos_token_id": fast.eos_token_id,
        "pad_token_id": fast.pad_token_id,
    }
    images = {
        "image_token_index": len(fast) - 1,
        "eoi_token_index": fast.convert_tokens_to_ids("<end_of_image>"),
    }
    return transformers.T5Gemma2Config(
        encoder={
            "text_config": dict(text),
            "vision_config": {"model_type": "siglip_vision_model", **asdict(vision)},
            "mm_tokens_per_image": 4,
            "boi_token_index": fast.convert_tokens_to_ids("<start_of_image>"),
            **images,
        },
        decoder=dict(text),
        **images,
    )


def _spread_weights(model: Any, spread: float) -> None:
    """Random matrices at a scale where states differ, as they do after training.

    At the initial scale of 0.02 every passage scores alike, and a comparison of scores would test nothing.
    """
    import torch

    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "vision_tower" in name or "multi_modal" in name:
                continue
            if weight.ndim == 2:
                weight.normal_(0.0, spread * weight.shape[-1] ** -0.5)
            elif "norm" in name:
                weight.normal_(0.0, 0.1 * spread)
        table = model.get_input_embeddings().weight
        table[model.config.decoder.pad_token_id].zero_()


def train_tokenizer(path: Path, vocabulary: int = 1024, texts: Iterable[str] | None = None) -> None:
    """Train a byte-fallback BPE tokenizer in the manner of Gemma's and write its `tokenizer.json`."""
    import tokenizers

    if texts is None:
        from kalm_rag.demo_data import load_demo

        texts = [f"{text} yes no" for text in load_demo().passages.values()]
    raw = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    raw.normalizer = tokenizers.normalizers.Replace(" ", "\u2581")
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Split(" ", "merged_with_previous")
    raw.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("\u2581", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
        ]
    )
    newlines = ["\n" * count for count in range(1, 5)]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[*_SPECIAL, *byte_tokens, "yes", "no"], show_progress=False
    )
    raw.train_from_iterator(texts, trainer)
    # The trainer made all of them special; only the control tokens are.
    model = raw.to_str()
    raw = tokenizers.Tokenizer.from_str(_demote(model, {*byte_tokens, "yes", "no"}))
    raw.add_tokens([tokenizers.AddedToken(text, normalized=False) for text in newlines])
    raw.save(str(path))


def _demote(serialised: str, names: set[str]) -> str:
    import json

    content = json.loads(serialised)
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] not in names]
    return json.dumps(content)
