"""What `kalm-rag tune` trains: weights of the decoder, on states that the encoder made before."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from kalm_rag.model.loading import LoadedModel
from kalm_rag.model.prompts import Prompts
from kalm_rag.states import StatesSource
from kalm_rag.tuning.judgements import Example
from kalm_rag.tuning.lists import ListMaker, Objective, ScoredList
from kalm_rag.tuning.recipe import Recipe
from kalm_rag.tuning.trainer import copied

if TYPE_CHECKING:
    import torch

_MEASURED_PER_EPOCH = 2


class DecoderTask:
    """A task of `Trainer`: lists of passages at several compression ratios.

    Args:
        loaded: the model, with the modules of transformers.
        states: passages' states, from the cache.
        prompts: builds the prompts.
        examples: of the queries that train.
        validation: of the queries that decide when to stop.
        recipe: how to train.
        parameters: what is trained, by name: an adapter's matrices, say.
        owner: digest of all that decides the result.
    """

    name = "tuning"

    def __init__(
        self,
        loaded: LoadedModel,
        states: StatesSource,
        prompts: Prompts,
        examples: Sequence[Example],
        validation: Sequence[Example],
        recipe: Recipe,
        parameters: Mapping[str, torch.nn.Parameter],
        owner: str,
    ) -> None:
        import torch

        self.owner, self.parameters = owner, parameters
        self.patience: int | None = recipe.patience
        self.extra: Mapping[str, torch.Tensor] = {}
        adamw = torch.optim.AdamW(list(parameters.values()), lr=recipe.rate, weight_decay=0.01)
        self.optimisers: Sequence[torch.optim.Optimizer] = (adamw,)
        self._recipe = recipe
        self._objective = Objective(loaded, states, recipe.answer)
        self._lists = ListMaker(prompts, recipe)
        self._examples, self._validation = examples, self._lists.validation(validation)
        self._steps_per_epoch = -(-len(examples) // recipe.lists_per_step)
        self._epoch: tuple[int, list[list[ScoredList]]] | None = None
        self.steps = recipe.epochs * self._steps_per_epoch
        self.measured_every = max(1, self._steps_per_epoch // _MEASURED_PER_EPOCH)

    def rate(self, step: int) -> float:
        """Return the learning rate: it rises during the warm-up, and falls to 0 from there."""
        warmup = min(self._recipe.warmup, max(1, self.steps // 4))
        return self._recipe.rate * min((step + 1) / warmup, (self.steps - step) / max(1, self.steps - warmup))

    def gradients(self, step: int) -> dict[str, float]:
        """Add the gradients of the mean loss of the step's lists, and return it."""
        return {"loss": self._add_gradients(self._lists_of(step))}

    def after_step(self, step: int) -> None:
        """Do nothing: only the parameters change."""

    def measure(self) -> float:
        """Return the mean loss of the validation lists."""
        losses = self._objective.losses(self._validation, gradients=False)
        return sum(float(part) for part in losses) / len(self._validation)

    def snapshot(self) -> dict[str, torch.Tensor]:
        """Return a copy of the parameters."""
        return copied(self.parameters)

    def time_step(self) -> float:
        """Return the seconds of one step, without taking it; one list before it warms up."""
        lists = self._lists_of(0)
        self._add_gradients(lists[:1])
        began = time.perf_counter()
        self._add_gradients(lists)
        return time.perf_counter() - began

    def estimate(self, seconds: float, done: int) -> float:
        """Return the seconds that the rest of the run takes if nothing stops it before.

        Args:
            seconds: what one step takes.
            done: steps done.
        """
        left = self.steps - done
        # Without gradients a list takes about a third.
        measured = seconds * len(self._validation) / self._recipe.lists_per_step / 3
        return seconds * left + measured * (1 + left * _MEASURED_PER_EPOCH / self._steps_per_epoch)

    def _lists_of(self, step: int) -> list[ScoredList]:
        epoch, place = divmod(step, self._steps_per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = epoch, self._lists.epoch(self._examples, epoch)
        return self._epoch[1][place]

    def _add_gradients(self, lists: Sequence[ScoredList]) -> float:
        total = 0.0
        for losses in self._objective.losses(lists, gradients=True):
            loss = losses / len(lists)
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        return total
