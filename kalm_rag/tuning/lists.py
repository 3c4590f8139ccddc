"""Lists of passages that compete, drawn reproducibly, and their loss."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kalm_rag.model.decoder import Pair, YesNoHead, pair_margins
from kalm_rag.model.loading import LoadedModel
from kalm_rag.model.prompts import Prompt, Prompts
from kalm_rag.states import StatesSource
from kalm_rag.tuning.judgements import Example
from kalm_rag.tuning.loss import list_loss
from kalm_rag.tuning.recipe import Recipe

if TYPE_CHECKING:
    import torch

_PASSAGES_AT_ONCE = 128
"""Passages whose states are in memory at a time; a single list may have more."""

_TOKENS_AT_ONCE = 4096
"""Prompt and passage positions whose activations are kept for the gradients at a time; a single list may have more."""


@dataclass(frozen=True, slots=True)
class ScoredList:
    """A query and the passages that compete, the relevant one first; at one compression ratio."""

    prompt: Prompt
    passages: tuple[str, ...]
    ratio: int


class ListMaker:
    """Draws lists; what it draws depends on the seed and the epoch only.

    Args:
        prompts: builds the prompts.
        recipe: sizes, ratios and seed.
    """

    def __init__(self, prompts: Prompts, recipe: Recipe) -> None:
        self._prompts = prompts
        self._recipe = recipe

    def epoch(self, examples: Sequence[Example], epoch: int) -> list[list[ScoredList]]:
        """Return the lists of every step of an epoch, one list per example."""
        chooser = random.Random(f"{self._recipe.seed} epoch {epoch}")  # noqa: S311 - reproducible
        shuffled = list(examples)
        chooser.shuffle(shuffled)
        lists = self._draw(shuffled, chooser)
        size = self._recipe.lists_per_step
        return [lists[start : start + size] for start in range(0, len(lists), size)]

    def validation(self, examples: Sequence[Example]) -> list[ScoredList]:
        """Return the lists of the validation loss, the same every time."""
        return self._draw(examples, random.Random(f"{self._recipe.seed} validation"))  # noqa: S311

    def _draw(self, examples: Sequence[Example], chooser: random.Random) -> list[ScoredList]:
        first, *others = self._recipe.ratios
        clean = self._prompts.tokenizer.clean
        found = []
        for place, example in enumerate(examples):
            ratio = others[place // 2 % len(others)] if others and place % 2 else first
            passages = tuple(clean(text) for text in example.draw(self._recipe.list_size, chooser))
            found.append(ScoredList(self._prompts.prompt(example.query), passages, ratio))
        return found


class Objective:
    """The loss of lists under a model.

    Args:
        loaded: the model, with the modules of transformers.
        states: passages' states, from the cache.
        answer: weight of the loss of `P(yes)`.
    """

    def __init__(self, loaded: LoadedModel, states: StatesSource, answer: float) -> None:
        self._loaded, self._states, self._answer = loaded, states, answer
        self._head = YesNoHead(loaded)

    def losses(self, lists: Sequence[ScoredList], *, gradients: bool) -> Iterator[torch.Tensor]:
        """Yield the summed loss of a few lists at a time, as many as should be in memory together."""
        size = max(1, _PASSAGES_AT_ONCE // max((len(one.passages) for one in lists), default=1))
        for start in range(0, len(lists), size):
            yield from self._losses(lists[start : start + size], gradients)

    def _losses(self, lists: Sequence[ScoredList], gradients: bool) -> Iterator[torch.Tensor]:
        import torch

        rows = [self._pairs(one) for one in lists]
        order = sorted(range(len(rows)), key=lambda place: -_width(rows[place]))
        while order:
            group = [order.pop(0)]
            width = _width(rows[group[0]])
            while order and width * sum(len(rows[place]) for place in (*group, order[0])) <= _TOKENS_AT_ONCE:
                group.append(order.pop(0))
            pairs = [pair for place in group for pair in rows[place]]
            with torch.set_grad_enabled(gradients), torch.autocast(self._loaded.device.type, enabled=False):
                margins = torch.split(pair_margins(self._loaded, self._head, pairs), [len(rows[at]) for at in group])
                yield torch.stack([list_loss(one, self._answer) for one in margins]).sum()

    def _pairs(self, one: ScoredList) -> list[Pair]:
        states = self._states.get(one.passages, one.ratio)
        return [Pair(one.prompt, states[text]) for text in one.passages]


def _width(pairs: Sequence[Pair]) -> int:
    """Prompt and passage positions of the widest row."""
    return max(len(pair.prompt.ids) for pair in pairs) + max(len(pair.passage.states) for pair in pairs)
