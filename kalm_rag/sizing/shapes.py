"""The shape of a model, as far as bytes depend on it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Shape:
    """What the bytes of a passage depend on.

    Attributes:
        width: numbers in an encoder state.
        layers: of the decoder.
        kv_heads: heads of keys and values.
        head_width: numbers in a key.
        prefix: tokens of the prompt's prefix under the model cards' instruction.
    """

    width: int
    layers: int
    kv_heads: int
    head_width: int
    prefix: int


_GEMMA_PREFIX = 53
"""Tokens of the prefix in the tokenizer of the releases."""

RELEASES = {
    "nano": Shape(640, 18, 1, 256, _GEMMA_PREFIX),
    "small": Shape(1152, 26, 1, 256, _GEMMA_PREFIX),
    "large": Shape(2560, 34, 4, 256, _GEMMA_PREFIX),
}
"""Shapes of KaLM-Reranker-V1 (T5Gemma2 270M-270M, 1B-1B and 4B-4B), so that sizing needs no download."""


def shape_of(model: str) -> Shape:
    """Return the shape of a release by its name, or of a checkpoint that is on this machine.

    Raises:
        CheckpointError: there is no such checkpoint, or it cannot be used.
    """
    if model in RELEASES:
        return RELEASES[model]
    from kalm_rag.model.checkpoint import find_checkpoint
    from kalm_rag.model.loading import load_tokenizer
    from kalm_rag.model.prefiller import find_prompt_prefix
    from kalm_rag.model.prompts import Prompts
    from kalm_rag.settings import Settings

    checkpoint = find_checkpoint(model, local_files_only=True)
    decoder = checkpoint.config["decoder"]
    settings = Settings()
    prompts = Prompts(load_tokenizer(checkpoint, escape=True), settings, int(decoder["max_position_embeddings"]))
    prefix = len(find_prompt_prefix(prompts, settings.instruction))
    sizes = ("hidden_size", "num_hidden_layers", "num_key_value_heads", "head_dim")
    width, layers, heads, head_width = (int(decoder[name]) for name in sizes)
    return Shape(width, layers, heads, head_width, prefix)
