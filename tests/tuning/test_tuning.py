"""Tuning from judgements to an adapter: exact, resumable, on cached states, and honest about its result."""

from __future__ import annotations

import errno
import json
import logging
import math
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mteb.models.model_implementations.kalm_reranker import KaLMRerankerWrapper
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tunekit import RECIPE, small_corpus

from kalm_rag import KaLMReranker, PassageCache
from kalm_rag.errors import CheckpointError, MissingExtraError
from kalm_rag.evaluation.metrics import difference_interval
from kalm_rag.model.checkpoint import find_checkpoint
from kalm_rag.model.decoder import Pair, YesNoHead, pair_margins
from kalm_rag.model.encoder import Encoder
from kalm_rag.model.identity import identify
from kalm_rag.model.loading import load_model, load_tokenizer
from kalm_rag.model.lora import CONFIG, WEIGHTS
from kalm_rag.model.prompts import Prompts
from kalm_rag.settings import Settings
from kalm_rag.states import StatesSource, key_space
from kalm_rag.tuning import Comparison, Recipe, Tuned, export_checkpoint, tune
from kalm_rag.tuning import adapter as adapter_module
from kalm_rag.tuning import job as job_module
from kalm_rag.tuning import lists as lists_module
from kalm_rag.tuning import trainer as trainer_module
from kalm_rag.tuning.adapter import insert_adapter
from kalm_rag.tuning.export import check_target
from kalm_rag.tuning.judgements import Example
from kalm_rag.tuning.lists import ListMaker, Objective
from kalm_rag.tuning.loss import list_loss
from kalm_rag.tuning.state import FILE, Progressed, read_state
from kalm_rag.tuning.task import DecoderTask
from kalm_rag.tuning.trainer import Trainer
from kalm_rag.utils.turns import Turns

pytest.importorskip("peft", reason="the extra tune is not installed")

QUERY = "How do I sort a list?"


