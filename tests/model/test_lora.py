"""An adapter changes the decoder, and nothing that encoded passages depend on."""

from __future__ import annotations

import asyncio
import copy
import errno
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lorakit import SCALE, write_lora
from safetensors.torch import load_file, save_file

from kalm_rag import KaLMReranker, PassageCache
from kalm_rag.errors import CheckpointError
from kalm_rag.forget import spaces_of
from kalm_rag.model.checkpoint import find_checkpoint
from kalm_rag.model.identity import identify
from kalm_rag.model.loading import load_model
from kalm_rag.model.lora import CONFIG, WEIGHTS, read_lora
from kalm_rag.settings import Settings
from kalm_rag.testing import build_checkpoint

QUERY = "How do I sort a list?"
SPREAD = 0.05


@pytest.fixture(scope="module")
def adapter(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lora(checkpoint, tmp_path_factory.mktemp("lora") / "adapter", SPREAD)


@pytest.fixture(scope="module")
def zeros(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lora(checkpoint, tmp_path_factory.mktemp("lora") / "zeros", 0.0)


def margins(reranker: KaLMReranker, texts: list[str], **options: object) -> list[float]:
    found = sorted(reranker.rank(QUERY, texts, **options), key=lambda hit: hit.index)  # type: ignore[call-overload]
    return [hit.margin for hit in found]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("prefill_memory", [0, 1_000_000_000])
def test_zeros_change_no_score(
    checkpoint: Path, zeros: Path, passages: list[str], dtype: str, prefill_memory: int
) -> None:
    given = {"dtype": dtype, "cache": None, "device": "cpu", "prefill_memory": prefill_memory}
    plain = margins(KaLMReranker(checkpoint, **given), passages[:4])  # type: ignore[arg-type]
    assert margins(KaLMReranker(checkpoint, lora=zeros, **given), passages[:4]) == pytest.approx(plain, abs=1e-5)  # type: ignore[arg-type]


def test_it_is_added_to_the_weights_of_the_decoder(checkpoint: Path, adapter: Path) -> None:
    plain, tuned = (
        load_model(found, settings=Settings(), device=torch.device("cpu"), dtype="float32", fast=False).model
        for found in (find_checkpoint(checkpoint), find_checkpoint(checkpoint, lora=adapter))
    )
    matrices = load_file(adapter / WEIGHTS)
    changed = set()
    for (name, old), (_, new) in zip(plain.named_parameters(), tuned.named_parameters(), strict=True):
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{stem}.lora_A.weight" in matrices:
            product = matrices[f"{stem}.lora_B.weight"] @ matrices[f"{stem}.lora_A.weight"]
            torch.testing.assert_close(new, old + SCALE * product)
            changed.add(name.split(".")[-2])
        else:
            assert torch.equal(old, new), name
    assert changed == {"q_proj", "down_proj"}
    assert tuned.get_output_embeddings().weight is tuned.get_input_embeddings().weight


def test_every_path_scores_with_it(checkpoint: Path, adapter: Path, passages: list[str]) -> None:
    given = {"lora": adapter, "cache": None, "device": "cpu"}
    plain = margins(KaLMReranker(checkpoint, prefill_memory=0, **given), passages[:4])  # type: ignore[arg-type]
    prefilled = KaLMReranker(checkpoint, score_memory=0, **given)  # type: ignore[arg-type]
    for _ in range(2):
        assert margins(prefilled, passages[:4]) == pytest.approx(plain, abs=1e-5)
    without = margins(KaLMReranker(checkpoint, cache=None, device="cpu"), passages[:4])
    assert max(abs(one - other) for one, other in zip(plain, without, strict=True)) > 1e-3


@pytest.mark.parametrize("keep", ["prefilled", "compact"])
def test_states_stay_hits_and_prefilled_passages_do_not(
    checkpoint: Path, adapter: Path, zeros: Path, passages: list[str], tmp_path: Path, keep: str
) -> None:
    texts = passages[:3]

    def open_reranker(lora: Path | None) -> KaLMReranker:
        cache = PassageCache(tmp_path, keep=keep, memory=0)  # type: ignore[arg-type]
        return KaLMReranker(checkpoint, lora=lora, cache=cache, device="cpu")

    with open_reranker(None) as plain:
        expected = margins(plain, texts)
        plain.cache.flush()
        made = 3 if keep == "prefilled" else plain.cache.stats().encoded  # the reference encodes texts of its own
        assert plain.cache.stats().encoded == made
    for lora in (adapter, zeros):
        with open_reranker(lora) as tuned:
            found = margins(tuned, texts)
            tuned.cache.flush()
            stats = tuned.cache.stats()
            assert stats.encoded == 0, "the encoder is the same"
            assert stats.prefilled.hits == 0, "what another decoder made must not be found"
            alone = margins(KaLMReranker(checkpoint, lora=lora, cache=None, device="cpu"), texts)
            assert found == pytest.approx(alone, abs=1e-5 if keep == "prefilled" else 0.02)
        with open_reranker(lora) as again:
            assert margins(again, texts) == pytest.approx(found, abs=1e-5)
            assert (again.cache.stats().encoded, again.cache.stats().prefilled.hits) == (0, 3)
    with open_reranker(None) as plain:
        assert margins(plain, texts) == pytest.approx(expected, abs=1e-5)
        assert plain.cache.stats().prefilled.hits == 3


def test_it_has_a_digest_of_content(checkpoint: Path, adapter: Path, zeros: Path, tmp_path: Path) -> None:
    plain, tuned, other = (identify(find_checkpoint(checkpoint, lora=lora)) for lora in (None, adapter, zeros))
    assert plain.digest == tuned.digest == other.digest
    assert plain.encoder == tuned.encoder
    assert len({plain.decoder, tuned.decoder, other.decoder}) == 3
    again = write_lora(checkpoint, tmp_path / "another name", SPREAD)
    assert identify(find_checkpoint(checkpoint, lora=again)) == tuned
    write_lora(checkpoint, again, SPREAD, scale=3 * SCALE)
    assert identify(find_checkpoint(checkpoint, lora=again)).decoder != tuned.decoder


def test_what_it_made_is_forgotten(checkpoint: Path, adapter: Path, passages: list[str], tmp_path: Path) -> None:
    cache = PassageCache(tmp_path, keep="prefilled")
    with KaLMReranker(checkpoint, lora=adapter, cache=cache, device="cpu") as tuned:
        tuned.encode(passages[:3])
        cache.flush()
        report = tuned.forget(passages[:1])
        assert (report.store.states, report.store.prefilled) == (1, 1)
    # Without loading the model.
    report = asyncio.run(KaLMReranker(checkpoint, lora=adapter, cache=cache, device="cpu").aforget(passages[1:2]))
    assert (report.store.states, report.store.prefilled) == (1, 1)
    tuned_keys, plain_keys = (
        {space.keys.states_keys(["x"])[0] for space in spaces_of(find_checkpoint(checkpoint, lora=lora))}
        for lora in (adapter, None)
    )
    assert tuned_keys == plain_keys
    assert KaLMReranker(checkpoint, cache=cache, device="cpu").forget(passages[2:3]).store.prefilled == 1, "recorded"


def test_copies_and_pickles_have_it(
    checkpoint: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(adapter.parent)
    reranker = KaLMReranker(checkpoint, lora=adapter.name, cache=None, device="cpu")
    monkeypatch.chdir(tmp_path)
    for made in (reranker, copy.copy(reranker), copy.deepcopy(reranker), pickle.loads(pickle.dumps(reranker))):
        found = made.checkpoint().lora
        assert found is not None
        assert found.folder == adapter
        assert f"lora={str(adapter)!r}" in repr(made)


def rewrite(change: Callable[[dict[str, torch.Tensor], dict[str, str]], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        from safetensors import safe_open

        tensors = load_file(folder / WEIGHTS)
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            metadata = dict(file.metadata())
        change(tensors, metadata)
        save_file(tensors, folder / WEIGHTS, metadata)

    return edit


def configure(**changed: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**content, **changed}))

    return edit


def rename(old: str, new: str) -> Callable[[Path], None]:
    def change(tensors: dict[str, torch.Tensor], _: dict[str, str]) -> None:
        key = next(name for name in tensors if old in name)
        tensors[key.replace(old, new)] = tensors.pop(key)

    return rewrite(change)


def widen(tensors: dict[str, torch.Tensor], _: dict[str, str]) -> None:
    key = next(name for name in tensors if "q_proj.lora_B" in name)
    tensors[key] = torch.cat([tensors[key], tensors[key]])


def narrow(tensors: dict[str, torch.Tensor], _: dict[str, str]) -> None:
    key = next(name for name in tensors if "q_proj.lora_B" in name)
    for name in (key, key.replace("lora_B", "lora_A")):
        tensors[name] = tensors[name][:, :1].clone() if name == key else tensors[name][:1].clone()


def poison(tensors: dict[str, torch.Tensor], _: dict[str, str]) -> None:
    next(tensor for name, tensor in tensors.items() if "q_proj.lora_B" in name)[0, 0] = float("nan")


def exotic(folder: Path) -> None:
    """A type that the format knows and torch does not, as a later version may write."""
    header = json.dumps({"x": {"dtype": "F8_E8M0", "shape": [2], "data_offsets": [0, 2]}}).encode()
    (folder / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + b"\x00\x00")


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (pickled, "holds the adapter as a pickle \\(adapter_model.bin\\), which can run code"),
        (lambda folder: (folder / WEIGHTS).unlink(), "holds no adapter_model.safetensors, so it is not an adapter"),
        (lambda folder: (folder / CONFIG).unlink(), "cannot read .*adapter_config.json.*train it again"),
        (lambda folder: (folder / CONFIG).write_text("[1]"), "expected an object, got list.*train it again"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b"\x00" * 64), "cannot read .*adapter_model.safetensors"),
        (configure(use_dora=True), r"of a kind that kalm-rag does not merge \(use_dora=True\)"),
        (configure(rank_pattern={"q_proj": 4}), r"does not merge \(rank_pattern="),
        (configure(peft_type="IA3"), r"does not merge \(peft_type='IA3'\)"),
        (configure(bias="all"), r"does not merge \(bias='all'\)"),
        (configure(r=0), "has r=0 and lora_alpha=4"),
        (configure(lora_alpha="many"), "has r=2 and lora_alpha='many'"),
        (configure(lora_alpha=10**400), "has r=2 and lora_alpha=1000"),
        (configure(r=10**400), "has r=1000.* and lora_alpha=4"),
        (configure(lora_alpha=64), "not of the same adapter: r=2 and lora_alpha=64 in the first, 2 and 4.0 in the sec"),
        (configure(r=4), "not of the same adapter: r=4 and lora_alpha=4 in the first, 2 and 4.0 in the second"),
        (rewrite(lambda _, metadata: metadata.pop("kalm_rag.r")), "not of the same adapter: .*, None and 4.0 in the"),
        (rewrite(narrow), r"has r=2, but changes 'model.decoder.layers.0.self_attn.q_proj' by \(\d+, 1\) times"),
        (rewrite(poison), "makes 'model.decoder.layers.0.self_attn.q_proj' NaN or infinite; train it again"),
        (exotic, "holds numbers of the type 'F8_E8M0', which torch cannot read"),
        (rewrite(lambda _, metadata: metadata.clear()), "does not say which model it was trained on"),
        (rename("decoder.layers", "encoder.text_model.layers"), "only matrices of the decoder's layers may be adapted"),
        (rename("model.decoder.layers.0.self_attn.q_proj", "lm_head.out_proj"), "only matrices of the decoder's"),
        (rename("model.decoder.layers.0.self_attn.q_proj", "model.decoder.embed_tokens"), "only matrices of the dec"),
        (rename("layers.0.self_attn.q_proj.lora_A", "layers.0.self_attn.k_proj.lora_A"), "lacks a matrix of"),
        (rename("layers.0.self_attn", "layers.99.self_attn"), "lacks a matrix of"),
        (rewrite(widen), "does not fit the model: it changes 'model.decoder.layers.0.self_attn.q_proj'"),
    ],
)
def test_what_is_no_adapter_of_this_model_is_refused(
    checkpoint: Path, tmp_path: Path, edit: Callable[[Path], None], message: str
) -> None:
    folder = write_lora(checkpoint, tmp_path / "lora", SPREAD)
    edit(folder)
    with pytest.raises(CheckpointError, match=message):
        KaLMReranker(checkpoint, lora=folder, cache=None, device="cpu").load()


