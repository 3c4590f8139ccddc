"""Rows of similar length share a forward pass, under a budget of padded tokens."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")


def plan(lengths: Sequence[int], *, batch_size: int, batch_tokens: int, padding_tokens: int) -> Iterator[list[int]]:
    """Group positions into batches, longest first, so that a batch too large for memory fails at once.

    Args:
        lengths: tokens of each row.
        batch_size: rows per batch at most.
        batch_tokens: rows times the longest row of the batch at most; a longer row gets a batch of its own.
        padding_tokens: padding per batch at most. One more forward pass has a fixed cost; this is how many tokens of
            work it is worth (see `launch_tokens`).

    Yields:
        Lists of positions into `lengths`; every position occurs once.
    """
    order = sorted(range(len(lengths)), key=lambda position: -lengths[position])
    batch: list[int] = []
    padding = 0
    for position in order:
        if batch:
            longest = lengths[batch[0]]
            padding += longest - lengths[position]
            too_wide = (len(batch) + 1) * longest > batch_tokens or padding > padding_tokens
            if len(batch) == batch_size or too_wide:
                yield batch
                batch, padding = [], 0
        batch.append(position)
    if batch:
        yield batch


def plan_pairs(
    queries: Sequence[int],
    passages: Sequence[int],
    *,
    batch_size: int,
    batch_tokens: int,
    query_padding: int,
    padding_tokens: int,
) -> Iterator[list[int]]:
    """Group pairs into batches as `plan` does, without padding short queries to much longer ones.

    Padding a query costs as much as its own tokens do; padding what it reads of a passage may cost less.

    Args:
        queries: tokens of each pair that run through the decoder.
        passages: positions of each pair that these attend to.
        batch_size: as in `plan`.
        batch_tokens: as in `plan`, of both together.
        query_padding: padding of queries at most, in all pairs that are planned together. Queries of equal length are.
        padding_tokens: as in `plan`, of both together.

    Yields:
        Lists of positions into `queries`; every position occurs once.
    """
    by_length: dict[int, list[int]] = {}
    for position, length in enumerate(queries):
        by_length.setdefault(length, []).append(position)
    groups: list[list[int]] = []
    longest = padding = 0
    for length in sorted(by_length, reverse=True):
        padding += (longest - length) * len(by_length[length])
        if not groups or padding > query_padding:
            groups.append([])
            longest, padding = length, 0
        groups[-1] += by_length[length]
    for group in groups:
        lengths = [queries[position] + passages[position] for position in group]
        for batch in plan(lengths, batch_size=batch_size, batch_tokens=batch_tokens, padding_tokens=padding_tokens):
            yield [group[place] for place in batch]


def launch_tokens(device_type: str) -> int:
    """How many tokens of work the fixed cost of a forward pass is worth.

    Measured with the Nano geometry on 2 CPU cores: about 10 ms against 0.1 ms per token. On a GPU the launches of a
    pass cost as much as thousands of tokens.
    """
    return 128 if device_type == "cpu" else 4096


def run_halving(forward: Callable[[Sequence[T]], list[R]], rows: Sequence[T]) -> list[R]:
    """Run one batch; on CUDA out-of-memory run its halves instead, down to single rows.

    Raises:
        torch.cuda.OutOfMemoryError: a single row does not fit.
    """
    import torch

    try:
        return forward(rows)
    except torch.cuda.OutOfMemoryError:
        if len(rows) == 1:
            raise
    # Outside of the handler: the exception's traceback keeps the failed batch's tensors alive.
    torch.cuda.empty_cache()
    half = len(rows) // 2
    logger.warning("CUDA is out of memory with %d rows in a batch; continuing with %d", len(rows), half)
    return run_halving(forward, rows[:half]) + run_halving(forward, rows[half:])
