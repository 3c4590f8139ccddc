"""The encoder: passages to pooled states, a batch at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kalm_rag.model.batching import launch_tokens, plan, run_halving
from kalm_rag.model.loading import LoadedModel
from kalm_rag.model.padding import right_pad
from kalm_rag.model.pooling import PassageStates, mean_groups
from kalm_rag.model.prompts import PassageTokens
from kalm_rag.settings import Settings


class Encoder:
    """Runs the encoder over passages and pools its states, a batch at a time."""

    def __init__(self, loaded: LoadedModel, settings: Settings) -> None:
        self._loaded = loaded
        self._settings = settings

    def batches(self, passages: Sequence[PassageTokens]) -> Iterator[list[int]]:
        """Positions into `passages` that are encoded together, longest passages first."""
        return plan(
            [len(passage.ids) for passage in passages],
            batch_size=self._settings.batch_size,
            batch_tokens=self._settings.batch_tokens,
            padding_tokens=launch_tokens(self._loaded.device.type),
        )

    def encode(self, passages: Sequence[PassageTokens], ratio: int) -> list[PassageStates]:
        """Encode one batch and return its states at `ratio` in host memory; the caller holds the model's turn."""
        return run_halving(lambda rows: self._forward(rows, ratio), passages)

    def _forward(self, passages: Sequence[PassageTokens], ratio: int) -> list[PassageStates]:
        device = self._loaded.device
        with self._loaded.computing():
            ids, mask = right_pad([passage.ids for passage in passages], self._loaded.tokenizer.pad_id, device)
            hidden = self._loaded.model.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
            # One copy off the device for the whole batch: the cache keeps states in host memory.
            pooled = mean_groups(hidden, mask.float(), ratio).to(self._loaded.dtype).cpu()
            # A copy per passage: a view would keep the whole padded batch alive.
            return [
                PassageStates(row[: -(-len(passage.ids) // ratio)].clone(), len(passage.ids), ratio, passage.truncated)
                for row, passage in zip(pooled, passages, strict=True)
            ]
