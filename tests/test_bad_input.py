"""Wrong arguments: the error names the rule, the value received and the way out."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import kalm_rag
from kalm_rag import KaLMReranker, PassageCache
from kalm_rag.errors import CheckpointError, ScoringError
from kalm_rag.model.checkpoint import find_checkpoint
from kalm_rag.model.identity import identify
from kalm_rag.settings import Settings
from kalm_rag.utils.checks import check_bytes, check_share


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"top_k": 0}, ValueError, "top_k must be at least 1, got 0"),
        ({"top_k": -3}, ValueError, "top_k must be at least 1, got -3"),
        ({"top_k": 2.0}, TypeError, r"top_k must be an integer, got 2.0 \(float\)"),
        ({"top_k": True}, TypeError, "top_k must be an integer, got True"),
        ({"ratio": 0}, ValueError, "ratio must be at least 1, got 0"),
        ({"ratio": 2.5}, TypeError, "ratio must be an integer, got 2.5"),
        ({"ratio": "4"}, TypeError, "ratio must be an integer, got '4'"),
        ({"threshold": "high"}, ValueError, "the path of a threshold profile, got 'high', and there is no such file"),
        ({"threshold": "0.5"}, ValueError, "got '0.5', which is a text: give the number 0.5"),
        ({"threshold": ["high"]}, TypeError, "must be a number between 0 and 1, got .'high'.; or a threshold"),
        ({"calibrated": 1}, TypeError, "calibrated must be True or False, got 1"),
        ({"calibrated": True}, ValueError, "calibrated=True needs a threshold profile, .* got threshold=None"),
        ({"calibrated": True, "threshold": 0.5}, ValueError, "calibrated=True needs .* got threshold=0.5"),
        ({"threshold": 50}, ValueError, "threshold must be a number between 0 and 1, got 50"),
        ({"threshold": float("nan")}, ValueError, "threshold must be a number between 0 and 1, got nan"),
        ({"instruction": 7}, TypeError, "instruction must be a string, got int: 7"),
    ],
)
def test_arguments_of_rank(
    reranker: KaLMReranker, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        reranker.rank("query", ["passage"], **arguments)


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ("one passage", r"got one str; put it into a list: \[document\]"),
        ({"text": "one"}, "got one dict; put it into a list"),
        (b"bytes", "got one bytes"),
        (7, "documents must be a list of passages, got int: 7"),
        (
            ["fine", None],
            r"documents\[1\] must be a string, a mapping with .* got NoneType: None; for others give text=",
        ),
        (["fine", 3.5], r"documents\[1\] .* got float: 3.5"),
        ([{"content": "x"}], r"documents\[0\] is a mapping without the key 'text'; its keys are \['content'\]"),
        ([{"text": None}], r"documents\[0\]\['text'\] must be a string, got NoneType"),
    ],
)
def test_documents(reranker: KaLMReranker, documents: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        reranker.rank("query", documents)
    with pytest.raises(TypeError, match=message):
        reranker.encode(documents)


class Frame:
    """Iterates its columns, as data frames do."""

    columns = ("id", "text")

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns)

    def __len__(self) -> int:
        return 2

    def __getitem__(self, name: str) -> list[str]:
        return ["one", "two"]


class Array:
    """An array of more or fewer dimensions than a list of passages has."""

    def __init__(self, ndim: int) -> None:
        self.ndim = ndim

    def __iter__(self) -> Iterator[str]:
        return iter(["a", "b"])


@pytest.mark.parametrize(
    ("given", "document_way_out", "pair_way_out"),
    [
        (Frame(), r'got a Frame, whose elements are its columns; give df\["text"\]', r'give df\[\["query", "text"\]\]'),
        (
            {"q": "one"},
            r"got a dict, whose elements are its keys; give list\(documents.values\(\)\)",
            r"list\(pairs.items",
        ),
        ({"ab", "cd"}, "got a set, which has no order, so that an index into it means nothing", "got a set"),
        (frozenset(["ab"]), "got a frozenset, which has no order", "got a frozenset"),
        (io.StringIO("ab"), r"got an open file \(StringIO\); read it", "got an open file"),
        (bytearray(b"ab"), "got one bytearray", "got bytearray"),
        (memoryview(b"ab"), "got memoryview", "got memoryview"),
        (Array(0), "got a Array of 0 dimensions; give one of 1", "of 0 dimensions; give one of 2"),
        (Array(3), "got a Array of 3 dimensions; give one of 1", "of 3 dimensions; give one of 2"),
    ],
)
def test_what_is_iterated_by_accident(
    reranker: KaLMReranker, given: Any, document_way_out: str, pair_way_out: str
) -> None:
    with pytest.raises(TypeError, match=f"documents must be a list of passages, {document_way_out}"):
        reranker.rank("query", given)
    with pytest.raises(TypeError, match=document_way_out):
        reranker.encode(given)
    with pytest.raises(TypeError, match=rf"pairs must be a list of \(query, passage\) pairs, .*{pair_way_out}"):
        reranker.predict(given)


def test_data_frames_of_pandas(reranker: KaLMReranker) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"query": ["q", "q"], "text": ["one", "two"]})
    for call in (partial(reranker.rank, "query"), reranker.encode, reranker.predict):
        with pytest.raises(TypeError, match=r"give df\["):
            call(frame)
    assert [hit.document for hit in sorted(reranker.rank("q", frame["text"]), key=lambda hit: hit.index)] == [
        "one",
        "two",
    ]
    expected = reranker.predict([("q", "one"), ("q", "two")])
    assert reranker.predict(frame[["query", "text"]].to_numpy()) == expected
    assert reranker.predict(row for _, row in frame.iterrows()) == expected


def test_what_is_iterated_on_purpose(reranker: KaLMReranker) -> None:
    expected = reranker.rank("query", ["one", "two"])
    for given in ({"one": 1, "two": 2}.keys(), {1: "one", 2: "two"}.values(), np.array(["one", "two"])):
        assert reranker.rank("query", given) == expected
    pairs = [("query", "one"), ("query", "two")]
    for rows in (np.array(pairs), np.array(pairs, dtype=object), map(list, pairs), dict([pairs[1]]).items()):
        assert reranker.predict(rows)[-1] == pytest.approx(reranker.predict(pairs)[-1], abs=1e-5)


@pytest.mark.parametrize(
    ("broken", "repaired"),
    [
        ("abc\ud800", "abc\ufffd"),
        ("\udfff\ud800x", "\ufffd\ufffdx"),
        ("smile \ud83d\ude00", "smile \U0001f600"),  # both halves of one character, in the right order
    ],
)
def test_half_characters_are_replaced_and_reported(
    reranker: KaLMReranker, broken: str, repaired: str, caplog: pytest.LogCaptureFixture
) -> None:
    mapping = {"text": broken, "id": 7}
    hits = {hit.index: hit for hit in reranker.rank("query", ["fine", broken, mapping])}
    plain = {hit.index: hit for hit in reranker.rank("query", ["fine", repaired, repaired])}
    assert {index: hit.margin for index, hit in hits.items()} == {index: hit.margin for index, hit in plain.items()}
    assert [hits[index].passage_repaired for index in range(3)] == [False, True, True]
    assert not any(hit.passage_repaired or hit.query_repaired for hit in plain.values())
    assert hits[1].document is broken
    assert hits[2].document is mapping
    assert mapping == {"text": broken, "id": 7}
    assert reranker.repairs.count == 2
    found = reranker.rank(broken, ["fine"], instruction=broken)
    assert found[0].query_repaired
    assert found[0].margin == reranker.rank(repaired, ["fine"], instruction=repaired)[0].margin
    assert reranker.predict([(broken, broken)]) == reranker.predict([(repaired, repaired)])
    assert (reranker.encode(["fine", broken]).repaired, reranker.encode(["fine"]).repaired) == (1, 0)
    assert reranker.repairs.count == 2 + 2 + 2 + 1
    lines = [record for record in caplog.records if "surrogate" in record.message]
    assert [record.levelname for record in lines].count("WARNING") == 1


def test_text_that_the_model_cannot_read_is_reported_once(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    english, chinese = "A list is sorted with its method sort.", "如何对列表进行排序？使用它的排序方法。"
    mixed = f"{english} That is all there is to say. {chinese[:5]}"
    mini = KaLMReranker("mini", cache=PassageCache(), device="cpu")
    assert mini.unknown_texts == 0, "the model is not loaded"
    mini.rank("How do I sort a list?", [english, mixed])
    assert (mini.unknown_texts, caplog.text) == (0, "")
    mini.rank("How do I sort a list?", [english, chinese])
    assert mini.unknown_texts == 1
    mini.rank(chinese, [english, chinese])
    assert mini.unknown_texts == 2, "the query; the passage is served from the cache"
    mini.encode([chinese, f"{chinese} {chinese}"])
    assert mini.unknown_texts == 3
    lines = [record for record in caplog.records if "tokens of 1 texts are unknown to this model" in record.message]
    assert [record.levelname for record in lines].count("WARNING") == 1
    assert "such as 'nano'" in lines[0].message
    whole = KaLMReranker(checkpoint, cache=None, device="cpu")  # its tokenizer falls back on bytes, as the released
    whole.rank(chinese, [chinese])
    assert whole.unknown_texts == 0


def test_numbers_of_numpy(reranker: KaLMReranker) -> None:
    texts = ["one", "two", "three"]
    expected = reranker.rank("query", texts, top_k=2, ratio=2, threshold=0.25)
    found = reranker.rank("query", texts, top_k=np.int64(2), ratio=np.uint8(2), threshold=np.float32(0.25))
    assert found == expected
    settings = Settings(
        max_length=np.int32(64), ratio=np.int64(8), prefill_memory=np.int64(7), score_memory=np.int64(7)
    )  # type: ignore[arg-type]
    assert [type(value) for value in (settings.max_length, settings.ratio, settings.score_memory)] == [int] * 3
    assert type(check_share("share", np.float16(1))) is float
    assert type(check_bytes("bytes", np.uint64(9))) is int
    for name in ("top_k", "ratio"):
        with pytest.raises(TypeError, match=f"{name} must be an integer, got .*2.0"):
            reranker.rank("query", texts, **{name: np.float64(2)})
        with pytest.raises(TypeError, match=f"{name} must be an integer, got .*True"):
            reranker.rank("query", texts, **{name: np.True_})
    with pytest.raises(TypeError, match="threshold must be a number between 0 and 1, got .*True"):
        reranker.rank("query", texts, threshold=np.True_)
    with pytest.raises(ValueError, match="memory must be a number of bytes"):
        PassageCache(None, memory=np.True_)
    assert PassageCache(None, memory=np.int64(5), base_ratio=np.int16(2)).base_ratio == 2


@pytest.mark.parametrize("query", [None, 3, b"bytes", ["list"]])
def test_query(reranker: KaLMReranker, query: Any) -> None:
    with pytest.raises(TypeError, match="query must be a string"):
        reranker.rank(query, ["passage"])


@pytest.mark.parametrize("pairs", [["ab"], [("a",)], [("a", "b", "c")], [("a", 1)], [(1, "a")], "ab", 7])
def test_pairs(reranker: KaLMReranker, pairs: Any) -> None:
    with pytest.raises(TypeError, match="pairs"):
        reranker.predict(pairs)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"ratio": 0}, ValueError, "ratio must be at least 1"),
        ({"max_length": 0}, ValueError, "max_length must be at least 1, got 0"),
        ({"query_max_length": "512"}, TypeError, "query_max_length must be an integer, got '512'"),
        ({"batch_size": -1}, ValueError, "batch_size must be at least 1, got -1"),
        ({"instruction": None}, TypeError, "instruction must be a string"),
        ({"control_tokens": "strip"}, ValueError, r"control_tokens must be one of .*, got 'strip'"),
    ],
)
def test_settings(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        KaLMReranker("nano", **settings)


def test_device_and_dtype(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown device 'warp'; available: cpu"):
        KaLMReranker(checkpoint, device="warp").load()
    missing = f"cuda:{torch.cuda.device_count()}"
    with pytest.raises(ValueError, match=f"device '{missing}' is not on this machine"):
        KaLMReranker(checkpoint, device=missing).load()
    with pytest.raises(ValueError, match="dtype must be one of .*, got 'int3'"):
        KaLMReranker(checkpoint, dtype="int3")


def test_path_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nor a folder here nor a hub id of the form owner/name"):
        KaLMReranker(tmp_path / "nothing").load()
    with pytest.raises(CheckpointError, match=r"neither an alias \(mini, nano, small, large\)"):
        KaLMReranker("huge").load()
    with pytest.raises(CheckpointError, match="model must be an alias"):
        KaLMReranker("").load()


def test_folder_without_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(CheckpointError, match=r"holds no config.json.*notes.txt"):
        KaLMReranker(tmp_path).load()
    with pytest.raises(CheckpointError, match="is a file; give the folder"):
        KaLMReranker(tmp_path / "notes.txt").load()


def test_revision_of_a_folder(checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match="revisions belong to hub ids"):
        KaLMReranker(checkpoint, revision="main").load()


def test_another_architecture(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(CheckpointError, match="is a 'bert' checkpoint; kalm-rag runs KaLM-Reranker-V1"):
        KaLMReranker(tmp_path).load()


def copy(checkpoint: Path, target: Path) -> Path:
    shutil.copytree(checkpoint, target)
    return target


def test_pickled_weights_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    folder = copy(checkpoint, tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pickles \(pytorch_model.bin\), which can run code .* refused"):
        KaLMReranker(folder).load()


def test_no_weights_and_damaged_weights(checkpoint: Path, tmp_path: Path) -> None:
    folder = copy(checkpoint, tmp_path / "model")
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="cannot read .*model.safetensors.*download the checkpoint again"):
        KaLMReranker(folder).load()
    weights.unlink()
    with pytest.raises(CheckpointError, match="holds no model.safetensors"):
        KaLMReranker(folder).load()


def test_weights_that_lack_a_tensor_or_have_another_shape(checkpoint: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = copy(checkpoint, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    name = "model.decoder.layers.3.mlp.up_proj.weight"
    save_file({key: value for key, value in tensors.items() if key != name}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"lacks 1 weights .*first: {name}"):
        KaLMReranker(folder).load()
    save_file({**tensors, name: torch.zeros(3, 3)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="shape|size"):
        KaLMReranker(folder).load()


def test_tokenizer_without_answers(checkpoint: Path, tmp_path: Path) -> None:
    import tokenizers

    folder = copy(checkpoint, tmp_path / "model")
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0, "<pad>": 1}, unk_token="<unk>"))
    raw.save(str(folder / "tokenizer.json"))
    with pytest.raises(CheckpointError, match="no token for the answer 'yes'"):
        KaLMReranker(folder).load()


def test_missing_tokenizer(checkpoint: Path, tmp_path: Path) -> None:
    folder = copy(checkpoint, tmp_path / "model")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(CheckpointError, match="tokenizer"):
        KaLMReranker(folder).load()


def test_hub_out_of_reach() -> None:
    with pytest.raises(
        CheckpointError,
        match=r"could not get 'KaLM-Embedding/KaLM-Reranker-V1-Nano-R2' from the hub .*"
        r"hf download KaLM-Embedding/KaLM-Reranker-V1-Nano-R2 --local-dir kalm-model",
    ):
        KaLMReranker("nano").load()
    with pytest.raises(CheckpointError, match="at revision 'abc'.*no folder of that name exists here"):
        KaLMReranker("some/model", revision="abc").load()


def test_non_finite_logits(checkpoint: Path, tmp_path: Path) -> None:
    """As float16 gives them: a weight that overflows."""
    from safetensors.torch import load_file, save_file

    folder = copy(checkpoint, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.decoder.norm.weight"].fill_(1e30)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ScoringError, match=r"non-finite logits for 2 of 2 passages in torch.float16: use dtype='bfloat16'"
    ):
        KaLMReranker(folder, dtype="float16").rank("query", ["a", "b"])


DEEP = "[" * 200_000 + "]" * 200_000


@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (DEEP.encode(), "nested too deeply"),
        (b'{"a":' + DEEP.encode() + b"}", "nested too deeply"),
        (b"[1, 2]", "expected an object, got list"),
        (b"null", "expected an object, got NoneType"),
        (b"\xff\xfe{}", "utf-8"),
        (b"{", "download the checkpoint again"),
        (b"", "download the checkpoint again"),
        (b"9" * 5000, "download the checkpoint again"),
    ],
    ids=["deep", "deep inside", "list", "null", "not UTF-8", "half", "empty", "digits"],
)
def test_json_that_is_not_a_checkpoints(
    checkpoint: Path, tmp_path: Path, file: str, content: bytes, message: str
) -> None:
    folder = copy(checkpoint, tmp_path / "model")
    (folder / file).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"cannot read '.*{file}' \(.*{message}"):
        find_checkpoint(folder)


def test_json_that_is_too_large_is_not_read(checkpoint: Path, tmp_path: Path) -> None:
    folder = copy(checkpoint, tmp_path / "model")
    with (folder / "config.json").open("r+b") as file:
        file.truncate(10**9)
    with pytest.raises(CheckpointError, match=r"config.json' \(1000000000 bytes, at most 64000000 are expected\)"):
        find_checkpoint(folder)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "t5gemma2"}, "has no section 'encoder.text_config'"),
        ({"model_type": "t5gemma2", "encoder": [], "decoder": {}}, "has no section 'encoder.text_config'"),
        ({"model_type": "t5gemma2", "encoder": {"text_config": 3}, "decoder": {}}, "no section 'encoder.text_config'"),
        ({"model_type": "t5gemma2", "encoder": {"text_config": {}}, "decoder": "x"}, "has no section 'decoder'"),
        ({"model_type": ["t5gemma2"]}, r"is a \['t5gemma2'\] checkpoint"),
    ],
)
def test_config_of_another_shape(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        find_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "weight_map", [{}, [], None, {"a": 1}, {"a": ["x"]}, {"a": "../x"}, {"a": ".."}, {"a": "a\0b"}, {"a": ""}]
)
def test_index_that_names_no_files(checkpoint: Path, tmp_path: Path, weight_map: object) -> None:
    folder = copy(checkpoint, tmp_path / "model")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match="index.json' (has no weight_map|names files that are not in its folder)"):
        find_checkpoint(folder)


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.uint8, torch.int64, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2]
)
@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_weights_that_are_not_floats(checkpoint: Path, tmp_path: Path, part: str, dtype: torch.dtype) -> None:
    """transformers reads quantised weights as if they were the numbers themselves."""
    from safetensors.torch import load_file, save_file

    folder = copy(checkpoint, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    name = next(key for key in sorted(tensors) if part in key and "layers.1.mlp.up_proj" in key)
    tensors[name] = tensors[name].to(dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    message = f"model.safetensors' keeps '{name}' in [A-Z]+[0-9A-Z_]*; kalm-rag reads .* not quantised"
    with pytest.raises(CheckpointError, match=message):
        KaLMReranker(folder, cache=None).load()
    with pytest.raises(CheckpointError, match=message):
        identify(find_checkpoint(folder))


@pytest.mark.parametrize("model", ["a\0b", "x" * 5000, "~nobody-of-this-name/model", Path("a\0b")])
def test_name_that_no_file_system_holds(model: str | Path) -> None:
    with pytest.raises(CheckpointError, match="nor a folder here nor a hub id"):
        find_checkpoint(model)


def test_path_of_a_checkpoint_is_read_as_any_other(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(checkpoint.parent))
    monkeypatch.setenv("MODELS", str(checkpoint.parent))
    monkeypatch.chdir(checkpoint.parent)
    for model in (checkpoint.name, f"~/{checkpoint.name}", f"$MODELS/{checkpoint.name}", Path("~", checkpoint.name)):
        assert find_checkpoint(model).folder == checkpoint


def test_folder_that_is_called_like_an_alias(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that is a checkpoint is meant, any other is not; `./` always means the folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("mini", "nano"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes.txt").write_text("data")
    assert find_checkpoint("mini").folder == Path(kalm_rag.__file__).parent / "mini"
    with pytest.raises(CheckpointError, match=r"could not get .*Nano-R2.* for the folder of that name write './nano'"):
        find_checkpoint("nano", local_files_only=True)
    for model in ("./nano", Path("nano"), tmp_path / "nano"):
        with pytest.raises(CheckpointError, match="holds no config.json"):
            find_checkpoint(model)
    for name in ("mini", "nano"):
        shutil.copytree(checkpoint, tmp_path / name, dirs_exist_ok=True)
        assert find_checkpoint(name).folder.resolve() == tmp_path / name
    (tmp_path / "small").write_text("a file")
    with pytest.raises(CheckpointError, match=r"could not get .*Small-R2.*write './small'"):
        find_checkpoint("small", local_files_only=True)
