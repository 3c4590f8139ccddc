"""`kalm-rag doctor`."""

from __future__ import annotations

import contextlib
import logging
import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from kalm_rag.cli.options import (
    CacheOption,
    DeviceOption,
    JsonOption,
    LoraOption,
    RevisionOption,
    check_lora,
    check_revision,
    choices,
)
from kalm_rag.cli.output import console, note_mini, print_json, show
from kalm_rag.diagnosis.privacy import scrubber
from kalm_rag.utils.display import size_text, visible_line

if TYPE_CHECKING:
    from kalm_rag.diagnosis.doctor import Diagnosis
    from kalm_rag.diagnosis.verify import Verification

_NAMES = 14
"""Columns of the names that stand before each line."""


def doctor(
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="Also load this model and compare every path from a passage to a score.",
            metavar="MODEL",
            show_default=False,
            autocompletion=choices("nano", "small", "large", "mini"),
        ),
    ] = None,
    card: Annotated[
        str | None,
        typer.Option(
            "--card",
            help="Hub id of the release that the folder given as --model is a copy of, to check the example that its "
            "model card publishes.",
            metavar="HUB_ID",
            show_default=False,
        ),
    ] = None,
    cache: CacheOption = "default",
    revision: RevisionOption = None,
    lora: LoraOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check this installation, or a model.

    It looks at processor, precision, versions, cache and hub, and says what is wrong with them.

    Nothing is created and nothing is downloaded, unless --model names a model that is not on this disk. The exit status
    is 0 if everything works, with or without warnings, and 1 if something is broken. The JSON form is meant for fault
    reports: it holds no tokens, and the home folder is written as ~.
    """
    if model is None:
        check_revision(revision)
        check_lora(lora)
        if card is not None:
            msg = f"--card {card} belongs to a model: name the folder of its copy with --model"
            raise ValueError(msg)
    try:
        from kalm_rag.diagnosis.doctor import diagnose
    except (ImportError, OSError) as error:  # a library that does not load is an OSError of torch
        _show_broken_import(error, as_json=as_json)
        sys.exit(1)
    if model is not None:
        note_mini(model)
    with _without_warnings("kalm_rag.model"):  # which precisions are slow is part of the report
        found = diagnose(model, revision=revision, lora=lora, cache=cache, device=device, card=card)
    if as_json:
        print_json(found.as_json())
    else:
        _show(found)
    if not found.is_usable:
        sys.exit(1)


def _show_broken_import(error: Exception, *, as_json: bool) -> None:
    """Say that a package is missing or broken: nothing else can be checked then."""
    text = (
        f"A package that kalm-rag needs cannot be imported ({type(error).__name__}: {error}). Install it again: "
        "pip install --force-reinstall kalm-rag"
    )
    text = scrubber()(text)
    if as_json:
        print_json({"usable": False, "findings": [{"level": "error", "area": "packages", "text": text}]})
    else:
        show(text)


@contextlib.contextmanager
def _without_warnings(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _show(found: Diagnosis) -> None:
    _section("Machine", _machine_rows(found))
    _section(f"Precision: one feed-forward network of Nano on {found.precisions.device}", _precision_rows(found))
    missing = [f"{extra} (needs {', '.join(names)})" for extra, names in found.extras.items() if names]
    complete = [extra for extra, names in found.extras.items() if not names]
    rows = [
        ("installed", ", ".join(f"{name} {version}" for name, version in found.versions.items())),
        ("extras", ", ".join(complete) or "none"),
    ]
    _section("Versions", rows + [("incomplete", ", ".join(missing))] * bool(missing))
    _section("Cache", _cache_rows(found))
    hub = found.hub
    rows = [
        ("downloads", "off: HF_HUB_OFFLINE is set" if hub.offline else f"from {hub.endpoint} (not tried)"),
        ("token", hub.token if hub.token == "none" else f"from {hub.token}"),
        ("models here", ", ".join(hub.models)),
    ]
    _section("Hub", rows)
    if found.model:
        _section("Model", [(name.replace("_digest", ""), text) for name, text in found.model.items()])
    if found.verification is not None:
        _show_paths(found.verification)
        _section("What was verified", _verified_rows(found.verification))
    if found.findings:
        _section("Findings", [(finding.level, finding.text) for finding in found.findings])
    counts = {level: sum(finding.level == level for finding in found.findings) for level in ("error", "warning")}
    what = " and ".join(f"{count} {level}{'s' if count > 1 else ''}" for level, count in counts.items() if count)
    if found.is_usable:
        show(f"Usable, with {what}." if what else "Usable: nothing is wrong.")
    else:
        show(f"Not usable as it is: {what}.")


def _section(title: str, rows: Sequence[tuple[str, str]]) -> None:
    """Print a title and rows of name and text; long texts are folded beside their names."""
    clean = scrubber()
    show(title, wrap=False)
    for name, text in rows:
        lines = textwrap.wrap(visible_line(clean(text)), max(20, console().width - _NAMES), break_on_hyphens=False)
        for number, line in enumerate(lines or [""]):
            show(f"{'' if number else f'  {name}':{_NAMES}}{line}".rstrip(), wrap=False)
    show("")


def _machine_rows(found: Diagnosis) -> list[tuple[str, str]]:
    machine = found.machine
    memory = "unknown" if machine.memory is None else size_text(machine.memory)
    if machine.memory_limit is not None:
        memory += f", limited to {size_text(machine.memory_limit)}"
    rows = [
        ("system", f"{machine.system}, {machine.architecture}"),
        ("processor", machine.cpu),
        ("features", " ".join(machine.features) or "unknown"),
        ("torch uses", f"{machine.torch_cpu}, {machine.threads} of its threads for {machine.cpus} usable processors"),
        ("memory", memory),
        (
            "prefilled",
            f"{size_text(found.prefill_memory.bytes)} before a model is loaded ({found.prefill_memory.source})",
        ),
        ("GPU", ", ".join(machine.gpus) or "none"),
    ]
    variables = " ".join(f"{name}={value}" for name, value in machine.environment.items())
    return rows + [("variables", variables)] * bool(variables)


def _precision_rows(found: Diagnosis) -> list[tuple[str, str]]:
    rows = []
    for timing in found.precisions.timings:
        time = "not run" if timing.milliseconds is None else f"{timing.milliseconds:.2f} ms"
        fastest = "the fastest here" if timing.precision == found.precisions.fastest else ""
        rows.append((timing.precision, ", ".join(filter(None, [time, fastest, timing.note]))))
    return rows


def _cache_rows(found: Diagnosis) -> list[tuple[str, str]]:
    seen = found.cache
    limit, free = ("unknown" if size is None else size_text(size) for size in (seen.limit, seen.free))
    return [
        ("folder", f"{seen.folder or 'none'}{f' ({seen.filesystem})' if seen.filesystem else ''}"),
        ("holds", f"{seen.entries} passages, {size_text(seen.bytes or 0)}" if seen.exists else "no cache yet"),
        ("writable", f"{'yes' if seen.writable else 'no'}{f': {seen.tried}' if seen.tried else ''}"),
        ("limit", f"{limit}; its disk has {free} left"),
    ]


def _show_paths(verified: Verification) -> None:
    caption = (
        f"Largest changes on {verified.pairs} pairs: of margin and P(yes) from plain {verified.base or 'float32'}, of "
        "the margin from plain in the same precision, and of P(yes) from the reference."
    )
    for line in textwrap.wrap(caption, console().width):
        show(line, wrap=False)
    show(f"{'':30}{'margin':>9}{'P(yes)':>9}{'own plain':>10}{'reference':>10}", wrap=False)
    precision = ""
    for result in verified.paths:
        if result.precision != precision:
            precision = result.precision
            real = "" if result.computes in ("", precision) else f" ({result.computes})"
            show(f"{precision}{real}", wrap=False)
        changes = (result.margin_change, result.score_change)
        others = (result.own_change, result.reference_change)
        numbers = "".join(f"{_number(value):>9}" for value in changes) + "".join(
            f"{_number(value):>10}" for value in others
        )
        show(f"  {result.path:28}{numbers}  {result.verdict}", wrap=False)
    show("")


def _verified_rows(verified: Verification) -> list[tuple[str, str]]:
    agree = sum(result.verdict in ("base", "agrees") for result in verified.paths)
    taken = sum(bool(result.margins) for result in verified.paths)
    text = f"{agree} of {taken} agree within their tolerance"
    if verified.largest_between is not None:
        text += f"; between any two, no margin differs by more than {verified.largest_between[0]:.3f}"
    rows = [("paths", text)]
    rows += [(result.precision, f"not run: {result.why}") for result in verified.paths if result.verdict == "not run"]
    if verified.reference_change is None:
        rows.append(("reference", f"{verified.reference}: {verified.reference_why}"))
    else:
        far = f"P(yes) of mteb's implementation is within {verified.reference_change:.1e} of plain {verified.base}"
        rows.append(("reference", f"{verified.reference}: {far}"))
    if verified.card:
        far = f"{max(abs(result.margin - result.expected) for result in verified.card):.3f}"
        agree = sum(result.agrees for result in verified.card)
        rows.append(("model card", f"{agree} of {len(verified.card)} margins agree; the farthest is {far} away"))
    else:
        rows.append(("model card", f"not compared: {verified.card_why}"))
    return rows


def _number(value: float | None) -> str:
    return "" if value is None else "0" if value == 0 else f"{value:.1e}"
