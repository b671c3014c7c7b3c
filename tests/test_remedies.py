"""Every remedy that a message names can be followed: the flags and commands in it exist."""

import ast
import dataclasses
import importlib
import re
import tomllib
import typing
from pathlib import Path
from typing import Any

import pytest

from smalti.cli import COMMANDS
from smalti.config import registry_of

ROOT = Path(__file__).parents[1]
FOLDERS = ("src/smalti", "data", "tokenizer", "prior", "pipelines", "training", "evaluation")
EDITORS = {"interpolate", "attribute", "traverse", "invert"}
# Where a message is written -> the commands in which it appears. One that stands in no script names
# flags that every one of these commands has.
CONCERNED: dict[str, set[str]] = {
    "training": {"train-tokenizer", "train-prior"},
    "tokenizer": {"train-tokenizer"},
    "prior": {"train-prior"},
    "evaluation": {"evaluate"},
    "pipelines/convert": {"convert"},
    "data/latent_cache/imports.py": {"import-latents"},
}
FLAG = re.compile(r"(?<![\w-])--([a-z][a-z_.-]*[a-z])(?![\w{])")
ANY_FLAG = {"help", "version", "config", "print-config", "print_config"}


def config_of(command: str) -> type:
    """The configuration class of a command: what its `main` parses."""
    module = importlib.import_module(COMMANDS[command][0])
    tree = ast.parse(Path(str(module.__file__)).read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "parse_config":
            return getattr(module, node.args[0].id)  # type: ignore[attr-defined]
    raise AssertionError(f"{command} parses no configuration")


def flags_of(config_class: Any, prefix: str = "") -> set[str]:
    """The flags of a configuration, without dashes: fields, their fields, kinds and presets."""
    found = {f"{prefix}{name}.preset" for name in getattr(config_class, "PRESETS", {})}
    hints = typing.get_type_hints(config_class)
    for part in dataclasses.fields(config_class):
        name, hint = f"{prefix}{part.name}", hints[part.name]
        found.add(name)
        inner = [hint, *typing.get_args(hint)]
        registry = registry_of(hint)
        if registry is not None:
            inner = [registry.config_class(kind) for kind in registry]
        for cls in inner:
            if dataclasses.is_dataclass(cls):
                found |= flags_of(cls, f"{name}.")
    return found


FLAGS = {command: flags_of(config_of(command)) for command in COMMANDS}
WITH_DATA = {command for command, flags in FLAGS.items() if "data" in flags}


def texts(tree: ast.Module) -> list[tuple[int, str]]:
    """The strings of a file that are not docstrings, with their lines; `{}` stands for a value."""
    documentation = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    inside = {
        id(part)
        for node in ast.walk(tree)
        if isinstance(node, ast.JoinedStr)
        for part in ast.walk(node)
        if part is not node
    }
    found = []
    for node in ast.walk(tree):
        if id(node) in documentation or id(node) in inside:
            continue
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append((node.lineno, node.value))
        elif isinstance(node, ast.JoinedStr):
            pieces = [v.value if isinstance(v, ast.Constant) else "{}" for v in node.values]
            found.append((node.lineno, "".join(map(str, pieces))))
    return found


def commands_of(path: str, text: str) -> tuple[set[str], bool]:
    """The commands that a message speaks of, and whether each of them must have its flags."""
    named = set(re.findall(r"smalti ([a-z]+(?:-[a-z]+)*)(?= )", text)) & COMMANDS.keys()
    named |= {c for c in COMMANDS if re.search(rf"\b{c}(?: \S+)? --", text) and "-" in c}
    if named:
        return named, False
    if path.startswith("scripts/"):
        by_module = {module.rpartition(".")[2]: name for name, (module, _) in COMMANDS.items()}
        own = by_module.get(Path(path).stem)
        return ({own} if own else set(COMMANDS)), own is not None
    for place in sorted(CONCERNED, key=len, reverse=True):
        if path.startswith(place):
            return CONCERNED[place], place == "training"
    if path.startswith("data/"):
        return WITH_DATA, False
    return set(COMMANDS), False


def wrong_flags(path: str, text: str) -> list[str]:
    """The flags in a message that the commands concerned do not have."""
    commands, every = commands_of(path, text)
    if FLAG.fullmatch(text):  # a word of a command line that is put together elsewhere
        commands, every = set(COMMANDS), False
    wrong = []
    for flag in FLAG.findall(text):
        have = {c for c in commands if flag in FLAGS[c] or flag in ANY_FLAG}
        partial = any(f.startswith(f"{flag}.") for c in commands for f in FLAGS[c])
        if not (have == commands if every else have) and not partial:
            wrong.append(f"--{flag} ({', '.join(sorted(commands))})")
    return wrong


def sources() -> list[str]:
    paths = [p for folder in (*FOLDERS, "scripts") for p in (ROOT / folder).rglob("*.py")]
    return sorted(str(path.relative_to(ROOT)) for path in paths)


@pytest.mark.parametrize("folder", [*FOLDERS, "scripts"])
def test_flags_in_messages_exist(folder: str) -> None:
    wrong = {
        f"{path}:{line}": found
        for path in sources()
        if path.startswith(f"{folder}/")
        for line, text in texts(ast.parse((ROOT / path).read_text()))
        if (found := wrong_flags(path, text))
    }
    assert wrong == {}


def test_commands_in_messages_exist() -> None:
    """`smalti WORD --flag` and `smalti WORD` in backticks."""
    pattern = re.compile(r"(?:`|: )smalti ([a-z]+(?:-[a-z]+)*)[ `]")
    for path in sources():
        for line, text in texts(ast.parse((ROOT / path).read_text())):
            for name in pattern.findall(text):
                assert name in COMMANDS, f"{path}:{line}: smalti {name}"


def test_extras_in_messages_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for path in sources():
        for name in re.findall(r"smalti\[(\w+)\]", (ROOT / path).read_text()):
            assert name in project["optional-dependencies"], f"{path}: smalti[{name}]"


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("training/optim.py", "lower --learning_rates"),
        ("training/run.py", "use --latents"),  # of one of the two commands only
        ("scripts/encode.py", "give --model"),
        ("data/sources/folder.py", "add --folder.max_pixel"),
        ("pipelines/info.py", "smalti generate --data X"),
    ],
)
def test_a_planted_flag_is_found(path: str, text: str) -> None:
    assert wrong_flags(path, text)
