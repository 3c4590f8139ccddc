"""The loop itself, on a task of a few numbers: exact after a kill with any optimiser, and plain about what it needs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kalm_rag.tuning import trainer as trainer_module
from kalm_rag.tuning.trainer import Trainer, copied
from training.average import Average


class Line:
    """Two weights that shall become a given line; what is measured is their moving average."""

    name, owner, steps, measured_every, patience = "line", "mine", 12, 3, None

    def __init__(self, stays: float = 0.5) -> None:
        generator = torch.Generator().manual_seed(3)
        self.parameters = {
            "matrix": torch.nn.Parameter(torch.randn(3, 3, generator=generator)),
            "bias": torch.nn.Parameter(torch.zeros(3)),
        }
        self.optimisers: list[torch.optim.Optimizer] = [
            torch.optim.Muon([self.parameters["matrix"]]),
            torch.optim.AdamW([{"params": [self.parameters["bias"]], "share": 0.5}]),
        ]
        self.average = Average(dict(self.parameters), stays)
        self.extra = self.average.tensors
        self.measured: list[torch.Tensor] = []

    def rate(self, step: int) -> float:
        return 0.1 * (1 - step / self.steps)

    def loss(self, seed: int) -> torch.Tensor:
        given = torch.randn(8, 3, generator=torch.Generator().manual_seed(seed))
        return (given @ self.parameters["matrix"].T + self.parameters["bias"] - 2 * given - 1).square().mean()

    def gradients(self, step: int) -> dict[str, float]:
        loss = self.loss(step)
        loss.backward()
        return {"loss": loss.item()}

    def after_step(self, step: int) -> None:
        self.average.update(step)

    @torch.no_grad()
    def measure(self) -> float:
        with self.average.in_place():
            self.measured.append(self.parameters["matrix"].detach().clone())
            return float(self.loss(99))

    def snapshot(self) -> dict[str, torch.Tensor]:
        return copied(self.extra)


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        torch.testing.assert_close(tensor, right[name], rtol=0, atol=1e-6)


def test_the_average_is_measured_and_the_weights_are_trained(tmp_path: Path) -> None:
    task = Line()
    trainer = Trainer(task, tmp_path)
    trainer.run()
    done = trainer.progressed
    assert (done.step, done.ended) == (12, "all 12 steps are done")
    assert [step for step, _ in done.validation] == [0, 3, 6, 9, 12]
    assert done.best_loss == min(loss for _, loss in done.validation) < done.validation[0][1]
    assert done.best_step > 0
    assert_same({"matrix": task.measured[-1]}, {"matrix": task.extra["matrix"]})
    assert not torch.equal(task.extra["matrix"], task.parameters["matrix"].detach())
    last = [group["lr"] for optimiser in task.optimisers for group in optimiser.param_groups]
    assert last == pytest.approx([0.1 / 12, 0.05 / 12])


@pytest.mark.parametrize("step", [0, 4, 6, 11])
def test_a_killed_run_ends_as_it_would_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    whole = Line()
    expected = Trainer(whole, tmp_path / "whole")
    (tmp_path / "whole").mkdir()
    expected.run()
    (tmp_path / "killed").mkdir()
    monkeypatch.setattr(trainer_module, "_KEPT_EVERY", -1.0)

    class Killed(Line):
        def gradients(self, at: int) -> dict[str, float]:
            if at == step:
                raise KeyboardInterrupt if step == 0 else SystemExit
            return super().gradients(at)

    with pytest.raises((SystemExit, KeyboardInterrupt)):
        Trainer(Killed(), tmp_path / "killed").run()
    task = Line()
    found = Trainer(task, tmp_path / "killed")
    assert found.progressed.step == step
    found.run()
    assert dict(found.progressed.losses) == pytest.approx(dict(expected.progressed.losses))
    assert dict(found.progressed.validation) == pytest.approx(dict(expected.progressed.validation))
    for left, right in ((found.best, expected.best), (task.parameters, whole.parameters), (task.extra, whole.extra)):
        assert_same(copied(left), copied(right))


def test_an_interruption_while_the_average_stands_in_loses_no_weight(tmp_path: Path) -> None:
    class Stopped(Line):
        def loss(self, seed: int) -> torch.Tensor:
            if seed == 99 and len(self.measured) == 3:
                raise KeyboardInterrupt
            return super().loss(seed)

    task = Stopped()
    with pytest.raises(KeyboardInterrupt):
        Trainer(task, tmp_path).run()
    resumed = Line()
    assert Trainer(resumed, tmp_path).progressed.step == 6
    assert_same(copied(resumed.parameters), copied(task.parameters))


def test_without_an_average_the_weights_themselves_are_measured(tmp_path: Path) -> None:
    task = Line(stays=0.0)
    Trainer(task, tmp_path).run()
    assert_same(copied(task.extra), copied(task.parameters))


def test_a_finished_run_is_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Trainer(Line(), tmp_path)
    first.run()
    monkeypatch.setattr(Line, "gradients", lambda *_: pytest.fail("it is finished"))
    monkeypatch.setattr(Line, "measure", lambda *_: pytest.fail("it is finished"))
    again = Trainer(Line(), tmp_path)
    again.run()
    assert_same(again.best, first.best)


def test_patience_ends_a_run(tmp_path: Path) -> None:
    task = Line()
    values = iter([1.0, 0.5, 0.6, 0.7])
    task.patience, task.measure = 2, lambda: next(values)  # type: ignore[assignment, method-assign]
    trainer = Trainer(task, tmp_path)
    trainer.run()
    assert trainer.progressed.ended == "the validation loss did not fall for 2 measurements, the last at step 9"
    assert trainer.progressed.best_step == 3


def test_what_a_task_gets_wrong_is_named(tmp_path: Path) -> None:
    task = Line()
    task.parameters["unused"] = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match=r"no optimiser has the parameters \['unused'\]; add them to one"):
        Trainer(task, tmp_path)
    task.optimisers.append(torch.optim.AdamW([task.parameters["unused"]]))
    with pytest.raises(ValueError, match=r"1 parameters take no part in the loss \(\['unused'\]\); leave them out"):
        Trainer(task, tmp_path).run()
    task.optimisers[-1] = torch.optim.AdamW([task.parameters["unused"], task.parameters["bias"]])
    with pytest.raises(ValueError, match="the parameter 'bias', which is in another one"):
        Trainer(task, tmp_path)
    task.optimisers[-1] = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    with pytest.raises(ValueError, match="the parameter None, which is not named"):
        Trainer(task, tmp_path)
    task.optimisers[-1] = torch.optim.SGD([task.parameters["unused"]])
    with pytest.raises(ValueError, match="what SGD keeps between steps is not known; use one of AdamW, Muon"):
        Trainer(task, tmp_path)
