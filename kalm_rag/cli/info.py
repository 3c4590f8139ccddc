"""`kalm-rag info`."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Annotated, Any

import typer

from kalm_rag.cli.options import JsonOption, RevisionOption, check_revision, choices
from kalm_rag.cli.output import console, note_mini, print_json
from kalm_rag.utils.display import visible

_PACKAGES = ("kalm-rag", "torch", "transformers", "tokenizers", "safetensors", "diskcache", "huggingface-hub")


def info(
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="Also show what identifies this model: nano, small, large, mini, a folder, or a hub id.",
            metavar="MODEL",
            autocompletion=choices("nano", "small", "large", "mini"),
        ),
    ] = None,
    revision: RevisionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show versions, device and the cache's folder."""
    import torch

    from kalm_rag.model.loading import resolve_device, resolve_dtype
    from kalm_rag.utils.paths import passages_dir

    device = resolve_device(None)
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
        "device": str(device) if device.type != "cuda" else f"{device} ({torch.cuda.get_device_name(device)})",
        "threads": torch.get_num_threads(),
        "dtype": str(resolve_dtype(None, device)).removeprefix("torch."),
        "cache": str(passages_dir() or "none: this user has no home folder"),
    }
    if model is None:
        check_revision(revision)
    else:
        from kalm_rag.model.checkpoint import find_checkpoint
        from kalm_rag.model.identity import identify

        note_mini(model)
        checkpoint = find_checkpoint(model, revision=revision)
        identity = identify(checkpoint)
        facts |= {
            "model": model,
            "model folder": str(checkpoint.folder),
            "model digest": identity.short,
            "encoder digest": identity.encoder,
            "tokenizer digest": identity.tokenizer,
        }
    if as_json:
        print_json({name.replace(" ", "_").replace("-", "_"): value for name, value in facts.items()})
        return
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name, Text(visible(str(value))))
    console().print(table)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
