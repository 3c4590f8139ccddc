"""What is loaded, and what is not."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kalm_rag import KaLMReranker
from kalm_rag.testing import Geometry, Vision, build_checkpoint

PAIRS = [("query", "one passage"), ("query", "another, which is longer")]

_PEAK = """
import sys, torch, transformers
from transformers import T5Gemma2ForConditionalGeneration
from kalm_rag import KaLMReranker
def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
before = peak()
if sys.argv[2] == "ours":
    KaLMReranker(sys.argv[1], device="cpu", dtype="float32").load()
else:
    T5Gemma2ForConditionalGeneration.from_pretrained(sys.argv[1], dtype=torch.float32)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_vision_tower_is_never_materialised(tmp_path: Path) -> None:
    """The peak of loading is that of the text part: measured with a tower a hundred times its size.

    The file is in bfloat16 and is loaded in float32, as the released files are on a CPU: that copies every weight,
    while a load in the file's own dtype maps it and reads what is used. What oneDNN needs for itself is in the peak.
    """
    geometry = Geometry(num_hidden_layers=2)
    vision = Vision(hidden_size=1024, intermediate_size=4096, num_hidden_layers=6, num_attention_heads=4)
    folder = build_checkpoint(tmp_path, geometry=geometry, vision=vision, dtype=torch.bfloat16)
    sizes = {key: value.nbytes for key, value in load_file(folder / "model.safetensors").items()}
    tower = sum(size for key, size in sizes.items() if "vision_tower" in key or "multi_modal" in key)
    assert tower > 150e6
    assert sum(sizes.values()) - tower < 5e6
    peaks = {}
    for loader in ("ours", "stock"):
        command = [sys.executable, "-c", _PEAK, str(folder), loader]
        peaks[loader] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert peaks["stock"] > tower
    assert peaks["ours"] < tower / 2


def test_no_part_of_the_tower_stays(reranker: KaLMReranker) -> None:
    model = reranker.scorer.loaded.model
    assert not [name for name, _ in model.named_parameters() if "vision" in name or "multi_modal" in name]
    assert not model.training
    assert not any(weight.requires_grad for weight in model.parameters())
    output = model.get_output_embeddings().weight
    assert output.data_ptr() == model.get_input_embeddings().weight.data_ptr()


def test_defaults_of_device_and_dtype(reranker: KaLMReranker, checkpoint: Path) -> None:
    assert reranker.scorer.loaded.dtype == torch.float32
    assert KaLMReranker(checkpoint, device="cpu", dtype=torch.bfloat16).scorer.loaded.dtype == torch.bfloat16


