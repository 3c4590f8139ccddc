"""Finds and identifies the files of a checkpoint without loading them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kalm_rag.errors import CheckpointError
from kalm_rag.model.json_file import read_json
from kalm_rag.model.lora import Lora, pickles_in, read_lora
from kalm_rag.utils.paths import user_path

ALIASES = {
    "nano": "KaLM-Embedding/KaLM-Reranker-V1-Nano-R2",
    "small": "KaLM-Embedding/KaLM-Reranker-V1-Small-R2",
    "large": "KaLM-Embedding/KaLM-Reranker-V1-Large-R2",
}
"""Short names of the R2 releases."""

MINI = "mini"
"""Short name of the demonstration checkpoint inside this package: trained by this project, not a KaLM release."""

MINI_NOTE = "mini is a demonstration checkpoint, not a KaLM release; use nano for real work"
"""What commands say when they run it."""

NAMES = (MINI, *ALIASES)
"""Every short name."""

MODEL_TYPE = "t5gemma2"
"""`model_type` of every KaLM-Reranker-V1 checkpoint."""

UNUSED = ("vision_tower.", "multi_modal_projector.")
"""Parts of the tensor names that a text reranker has no use for."""

_WANTED = (
    "config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
)
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
)
"""Files that shape how text is tokenised."""

_INDEX = "model.safetensors.index.json"
_FLOATS = {"F64", "F32", "F16", "BF16"}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint on this disk.

    Attributes:
        name: what the user asked for, for messages.
        folder: where its files are.
        config: the content of `config.json`.
        shards: its safetensors files.
        marks: what its files looked like before the first of them was read, so that a change shows.
        lora: the adapter that is added to its decoder, if there is one.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    shards: tuple[Path, ...]
    marks: tuple[str, ...]
    lora: Lora | None = None

    def check_unchanged(self) -> None:
        """Refuse a checkpoint whose files were replaced since it was found: parts of two models give wrong scores.

        Raises:
            CheckpointError: a file has changed.
        """
        if _marks(self.folder, self.shards) != self.marks:
            msg = (
                f"a file of {self.name!r} in {str(self.folder)!r} changed while it was loaded; load it again once "
                "the files are in place"
            )
            raise CheckpointError(msg)


def _file_mark(path: Path) -> str:
    """Return what identifies this version of a file on this machine; links are followed.

    Raises:
        OSError: there is no such file.
    """
    real = path.resolve()
    stat = real.stat()
    return f"file {real} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} {stat.st_ino} {stat.st_dev}"


class MappedFiles:
    """The files that a model's weights are mapped from; overwriting them in place changes the model.

    A file that is replaced by another one, as a download or a rename does, is not the one that is mapped.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self._seen = {real: self._content(real) for real in {file.resolve() for file in files}}

    @staticmethod
    def _content(file: Path) -> tuple[tuple[int, int], tuple[int, int]] | None:
        try:
            stat = file.stat()
        except OSError:
            return None
        return (stat.st_dev, stat.st_ino), (stat.st_size, stat.st_mtime_ns)

    def check(self) -> None:
        """Raise if the files have changed; call this after computing with them.

        Raises:
            CheckpointError: a file was overwritten since the model was loaded.
        """
        for file, seen in self._seen.items():
            now = self._content(file)
            if seen is not None and now is not None and now[0] == seen[0] and now[1] != seen[1]:
                msg = (
                    f"{str(file)!r} was overwritten while its weights were in use, and they changed with it: close() "
                    "this reranker, and the next call loads the file. Replace a checkpoint's files by renaming others "
                    "over them"
                )
                raise CheckpointError(msg)


def _marks(folder: Path, shards: tuple[Path, ...]) -> tuple[str, ...]:
    files = [folder / "config.json", folder / _INDEX, *(folder / name for name in TOKENIZER_FILES), *shards]
    found = []
    for file in files:
        try:
            found.append(_file_mark(file))
        except OSError:
            found.append(f"none {file.name}")
    return tuple(found)


