"""The two stages of training, as tasks of the trainer that `kalm-rag tune` uses too."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from kalm_rag.tuning.trainer import copied
from training.average import Average
from training.batches import Batches
from training.development import Development
from training.objective import answer_loss, dense_losses, distribution, ranking_loss, soft_targets, states_loss
from training.student import Student

log = logging.getLogger("training")

_WARMUP = 100
_UNUSED = ("vision", "multi_modal")
"""Parts of the architecture that text does not pass through."""


def cosine_share(step: int, steps: int) -> float:
    """Share of the highest learning rate: it rises during the warm-up, then falls along a cosine to a fiftieth."""
    return min(1.0, (step + 1) / _WARMUP) * (0.02 + 0.98 * 0.5 * (1.0 + math.cos(math.pi * step / steps)))


def parameters_of(module: nn.Module, prefix: str) -> dict[str, nn.Parameter]:
    """Return the parameters that text passes through, by name."""
    return {
        f"{prefix}.{name}": parameter
        for name, parameter in module.named_parameters()
        if not any(part in name for part in _UNUSED)
    }


class EncoderStage:
    """The encoder reads as the teacher does.

    Args:
        student: the model.
        batches: draws passages.
        owner: digest of all that decides the result.
    """

    name = "encoder"
    patience: int | None = None
    measured_every = 100

    def __init__(self, student: Student, batches: Batches, owner: str) -> None:
        self._student, self._batches, self._recipe = student, batches, student.recipe
        self.owner, self.steps = owner, self._recipe.encoder_steps
        self.parameters: Mapping[str, nn.Parameter] = {
            **parameters_of(student.model.get_encoder(), "encoder"),
            **parameters_of(student.heads.states, "heads.states"),
        }
        self.extra: Mapping[str, Tensor] = {}
        adamw = torch.optim.AdamW(list(self.parameters.values()), betas=(0.9, 0.98))
        self.optimisers: Sequence[torch.optim.Optimizer] = (adamw,)

    def rate(self, step: int) -> float:
        """Return the learning rate of a step."""
        return self._recipe.encoder_rate * cosine_share(step, self.steps)

    def gradients(self, step: int) -> dict[str, float]:
        """Add the gradients of a batch of passages."""
        loss = self._loss(f"step {step}")
        loss.backward()  # type: ignore[no-untyped-call]
        return {"loss": loss.item()}

    def after_step(self, step: int) -> None:
        """Do nothing: only the parameters change."""

    @torch.no_grad()
    def measure(self) -> float:
        """Return the loss of four batches that are the same every time."""
        return sum(float(self._loss(f"validation {number}")) for number in range(4)) / 4

    def snapshot(self) -> dict[str, Tensor]:
        """Return a copy of the parameters."""
        return copied(self.parameters)

    def _loss(self, batch: str) -> Tensor:
        keys, ids, mask = self._batches.passages(random.Random(f"{self._recipe.seed} encoder {batch}"))
        inner = slice(len(self._student.prefix), None)
        taught = self._batches.teach(keys, ids[:, inner], mask[:, inner])
        states = self._student.read(ids, mask)
        with self._student.autocast():
            read = self._student.heads.states(states[:, inner])
        return states_loss(read.float(), taught[:, 1:-1], mask[:, inner])


class RankingStage:
    """The whole model ranks; what is measured and saved is the average of its weights.

    Args:
        student: the model.
        batches: draws groups of passages and queries.
        development: measures.
        number: of the round, counted from 1.
        owner: digest of all that decides the result.
    """

    patience: int | None = None

    def __init__(self, student: Student, batches: Batches, development: Development, number: int, owner: str) -> None:
        self._student, self._batches, self._development = student, batches, development
        self._recipe, self._plan = student.recipe, student.recipe.rounds[number - 1]
        self.name, self._number, self.owner = f"round {number}", number, owner
        self.steps, self.measured_every = self._plan.steps, self._plan.measured_every
        heads = student.heads
        used = {"query": heads.query, "passage": heads.passage, "term": heads.term, "pair": heads.pair}
        parameters = parameters_of(student.model, "model")
        for name, head in used.items():
            parameters |= parameters_of(head, f"heads.{name}")
        self.parameters: Mapping[str, nn.Parameter] = parameters
        self._average = Average(parameters, self._plan.average)
        self.extra: Mapping[str, Tensor] = self._average.tensors
        self.optimisers: Sequence[torch.optim.Optimizer] = self._make_optimisers()
        self._scores: dict[str, float] = {}

    def _make_optimisers(self) -> Sequence[torch.optim.Optimizer]:
        table = self._student.model.get_input_embeddings().weight
        others = {name: parameter for name, parameter in self.parameters.items() if parameter is not table}
        # Muon is for the matrices inside of the network.
        inner = [
            parameter
            for name, parameter in others.items()
            if self._plan.muon and parameter.ndim == 2 and not name.startswith("heads.")
        ]
        rest = [parameter for parameter in others.values() if not any(parameter is one for one in inner)]
        groups = [{"params": rest, "share": 1.0}, {"params": [table], "share": self._plan.embeddings}]
        adamw = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.01)
        if not inner:
            return (adamw,)
        return torch.optim.Muon(inner, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"), adamw

    def rate(self, step: int) -> float:
        """Return the learning rate of a step."""
        return self._plan.rate * cosine_share(step, self.steps)

    def gradients(self, step: int) -> dict[str, float]:
        """Add the gradients of a batch of groups, at a fine and a coarse compression ratio."""
        generator = random.Random(f"{self._recipe.seed} round {self._number} step {step}")
        losses = self._losses(generator, step / self.steps)
        losses["loss"].backward()  # type: ignore[no-untyped-call]
        return {name: value.item() for name, value in losses.items()}

    def after_step(self, step: int) -> None:
        """Take the weights into the average."""
        self._average.update(step)

    def measure(self) -> float:
        """Return how far the mean nDCG@10 on the development split is from 1."""
        with self._average.in_place():
            self._scores = self._development.scores(self._student)
        mean = sum(self._scores.values()) / len(self._scores)
        log.info("development nDCG@10 %.4f  %s", mean, {name: round(own, 3) for name, own in self._scores.items()})
        return 1.0 - mean

    def snapshot(self) -> dict[str, Tensor]:
        """Return a copy of the average, and write it as a checkpoint."""
        with self._average.in_place():
            self._student.save(self._scores)
        return copied(self.extra)

    def _losses(self, generator: random.Random, progress: float) -> dict[str, Tensor]:
        plan, student = self._plan, self._student
        ids, mask, rows = self._batches.groups(plan, generator)
        states = student.read(ids, mask)
        total: dict[str, Tensor] = {}
        dense = plan.dense[0] + (plan.dense[1] - plan.dense[0]) * min(1.0, progress * 2)
        wanted = soft_targets(rows.targets, plan.soft)
        for ratio in (generator.choice(plan.fine), generator.choice(plan.coarse)):
            margins, before, last = student.decode(states, mask, rows.prompts, rows.prompts_mask, rows.passage, ratio)
            parts = {
                "rank": ranking_loss(margins, wanted, rows.targets.lists),
                "answer": answer_loss(margins, rows.targets.labels),
                "dense": dense_losses(student.heads, before, last, rows.where, rows.present, rows.targets),
            }
            loss = parts["rank"] + self._recipe.answer * parts["answer"] + dense * parts["dense"]
            if plan.self_distilled:
                own = distribution(margins.detach(), rows.targets.lists)
                wanted = (1 - plan.self_distilled) * wanted + plan.self_distilled * own
            for name, value in {**parts, "loss": loss}.items():
                total[name] = total.get(name, torch.zeros((), device=student.device)) + value
        return total
