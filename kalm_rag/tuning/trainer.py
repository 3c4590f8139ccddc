"""The loop of every training: steps, measurements, early stopping, and a state to resume from."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from kalm_rag.tuning.state import Progressed, read_state, write_state
from kalm_rag.utils.progress import Progress

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

MOMENTS = {"AdamW": ("exp_avg", "exp_avg_sq"), "Muon": ("momentum_buffer",)}
"""What an optimiser keeps for each of its parameters once a step is done, by the optimiser's class."""

_KEPT_EVERY = 60.0
"""Seconds between two states that are kept for a later start."""
_LOGGED_EVERY = 50
"""Steps between two lines in the log."""


class Task(Protocol):
    """What is trained, and on what; `Trainer` decides when.

    Attributes:
        name: what is done, for the progress bar and the log.
        owner: digest of all that decides the result, so that no other run's state is resumed.
        steps: steps of the whole run, if nothing stops it before.
        measured_every: steps between two measurements; step 0 and the last one are measured too.
        patience: how many times in a row a measurement may fail to improve before training stops; None for always.
        parameters: what is trained, by name, in float32; each one must take part in every step.
        extra: other tensors that a step changes, by name, in float32: they are kept and restored in place.
        optimisers: of the parameters, each in one of them. A group's `share`, 1 by default, multiplies its rate.
    """

    name: str
    owner: str
    steps: int
    measured_every: int
    patience: int | None
    parameters: Mapping[str, torch.nn.Parameter]
    extra: Mapping[str, torch.Tensor]
    optimisers: Sequence[torch.optim.Optimizer]

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""

    def gradients(self, step: int) -> Mapping[str, float]:
        """Add the gradients of a step, counted from 0, which depend on its number, the weights and `extra` only.

        Returns:
            The loss as `loss`, and parts of it for the log.
        """

    def after_step(self, step: int) -> None:
        """Update `extra` after a step, counted from 0."""

    def measure(self) -> float:
        """Return the validation loss; lower is better. It need not be that of the trained weights themselves."""

    def snapshot(self) -> dict[str, torch.Tensor]:
        """Return a copy of the weights that were measured last, which are the best so far, named as `parameters`."""