def check_tensor(shard: Path, key: str, dtype: str) -> None:
    """Refuse a weight that is not stored in floating point: transformers would read its raw integers.

    Args:
        shard: the file.
        key: the tensor's name.
        dtype: as the file calls it.

    Raises:
        CheckpointError: it is integers, or floats of 8 bits, whose scale stands elsewhere.
    """
    if dtype not in _FLOATS:
        msg = (
            f"{str(shard)!r} keeps {key!r} in {dtype}; kalm-rag reads weights in {', '.join(sorted(_FLOATS))}: get the "
            "checkpoint that is not quantised, and use dtype='int8' for 8 bits on a CPU"
        )
        raise CheckpointError(msg)


def find_checkpoint(
    model: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    lora: str | Path | None = None,
) -> Checkpoint:
    """Resolve an alias, a local folder or a hub id to files, downloading them if need be.

    Args:
        model: `mini`, `nano`, `small`, `large`, a folder, or a hub id such as `KaLM-Embedding/KaLM-Reranker-V1-Nano`.
        revision: branch, tag or commit on the hub; refused for a folder.
        token: hub token, as `huggingface_hub` takes it.
        local_files_only: use only the hub's local cache.
        lora: folder of an adapter that `kalm-rag tune` wrote, see `kalm_rag.model.lora`.

    Raises:
        CheckpointError: nothing usable is there; the message says what was looked for and the way out.
    """
    adapter = None if lora is None else read_lora(lora)
    found = _find(model, revision, clean_token(token), local_files_only)
    return found if adapter is None else replace(found, lora=adapter)


def _find(model: str | Path, revision: str | None, token: str | bool | None, local_files_only: bool) -> Checkpoint:
    if not isinstance(model, (str, Path)) or not str(model):
        msg = f"model must be an alias ({', '.join(NAMES)}), a folder or a hub id, got {model!r}"
        raise CheckpointError(msg)
    path = _local(model)
    named = str(model) in NAMES and not isinstance(model, Path)
    # A folder with the name of an alias is used only if it holds a checkpoint.
    if path is not None and path.is_dir() and (not named or (path / "config.json").is_file()):
        if revision is not None:
            msg = f"revision={revision!r} was given for the folder {str(model)!r}; revisions belong to hub ids"
            raise CheckpointError(msg)
        return read_checkpoint(path, str(model))
    if named and str(model) == MINI:
        if revision is not None:
            msg = f"revision={revision!r} was given for {MINI!r}, which comes with this package and has no revisions"
            raise CheckpointError(msg)
        return read_checkpoint(Path(__file__).parent.parent / "mini", MINI)
    if not named and path is not None and path.is_file():
        msg = f"model={str(model)!r} is a file; give the folder that holds config.json and the safetensors files"
        raise CheckpointError(msg)
    repo = ALIASES.get(str(model), str(model))
    if isinstance(model, Path) or not _HUB_ID.fullmatch(repo) or repo.startswith((".", "~")):
        msg = (
            f"model={str(model)!r} is neither an alias ({', '.join(NAMES)}) nor a folder here nor a hub id of the form "
            "owner/name"
        )
        raise CheckpointError(msg)
    try:
        return read_checkpoint(_download(repo, revision, token, local_files_only), str(model))
    except CheckpointError as error:
        if named and path is not None and path.exists():
            msg = f"{error}. {str(model)!r} is read as the alias; for the folder of that name write './{model}'"
            raise CheckpointError(msg) from error
        raise


def _local(model: str | Path) -> Path | None:
    """Return `model` as a path; None if it cannot be one."""
    try:
        path = user_path(model, "model")
        path.exists()
    except (ValueError, OSError):  # such as an unknown home folder, or a name that is too long
        return None
    return path


