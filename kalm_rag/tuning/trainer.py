"""Trains an adapter of the decoder on states that the encoder made before."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kalm_rag.model.loading import LoadedModel
from kalm_rag.model.prompts import Prompts
from kalm_rag.states import StatesSource
from kalm_rag.tuning.adapter import insert_adapter
from kalm_rag.tuning.judgements import Example
from kalm_rag.tuning.lists import ListMaker, Objective, ScoredList
from kalm_rag.tuning.recipe import Recipe
from kalm_rag.tuning.state import MOMENTS, Progressed, read_state, write_state
from kalm_rag.utils.progress import Progress

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

_KEPT_EVERY = 60.0
"""Seconds between two states that are kept for a later start."""
_MEASURED_PER_EPOCH = 2


class Trainer:
    """One training run.

    What a step does depends on its number and the seed only, so that a run that was killed ends as it would have.

    Args:
        loaded: the model, with the modules of transformers; an adapter is put into it.
        states: passages' states, from the cache.
        prompts: builds the prompts.
        examples: of the queries that train.
        validation: of the queries that decide when to stop.
        recipe: how to train.
        owner: digest of all that decides the result.
        folder: where the state for a later start is kept.

    Attributes:
        steps: steps of the whole run, if nothing stops it before.
        progressed: how far the run is.
        best: the adapter with the lowest validation loss, by the names in the file.
        is_kept: whether the state that was written last, if any, could be written.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        states: StatesSource,
        prompts: Prompts,
        examples: Sequence[Example],
        validation: Sequence[Example],
        recipe: Recipe,
        owner: str,
        folder: Path,
    ) -> None:
        import torch

        self._recipe, self._folder = recipe, folder
        self._objective = Objective(loaded, states, recipe.answer)
        self._matrices = insert_adapter(loaded.model, recipe)
        self._parameters = list(self._matrices.values())
        self._optimiser = torch.optim.AdamW(self._parameters, lr=recipe.rate, weight_decay=0.01)
        self._lists = ListMaker(prompts, recipe)
        self._examples, self._validation = examples, self._lists.validation(validation)
        self._steps_per_epoch = -(-len(examples) // recipe.lists_per_step)
        self.steps = recipe.epochs * self._steps_per_epoch
        self.progressed = Progressed(owner)
        self.best = _copied(self._matrices)
        self.is_kept = False
        self._is_whole = True
        self._resume()

    def time_step(self) -> float:
        """Return the seconds of one step, without taking it; one list before it warms up."""
        lists = self._lists.epoch(self._examples, 0)[0]
        self._gradients(lists[:1])
        began = time.perf_counter()
        self._gradients(lists)
        return time.perf_counter() - began

    def estimate(self, step: float) -> float:
        """Return the seconds that the rest of the run takes if nothing stops it before.

        Args:
            step: seconds of one step.
        """
        left = self.steps - self.progressed.step
        # Without gradients a list takes about a third.
        measured = step * len(self._validation) / self._recipe.lists_per_step / 3
        return step * left + measured * (1 + left * _MEASURED_PER_EPOCH / self._steps_per_epoch)

    def run(self, show_progress: bool | None = None) -> None:
        """Train until the last step, or until the validation loss no longer falls.

        An interruption keeps the state for a later start; in the middle of a change, the state that was kept before.
        """
        done = self.progressed
        began, kept = time.monotonic() - done.seconds, time.monotonic()
        with Progress(self.steps, "tuning", unit="step", show=show_progress) as progress:
            progress.advance(done.step)
            try:
                if self._is_due():  # at the start, or where the run was interrupted while it measured
                    self._measure()
                for lists in self._rest():
                    if done.ended:
                        break
                    self._step(lists)
                    progress.advance(1)
                    if self._is_due():
                        self._measure()
                    done.seconds = time.monotonic() - began
                    if time.monotonic() - kept > _KEPT_EVERY:
                        self._keep()
                        kept = time.monotonic()
                done.ended = done.ended or f"all {self.steps} steps are done"
                self._keep()
            except KeyboardInterrupt:
                if self._is_whole:
                    self._keep()
                raise

    def _is_due(self) -> bool:
        """Whether the validation loss of the present step is wanted and was not measured yet."""
        done = self.progressed
        every = max(1, self._steps_per_epoch // _MEASURED_PER_EPOCH)
        wanted = not done.ended and (done.step % every == 0 or done.step == self.steps)
        return wanted and (not done.validation or done.validation[-1][0] != done.step)

    @contextlib.contextmanager
    def _change(self) -> Iterator[None]:
        """Mark a change of what is kept: a state from the middle of it would take a step twice, or lose the best."""
        self._is_whole = False
        yield
        self._is_whole = True

    def _rest(self) -> Iterator[list[ScoredList]]:
        """Yield the lists of each step that is left."""
        first, skipped = divmod(self.progressed.step, self._steps_per_epoch)
        for epoch in range(first, self._recipe.epochs):
            yield from self._lists.epoch(self._examples, epoch)[skipped if epoch == first else 0 :]

    def _step(self, lists: Sequence[ScoredList]) -> None:
        import torch

        done = self.progressed
        loss = self._gradients(lists)
        norm = float(torch.nn.utils.clip_grad_norm_(self._parameters, 1.0))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            done.ended = f"the loss was not finite at step {done.step + 1}"
            logger.warning("%s: training stops, and the adapter of step %d is kept", done.ended, done.best_step)
            return
        for group in self._optimiser.param_groups:
            group["lr"] = self._recipe.rate * _rate_share(done.step, self.steps, self._recipe.warmup)
        with self._change():
            self._optimiser.step()
            done.step += 1
            done.losses.append((done.step, loss))

    def _gradients(self, lists: Sequence[ScoredList]) -> float:
        """Compute the gradients of the mean loss of some lists, and return it."""
        self._optimiser.zero_grad(set_to_none=True)
        total = 0.0
        for losses in self._objective.losses(lists, gradients=True):
            loss = losses / len(lists)
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        return total

    def _measure(self) -> None:
        """Measure the validation loss, and keep the adapter if it is the best so far."""
        done = self.progressed
        loss = sum(float(part) for part in self._objective.losses(self._validation, gradients=False)) / len(
            self._validation
        )
        with self._change():
            done.validation.append((done.step, loss))
            if loss < done.best_loss:
                self.best = _copied(self._matrices)
                done.best_loss, done.best_step, done.waited = loss, done.step, 0
            else:
                _wait(done, loss, self._recipe.patience)
        logger.info("step %d of %d: validation loss %.4f", done.step, self.steps, loss)

    def _keep(self) -> None:
        tensors = {f"best {name}": tensor for name, tensor in self.best.items()}
        for name, parameter in self._matrices.items():
            tensors[f"now {name}"] = parameter
            for moment in MOMENTS:
                if parameter in self._optimiser.state:
                    tensors[f"{moment} {name}"] = self._optimiser.state[parameter][moment]
        self.is_kept = write_state(self._folder, self.progressed, tensors)

    def _resume(self) -> None:
        import torch

        shapes = {name: parameter.shape for name, parameter in self._matrices.items()}
        found = read_state(self._folder, self.progressed.owner, shapes)
        if found is None:
            return
        self.progressed, tensors = found
        self.best = {name: tensors[f"best {name}"] for name in self._matrices}
        for name, parameter in self._matrices.items():
            parameter.data.copy_(tensors[f"now {name}"])
            if self.progressed.step:
                moments = {key: tensors[f"{key} {name}"].to(parameter.device) for key in MOMENTS}
                self._optimiser.state[parameter] = {"step": torch.tensor(float(self.progressed.step)), **moments}
        logger.info("resuming at step %d of %d", self.progressed.step, self.steps)


def _wait(done: Progressed, loss: float, patience: int) -> None:
    """Note a measurement that is not the best, which may end training."""
    done.waited += 1
    if not math.isfinite(loss):
        done.ended = f"the validation loss was not finite at step {done.step}"
        logger.warning("%s: training stops, and the adapter of step %d is kept", done.ended, done.best_step)
    elif done.waited >= patience:
        done.ended = f"the validation loss did not fall for {done.waited} measurements, the last at step {done.step}"


def _rate_share(step: int, steps: int, warmup: int) -> float:
    """Share of the highest learning rate: it rises during the warm-up, and falls to 0 from there."""
    warmup = min(warmup, max(1, steps // 4))
    return min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))


def _copied(matrices: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: matrix.detach().cpu().clone() for name, matrix in matrices.items()}
