"""Rows of different length as one tensor and its mask, on the model's device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kalm_rag.model.loading import LoadedModel

if TYPE_CHECKING:
    import torch


def right_pad(rows: Sequence[Sequence[int]], pad_id: int, device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and their mask, both int64 of shape `(batch, longest)`, padded on the right."""
    longest = max(map(len, rows))
    ids = host_integers([[*row, *[pad_id] * (longest - len(row))] for row in rows])
    return to_device(ids, device), to_device(_mask(rows, longest), device)


def right_pad_states(rows: Sequence[torch.Tensor], loaded: LoadedModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Pooled states `(batch, most groups, width)` on the model's device, and their int64 mask."""
    import torch

    batch = torch.nn.utils.rnn.pad_sequence([row.to(loaded.compute_dtype) for row in rows], batch_first=True)
    return to_device(batch, loaded.device), to_device(_mask(rows, batch.shape[1]), loaded.device)


def _mask(rows: Sequence[Sequence[int] | torch.Tensor], longest: int) -> torch.Tensor:
    """Return the padding mask, int64 of shape `(batch, longest)`, in host memory."""
    import torch

    lengths = host_integers([len(row) for row in rows])
    return (torch.arange(longest, device="cpu", dtype=torch.long) < lengths[:, None]).long()


def host_integers(numbers: Any) -> torch.Tensor:
    """Integers as an int64 tensor in host memory, whatever the caller's default device is."""
    import torch

    return torch.tensor(numbers, dtype=torch.long, device="cpu")


def to_device(tensor: torch.Tensor, device: Any) -> torch.Tensor:
    """Copy a host tensor to the device; to CUDA from pinned memory, so that the host does not wait for it."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
