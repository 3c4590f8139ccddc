"""The untrained model: its tokenizer, its sizes, and weights that start from the teacher's word vectors.

Random weights learn little in an hour on a CPU. Three choices give gradient descent something to hold on to:

- Token embeddings are the teacher's sentence vectors of single tokens, reduced by PCA, so that similar words are near
  from the first step; one more coordinate tells rare words from frequent ones.
- The decoder's query and key projections start equal, so that a query token attends to equal and similar passage
  tokens. Cross-attention keys carry no rotary position while queries do; slow rotary frequencies keep them comparable.
- One coordinate is a constant that the encoder's last norm turns negative, so that the decoder tells passage states
  from its own.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

SPECIAL = (
    "<pad>",
    "<eos>",
    "<bos>",
    "<unk>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<start_of_image>",
    "<end_of_image>",
)
PHRASES = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct provided. "
    'Note that the answer can only be "yes" or "no".',
    "Given a query, retrieve documents that answer the query.",
    "<Instruct>:",
    "<Query>:",
    "<Document>:",
)
"""Parts of KaLM's templates that are one token each: the same text costs the small model a quarter of the tokens."""

WIDTH, HEADS, KEY_HEADS, HEAD_DIM, MLP = 256, 4, 2, 128, 512
POSITIONS = 8192
CONTENT = 224
"""Coordinates that hold word vectors; the next two hold rarity and the constant, the others start empty."""


def count_tokens(teacher_tokenizer: Any, texts: Iterable[list[str]]) -> Counter[int]:
    """How often each of the teacher's word pieces occurs."""
    counts: Counter[int] = Counter()
    for batch in texts:
        for row in teacher_tokenizer(batch, add_special_tokens=False, return_attention_mask=False).input_ids:
            counts.update(row)
    return counts