@pytest.fixture
def without_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Comparing takes most of the time of a small tuning."""
    monkeypatch.setattr(job_module, "compare", lambda *_: [])


def again(checkpoint: Path, cache: Path, out: Path, recipe: Recipe = RECIPE, **options: Any) -> Tuned:
    return tune(small_corpus(), out, model=checkpoint, cache=cache, recipe=recipe, device="cpu", **options)


def weights(tuned: Tuned) -> dict[str, torch.Tensor]:
    assert tuned.folder is not None
    return load_file(tuned.folder / WEIGHTS)


def assert_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        torch.testing.assert_close(tensor, right[name], rtol=0, atol=1e-5)


def test_the_validation_loss_falls_and_is_reported(tuned: Tuned, cache: Path) -> None:
    assert tuned.best_step > 0
    found = dict(tuned.validation)
    assert found[tuned.best_step] < found[0]
    assert tuned.encoded > 0
    assert tuned.queries == (13, 2, 5)
    assert [(one.ratio, one.queries) for one in tuned.comparisons] == [(4, 5), (16, 5)]
    assert all(one.verdict == "within the noise" for one in tuned.comparisons), "five queries show nothing"
    assert tuned.folder is not None
    report = json.loads((tuned.folder / "tuning.json").read_text())
    assert report["best_step"] == tuned.best_step
    assert report["comparisons"][0]["verdict"] == "within the noise"
    assert not (tuned.folder / FILE).exists(), "a finished tuning leaves nothing to resume"


def test_the_encoder_does_not_run_again_and_the_result_is_the_same(
    tuned: Tuned, checkpoint: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(Encoder, "encode", run)
    said: list[str] = []
    second = again(checkpoint, cache, tmp_path / "two", announce=said.append)
    assert second.encoded == 0
    assert_equal(weights(second), weights(tuned))
    assert second.comparisons == tuned.comparisons
    assert any("0 encoded now" in text for text in said)
    assert any(text.startswith("Training takes about") and "10 steps of" in text for text in said)


def test_the_merged_adapter_scores_as_the_trained_modules(tuned: Tuned, checkpoint: Path, passages: list[str]) -> None:
    settings = Settings()
    loaded = load_model(
        find_checkpoint(checkpoint), settings=settings, device=torch.device("cpu"), dtype="float32", fast=False
    )
    matrices = insert_adapter(loaded.model, RECIPE)
    for name, tensor in weights(tuned).items():
        matrices[name].data.copy_(tensor)
    assert tuned.folder is not None
    reranker = KaLMReranker(checkpoint, lora=tuned.folder, cache=None, device="cpu")
    plain = KaLMReranker(checkpoint, cache=None, device="cpu")
    states = plain.scorer.states.get(passages[:4], 4)
    prompt = Prompts(loaded.tokenizer, settings, 8192).prompt(QUERY)
    with torch.no_grad():
        expected = pair_margins(loaded, YesNoHead(loaded), [Pair(prompt, states[text]) for text in passages[:4]])
    found = sorted(reranker.rank(QUERY, passages[:4]), key=lambda hit: hit.index)
    assert [hit.margin for hit in found] == pytest.approx(expected.tolist(), abs=1e-5)
    before = sorted(plain.rank(QUERY, passages[:4]), key=lambda hit: hit.index)
    assert max(abs(one.margin - other.margin) for one, other in zip(found, before, strict=True)) > 1e-3


def test_only_matrices_of_the_decoders_layers_take_gradients(checkpoint: Path) -> None:
    loaded = load_model(
        find_checkpoint(checkpoint), settings=Settings(), device=torch.device("cpu"), dtype="float32", fast=False
    )
    state = torch.random.get_rng_state()
    found = insert_adapter(loaded.model, RECIPE)
    assert torch.equal(state, torch.random.get_rng_state()), "the user's random numbers are left alone"
    assert len(found) == 8 * 7 * 2
    trained = {name for name, parameter in loaded.model.named_parameters() if parameter.requires_grad}
    assert all(".decoder.layers." in name and "lora_" in name for name in trained)
    assert len(trained) == len(found)


@pytest.mark.usefixtures("without_comparison")
@pytest.mark.parametrize("step", [0, 7])
def test_an_interrupted_run_ends_as_it_would_have(
    tuned: Tuned, checkpoint: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    take = Trainer._step

    def interrupt(trainer: Trainer) -> None:
        if trainer.progressed.step == step:
            raise KeyboardInterrupt
        take(trainer)

    monkeypatch.setattr(Trainer, "_step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        again(checkpoint, cache, tmp_path)
    assert (tmp_path / FILE).is_file()
    monkeypatch.setattr(Trainer, "_step", take)
    said: list[str] = []
    found = again(checkpoint, cache, tmp_path, announce=said.append)
    assert step == 0 or any(f"resuming after step {step}" in text for text in said)
    assert_equal(weights(found), weights(tuned))
    assert [loss for _, loss in found.losses] == pytest.approx([loss for _, loss in tuned.losses], abs=1e-5)
    assert found.best_step == tuned.best_step


@pytest.mark.usefixtures("without_comparison")
def test_an_interruption_while_it_measures_or_takes_a_step_changes_nothing(
    tuned: Tuned, checkpoint: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both in one run, one after the other; the state is written after every step here."""
    monkeypatch.setattr(trainer_module, "_KEPT_EVERY", -1.0)
    losses, step, steps = Objective.losses, torch.optim.AdamW.step, iter(range(1, 99))
    best = max(place for place, _ in tuned.validation[1:-1])

    def stop_measuring(objective: Objective, lists: Any, *, gradients: bool) -> Any:
        yield from losses(objective, lists, gradients=gradients)
        if not gradients and next(measured) == [place for place, _ in tuned.validation].index(best):
            raise KeyboardInterrupt

    def stop_after_step(optimiser: Any, *given: Any) -> None:
        step(optimiser, *given)
        if next(steps) == 2:
            raise KeyboardInterrupt

    measured = iter(range(99))
    with monkeypatch.context() as patch:
        patch.setattr(Objective, "losses", stop_measuring)
        with pytest.raises(KeyboardInterrupt):
            again(checkpoint, cache, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", stop_after_step)
        with pytest.raises(KeyboardInterrupt):
            again(checkpoint, cache, tmp_path)
    said: list[str] = []
    found = again(checkpoint, cache, tmp_path, announce=said.append)
    assert any(f"resuming after step {best + 1}" in text for text in said)
    assert [place for place, _ in found.validation] == [place for place, _ in tuned.validation]
    assert dict(found.validation) == pytest.approx(dict(tuned.validation), abs=1e-5)
    assert [place for place, _ in found.losses] == [place for place, _ in tuned.losses]
    assert_equal(weights(found), weights(tuned))


def test_few_passages_are_in_memory_at_a_time(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings()
    found = find_checkpoint(checkpoint)
    loaded = load_model(found, settings=settings, device=torch.device("cpu"), dtype="float32", fast=False)
    prompts = Prompts(loaded.tokenizer, settings, 8192)
    cache = PassageCache()
    keys = key_space(identify(found), max_length=64, dtype="float32", storage=cache.storage)
    objective = Objective(loaded, StatesSource(loaded, settings, cache, keys, prompts, Turns()), 0.3)
    examples = [Example(f"q{number}", ("good",), (), ("bad", "worse", "worst")) for number in range(7)]
    lists = ListMaker(prompts, Recipe(list_size=3, ratios=(4, 8))).validation(examples)
    whole = sum(float(loss) for loss in objective.losses(lists, gradients=False))
    make, score = Objective._pairs, lists_module.pair_margins
    held: list[int] = [0]

    def count_made(given: Objective, one: Any) -> Any:
        held.append(held[-1] + 1)
        return make(given, one)

    def count_scored(*given: Any) -> torch.Tensor:
        held.append(held[-1] - len(given[2]) // 3)
        return score(*given)

    monkeypatch.setattr(Objective, "_pairs", count_made)
    monkeypatch.setattr(lists_module, "pair_margins", count_scored)
    monkeypatch.setattr(lists_module, "_PASSAGES_AT_ONCE", 6)
    assert sum(float(loss) for loss in objective.losses(lists, gradients=False)) == pytest.approx(whole, abs=1e-5)
    assert (max(held), held[-1]) == (2, 0)


@pytest.mark.usefixtures("without_comparison")
def test_a_kill_between_two_steps_loses_only_what_was_not_kept(
    tuned: Tuned, checkpoint: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing runs after a kill, so the state must be there before: it is written after every step here."""
    monkeypatch.setattr(trainer_module, "_KEPT_EVERY", -1.0)
    take = Trainer._step

    def kill(trainer: Trainer) -> None:
        if trainer.progressed.step == 4:
            raise SystemExit
        take(trainer)

    monkeypatch.setattr(Trainer, "_step", kill)
    with pytest.raises(SystemExit):
        again(checkpoint, cache, tmp_path)
    monkeypatch.setattr(Trainer, "_step", take)
    said: list[str] = []
    found = again(checkpoint, cache, tmp_path, announce=said.append)
    assert any("resuming after step 4" in text for text in said)
    assert_equal(weights(found), weights(tuned))


SHAPES = {"best a": (2, 3), "now a": (2, 3)}
MOMENTS = {"exp_avg a": (2, 3), "exp_avg_sq a": (2, 3)}
STATE = {f"{kind} a": torch.ones(2, 3) for kind in ("best", "now", "exp_avg", "exp_avg_sq")}


def test_the_state_of_another_run_is_refused_and_a_damaged_one_is_left(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer_module.write_state(tmp_path, Progressed("mine", 3), STATE)
    found = read_state(tmp_path, "mine", SHAPES, MOMENTS)
    assert found is not None
    assert found[0].step == 3
    assert_equal(found[1], STATE)
    with pytest.raises(ValueError, match=r"another model, other judgements or another recipe \(mine, this one is anot"):
        read_state(tmp_path, "another", SHAPES, MOMENTS)
    (tmp_path / FILE).write_bytes((tmp_path / FILE).read_bytes()[:-3])
    assert read_state(tmp_path, "mine", SHAPES, MOMENTS) is None
    assert "training starts again" in caplog.text


@pytest.mark.parametrize(
    "state",
    ["[" * 100_000, "[1]", "{", '{"step": 3}', '{"owner": "mine", "step": "3"}', '{"owner": "mine", "step": -1}',
     '{"owner": 7}', '{"owner": "mine", "losses": [[1]]}', '{"owner": "mine", "best_loss": 1' + 400 * "0" + "}",
     '{"owner": "mine", "step": 1, "more": 1}'],
)  # fmt: skip
def test_a_state_that_says_nonsense_is_left(tmp_path: Path, caplog: pytest.LogCaptureFixture, state: str) -> None:
    save_file(STATE, tmp_path / FILE, {"state": state})
    assert read_state(tmp_path, "mine", SHAPES, MOMENTS) is None
    assert "training starts again" in caplog.text


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {name: tensor for name, tensor in STATE.items() if name != "now a"},
        {name: tensor for name, tensor in STATE.items() if not name.startswith("exp")},
        STATE | {"best a": torch.ones(3, 2)},
        STATE | {"exp_avg a": torch.ones(2, 3, dtype=torch.float64)},
        STATE | {"best b": torch.ones(1)},
    ],
)
def test_a_state_without_its_tensors_is_left(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, tensors: dict[str, torch.Tensor]
) -> None:
    trainer_module.write_state(tmp_path, Progressed("mine", 3), tensors)
    assert read_state(tmp_path, "mine", SHAPES, MOMENTS) is None
    assert "does not fit what is trained" in caplog.text


@pytest.mark.usefixtures("without_comparison")
@pytest.mark.parametrize("good", [4, 0])
def test_a_loss_that_is_not_finite_ends_training_with_the_best_so_far(
    tuned: Tuned, checkpoint: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, good: int
) -> None:
    take = DecoderTask.gradients

    def diverge(task: DecoderTask, step: int) -> dict[str, float]:
        return take(task, step) | ({"loss": float("nan")} if step == good else {})

    monkeypatch.setattr(DecoderTask, "gradients", diverge)
    found = again(checkpoint, cache, tmp_path)
    assert found.ended == f"the loss was not finite at step {good + 1}"
    assert found.steps == good
    if good:
        assert 0 < found.best_step <= good
        assert all(tensor.isfinite().all() for tensor in weights(found).values())
    else:
        assert found.folder is None
        assert not (tmp_path / WEIGHTS).exists()


@pytest.mark.usefixtures("without_comparison")
def test_a_rate_that_is_too_high_ends_training_early(
    tuned: Tuned, checkpoint: Path, cache: Path, tmp_path: Path
) -> None:
    found = again(checkpoint, cache, tmp_path, replace(RECIPE, rate=0.9, epochs=20, patience=2))
    assert found.steps < 20 * 5
    assert "did not fall for 2 measurements" in found.ended
    losses = dict(found.validation)
    assert losses[found.best_step] == min(losses.values())


def full_disk(path: Path, content: bytes) -> None:
    raise OSError(errno.ENOSPC, "No space left on device", str(path))


def no_room_for_the_adapter(contents: Mapping[Path, bytes]) -> None:
    for path, content in contents.items():
        if path.name == WEIGHTS:
            full_disk(path, content)
        path.write_bytes(content)


@pytest.mark.usefixtures("without_comparison")
def test_a_full_disk_at_saving(
    tuned: Tuned, checkpoint: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(adapter_module, "replace_files", no_room_for_the_adapter)
        with pytest.raises(OSError, match=r"cannot write the adapter to .*No space left.*what was trained is kept"):
            again(checkpoint, cache, tmp_path)
    take = Trainer._step
    monkeypatch.setattr(Trainer, "_step", lambda *_: pytest.fail("it was trained already"))
    assert_equal(weights(again(checkpoint, cache, tmp_path)), weights(tuned))
    assert take is not Trainer._step


@pytest.mark.usefixtures("without_comparison")
def test_a_state_that_cannot_be_kept_does_not_end_training(
    tuned: Tuned,
    checkpoint: Path,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("kalm_rag.tuning.state.replace_file", full_disk)
    with caplog.at_level(logging.WARNING):
        assert_equal(weights(again(checkpoint, cache, tmp_path)), weights(tuned))
    assert "cannot keep the state of the training" in caplog.text


def test_the_loss_prefers_the_right_order_and_is_the_formula() -> None:
    margins = torch.tensor([2.0, -1.0, 0.5])
    expected = torch.nn.functional.cross_entropy(margins[None], torch.tensor([0]))
    assert float(list_loss(margins, 0.0)) == pytest.approx(float(expected))
    yes = -torch.log(torch.sigmoid(margins[0])) - torch.log(1 - torch.sigmoid(margins[1:])).mean()
    assert float(list_loss(margins, 0.4)) == pytest.approx(float(expected + 0.2 * yes), rel=1e-5)
    assert list_loss(margins, 0.3) < list_loss(margins.flip(0), 0.3)


def test_half_of_the_lists_are_at_the_first_ratio_and_the_others_take_turns(checkpoint: Path) -> None:
    tokenizer = load_tokenizer(find_checkpoint(checkpoint), escape=True)
    maker = ListMaker(Prompts(tokenizer, Settings(), 8192), Recipe(ratios=(4, 8, 16, 32), lists_per_step=5))
    examples = [Example(f"q{number}", ("a",), (), tuple("bcdefghijk")) for number in range(12)]
    steps = maker.epoch(examples, 0)
    assert [one.ratio for lists in steps for one in lists] == [4, 8, 4, 16, 4, 32] * 2
    assert [len(lists) for lists in steps] == [5, 5, 2]
    assert steps == maker.epoch(examples, 0)
    assert steps != maker.epoch(examples, 1)
    assert all(one.passages[0] == "a" and len(set(one.passages)) == 8 for lists in steps for one in lists)


def comparison(low: float, high: float, p: float) -> Comparison:
    return Comparison(4, 50, 0.5, 0.6, 0.7, low, high, p)


@pytest.mark.parametrize(
    ("low", "high", "p", "verdict"),
    [
        (0.01, 0.2, 0.01, "gain"),
        (-0.2, -0.01, 0.01, "loss"),
        (-0.01, 0.2, 0.01, "within the noise"),
        (0.01, 0.2, 0.06, "within the noise"),
        (0.0, 0.2, 0.04, "within the noise"),
        (-0.2, -0.01, 0.2, "within the noise"),
    ],
)
def test_a_difference_is_a_gain_only_if_interval_and_test_say_so(
    low: float, high: float, p: float, verdict: str
) -> None:
    assert comparison(low, high, p).verdict == verdict


def test_the_interval_is_that_of_the_bootstrap() -> None:
    from scipy import stats

    rng = np.random.default_rng(3)
    old = {f"q{number}": float(value) for number, value in enumerate(rng.random(80))}
    new = {query: value + float(rng.normal(0.02, 0.1)) for query, value in old.items()}
    differences = np.array([new[query] - old[query] for query in old])
    expected = stats.bootstrap((differences,), np.mean, method="percentile", n_resamples=9_999, rng=1)
    found = difference_interval(new, old)
    assert found == pytest.approx((expected.confidence_interval.low, expected.confidence_interval.high), abs=2e-3)
    assert found == difference_interval(new, old), "it is the same again"
    assert difference_interval(old, old) == (0.0, 0.0)


def test_an_exported_checkpoint_scores_as_the_adapter_does_for_the_reference_too(
    tuned: Tuned, checkpoint: Path, passages: list[str], tmp_path: Path
) -> None:
    assert tuned.folder is not None
    place = export_checkpoint(checkpoint, tuned.folder, tmp_path / "whole")
    own, old = identify(find_checkpoint(place)), identify(find_checkpoint(checkpoint))
    assert own.encoder == old.encoder
    assert own.decoder != old.decoder
    pairs = [(QUERY, passage) for passage in passages[:6]]
    cache = PassageCache(tmp_path / "cache")
    expected = KaLMReranker(checkpoint, lora=tuned.folder, cache=cache, device="cpu").predict(pairs)
    cache.flush()
    exported = KaLMReranker(place, cache=PassageCache(tmp_path / "cache", memory=0), device="cpu")
    assert exported.predict(pairs) == pytest.approx(expected, abs=1e-5)
    assert exported.cache.stats().encoded == 0, "encoded passages are found"
    wrapper = KaLMRerankerWrapper(str(place), device="cpu")
    scores = wrapper._predict_batch(pairs, [wrapper.instruction] * len(pairs))
    assert scores == pytest.approx(expected, abs=1e-5)
    names = set(load_file(place / "model.safetensors"))
    assert names == set(load_file(checkpoint / "model.safetensors")), "the vision tower comes along"
    plain = KaLMReranker(checkpoint, cache=cache, device="cpu").predict(pairs)
    assert max(abs(one - other) for one, other in zip(plain, expected, strict=True)) > 1e-4
    with pytest.raises(ValueError, match="is not an empty folder; give a new one"):
        export_checkpoint(checkpoint, tuned.folder, place)


def test_an_export_of_another_model_writes_nothing(tuned: Tuned, tmp_path: Path) -> None:
    assert tuned.folder is not None
    with pytest.raises(CheckpointError, match="was trained on another model than 'mini'"):
        export_checkpoint("mini", tuned.folder, tmp_path / "whole")
    assert not (tmp_path / "whole").exists()


@pytest.mark.usefixtures("without_comparison")
def test_a_few_queries_on_mini(tmp_path: Path) -> None:
    recipe = Recipe(ratios=(4, 32), list_size=4, lists_per_step=4, epochs=4, warmup=2, negatives=6, depth=6, patience=9)
    found = tune(small_corpus(24), tmp_path / "out", model="mini", cache=None, recipe=recipe, device="cpu")
    losses = [loss for _, loss in found.losses]
    assert np.mean(losses[-4:]) < 0.8 * np.mean(losses[:4])
    validation = [loss for _, loss in found.validation]
    assert min(validation) < validation[0]
    assert (tmp_path / "out" / "cache").is_dir(), "without a cache of the user, one beside the adapter"


def test_what_must_be_installed_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    find = job_module.importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == "peft" else find(name, *rest))
    with pytest.raises(MissingExtraError, match=r"'peft'.*pip install 'kalm-rag\[tune\]'"):
        tune(small_corpus(), tmp_path, model="mini")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dtype": "int8"}, r"dtype must be one of \('float32', 'bfloat16'\), got 'int8'"),
        ({"dtype": "float16"}, r"dtype must be one of \('float32', 'bfloat16'\), got 'float16'"),
        ({"language": "klingon"}, r"language must be one of auto, none, de, .*, got 'klingon'"),
        ({"max_length": 0}, "max_length must be at least 1, got 0"),
        ({"instruction": 7}, "instruction must be a string, got int"),
        ({"held_out": "q1"}, "held_out must be a collection of query ids, got the single text 'q1'"),
        ({"held_out": ["nowhere"]}, "held_out names 1 queries without judgements, such as 'nowhere'"),
        ({"model": "nowhere"}, "is neither an alias"),
    ],
)
def test_wrong_arguments(tmp_path: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        tune(small_corpus(), tmp_path / "out", **{"model": "mini", **given})


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds other files \(it has \['mine.txt'\]\); give a new or empty folder"):
        tune(small_corpus(), tmp_path, model="mini")
    with pytest.raises(ValueError, match="is a file; give a folder"):
        tune(small_corpus(), tmp_path / "mine.txt", model="mini")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def no_training(*_: object, **__: object) -> None:
    pytest.fail("the folder is refused before anything is trained")


@pytest.mark.usefixtures("without_comparison")
def test_an_adapter_of_another_tuning_is_not_overwritten(
    tuned: Tuned, checkpoint: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tuned.folder is not None
    out = Path(shutil.copytree(tuned.folder, tmp_path / "out"))
    before = contents(out)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "run", no_training)
        with pytest.raises(ValueError, match=f"adapter of the tuning {tuned.owner[:12]}, and this one is .*give an"):
            again(checkpoint, cache, out, replace(RECIPE, seed=1))
        assert contents(out) == before
        (out / "tuning.json").unlink()
        with pytest.raises(ValueError, match=f"holds {CONFIG}, {WEIGHTS}, and no tuning.json names the tuning"):
            again(checkpoint, cache, out)
        (out / WEIGHTS).unlink()
        (out / CONFIG).unlink()
        (out / "tuning.json").write_text("[]")
        with pytest.raises(ValueError, match=r"holds tuning.json, and no tuning.json names .*give another folder"):
            again(checkpoint, cache, out)
        (out / "tuning.json").unlink()
        save_file({"x": torch.ones(1)}, out / FILE)
        with pytest.raises(ValueError, match="resume.safetensors' is no state of a training, so it is not overwritten"):
            again(checkpoint, cache, out)
        assert load_file(out / FILE)["x"].tolist() == [1.0]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


TAKE = DecoderTask.gradients


def diverge_at_once(task: DecoderTask, step: int) -> dict[str, float]:
    return TAKE(task, step) | {"loss": float("nan")}


@pytest.mark.usefixtures("without_comparison")
def test_without_a_gain_only_the_report_is_left(
    tuned: Tuned, checkpoint: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tuned.folder is not None
    out = Path(shutil.copytree(tuned.folder, tmp_path / "out"))
    monkeypatch.setattr(DecoderTask, "gradients", diverge_at_once)
    with monkeypatch.context() as patch:
        patch.setattr(job_module, "replace_file", full_disk)
        with pytest.raises(OSError, match=r"cannot write the report to .*tuning.json.*No space.*make room there"):
            again(checkpoint, cache, out)
    assert (out / FILE).is_file(), "the next call finds what was trained"
    losses = Objective.losses
    monkeypatch.setattr(
        Objective, "losses", lambda *given, **more: (part * math.nan for part in losses(*given, **more))
    )
    found = again(checkpoint, cache, tmp_path / "new")
    assert math.isnan(found.validation[0][1])
    found = again(checkpoint, cache, out)
    assert found.folder is None
    assert set(contents(out)) == {"tuning.json"}
    for folder in (out, tmp_path / "new"):
        report = json.loads((folder / "tuning.json").read_text(), parse_constant=lambda name: pytest.fail(name))
        assert report["folder"] is None
        assert report["owner"] == tuned.owner
    assert report["validation"] == [[0, None]]


@pytest.mark.parametrize("there", [False, True])
def test_an_export_that_cannot_be_written_leaves_nothing(
    tuned: Tuned, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    assert tuned.folder is not None
    place = tmp_path / "whole"
    if there:
        place.mkdir()

    def full(_: object, path: Path, metadata: object) -> None:
        Path(path).write_bytes(b"half")
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(
        OSError, match=r"cannot write the checkpoint to .*whole.*No space.*; make room there, or give an"
    ):
        export_checkpoint(checkpoint, tuned.folder, place)
    assert [path.name for path in tmp_path.iterdir()] == ["whole"] * there


def test_an_export_has_the_licence_and_replaces_an_empty_folder(tuned: Tuned, checkpoint: Path, tmp_path: Path) -> None:
    assert tuned.folder is not None
    source = Path(shutil.copytree(checkpoint, tmp_path / "source"))
    for name in ("LICENSE", "License-Gemma.txt", "NOTICE.md", "README.md", "noticeable.py"):
        (source / name).write_text(name)
    place = tmp_path / "whole"
    place.mkdir()
    assert export_checkpoint(source, tuned.folder, place) == place
    names = {path.name for path in place.iterdir()}
    assert names == {path.name for path in source.iterdir()} - {"README.md", "noticeable.py"}
    assert {path.name for path in tmp_path.iterdir()} == {"source", "whole"}


def test_where_no_export_can_go(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for place, lora, message in (
        ("file", "lora", "is not an empty folder; give a new one to export to"),
        ("file/whole", "lora", "no folder can be made in .*file"),
        (".", "lora", "overlaps with the adapter's"),
        ("lora/whole", "lora", "overlaps with the adapter's"),
        ("lora", "lora", "overlaps with the adapter's"),
    ):
        with pytest.raises(ValueError, match=message):
            check_target(tmp_path / place, tmp_path / lora)
    assert check_target(tmp_path / "a" / "b", tmp_path / "lora") == tmp_path / "a" / "b"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
