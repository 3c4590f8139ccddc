"""The command `kalm-rag`."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer

from kalm_rag._version import __version__
from kalm_rag.cli import cache, compare, demo, doctor, encode, evaluate, forget, info, rank, serve, size, tune, warm
from kalm_rag.cli.options import with_flags
from kalm_rag.cli.output import make_log_visible, replace_what_a_stream_cannot_hold
from kalm_rag.errors import KaLMError
from kalm_rag.utils.display import visible_line

app = typer.Typer(
    name="kalm-rag",
    help="Rerank passages with KaLM-Reranker. Passages are encoded once and reused by every later query.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("rank")(rank.rank)
app.command("encode")(encode.encode)
app.command("warm")(warm.warm)
for command in (forget.forget, forget.clear, forget.prune):
    cache.app.command(command.__name__)(command)
app.add_typer(cache.app)
app.command("eval")(evaluate.evaluate)
app.command("compare")(compare.compare)
app.command("tune")(tune.tune)
app.command("size")(size.size)
app.command("serve")(serve.serve)
app.command("demo")(demo.demo)
app.command("info")(info.info)
app.command("doctor")(doctor.doctor)

_debug = False


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"kalm-rag {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the whole traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    global _debug
    _debug = debug


def main() -> None:
    """Run the command line; an expected error is one line on standard error and exit code 2."""
    replace_what_a_stream_cannot_hold()
    make_log_visible()
    try:
        app(prog_name="kalm-rag")  # also for `python -m kalm_rag`; shell completion goes by it
    except BrokenPipeError:  # the reader of the output closed it, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (KaLMError, ValueError, TypeError, OSError, OverflowError) as error:
        if _debug:
            raise
        text = str(error)
        if isinstance(error, PermissionError) and error.filename is not None:
            text = f"no permission to use {error.filename}: run as a user who may use it, or name another place"
        typer.echo(f"error: {visible_line(with_flags(text, _flags()))}", err=True)
        sys.exit(2)


def _flags() -> dict[str, str]:
    """Return the options of all commands by the library's argument names."""
    found: dict[str, str] = {}
    groups: list[Any] = [typer.main.get_command(app)]
    while groups:
        command = groups.pop()
        groups += getattr(command, "commands", {}).values()
        found |= {option.name: max(option.opts, key=len) for option in command.params if option.opts[0].startswith("-")}
    return found