def build_tokenizer(folder: Path, teacher_tokenizer: Any, counts: Counter[int], size: int) -> list[int]:
    """Write a WordPiece tokenizer of the teacher's most frequent pieces.

    Returns:
        The teacher's id of each piece, in the order of the new ids behind the special tokens.
    """
    import tokenizers
    import transformers

    pieces = {index: piece for piece, index in teacher_tokenizer.get_vocab().items()}
    usable = {index: piece for index, piece in pieces.items() if not piece.startswith("[") or len(piece) == 1}
    # Every single character stays, so that no Latin word becomes unknown.
    always = [i for i, piece in usable.items() if len(piece.removeprefix("##")) == 1 and piece.isascii()]
    always += [teacher_tokenizer.convert_tokens_to_ids(word) for word in ("yes", "no", "user", "model")]
    kept = list(dict.fromkeys(always))
    for index, _ in counts.most_common():
        if len(kept) == size:
            break
        if index in usable and index not in kept[: len(always)]:
            kept.append(index)
    kept.sort()
    vocabulary = {piece: number for number, piece in enumerate([*SPECIAL, *(pieces[index] for index in kept)])}
    raw = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="<unk>", max_input_chars_per_word=64))
    raw.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    raw.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    raw.decoder = tokenizers.decoders.WordPiece(prefix="##", cleanup=False)
    raw.add_special_tokens([tokenizers.AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    raw.add_tokens([tokenizers.AddedToken(phrase, normalized=False) for phrase in PHRASES])
    folder.mkdir(parents=True, exist_ok=True)
    raw.save(str(folder / "tokenizer.json"))
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side="right",
        model_max_length=8192,
    )
    fast.save_pretrained(folder)
    (folder / "teacher_ids.json").write_text(json.dumps(kept))
    return kept


def config(vocabulary: int, encoder_layers: int, decoder_layers: int) -> Any:
    """A `T5Gemma2Config` of the checkpoint's sizes."""
    import transformers

    text = {
        "vocab_size": vocabulary,
        "hidden_size": WIDTH,
        "intermediate_size": MLP,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_HEADS,
        "head_dim": HEAD_DIM,
        "query_pre_attn_scalar": 64,
        "sliding_window": 64,
        "max_position_embeddings": POSITIONS,
        "bos_token_id": SPECIAL.index("<bos>"),
        "eos_token_id": SPECIAL.index("<eos>"),
        "pad_token_id": SPECIAL.index("<pad>"),
    }
    turning = {"rope_type": "default", "rope_theta": 10_000.0}
    slow = {"rope_type": "linear", "factor": 64.0, "rope_theta": 1_000_000.0}
    images = {
        "image_token_index": SPECIAL.index("<start_of_image>"),
        "eoi_token_index": SPECIAL.index("<end_of_image>"),
    }
    made = transformers.T5Gemma2Config(
        encoder={
            "text_config": {
                **text,
                "num_hidden_layers": encoder_layers,
                "layer_types": ["sliding_attention"] * (encoder_layers - 1) + ["full_attention"],
                "rope_parameters": {"full_attention": dict(slow), "sliding_attention": dict(turning)},
            },
            # The architecture has a vision tower; it is not trained, not stored and not loaded.
            "vision_config": {
                "model_type": "siglip_vision_model",
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
            },
            "mm_tokens_per_image": 4,
            "boi_token_index": SPECIAL.index("<start_of_image>"),
            **images,
        },
        decoder={
            **text,
            "num_hidden_layers": decoder_layers,
            "layer_types": ["full_attention"] * decoder_layers,
            "rope_parameters": {"full_attention": dict(slow), "sliding_attention": dict(turning)},
        },
        **images,
    )
    made._attn_implementation = "eager"
    return made


def start_weights(model: Any, vectors: torch.Tensor, rarity: torch.Tensor, generator: torch.Generator) -> None:
    """Set the weights training starts from.

    Args:
        model: a `T5Gemma2ForConditionalGeneration`.
        vectors: the teacher's vectors of the word pieces, shape `(pieces, teacher width)`.
        rarity: inverse document frequency of the word pieces, shape `(pieces,)`.
        generator: source of randomness.
    """
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "vision" in name or "multi_modal" in name:
                continue
            if weight.ndim == 2:
                weight.normal_(0.0, weight.shape[-1] ** -0.5, generator=generator)
            elif "norm" in name:
                weight.zero_()
                if "post_" in name:
                    # Branches start quiet: the word vectors pass through.
                    weight.fill_(-0.7)
        _embed(model.get_input_embeddings().weight, vectors, rarity, generator)
        model.get_encoder().text_model.norm.weight[CONTENT + 1] = -2.0
        for layer in model.get_decoder().layers:
            _match(layer.self_attn, generator)


def _embed(table: torch.Tensor, vectors: torch.Tensor, rarity: torch.Tensor, generator: torch.Generator) -> None:
    centred = vectors - vectors.mean(0)
    directions = torch.linalg.svd(centred.double(), full_matrices=False).Vh[:CONTENT].float()
    reduced = centred @ directions.T
    # A random rotation spreads the variance over the coordinates, so that each head sees a fair share of it.
    rotation = torch.linalg.qr(torch.randn(CONTENT, CONTENT, generator=generator)).Q
    content = torch.nn.functional.normalize(reduced @ rotation, dim=-1)
    first, last = len(SPECIAL), len(SPECIAL) + len(vectors)
    table.zero_()
    table[first:last, :CONTENT] = 0.9 * content
    table[first:last, CONTENT] = 0.3 * (rarity - rarity.mean()) / rarity.std()
    for row in [*range(1, first), *range(last, len(table))]:
        table[row, :CONTENT] = 0.9 * torch.nn.functional.normalize(torch.randn(CONTENT, generator=generator), dim=-1)
    table[1:, CONTENT + 1] = 0.3


def _match(attention: Any, generator: torch.Generator) -> None:
    keys = torch.zeros(KEY_HEADS * HEAD_DIM, WIDTH)
    # A rotation of the content per pair of heads; the sum of both compares all of it.
    basis = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator)).Q
    keys[:, :CONTENT] = basis[:, :CONTENT]
    attention.k_proj.weight.copy_(keys)
    repeats = HEADS // KEY_HEADS
    queries = keys.view(KEY_HEADS, 1, HEAD_DIM, WIDTH).repeat(1, repeats, 1, 1)
    # The second head of each pair may wander further from plain matching.
    noise = torch.randn(queries.shape, generator=generator) / math.sqrt(WIDTH)
    queries[:, 1:] = 0.7 * queries[:, 1:] + 0.5 * noise[:, 1:]
    attention.q_proj.weight.copy_(queries.reshape(HEADS * HEAD_DIM, WIDTH))


def rarity_of(kept: list[int], counts: Counter[int]) -> torch.Tensor:
    """Inverse frequency of each piece, in nats."""
    total = sum(counts.values())
    return torch.tensor(np.log([total / (counts[index] + 1.0) for index in kept]), dtype=torch.float32)
