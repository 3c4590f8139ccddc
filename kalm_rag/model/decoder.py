"""The decoder on full prompts: prompts and pooled states to margins.

This is the plain path, which every faster one is tested against.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from kalm_rag.model.batching import launch_tokens, plan_pairs, run_halving
from kalm_rag.model.loading import LoadedModel
from kalm_rag.model.padding import host_integers, right_pad, right_pad_states, to_device
from kalm_rag.model.pooling import PassageStates
from kalm_rag.model.prompts import Prompt
from kalm_rag.settings import Settings
from kalm_rag.utils.progress import Progress
from kalm_rag.utils.turns import Turns

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt and an encoded passage to score."""

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


class Decoder:
    """Runs full prompts against pooled states.

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
        launch = launch_tokens(self._loaded.device.type)
        batches = plan_pairs(
            [len(pair.prompt.ids) for pair in pairs],
            [len(pair.passage.states) for pair in pairs],
            batch_size=self._settings.batch_size,
            batch_tokens=self._settings.batch_tokens,
            query_padding=launch,
            padding_tokens=launch,
        )
        for batch in batches:
            with self._turns.of("score") as turn:
                margins = run_halving(partial(self._loaded.compute, self._forward), [pairs[place] for place in batch])
                turn.size = sum(len(pairs[position].prompt.ids) for position in batch)
                turn.rows = len(batch)
            for position, margin in zip(batch, margins, strict=True):
                found[position] = margin
            if progress is not None:
                progress.advance(len(batch))
        return found

    def _forward(self, pairs: Sequence[Pair]) -> list[float]:
        margins: list[float] = pair_margins(self._loaded, self._head, pairs).tolist()
        return margins


def pair_margins(loaded: LoadedModel, head: YesNoHead, pairs: Sequence[Pair]) -> torch.Tensor:
    """`z_yes - z_no` of a batch, float32 of shape `(batch,)`; gradients flow where the caller allows them."""
    import torch

    ids, mask = right_pad([pair.prompt.ids for pair in pairs], loaded.tokenizer.pad_id, loaded.device)
    states, states_mask = right_pad_states([pair.passage.states for pair in pairs], loaded)
    decoder = loaded.model.get_decoder()
    hidden = decoder(
        input_ids=ids,
        attention_mask=mask,
        encoder_hidden_states=states,
        encoder_attention_mask=states_mask,
        use_cache=False,
    ).last_hidden_state
    last = mask.sum(dim=1) - 1
    return head.margins(hidden[torch.arange(len(pairs), device=loaded.device), last])
