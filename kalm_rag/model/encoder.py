"""The encoder: passages to pooled states, a batch at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from kalm_rag.model.batching import launch_tokens, plan, run_halving
from kalm_rag.model.loading import LoadedModel
from kalm_rag.model.padding import right_pad
from kalm_rag.model.pooling import PassageStates, mean_groups
from kalm_rag.model.prompts import PassageTokens
from kalm_rag.settings import Settings

if TYPE_CHECKING:
    import torch

_CPU_TOKENS = 2048
"""Tokens of a batch on a CPU: more leave the processor's cache, and make other calls wait (`benchmarks/encoder.py`)."""


class Encoder:
    """Runs the encoder over passages and pools its states, a batch at a time.

    On a CPU, passages lie side by side without padding, unless a version of transformers cannot do that. The encoder's
    layers are loaded when they are first needed.
    """

    def __init__(self, loaded: LoadedModel, settings: Settings) -> None:
        self._loaded = loaded
        self._settings = settings
        self._packed = None
        if loaded.device.type == "cpu":
            from kalm_rag.model.encoder_attention import PackedEncoder

            self._packed = PackedEncoder(loaded.model.get_encoder())

    @property
    def is_ready(self) -> bool:
        """Whether its layers are loaded."""
        return self._loaded.encoder.is_ready

    def prepare(self) -> None:
        """Load its layers, if they are not loaded yet: before a turn of the model, so that other calls can go on.

        Raises:
            CheckpointError: a file was overwritten, or cannot be read any more.
        """
        self._loaded.encoder.ready()

    def batches(self, passages: Sequence[PassageTokens]) -> Iterator[list[int]]:
        """Positions into `passages` that are encoded together, longest passages first."""
        most = self._settings.batch_tokens
        is_packed = self._packed is not None and self._packed.is_usable
        return plan(
            [len(passage.ids) for passage in passages],
            batch_size=self._settings.batch_size,
            batch_tokens=min(most, _CPU_TOKENS) if self._loaded.device.type == "cpu" else most,
            padding_tokens=most if is_packed else launch_tokens(self._loaded.device.type),
        )

    def encode(self, passages: Sequence[PassageTokens], ratio: int) -> list[PassageStates]:
        """Encode one batch and return its states at `ratio` in host memory; the caller holds the model's turn."""
        self.prepare()
        return run_halving(lambda rows: self._loaded.compute(self._forward, rows, ratio), passages)

    def _forward(self, passages: Sequence[PassageTokens], ratio: int) -> list[PassageStates]:
        pooled = self._pooled_packed(passages, ratio) or self._pooled_padded(passages, ratio)
        return [
            PassageStates(states, len(passage.ids), ratio, passage.truncated)
            for states, passage in zip(pooled, passages, strict=True)
        ]

    def _pooled_packed(self, passages: Sequence[PassageTokens], ratio: int) -> list[torch.Tensor] | None:
        if self._packed is None or not self._packed.is_usable:
            return None
        hidden = self._packed.run([passage.ids for passage in passages])
        return None if hidden is None else [self._pooled(rows, ratio) for rows in hidden]

    def _pooled(self, rows: torch.Tensor, ratio: int) -> torch.Tensor:
        import torch

        pooled = mean_groups(rows, torch.ones(len(rows), dtype=torch.float32, device=rows.device), ratio)
        # A copy where it is a view, which would keep the whole batch alive.
        return pooled.to(self._loaded.dtype, copy=pooled is rows)

    def _pooled_padded(self, passages: Sequence[PassageTokens], ratio: int) -> list[torch.Tensor]:
        ids, mask = right_pad([passage.ids for passage in passages], self._loaded.tokenizer.pad_id, self._loaded.device)
        hidden = self._loaded.model.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
        # One copy off the device for the whole batch: the cache keeps states in host memory.
        pooled = mean_groups(hidden, mask.float(), ratio).to(self._loaded.dtype).cpu()
        # A copy per passage: a view would keep the whole padded batch alive.
        return [row[: -(-len(passage.ids) // ratio)].clone() for row, passage in zip(pooled, passages, strict=True)]