def clean_token(token: object) -> str | bool | None:
    """Strip the hub token of surrounding blanks; None if it is empty.

    Raises:
        TypeError: it is not a string, a truth value or None. No message shows the token.
        ValueError: no HTTP header can carry it.
    """
    if token is None or isinstance(token, bool):
        return token
    if not isinstance(token, str):
        msg = f"token must be a string, True, False or None, got {type(token).__name__}; give the token as a string"
        raise TypeError(msg)
    text = token.strip()
    if not text.isascii() or any(not "!" <= character <= "~" for character in text):
        msg = (
            f"token must be printable ASCII without blanks, got {len(text)} characters, and some are not; "
            "copy the token again from the hub's settings"
        )
        raise ValueError(msg)
    return text or None


def _download(repo: str, revision: str | None, token: str | bool | None, local_files_only: bool) -> Path:
    import huggingface_hub

    try:
        return Path(
            huggingface_hub.snapshot_download(
                repo,
                revision=revision,
                token=token,
                local_files_only=local_files_only,
                allow_patterns=list(_WANTED),
            )
        )
    except Exception as error:
        at = f" at revision {revision!r}" if revision else ""
        msg = (
            f"could not get {repo!r}{at} from the hub ({type(error).__name__}: {_first_line(error)}), "
            f"and no folder of that name exists here. On a machine with access run "
            f"`hf download {repo} --local-dir kalm-model`, copy the folder here and use model='kalm-model'"
        )
        raise CheckpointError(msg) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]


def read_checkpoint(folder: Path, name: str) -> Checkpoint:
    """Check that a folder holds a KaLM reranker in safetensors.

    Raises:
        CheckpointError: `config.json` or weights are missing, the weights are a pickle, or it is another model.
    """
    config_file = folder / "config.json"
    if not config_file.is_file():
        there = sorted(entry.name for entry in folder.iterdir())[:8]
        msg = f"the folder {str(folder)!r} holds no config.json, so it is not a checkpoint; it holds {there}"
        raise CheckpointError(msg)
    shards: tuple[Path, ...] = ()
    first = _marks(folder, shards)
    config = read_json(config_file)
    kind = config.get("model_type")
    if kind != MODEL_TYPE:
        msg = (
            f"{name!r} is a {kind!r:.80} checkpoint; kalm-rag runs KaLM-Reranker-V1 checkpoints, whose model_type is "
            f"{MODEL_TYPE!r}: use one of {', '.join(NAMES)} or a folder with one of them"
        )
        raise CheckpointError(msg)
    for part, inner in (("encoder", "text_config"), ("decoder", None)):
        section = config.get(part)
        if isinstance(section, dict) and inner is not None:
            section = section.get(inner)
        if not isinstance(section, dict):
            path = part if inner is None else f"{part}.{inner}"
            msg = f"{str(config_file)!r} has no section {path!r}, or not as an object; download the checkpoint again"
            raise CheckpointError(msg)
    shards = _shards(folder)
    return Checkpoint(name, folder, config, shards, first + _marks(folder, shards)[len(first) :])


def _shards(folder: Path) -> tuple[Path, ...]:
    index_file = folder / _INDEX
    if index_file.is_file():
        weight_map = read_json(index_file).get("weight_map")
        names = list(weight_map.values()) if isinstance(weight_map, dict) else []
        if not names or not all(isinstance(name, str) for name in names):
            msg = f"{str(index_file)!r} has no weight_map that names files; download the checkpoint again"
            raise CheckpointError(msg)
        bad = sorted(
            {name for name in names if Path(name).name != name or "\0" in name or not (folder / name).is_file()}
        )
        if bad:
            msg = f"{str(index_file)!r} names files that are not in its folder: {bad[:8]}"
            raise CheckpointError(msg)
        return tuple(folder / name for name in sorted(set(names)))
    single = folder / "model.safetensors"
    if single.is_file():
        return (single,)
    pickles = pickles_in(folder)
    if pickles:
        msg = (
            f"{str(folder)!r} holds its weights as pickles ({', '.join(pickles[:3])}), which can run code when "
            "they are read and are refused; get the safetensors files of the checkpoint or convert them "
            "on a machine that may run them"
        )
        raise CheckpointError(msg)
    msg = f"the folder {str(folder)!r} holds no model.safetensors; download the checkpoint again"
    raise CheckpointError(msg)
