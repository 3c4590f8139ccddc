"""Finds the files of a checkpoint and says what they are, without loading them."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kalm_rag.errors import CheckpointError

ALIASES = {
    "nano": "KaLM-Embedding/KaLM-Reranker-V1-Nano-R2",
    "small": "KaLM-Embedding/KaLM-Reranker-V1-Small-R2",
    "large": "KaLM-Embedding/KaLM-Reranker-V1-Large-R2",
}
"""Short names of the R2 releases."""

MINI = "mini"
"""Short name of the demonstration checkpoint inside this package: trained by this project, no KaLM release."""

MINI_NOTE = "mini is a demonstration checkpoint, no KaLM release; for real use: nano"
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
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint on this disk.

    Attributes:
        name: what the user asked for, for messages.
        folder: where its files are.
        config: the content of `config.json`.
        shards: its safetensors files.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    shards: tuple[Path, ...]


def find_checkpoint(
    model: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Checkpoint:
    """Resolve an alias, a local folder or a hub id to files, downloading them if need be.

    Args:
        model: `mini`, `nano`, `small`, `large`, a folder, or a hub id such as `KaLM-Embedding/KaLM-Reranker-V1-Nano`.
        revision: branch, tag or commit on the hub; refused for a folder.
        token: hub token, as `huggingface_hub` takes it.
        local_files_only: use the hub's local cache alone.

    Raises:
        CheckpointError: nothing usable is there; the message says what was looked for and the way out.
    """
    token = clean_token(token)
    if not isinstance(model, (str, Path)) or not str(model):
        msg = f"model must be an alias ({', '.join(NAMES)}), a folder or a hub id, got {model!r}"
        raise CheckpointError(msg)
    path = Path(model).expanduser()
    if path.is_dir():
        if revision is not None:
            msg = f"revision={revision!r} was given for the folder {str(model)!r}; revisions belong to hub ids"
            raise CheckpointError(msg)
        return read_checkpoint(path, str(model))
    if str(model) == MINI:
        if revision is not None:
            msg = f"revision={revision!r} was given for {MINI!r}, which comes with this package and has no revisions"
            raise CheckpointError(msg)
        return read_checkpoint(Path(__file__).parent / "mini", MINI)
    repo = ALIASES.get(str(model), str(model))
    if path.is_file():
        msg = f"model={str(model)!r} is a file; give the folder that holds config.json and the safetensors files"
        raise CheckpointError(msg)
    if isinstance(model, Path) or not _HUB_ID.fullmatch(repo) or repo.startswith((".", "~")):
        msg = (
            f"no folder {str(model)!r} here, and it is neither an alias ({', '.join(NAMES)}) "
            "nor a hub id of the form owner/name"
        )
        raise CheckpointError(msg)
    return read_checkpoint(_download(repo, revision, token, local_files_only), str(model))


def clean_token(token: object) -> str | bool | None:
    """The hub token without the blanks around it that files and variables leave; None if nothing else is in it.

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
            f"token must be printable ASCII without blanks, got {len(text)} characters with another one among them; "
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
            f"and there is no folder of that name here. On a machine with access run "
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
        msg = f"the folder {str(folder)!r} holds no config.json, so it is no checkpoint; it holds {there}"
        raise CheckpointError(msg)
    try:
        config = json.loads(config_file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        msg = f"cannot read {str(config_file)!r} ({error}); download the checkpoint again"
        raise CheckpointError(msg) from error
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind != MODEL_TYPE:
        msg = (
            f"{name!r} is a {kind!r} checkpoint; kalm-rag runs KaLM-Reranker-V1 checkpoints, whose model_type is "
            f"{MODEL_TYPE!r}: use one of {', '.join(NAMES)} or a folder with one of them"
        )
        raise CheckpointError(msg)
    return Checkpoint(name, folder, config, _shards(folder))


def _shards(folder: Path) -> tuple[Path, ...]:
    index_file = folder / "model.safetensors.index.json"
    if index_file.is_file():
        try:
            names = sorted(set(json.loads(index_file.read_text("utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            msg = f"cannot read {str(index_file)!r} ({error!r}); download the checkpoint again"
            raise CheckpointError(msg) from error
        bad = [name for name in names if not isinstance(name, str) or Path(name).name != name]
        missing = [name for name in names if name not in bad and not (folder / name).is_file()]
        if bad or missing:
            msg = f"{str(index_file)!r} names files that are not in its folder: {bad + missing}"
            raise CheckpointError(msg)
        return tuple(folder / name for name in names)
    single = folder / "model.safetensors"
    if single.is_file():
        return (single,)
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        msg = (
            f"{str(folder)!r} holds its weights as pickles ({', '.join(pickles[:3])}), which can run code when "
            "they are read and are refused; get the safetensors files of the checkpoint or convert them "
            "on a machine that may run them"
        )
        raise CheckpointError(msg)
    msg = f"the folder {str(folder)!r} holds no model.safetensors; download the checkpoint again"
    raise CheckpointError(msg)
