"""The two halves of the model, run in batches: passages to states, prompts and states to margins."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kalm_rag.batching import launch_tokens, plan, run_halving
from kalm_rag.errors import ScoringError
from kalm_rag.loading import LoadedModel
from kalm_rag.pooling import PassageStates, mean_groups
from kalm_rag.progress import Progress
from kalm_rag.prompts import PassageTokens, Prompt
from kalm_rag.settings import Settings
from kalm_rag.turns import Turns

if TYPE_CHECKING:
    import torch


def probability(margin: float) -> float:
    """`P(yes)` of a margin: the softmax over the logits of `yes` and `no` is the sigmoid of their difference."""
    if margin >= 0:
        return 1.0 / (1.0 + math.exp(-margin))
    return math.exp(margin) / (1.0 + math.exp(margin))


@dataclass(frozen=True, slots=True)
class Pair:
    """One thing to score: a prompt against an encoded passage."""

    prompt: Prompt
    passage: PassageStates


class YesNoHead:
    """The answer head: the two rows of the output matrix that matter.

    The reference multiplies all rows (262,144 on the released models) at all positions; the score reads two numbers.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        tokenizer = loaded.tokenizer
        weight = loaded.model.get_output_embeddings().weight
        answers = to_device(host_integers([tokenizer.yes_id, tokenizer.no_id]), weight.device)
        self._rows = weight[answers].to(loaded.compute_dtype)
        self._cap = loaded.model.config.decoder.final_logit_softcapping

    def margins(self, hidden: torch.Tensor) -> torch.Tensor:
        """`z_yes - z_no`.

        Args:
            hidden: the decoder's last hidden states at the last prompt position, shape `(batch, width)`.

        Returns:
            Float32 of shape `(batch,)`; logits are compared in float32, as the reference does.
        """
        import torch

        logits = torch.nn.functional.linear(hidden, self._rows)
        if self._cap is not None:
            logits = torch.tanh(logits / self._cap) * self._cap
        logits = logits.float()
        return logits[:, 0] - logits[:, 1]


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
        """Encode one batch, which needs the model's turn; returns its states at `ratio`, in host memory."""
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


class PlainScorer:
    """Runs the whole prompt against pooled states: the plain path that every faster one is tested against.

    Args:
        loaded: the model.
        settings: batch sizes.
        turns: taken for each batch.
    """

    def __init__(self, loaded: LoadedModel, settings: Settings, turns: Turns) -> None:
        self._loaded = loaded
        self._settings = settings
        self._turns = turns
        self._head = YesNoHead(loaded)

    def margins(self, pairs: Sequence[Pair], progress: Progress | None = None) -> list[float]:
        """`z_yes - z_no` of each pair, in input order; not finite where the model overflows."""
        found = [0.0] * len(pairs)
        batches = plan(
            [len(pair.prompt.ids) + len(pair.passage.states) for pair in pairs],
            batch_size=self._settings.batch_size,
            batch_tokens=self._settings.batch_tokens,
            padding_tokens=launch_tokens(self._loaded.device.type),
        )
        for batch in batches:
            with self._turns:
                margins = run_halving(self._forward, [pairs[position] for position in batch])
            for position, margin in zip(batch, margins, strict=True):
                found[position] = margin
            if progress is not None:
                progress.advance(len(batch))
        return found

    def _forward(self, pairs: Sequence[Pair]) -> list[float]:
        import torch

        device = self._loaded.device
        with self._loaded.computing():
            ids, mask = right_pad([pair.prompt.ids for pair in pairs], self._loaded.tokenizer.pad_id, device)
            states, states_mask = right_pad_states([pair.passage.states for pair in pairs], self._loaded)
            hidden = (
                self._loaded.model.get_decoder()(
                    input_ids=ids,
                    attention_mask=mask,
                    encoder_hidden_states=states,
                    encoder_attention_mask=states_mask,
                    use_cache=False,
                )
            ).last_hidden_state
            last = mask.sum(dim=1) - 1
            rows = torch.arange(len(pairs), device=device)
            margins: list[float] = self._head.margins(hidden[rows, last]).tolist()
            return margins


def check_finite(margins: list[float], dtype: torch.dtype) -> list[float]:
    """Return the margins if all are finite numbers.

    Raises:
        ScoringError: some are not; the message names how many and the way out.
    """
    bad = sum(not math.isfinite(margin) for margin in margins)
    if bad:
        msg = (
            f"the model gave non-finite logits for {bad} of {len(margins)} passages in {dtype}: "
            "use dtype='bfloat16' or dtype='float32' (float16 overflows), and check the checkpoint if it persists"
        )
        raise ScoringError(msg)
    return margins


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
    """Which places hold something, int64 of shape `(batch, longest)`, in host memory."""
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