def test_a_write_that_is_cut_short_leaves_no_mixture_of_two_adapters(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_lora(checkpoint, tmp_path / "lora", SPREAD)
    before = read_lora(folder)
    sync, replace, calls = os.fsync, os.replace, iter(range(9))

    def full(descriptor: int) -> None:
        if next(calls) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            write_lora(checkpoint, folder, SPREAD, scale=3 * SCALE)
    assert read_lora(folder) == before
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG, WEIGHTS]

    def kill(old: Path, new: Path) -> None:
        if new.name == WEIGHTS:
            raise SystemExit
        replace(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", kill)
        with pytest.raises(SystemExit):
            write_lora(checkpoint, folder, SPREAD, scale=3 * SCALE)
    with pytest.raises(CheckpointError, match=r"not of the same adapter: .* lora_alpha=12 in the first, 2 and 4\.0 in"):
        read_lora(folder)


def test_an_adapter_of_another_model_is_refused(checkpoint: Path, adapter: Path, tmp_path: Path) -> None:
    other = build_checkpoint(tmp_path / "other", seed=1)
    message = "was trained on another model than .*: its encoder has the digest [0-9a-f]{12}, this one [0-9a-f]{12}"
    with pytest.raises(CheckpointError, match=message):
        KaLMReranker(other, lora=adapter, cache=None, device="cpu").load()
    identity = identify(find_checkpoint(checkpoint))
    wrong = write_lora(checkpoint, tmp_path / "wrong", SPREAD, base=(identity.encoder, "0" * 64))
    with pytest.raises(CheckpointError, match="its decoder has the digest 000000000000"):
        KaLMReranker(checkpoint, lora=wrong, cache=None, device="cpu").load()


def test_an_adapter_that_changes_while_it_is_loaded_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    folder = write_lora(checkpoint, tmp_path / "lora", SPREAD)
    found = find_checkpoint(checkpoint, lora=folder)
    write_lora(checkpoint, folder, 2 * SPREAD)
    with pytest.raises(CheckpointError, match="changed while it was loaded; load it again"):
        load_model(found, settings=Settings(), device=torch.device("cpu"), dtype="float32")


@pytest.mark.parametrize("lora", ["", " ", "nowhere", 7])
def test_a_folder_that_is_not_there(checkpoint: Path, lora: object) -> None:
    with pytest.raises((ValueError, TypeError), match="lora"):
        KaLMReranker(checkpoint, lora=lora, cache=None, device="cpu").load()  # type: ignore[arg-type]


def test_states_are_forgotten_without_the_adapter(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """They do not depend on it. Entries that are older than the records are found by the model's own key spaces."""
    folder = write_lora(checkpoint, tmp_path / "tuned", 0.1)
    reranker = KaLMReranker(checkpoint, device="cpu", lora=folder, cache=tmp_path / "cache")
    with KaLMReranker(checkpoint, device="cpu", cache=tmp_path / "cache") as other:
        other.encode(["a text"])
    shutil.rmtree(tmp_path / "cache" / "key-spaces")
    shutil.rmtree(folder)
    assert reranker.forget(["a text"]).store.states == 1
    assert "the adapter is not here" in caplog.text
