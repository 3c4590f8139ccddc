"""Help texts and shell completion, of every command that there is."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, get_args

import pytest
import typer

from kalm_rag.cache.passage_cache import Keep, Storage
from kalm_rag.cli import app
from kalm_rag.latency.limit import OnUnknown
from kalm_rag.model.checkpoint import NAMES
from kalm_rag.retrieval.corpus import FORMATS


def walk(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield path, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from walk(inner, (*path, name))


COMMANDS = dict(walk(typer.main.get_command(app)))
every_command = pytest.mark.parametrize("path", COMMANDS, ids=lambda path: " ".join(path) or "kalm-rag")


def python(*arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=True,
    )
    return done.stdout


def shown_help(path: tuple[str, ...], columns: int, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What `--help` prints. `COLUMNS` is read when it is printed, so one process can print them all."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("COLUMNS", str(columns))
        with pytest.raises(SystemExit) as done:
            app([*path, "--help"], prog_name="kalm-rag")
    assert done.value.code == 0
    return capsys.readouterr().out.splitlines()


def completions(line: str) -> list[str]:
    """What bash offers for the last word of a command line, as the installed script asks for it."""
    words = line.split(" ")
    environment = {"COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1), "_KALM_RAG_COMPLETE": "complete_bash"}
    return python("-m", "kalm_rag", **environment).split()


class TestHelp:
    @every_command
    @pytest.mark.parametrize("columns", [60, 80])
    def test_nothing_is_cut(self, path: tuple[str, ...], columns: int, capsys: pytest.CaptureFixture[str]) -> None:
        """A group shows the first sentence of each of its commands, which must fit: 45 characters fit."""
        lines = shown_help(path, columns, capsys)
        assert lines[0].startswith(f"Usage: {' '.join(('kalm-rag', *path))} ")
        assert [line for line in lines if line.endswith(("...", "…")) and not line.startswith("Usage: ")] == []
        assert max(map(len, lines)) <= columns

    @every_command
    def test_a_command_says_what_it_does_in_sentences(self, path: tuple[str, ...]) -> None:
        paragraphs = re.split(r"\n\s*\n", COMMANDS[path].help.strip())
        for paragraph in paragraphs:
            assert paragraph[0].isupper(), paragraph
            assert paragraph.endswith("."), paragraph
        first = re.split(r"(?<=\.)\s", paragraphs[0])[0]
        assert len(first) <= 45 or not path, f"{first!r} has {len(first)} characters; it is cut in a list of commands"

    @every_command
    def test_every_option_and_argument_has_a_sentence(self, path: tuple[str, ...]) -> None:
        """A default that is no value belongs in `show_default`, not in the sentence."""
        for parameter in COMMANDS[path].params:
            text = getattr(parameter, "help", None)
            assert text, f"{parameter.name} has no help"
            assert text.endswith("."), f"the help of {parameter.name} is no sentence: {text!r}"
            assert text[0].isupper(), f"the help of {parameter.name} is no sentence: {text!r}"
            assert len(text.split()) > 2, f"the help of {parameter.name} is no sentence: {text!r}"
            assert "[default" not in text, f"the help of {parameter.name} holds a default"
            assert "..." not in text, f"the help of {parameter.name} leaves something out: {text!r}"

    @every_command
    def test_an_option_that_takes_a_value_names_it(self, path: tuple[str, ...]) -> None:
        """`--depth N` says more than `--depth INTEGER`; the placeholder is written in capitals."""
        for parameter in COMMANDS[path].params:
            if parameter.param_type_name == "option" and not parameter.is_flag:
                assert parameter.metavar, f"{parameter.name} has no metavar"
                assert parameter.metavar.isupper(), parameter.metavar

    def test_every_choice_is_named(self) -> None:
        """The command line names them without importing what defines them, so that `--help` stays quick."""
        for names, (command, option) in {
            get_args(Storage): ("encode", "storage"),
            get_args(Keep): ("encode", "keep"),
            get_args(OnUnknown): ("rank", "on_unknown"),
            tuple(FORMATS): ("rank", "file_format"),
            tuple(NAMES): ("rank", "model"),
            ("float32", "bfloat16", "float16", "int8", "int8-all"): ("rank", "dtype"),
        }.items():
            [parameter] = [found for found in COMMANDS[(command,)].params if found.name == option]
            assert [name for name in names if not re.search(rf"\b{name}\b", parameter.help)] == []

    def test_it_imports_no_framework(self) -> None:
        """A user waits for these when a model loads, not for a help text."""
        code = (
            "import sys\nfrom kalm_rag import cli\nsys.argv = ['kalm-rag', 'rank', '--help']\n"
            "try:\n    cli.main()\nexcept SystemExit:\n    pass\n"
            "print(sorted({'torch', 'transformers', 'numpy', 'diskcache'} & sys.modules.keys()))"
        )
        assert python("-c", code).splitlines()[-1] == "[]"


class TestCompletion:
    def test_commands_and_options(self) -> None:
        assert completions("kalm-rag ca") == ["cache"]
        assert completions("kalm-rag rank --dty") == ["--dtype"]
        assert set(completions("kalm-rag cache i")) == {"info", "import"}

    @pytest.mark.parametrize(
        ("line", "expected"),
        [
            ("kalm-rag rank q --dtype bf", ["bfloat16"]),
            ("kalm-rag rank q --model s", ["small"]),
            ("kalm-rag rank q --format js", ["jsonl", "json"]),
            ("kalm-rag rank q --device c", ["cpu", "cuda"]),
            ("kalm-rag encode --storage ", ["native", "int8"]),
            ("kalm-rag encode --keep p", ["prefilled"]),
            ("kalm-rag eval --dtype i", ["int8", "int8-all"]),
            ("kalm-rag rank q --model ./mod", []),
        ],
    )
    def test_values_that_are_choices(self, line: str, expected: list[str]) -> None:
        assert completions(line) == expected

    def test_what_it_offers_is_accepted(self) -> None:
        """The library refuses what it does not know, so what is offered is compared with what it knows."""
        assert set(completions("kalm-rag encode --storage ")) == set(get_args(Storage))
        assert set(completions("kalm-rag encode --keep ")) == set(get_args(Keep))
        assert set(completions("kalm-rag rank --format ")) == set(FORMATS)
        assert set(completions("kalm-rag rank --model ")) == set(NAMES)

    def test_the_script_for_bash(self) -> None:
        script = python("-m", "kalm_rag", _KALM_RAG_COMPLETE="source_bash")
        assert "_KALM_RAG_COMPLETE=complete_bash" in script
        assert re.search(r"complete .*kalm-rag", script)
