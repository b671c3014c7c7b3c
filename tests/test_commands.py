"""Every command line of the documentation is one that its program takes."""

import argparse
import contextlib
import importlib
import io
import re
import runpy
import subprocess
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import pytest
import yaml
from documented import PAGES, RECIPES, ROOT, CommandLine, command_lines
from test_docs import EXAMPLES, IN_FILES

from smalti.cli import COMMANDS, main

PLACEHOLDERS = {"COMMAND": "info", "...": "", "PICTURES": "my_pictures"}  # words of a page
# A name of each kind that stands for any: --tokenizer NAME, --prior NAME.
NAMES = {"--tokenizer": "vq-32-tiny", "--prior": "gpt-nano"}
# Options whose value is a saved model that is read while options are.
MODELS = {"--initial", "--prior"}
LINES = [line for page in (*PAGES, *RECIPES) for line in command_lines(page)]
TARGETS = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
# The first words of other programs' commands.
OTHERS = {"pip", "source", "curl", "make", ".venv/bin/python"}


class Parsed(BaseException):
    """The options of a program were taken."""


def options_of(words: Sequence[str]) -> dict:
    """The configuration of a command of smalti, as --print-config prints it.

    Raises:
        AssertionError: the command does not take these options.
    """
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            status = main([*words, "--print-config"])
        except SystemExit as end:
            status = end.code
    assert not status, error.getvalue()
    return yaml.safe_load(out.getvalue()) or {}


def without_models(words: Sequence[str]) -> list[str]:
    """The words without the options that name a saved model, and with a name for each NAME."""
    kept: list[str] = []
    for before, word in zip(("", *words), words, strict=False):
        if word == "NAME":
            kept.append(NAMES[before])
        elif word in MODELS and "train" in words[0]:
            continue
        elif not (before in MODELS and "train" in words[0]):
            kept.append(PLACEHOLDERS.get(word, word))
    return [word for word in kept if word]


def parse_program(words: Sequence[str], patch: pytest.MonkeyPatch) -> None:
    """Let `python FILE OPTIONS` read its options, and nothing more."""
    import tyro

    real, real_tyro = argparse.ArgumentParser.parse_args, tyro.cli

    def parse_args(self, *args, **options) -> NoReturn:
        real(self, *args, **options)
        raise Parsed

    def cli(*args, **options) -> NoReturn:
        real_tyro(*args, **options)
        raise Parsed

    patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    patch.setattr(tyro, "cli", cli)
    patch.setattr(sys, "argv", list(words))
    patch.syspath_prepend(str(ROOT / Path(words[0]).parent))
    with contextlib.suppress(Parsed):
        runpy.run_path(str(ROOT / words[0]), run_name="__main__")
        raise AssertionError(f"{words[0]} reads no options")


def parse_launcher(words: Sequence[str]) -> None:
    """Let Accelerate or torchrun read its options; a file of settings must be there."""
    if words[0] == "torchrun":
        from torch.distributed.run import get_args_parser

        get_args_parser().parse_args(words[1:])
        return
    from accelerate.commands.launch import launch_command_parser

    given = words[2:] if "-m" in words else (*words[2:], "program.py")
    known = launch_command_parser().parse_args(given)
    if known.config_file:
        places = (ROOT, ROOT / "scripts/configs/accelerate")
        assert any((place / known.config_file).is_file() for place in places)


def check(line: CommandLine, patch: pytest.MonkeyPatch) -> None:
    """Raise an error if a program does not take a command line."""
    program, *rest = line.words
    if line.launcher:
        parse_launcher(line.launcher)
    if line.smalti and not {"--help", "--version"} & {*line.smalti}:
        options_of(without_models(line.smalti))
    elif line.smalti:
        assert line.smalti[0] in {*COMMANDS, "COMMAND", "--help", "--version"}
    elif program == "python":
        with patch.context() as patched:
            parse_program([word.strip(".") or word for word in rest], patched)
    elif program == "make":
        assert {word for word in rest if "=" not in word} <= {*TARGETS}
    else:
        assert line.launcher or program in OTHERS


@pytest.fixture
def place(tmp_path: Path, monkeypatch) -> Path:
    """An empty folder with the recipes, where commands are started."""
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    monkeypatch.chdir(tmp_path)
    return tmp_path


NEEDS_EXAMPLES = [line for line in LINES if line.page == "CONTRIBUTING.md" and line.smalti]


@pytest.mark.parametrize(
    "line", [line for line in LINES if line not in NEEDS_EXAMPLES], ids=lambda line: str(line)
)
def test_a_command_line_is_one_that_its_program_takes(line, place, monkeypatch) -> None:
    check(line, monkeypatch)


def read_contributing() -> None:
    """Read the options of the commands in CONTRIBUTING.md after its examples have run."""
    for file in {*IN_FILES.values()}:
        importlib.import_module(file.removesuffix(".py"))
    others = [block for heading, block in EXAMPLES.items() if heading not in IN_FILES]
    for number, block in enumerate(others):
        named = re.match(r"# (\w+)\.py\n", block)
        name = named[1] if named else f"example_{number}"
        module = sys.modules[name] = types.ModuleType(name)
        exec(compile(block, name, "exec"), vars(module))
    # Those of the condition "colour" run in tests/pipelines/test_own_condition.py.
    for line in (line for line in NEEDS_EXAMPLES if "colour" not in str(line)):
        options_of(without_models(line.smalti))


@pytest.mark.slow
def test_the_commands_of_contributing_know_its_examples() -> None:
    """They name what its examples register before the commands are imported, as a user's file does:
    in a process of its own."""
    code = "import test_commands; test_commands.read_contributing()"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "tests", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_every_program_of_the_documentation_is_run_by_a_test() -> None:
    """Benchmarks, examples and tools: a test names the file, and imports it or runs it."""
    pages = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    named = {*re.findall(r"python\s+(?:benchmarks|examples|tools)/(\w+)\.py", pages)}
    named -= {"screenshots", "write_help"}  # drives a browser; test_cli.py compares what it writes
    tests = "".join(p.read_text() for p in (ROOT / "tests").rglob("*.py") if p != Path(__file__))
    assert len(named) > 20
    assert [n for n in sorted(named) if not re.search(rf'"{n}\.py"|import {n}\b', tests)] == []
