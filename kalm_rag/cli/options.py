"""Options that several commands share, and how their values are read."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated

import typer

from kalm_rag.utils.display import visible_line


def choices(*names: str) -> Callable[[str], list[str]]:
    """Return what completes an option in a shell; nothing fits a path, so the shell offers files."""

    def complete(incomplete: str) -> list[str]:
        return [name for name in names if name.startswith(incomplete)]

    return complete


def whole_number(text: str | int) -> int:
    """Read an option's whole number, or say what was given instead."""
    try:
        return int(text)
    except ValueError:
        msg = f"it must be a whole number, got {visible_line(str(text))!r}"
        raise typer.BadParameter(msg) from None


def whole_numbers(name: str, text: str) -> tuple[int, ...]:
    """Read whole numbers that are separated by commas, each once.

    Args:
        name: the option.
        text: what was given.
    """
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        msg = f"{name} takes whole numbers separated by commas, for example 1,4,32; got {text!r}"
        raise ValueError(msg) from None
    return tuple(dict.fromkeys(found))


def number(text: str | float) -> float:
    """Read an option's number, or say what was given instead."""
    try:
        return float(text)
    except ValueError:
        msg = f"it must be a number, got {visible_line(str(text))!r}"
        raise typer.BadParameter(msg) from None


