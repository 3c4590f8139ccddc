"""Numbers in 4 bits, the reference, and compact passages turned back into keys and values."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kalm_rag import KaLMReranker
from kalm_rag.model.compact import (
    DIRECTIONS,
    Reference,
    compacted,
    from_rows,
    reference_numbers,
    rows_of,
    to_rows,
)
from kalm_rag.model.pooling import PassageStates
from kalm_rag.model.quantization import pack_nibbles, unpack_nibbles

SHAPE = (2, 3, 1, 5, 16)
"""Keys and values, layers, heads, tokens of the prefix, head width."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_number_of_4_bits_survives_packing(dtype: torch.dtype) -> None:
    numbers = torch.stack([torch.arange(-7, 9).clamp(max=7), torch.arange(7, -9, -1).clamp(min=-7)]).float()
    packed, scales = pack_nibbles(numbers * 0.25)
    assert packed.shape == (2, 8)
    assert packed.dtype == torch.uint8
    assert torch.equal(scales, torch.full((2, 1), 0.25))
    assert torch.equal(unpack_nibbles(packed, dtype), numbers.to(dtype))


def test_packing_errs_by_half_a_step_at_most() -> None:
    numbers = torch.randn(50, 4, 64, generator=torch.Generator().manual_seed(0))
    packed, scales = pack_nibbles(numbers)
    error = (unpack_nibbles(packed, torch.float32) * scales - numbers).abs()
    assert (error <= scales / 2 * 1.001).all()


def test_zeros_stay_zeros() -> None:
    packed, scales = pack_nibbles(torch.zeros(3, 8))
    assert torch.equal(unpack_nibbles(packed, torch.float32) * scales, torch.zeros(3, 8))


def prefixes(count: int, rank: int, seed: int = 0) -> torch.Tensor:
    """Prefixes that differ from one another in a few directions."""
    generator = torch.Generator().manual_seed(seed)
    mean, directions = torch.randn(SHAPE, generator=generator), torch.randn(rank, *SHAPE, generator=generator)
    places = torch.randn(count, rank, generator=generator)
    return mean + (places @ directions.flatten(1)).view(count, *SHAPE)


def test_the_directions_are_of_length_1_and_span_what_differs() -> None:
    given = prefixes(16, 3)
    found = reference_numbers(given)
    assert found.shape == (1 + DIRECTIONS, *SHAPE)
    flat = found[1:].flatten(1)
    assert torch.allclose(flat @ flat.T, torch.diag(torch.tensor([1.0] * 3 + [0.0] * (DIRECTIONS - 3))), atol=1e-4)
    rest = (given - found[0]).flatten(1)
    assert torch.allclose(rest @ flat.T @ flat, rest, atol=1e-4)


def test_equal_passages_have_no_directions() -> None:
    found = reference_numbers(prefixes(1, 1).expand(16, *SHAPE))
    assert not found[1:].any()


def test_passages_with_nan_do_not_count() -> None:
    given = prefixes(16, 3)
    spoiled = torch.cat([given, torch.full((1, *SHAPE), float("nan"))])
    assert torch.equal(reference_numbers(spoiled), reference_numbers(given))
    assert not reference_numbers(spoiled[16:]).any()


def test_what_the_reference_explains_costs_nothing() -> None:
    given = prefixes(16, 3)
    given[:, :, 0] = given[0, :, 0]  # the first layer sees nothing of a passage
    reference = Reference(reference_numbers(given), "digest")
    states = PassageStates(torch.zeros(2, 4), 8, 4, False)
    found = compacted(given[5], reference, states)
    assert found.scales.max() < 1e-4
    for layer in range(SHAPE[1]):
        near = reference.at(found.along[None], layer)[:, 0]
        assert torch.allclose(near, given[5][:, layer], atol=1e-4)


def test_a_passage_is_rows_of_bytes_and_back() -> None:
    given = prefixes(16, 12)
    found = compacted(
        given[2], Reference(reference_numbers(given), "digest"), PassageStates(torch.zeros(2, 4), 8, 4, True)
    )
    rows, scales = to_rows(found)
    shape = (2, SHAPE[1] - 1, *SHAPE[2:4])
    assert rows.shape == (rows_of(shape, 8), 8)
    assert rows.dtype == torch.int8
    rest, its_scales, along = from_rows(rows, scales, shape)
    assert torch.equal(rest, found.rest)
    assert torch.equal(its_scales, found.scales)
    assert torch.equal(along, found.along)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_expansion_gives_the_decoders_own_keys_and_values(checkpoint: Path, passages: list[str], dtype: str) -> None:
    """Of texts that differ in as many directions as the reference has, nothing is left for the 4 bits."""
    reranker = KaLMReranker(checkpoint, device="cpu", cache=None, dtype=dtype, prefill_storage="compact")
    scorer = reranker.scorer
    source = scorer.passage_kv
    prefix = source.prefix(reranker.settings.instruction)
    texts = passages[: DIRECTIONS + 1]
    states = scorer.states.get(texts, 4)
    inputs = [states[text] for text in texts]
    plain = KaLMReranker(checkpoint, device="cpu", cache=None, dtype=dtype)
    whole = plain.scorer.passage_kv.get(texts, plain.scorer.passage_kv.request(plain.settings.instruction, 4))
    with scorer.loaded.computing():
        own = torch.stack(source.decoder.prefiller.prefixes(prefix, inputs))
        reference = Reference(reference_numbers(own), "digest")
        compact = source.decoder.prefiller.prefill(prefix, inputs, reference)
        layers, heads, width = source.decoder.shape
        positions = max(passage.positions for passage in compact)
        room = torch.full((2, layers, len(texts), heads, positions, width), float("nan"))
        room = room.to(scorer.loaded.compute_dtype)
        source.decoder._layout._expansion.fill(room, compact, reference)  # type: ignore[union-attr, arg-type]
    tolerance = 2e-4 if dtype == "float32" else 6e-2
    for row, text in enumerate(texts):
        expected = whole[text].key_values  # type: ignore[union-attr]
        got = room[:, :, row, :, : expected.shape[3]]
        assert torch.allclose(got.float(), expected.float(), atol=tolerance * float(expected.abs().max()))
    assert room.isfinite().all()