class Trainer:
    """One training run.

    What a step does depends on its number only, so that a run that was killed ends as it would have.

    Args:
        task: what is trained.
        folder: where the state for a later start is kept.

    Attributes:
        progressed: how far the run is.
        best: the weights with the lowest validation loss, as the task's `snapshot` returned them.
        is_kept: whether the state that was written last, if any, could be written.

    Raises:
        ValueError: the folder holds the state of another run, or an optimiser's state cannot be kept.
    """

    def __init__(self, task: Task, folder: Path) -> None:
        self._task, self._folder = task, folder
        self._moments = _moments(task)
        self.progressed = Progressed(task.owner)
        self.best = copied(task.parameters)
        self.is_kept = False
        self._is_whole = True
        self._shown: Counter[str] = Counter()
        self._resume()

    def run(self, show_progress: bool | None = None) -> None:
        """Train until the last step, or until the validation loss no longer falls.

        An interruption keeps the state for a later start; in the middle of a change, the state that was kept before.
        """
        done, task = self.progressed, self._task
        began, kept = time.monotonic() - done.seconds, time.monotonic()
        with Progress(task.steps, task.name, unit="step", show=show_progress) as progress:
            progress.advance(done.step)
            try:
                if self._is_due():  # at the start, or where the run was interrupted while it measured
                    self._measure()
                while not done.ended and done.step < task.steps:
                    self._step()
                    if done.ended:
                        break
                    progress.advance(1)
                    if self._is_due():
                        self._measure()
                    done.seconds = time.monotonic() - began
                    if time.monotonic() - kept > _KEPT_EVERY:
                        self._keep()
                        kept = time.monotonic()
                done.ended = done.ended or f"all {task.steps} steps are done"
                self._keep()
            except KeyboardInterrupt:
                if self._is_whole:
                    self._keep()
                raise

    def _is_due(self) -> bool:
        """Whether the validation loss of the present step is wanted and was not measured yet."""
        done, task = self.progressed, self._task
        wanted = not done.ended and (done.step % task.measured_every == 0 or done.step == task.steps)
        return wanted and (not done.validation or done.validation[-1][0] != done.step)

    @contextlib.contextmanager
    def _change(self) -> Iterator[None]:
        """Mark a change of what is kept: a state from the middle of it would take a step twice, or lose the best."""
        self._is_whole = False
        yield
        self._is_whole = True

    def _step(self) -> None:
        import torch

        done, task = self.progressed, self._task
        for optimiser in task.optimisers:
            optimiser.zero_grad(set_to_none=True)
        losses = task.gradients(done.step)
        unused = [name for name, parameter in task.parameters.items() if parameter.grad is None]
        if unused:
            msg = f"{len(unused)} parameters take no part in the loss ({unused[:3]}); leave them out of the task"
            raise ValueError(msg)
        norm = float(torch.nn.utils.clip_grad_norm_(list(task.parameters.values()), 1.0))
        if not (math.isfinite(losses["loss"]) and math.isfinite(norm)):
            done.ended = f"the loss was not finite at step {done.step + 1}"
            logger.warning("%s: training stops, and the weights of step %d are kept", done.ended, done.best_step)
            return
        for optimiser in task.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = task.rate(done.step) * group.get("share", 1.0)
        with self._change():
            for optimiser in task.optimisers:
                optimiser.step()
            task.after_step(done.step)
            done.step += 1
            done.losses.append((done.step, losses["loss"]))
        self._log(losses)

    def _log(self, losses: Mapping[str, float]) -> None:
        """Log the mean losses of the steps since the last line."""
        self._shown.update({**losses, "": 1})
        done, steps = self.progressed, self._shown[""]
        if done.step % _LOGGED_EVERY == 0:
            means = ", ".join(f"{name} {value / steps:.4f}" for name, value in self._shown.items() if name)
            logger.info("%s: step %d of %d: %s", self._task.name, done.step, self._task.steps, means)
            self._shown.clear()

    def _measure(self) -> None:
        """Measure the validation loss, and keep the weights if they are the best so far."""
        done, task = self.progressed, self._task
        loss = task.measure()
        best = task.snapshot() if loss < done.best_loss else self.best
        with self._change():
            done.validation.append((done.step, loss))
            self.best = best
            if loss < done.best_loss:
                done.best_loss, done.best_step, done.waited = loss, done.step, 0
            else:
                _wait(done, loss, task.patience)
        logger.info("%s: step %d of %d: validation loss %.4f", task.name, done.step, task.steps, loss)

    def _keep(self) -> None:
        task = self._task
        tensors = {f"best {name}": tensor for name, tensor in self.best.items()}
        tensors |= {f"extra {name}": tensor for name, tensor in task.extra.items()}
        tensors |= {f"now {name}": parameter for name, parameter in task.parameters.items()}
        if self.progressed.step:
            tensors |= {
                f"{moment} {name}": optimiser.state[task.parameters[name]][moment]
                for name, (optimiser, moments) in self._moments.items()
                for moment in moments
            }
        self.is_kept = write_state(self._folder, self.progressed, tensors)

    def _resume(self) -> None:
        import torch

        task = self._task
        shapes = {f"{kind} {name}": own.shape for name, own in task.parameters.items() for kind in ("best", "now")}
        shapes |= {f"extra {name}": tensor.shape for name, tensor in task.extra.items()}
        moments = {
            f"{moment} {name}": task.parameters[name].shape
            for name, (_, kept) in self._moments.items()
            for moment in kept
        }
        found = read_state(self._folder, task.owner, shapes, moments)
        if found is None:
            return
        self.progressed, tensors = found
        self.best = {name: tensors[f"best {name}"] for name in task.parameters}
        with torch.no_grad():
            for name, parameter in task.parameters.items():
                parameter.copy_(tensors[f"now {name}"])
            for name, extra in task.extra.items():
                extra.copy_(tensors[f"extra {name}"])
        if self.progressed.step:
            for name, (optimiser, kept) in self._moments.items():
                parameter = task.parameters[name]
                state = {moment: tensors[f"{moment} {name}"].to(parameter.device) for moment in kept}
                optimiser.state[parameter] = {"step": torch.tensor(float(self.progressed.step)), **state}
        logger.info("%s: resuming at step %d of %d", task.name, self.progressed.step, task.steps)


def copied(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return copies in memory of the CPU."""
    return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}


def _moments(task: Task) -> dict[str, tuple[torch.optim.Optimizer, tuple[str, ...]]]:
    """Return the optimiser of each parameter, and what it keeps of it.

    Raises:
        ValueError: what it keeps is not known, or a parameter is in no optimiser or in two.
    """
    names = {id(parameter): name for name, parameter in task.parameters.items()}
    found: dict[str, tuple[torch.optim.Optimizer, tuple[str, ...]]] = {}
    for optimiser in task.optimisers:
        kind = type(optimiser).__name__
        if kind not in MOMENTS:
            msg = f"what {kind} keeps between steps is not known; use one of {', '.join(MOMENTS)}, or add it to MOMENTS"
            raise ValueError(msg)
        for parameter in (each for group in optimiser.param_groups for each in group["params"]):
            name = names.get(id(parameter))
            if name is None or name in found:
                msg = f"an optimiser has the parameter {name!r}, which is {'in another one' if name else 'not named'}"
                raise ValueError(msg)
            found[name] = optimiser, MOMENTS[kind]
    if len(found) != len(names):
        msg = f"no optimiser has the parameters {sorted(task.parameters.keys() - found.keys())[:3]}; add them to one"
        raise ValueError(msg)
    return found


def _wait(done: Progressed, loss: float, patience: int | None) -> None:
    """Note a measurement that is not the best, which may end training."""
    done.waited += 1
    if not math.isfinite(loss):
        done.ended = f"the validation loss was not finite at step {done.step}"
        logger.warning("%s: training stops, and the weights of step %d are kept", done.ended, done.best_step)
    elif patience is not None and done.waited >= patience:
        done.ended = f"the validation loss did not fall for {done.waited} measurements, the last at step {done.step}"