def test_shards_and_names_of_other_releases(checkpoint: Path, tmp_path: Path, reranker: KaLMReranker) -> None:
    """Tensor names with `encoder.text_model.`, split into two files behind an index."""
    shutil.copytree(checkpoint, tmp_path / "model")
    folder = tmp_path / "model"
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    renamed = {
        key.replace("model.encoder.", "model.encoder.text_model.")
        if "vision" not in key and "multi_modal" not in key
        else key: value
        for key, value in tensors.items()
    }
    assert renamed.keys() != tensors.keys()
    names = sorted(renamed)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: renamed[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert KaLMReranker(folder).predict(PAIRS) == pytest.approx(reranker.predict(PAIRS), abs=1e-5)


def test_config_with_remote_code_runs_none_of_it(checkpoint: Path, tmp_path: Path, reranker: KaLMReranker) -> None:
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    marker = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Model: pass\nclass Config: pass\n")
    for name in ("config.json", "tokenizer_config.json"):
        content = json.loads((folder / name).read_text())
        content["auto_map"] = {
            "AutoConfig": "evil.Config",
            "AutoModelForSeq2SeqLM": "evil.Model",
            "AutoTokenizer": ["evil.Model", "evil.Model"],
        }
        (folder / name).write_text(json.dumps(content))
    assert KaLMReranker(folder).predict(PAIRS) == pytest.approx(reranker.predict(PAIRS), abs=1e-5)
    assert not marker.exists()


def test_hub_id_through_the_hub_cache(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reranker: KaLMReranker
) -> None:
    """The layout that `huggingface_hub` writes, so that the real download code resolves it offline."""
    from huggingface_hub import constants

    repo = tmp_path / "models--KaLM-Embedding--KaLM-Reranker-V1-Nano-R2"
    snapshot = repo / "snapshots" / ("0" * 40)
    shutil.copytree(checkpoint, snapshot)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    found = KaLMReranker("nano", local_files_only=True)
    assert found.checkpoint().folder == snapshot
    assert found.predict(PAIRS) == pytest.approx(reranker.predict(PAIRS), abs=1e-5)


def process_state() -> dict[str, Any]:
    """What `from_pretrained` of transformers replaces while it runs."""
    from transformers import PreTrainedModel
    from transformers.utils import logging

    functions = {name: getattr(torch.nn.init, name) for name in dir(torch.nn.init) if name.endswith("_")}
    return {
        **functions,
        "tie_weights": PreTrainedModel.tie_weights,
        "init_weights": PreTrainedModel.init_weights,
        "linspace": torch.linspace,
        "dtype": torch.get_default_dtype(),
        "verbosity": logging.get_verbosity(),
        "bars": logging.is_progress_bar_enabled(),
    }


def test_loading_changes_nothing_in_the_process(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor for a moment: another thread may be loading a model of its own."""
    from transformers.models.t5gemma2 import modeling_t5gemma2

    from kalm_rag.model import encoder_attention

    before, seen = process_state(), []

    def watch(owner: Any, name: str) -> None:
        original = getattr(owner, name)
        monkeypatch.setattr(
            owner, name, lambda *args, **kwargs: seen.append(process_state()) or original(*args, **kwargs)
        )

    for owner, name in [
        (modeling_t5gemma2.T5Gemma2MLP, "__init__"),
        (modeling_t5gemma2.T5Gemma2MultiModalProjector, "__init__"),
        (encoder_attention, "encoder_attention"),
        (torch.Tensor, "to"),
        (torch.nn.Module, "register_forward_pre_hook"),
    ]:
        watch(owner, name)
    KaLMReranker(checkpoint, cache=None, device="cpu", dtype="bfloat16").load()
    assert len(seen) > 20
    assert all(state == before for state in seen)
    assert process_state() == before


def test_loading_does_not_care_what_another_load_replaced(
    checkpoint: Path, reranker: KaLMReranker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the process is while another thread is in `from_pretrained`, or in `init_empty_weights` of accelerate."""
    from transformers import PreTrainedModel

    expected = reranker.predict(PAIRS)

    def nothing(*_: Any, **__: Any) -> None:
        return None

    register = torch.nn.Module.register_parameter

    def register_empty(module: Any, name: str, weight: Any) -> None:
        register(module, name, None if weight is None else torch.nn.Parameter(weight.to("meta"), requires_grad=False))

    for name in ("tie_weights", "init_weights"):
        monkeypatch.setattr(PreTrainedModel, name, nothing)
    for name in ("normal_", "zeros_", "kaiming_uniform_", "constant_", "copy_"):
        monkeypatch.setattr(torch.nn.init, name, nothing, raising=False)
    monkeypatch.setattr(torch.nn.Module, "register_parameter", register_empty)
    loading = KaLMReranker(checkpoint, cache=None, device="cpu")
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        loading.load()
    finally:
        torch.set_default_dtype(default)
    assert loading.predict(PAIRS) == expected


def test_two_models_load_at_once_beside_one_of_the_host_program(
    checkpoint: Path, reranker: KaLMReranker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All three are inside of the module's construction at the same time, and end in an order that once did harm."""
    import transformers
    from transformers.models.t5gemma2 import modeling_t5gemma2

    expected, before = reranker.predict(PAIRS), process_state()
    meet = threading.Barrier(3, timeout=60)
    build = modeling_t5gemma2.T5Gemma2Decoder.__init__

    def together(*args: Any, **kwargs: Any) -> None:
        meet.wait()
        build(*args, **kwargs)
        meet.wait()

    monkeypatch.setattr(modeling_t5gemma2.T5Gemma2Decoder, "__init__", together)
    ours = [KaLMReranker(checkpoint, cache=None, device="cpu") for _ in range(2)]
    with ThreadPoolExecutor(3) as pool:
        loads = [pool.submit(model.load) for model in ours]
        host = pool.submit(transformers.T5Gemma2ForConditionalGeneration.from_pretrained, checkpoint)
        assert host.result(60) is not None
        assert [load.result(60).predict(PAIRS) for load in loads] == [expected, expected]
    assert process_state() == before


@pytest.mark.parametrize(
    ("present", "shared"),
    [
        ("model.encoder.embed_tokens", True),
        ("lm_head.out_proj", True),
        ("model.decoder.embed_tokens", True),
        ("both", True),
        ("different", False),
    ],
)
def test_tied_weights_under_any_of_their_names(
    checkpoint: Path, tmp_path: Path, reranker: KaLMReranker, present: str, shared: bool
) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    table = tensors["model.encoder.embed_tokens.weight"]
    if present in ("both", "different"):
        tensors["lm_head.out_proj.weight"] = table.clone() if shared else table * 2
    else:
        tensors[f"{present}.weight"] = tensors.pop("model.encoder.embed_tokens.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    found = KaLMReranker(folder, cache=None, device="cpu")
    model = found.scorer.loaded.model
    pointers = {part.weight.data_ptr() for part in (model.get_output_embeddings(), model.get_input_embeddings())}
    assert len(pointers) == (1 if shared else 2)
    assert (found.predict(PAIRS) == pytest.approx(reranker.predict(PAIRS), abs=1e-5)) == shared