# A help text is whole sentences. A default that is no value, such as "all", is given to `show_default`.
ModelOption = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="Use this model: nano, small, large, mini (bundled, to try things out), a folder, or a hub id.",
        metavar="MODEL",
        autocompletion=choices("nano", "small", "large", "mini"),
    ),
]
RevisionOption = Annotated[
    str | None,
    typer.Option(
        "--revision",
        help="Use this branch, tag or commit of a model on the hub.",
        metavar="REVISION",
        show_default="the newest",
    ),
]
LoraOption = Annotated[
    str | None,
    typer.Option(
        "--lora",
        help="Add this adapter, a folder that `kalm-rag tune` wrote, to the model.",
        metavar="FOLDER",
        show_default="none",
    ),
]
DeviceOption = Annotated[
    str | None,
    typer.Option(
        "--device",
        help="Compute on this device: cpu, cuda, cuda:1 or mps.",
        metavar="DEVICE",
        show_default="cuda if there is one, else cpu",
        autocompletion=choices("cpu", "cuda", "mps"),
    ),
]
complete_dtype = choices("float32", "bfloat16", "float16", "int8", "int8-all")
DtypeOption = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        help="Compute in this precision: float32, bfloat16, float16, or int8 or int8-all on a CPU.",
        metavar="DTYPE",
        show_default="bfloat16 on CUDA, else float32",
        autocompletion=complete_dtype,
    ),
]
CacheOption = Annotated[
    str,
    typer.Option(
        "--cache",
        help="Keep encoded passages in this folder.",
        metavar="FOLDER",
        show_default="KALM_RAG_CACHE, or the user's cache folder",
    ),
]
FormatOption = Annotated[
    str,
    typer.Option(
        "--format",
        help="Read files in this format: jsonl, json, csv, tsv, parquet, text, or auto, which goes by their names.",
        metavar="FORMAT",
        autocompletion=choices("auto", "jsonl", "json", "csv", "tsv", "parquet", "text"),
    ),
]
TextFieldOption = Annotated[
    str | None,
    typer.Option(
        "--text-field",
        help="Read the text of a passage from this field.",
        metavar="NAME",
        show_default="text, contents, content or passage",
    ),
]
IdFieldOption = Annotated[
    str | None,
    typer.Option(
        "--id-field",
        help="Read the id of a passage from this field.",
        metavar="NAME",
        show_default="_id, id, docid or doc_id",
    ),
]
InstructionOption = Annotated[
    str | None,
    typer.Option(
        "--instruction",
        help="Tell the model what makes a passage relevant.",
        metavar="TEXT",
        show_default="the model's",
    ),
]
QueriesOption = Annotated[
    Path | None,
    typer.Option(
        "--queries",
        help="Read the queries from this file: JSONL, or id<tab>text.",
        metavar="FILE",
        show_default="the folder's",
    ),
]
QrelsOption = Annotated[
    Path | None,
    typer.Option(
        "--qrels",
        help="Read the judgements from this file of BEIR or TREC.",
        metavar="FILE",
        show_default="the folder's",
    ),
]
SplitOption = Annotated[
    str, typer.Option("--split", help="Use this part of a BEIR folder's judgements.", metavar="NAME")
]
LanguageOption = Annotated[
    str,
    typer.Option(
        "--language",
        help="Let BM25 leave out the stop words of this language: auto (English ones if the passages are English), "
        "none, de, en, es, fr, it, nl, no, pt, ru, sv or zh.",
        metavar="LANGUAGE",
        autocompletion=choices("auto", "none", "de", "en", "es", "fr", "it", "nl", "no", "pt", "ru", "sv", "zh"),
    ),
]
FoldAccentsOption = Annotated[bool, typer.Option("--fold-accents", help="Let BM25 read letters without their accents.")]
MaxLengthOption = Annotated[
    int,
    typer.Option("--max-length", help="Read at most this many tokens of a passage.", metavar="N", parser=whole_number),
]
LongPassagesOption = Annotated[
    str,
    typer.Option(
        "--long-passages",
        help="Truncate long passages (truncate), or read them in windows, of which the best one counts (windows).",
        metavar="WAY",
        autocompletion=choices("truncate", "windows"),
    ),
]
WindowTokensOption = Annotated[
    int | None,
    typer.Option(
        "--window-tokens",
        help="Let a window have at most this many tokens.",
        metavar="N",
        parser=whole_number,
        show_default="as many as are read of a passage",
    ),
]
WindowOverlapOption = Annotated[
    int | None,
    typer.Option(
        "--window-overlap",
        help="Let a window repeat at most this many tokens of the one before.",
        metavar="N",
        parser=whole_number,
        show_default="an eighth of a window",
    ),
]
MaxWindowsOption = Annotated[
    int,
    typer.Option(
        "--max-windows", help="Read at most this many windows of a passage.", metavar="N", parser=whole_number
    ),
]
LimitOption = Annotated[
    float | None,
    typer.Option(
        "--limit-gb",
        help="Let the cache take this many GB on disk.",
        metavar="GB",
        parser=number,
        show_default="as it was, or 10",
    ),
]
RatioOption = Annotated[
    int,
    typer.Option(
        "--ratio",
        "-r",
        help="Compress each passage this many times: 1, 2, 4, 8, 16 or 32.",
        metavar="N",
        parser=whole_number,
    ),
]
BaseRatioOption = Annotated[
    int,
    typer.Option(
        "--base-ratio",
        help="Keep passages compressed this many times; multiples of it are derived from them.",
        metavar="N",
        parser=whole_number,
    ),
]
StorageOption = Annotated[
    str,
    typer.Option(
        "--storage",
        help="Keep numbers as they are (native), or in a fraction of the bytes (int8).",
        metavar="STORAGE",
        autocompletion=choices("native", "int8"),
    ),
]
KeepOption = Annotated[
    str,
    typer.Option(
        "--keep",
        help="Keep states, or prefilled passages too, for fast cold starts on a CPU: prefilled at 25 times the "
        "bytes, or compact at three times with scores that change a little.",
        metavar="KIND",
        autocompletion=choices("states", "prefilled", "compact"),
    ),
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Estimate bytes and time, and encode nothing.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_MOST_GB = 1_000_000_000
"""An exabyte: more than any disk has, and a number of bytes that SQLite holds."""


def with_flags(message: str, flags: Mapping[str, str]) -> str:
    """Rewrite a library message so that it names command-line options instead of arguments.

    Args:
        message: it names an argument at its beginning (`top_k must be`, `unknown device 'x'`), or with a value
            (`dtype='bfloat16'`).
        flags: the options by the name of the argument.
    """
    message = re.sub(r"^(\w+)(?= must )", lambda match: flags.get(match[1], match[1]), message)
    named = re.match(r"(?:unknown )?(\w+) '", message)
    if named and (flag := flags.get(named[1], flags.get(f"{named[1]}s"))):
        message = f"{flag}: {message}"
    return re.sub(
        r"(?<!, )\b(\w+)=(?:'([^']*)'|(\d+)|True\b)",
        lambda match: f"{flags[match[1]]} {match[2] or match[3] or ''}".rstrip() if match[1] in flags else match[0],
        message,
    )


def limit_bytes(limit_gb: float | None) -> int | None:
    """`--limit-gb` in bytes, None if it was not given."""
    if limit_gb is None:
        return None
    if not 1e-9 <= limit_gb <= _MOST_GB:  # neither is "not a number"
        msg = f"--limit-gb must be a number of GB above 0 and at most {_MOST_GB:,}, got {limit_gb:g}"
        raise ValueError(msg)
    return int(limit_gb * 1e9)


def read_bytes(text: str | int) -> int:
    """Read an option's number of bytes, such as `20GB`, or say what was given instead."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?B)?\s*", str(text), re.IGNORECASE)
    count = float(found[1]) * _UNITS[(found[2] or "B").upper()] if found else 0.0
    if not 1 <= count <= _MOST_GB * 1e9:
        msg = f"it must be a number of bytes above 0, such as 500MB or 20GB, got {visible_line(str(text))!r}"
        raise typer.BadParameter(msg)
    return int(count)


def check_revision(revision: str | None) -> None:
    """Refuse a `--revision` without a `--model`, which would be ignored."""
    if revision is not None:
        msg = f"--revision {revision} belongs to a model: name it with --model"
        raise ValueError(msg)


def check_lora(lora: str | None) -> None:
    """Refuse a `--lora` without a `--model`, which would be ignored."""
    if lora is not None:
        msg = f"--lora {lora} belongs to a model: name the one it was trained on with --model"
        raise ValueError(msg)
