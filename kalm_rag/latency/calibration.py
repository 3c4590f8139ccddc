"""A first idea of what steps cost on this machine, before any call has shown it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from kalm_rag.model.decoder import Pair
from kalm_rag.model.pooling import PassageStates
from kalm_rag.model.prefill import PrefilledPair
from kalm_rag.passage_kv import BehindPrefix
from kalm_rag.utils.costs import Work

if TYPE_CHECKING:
    from kalm_rag.scorer import Scorer

_WORDS = (8, 8, 48, 192)
"""Words of the passages that are tried; the first is not counted, since kernels are chosen there."""
_SECONDS = 0.5
_WORKS: tuple[Work, ...] = ("encode", "prefill", "score")


def calibrate(
    scorer: Scorer, request: BehindPrefix | None, instruction: str, ratio: int, *, encoder: bool = True
) -> None:
    """Encode, prefill and score a few short passages, which are not kept, and learn what it costs.

    It ends with the passage in which half a second is over. Costs that are known already are not measured again.

    Args:
        scorer: of the loaded model.
        request: asks for prefilled passages; None if this model runs full prompts.
        instruction: of the prompt.
        ratio: of the passages' states.
        encoder: run the encoder; otherwise states of random numbers take the place of its own.
    """
    left_out = {*(() if request is not None else ("prefill",)), *(() if encoder else ("encode",))}
    if all(scorer.turns.costs.knows(work) for work in _WORKS if work not in left_out):
        return
    prompt, began = scorer.prompts.prompt("What is measured here?", instruction), time.monotonic()
    for number, words in enumerate(_WORDS):
        [passage] = scorer.prompts.passages([" ".join(["word"] * words)])
        if encoder:
            with scorer.turns.of("encode") as turn:
                [states] = scorer.states.encoder.encode([passage], ratio)
                turn.size = len(passage.ids) if number else 0
        else:
            states = _random_states(scorer, len(passage.ids), ratio)
        if request is None:
            scorer.decoder.margins([Pair(prompt, states)])
        else:
            with scorer.turns.of("prefill") as turn:
                [prefilled] = scorer.passage_kv.decoder.prefiller.prefill(request.prefix, [states], request.reference)
                turn.size = len(request.prefix) + len(states.states) if number else 0
            scorer.passage_kv.decoder.margins(request.prefix, [PrefilledPair(prompt, prefilled)], request.reference)
        if number and time.monotonic() - began > _SECONDS:
            return


def _random_states(scorer: Scorer, tokens: int, ratio: int) -> PassageStates:
    import torch

    generator = torch.Generator().manual_seed(0)
    width = int(scorer.loaded.model.config.decoder.hidden_size)
    states = torch.randn(-(-tokens // ratio), width, generator=generator).to(scorer.loaded.dtype)
    return PassageStates(states, tokens, ratio, False)
