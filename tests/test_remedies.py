"""Every remedy that a message names can be followed: the flags and commands in it exist."""

import ast
import contextlib
import dataclasses
import importlib
import logging
import math
import re
import shutil
import tomllib
import typing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import make_pictures
from PIL import Image
from toy_run import toy_config
from toy_run import train as train_toy

from smalti.cli import COMMANDS, main
from smalti.config import registry_of
from smalti.errors import SmaltiError

ROOT = Path(__file__).parents[1]
FOLDERS = ("src/smalti", "data", "tokenizer", "prior", "pipelines", "training", "evaluation")
EDITORS = {"interpolate", "attribute", "traverse", "invert"}
# Where a message is written -> the commands in which it appears. One that stands in no script names
# flags that every one of these commands has.
CONCERNED: dict[str, set[str]] = {
    "training": {"train-tokenizer", "train-prior", "train-classifier"},
    "tokenizer": {"train-tokenizer"},
    "prior": {"train-prior"},
    "prior/flow/classifier.py": {"train-classifier"},
    "evaluation": {"evaluate"},
    "pipelines/convert": {"convert"},
    "data/latent_cache/imports.py": {"import-latents"},
}
FLAG = re.compile(r"(?<![\w-])--([a-z][a-z_.-]*[a-z])(?![\w{])")
ANY_FLAG = {"help", "version", "config", "print-config", "print_config"}
# Of torchrun, accelerate, docker and hf.
ANY_FLAG |= {"nproc_per_node", "num_processes", "shm-size", "local-dir"}


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


# -- remedies that are applied --------------------------------------------------------------------

RECIPE = """
tokenizer: {kind: vq, image_size: 16, conv: {channels: 8, channel_mult: [1, 2], num_res_blocks: 1,
  attention_levels: [], z_channels: 2}, quantizer: {kind: nearest, codebook: {vocab_size: 16,
  code_dim: 4}}}
objective: {perceptual_weight: 0, adversarial_weight: 0}
max_train_steps: 2
train_batch_size: 4
checkpointing_steps: 1
mixed_precision: no
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with pictures, some of which are unusual, a finished run and latents."""
    root = tmp_path_factory.mktemp("remedies")
    make_pictures(root / "pictures")
    for name in ("moving", "broken"):
        make_pictures(root / name)
    (root / "broken" / "red" / "0.png").write_bytes(b"broken")
    frames = [Image.new("RGB", (40, 36), colour) for colour in ("red", "black")]
    frames[0].save(root / "moving" / "red" / "8.gif", save_all=True, append_images=frames[1:])
    one = root / "one" / "red"
    shutil.copytree(root / "pictures" / "red", one)
    (root / "recipe.yaml").write_text(RECIPE)
    with contextlib.chdir(root):
        assert main([*TRAIN, "--output_dir", "run"]) == 0
        assert main(["encode", "--data", "pictures", "--tokenizer", "run/tokenizer"]) == 0
    return root


TRAIN = ["train-tokenizer", "--config", "recipe.yaml", "--data", "pictures"]
PRIOR = ["train-prior", "--tokenizer", "run/tokenizer", "--max_train_steps", "1"]
PRIOR += ["--train_batch_size", "4", "--prior.depth", "1", "--prior.width", "16"]
PRIOR += ["--prior.num_heads", "2"]
LATEST = ["--resume_from_checkpoint", "latest"]

# (name of the test, what fails, what the message says, what it advises)
REMEDIES: list[tuple[str, list[str], str, list[str]]] = [
    (
        "resume",
        [*TRAIN, "--output_dir", "run"],
        "continue it with --resume_from_checkpoint latest",
        [*TRAIN, "--output_dir", "run", *LATEST],
    ),
    (
        "folder",
        [*TRAIN, "--output_dir", "run"],
        "or choose another --output_dir",
        [*TRAIN, "--output_dir", "run2"],
    ),
    (
        "steps",
        [*TRAIN, "--output_dir", "run", *LATEST, "--max_train_steps", "1"],
        "set it to 2 or more",
        [*TRAIN, "--output_dir", "run", *LATEST, "--max_train_steps", "2"],
    ),
    (
        "crop",
        [*TRAIN, "--random_crop.min_fraction", "0.5", "--output_dir", "run3"],
        "add --crop random",
        [*TRAIN, "--random_crop.min_fraction", "0.5", "--output_dir", "run3", "--crop", "random"],
    ),
    (
        "tracker",
        [*TRAIN, "--report_to", "trackio", "--output_dir", "run4"],
        "or use --report_to none",
        [*TRAIN, "--report_to", "none", "--output_dir", "run4"],
    ),
    (
        "preset",
        [*TRAIN, "--tokenizer.preset", "vq-32-tiny", "--output_dir", "run5"],
        "or leave the flag out",
        [*TRAIN, "--output_dir", "run5"],
    ),
    (
        "unusual",
        [*TRAIN, "--data", "moving", "--output_dir", "run8"],
        "pass --folder.unusual_images convert",
        [*TRAIN, "--data", "moving", "--output_dir", "run8", "--folder.unusual_images", "convert"],
    ),
    (
        "damaged",
        [*TRAIN, "--data", "broken", "--output_dir", "run6"],
        "--folder.bad_images replace (or skip)",
        [*TRAIN, "--data", "broken", "--output_dir", "run6", "--folder.bad_images", "skip"],
    ),
    (
        "target",
        [*PRIOR, "--output_dir", "prior", "--pipeline_dir", "run"],
        "choose another folder",
        [*PRIOR, "--output_dir", "prior", "--pipeline_dir", "pipeline"],
    ),
    (
        "retarget",
        [*PRIOR, "--output_dir", "prior", "--pipeline_dir", "run", *LATEST],
        "choose another folder",
        [*PRIOR, "--output_dir", "prior", "--pipeline_dir", "pipeline2", *LATEST],
    ),
    (
        "tokenizer",
        [*PRIOR, "--tokenizer", "run2/checkpoint-000001", "--output_dir", "prior2"],
        "give the one that made them",
        [*PRIOR, "--output_dir", "prior2"],
    ),
    (
        "latents",
        [*PRIOR, "--latents", "nowhere", "--output_dir", "prior3"],
        "does not exist",
        [*PRIOR, "--output_dir", "prior3"],
    ),
]


@pytest.mark.parametrize(
    ("fails", "says", "works"),
    [pytest.param(*row, id=name) for name, *row in REMEDIES],
)
def test_a_remedy_that_is_followed_works(
    place: Path, monkeypatch, capsys, fails: list[str], says: str, works: list[str]
) -> None:
    monkeypatch.chdir(place)
    assert main(fails) != 0
    told = capsys.readouterr()
    assert says in told.err + told.out
    assert main(works) == 0


@pytest.mark.parametrize(
    "remedy", [{"learning_rate": 1e-3}, {"mixed_precision": "no"}], ids=lambda r: next(iter(r))
)
def test_the_remedy_of_a_run_that_diverged_can_be_followed(
    tmp_path: Path, caplog, remedy: dict[str, Any]
) -> None:
    """A run whose loss is infinite at its learning rate and in bf16 goes on with either changed."""
    config = toy_config(tmp_path / "run", mixed_precision="bf16", max_skipped_steps=2)

    def diverging(run, model, step, loss):
        bad = step >= 3 and run.config.learning_rate == 1e-2 and run.precision == "bf16"
        return loss * math.inf if bad else loss

    with pytest.raises(SmaltiError) as stopped:
        train_toy(config, diverging)
    for word in ("--resume_from_checkpoint latest", "--learning_rate", "--mixed_precision no"):
        assert word in str(stopped.value)
    caplog.set_level(logging.INFO)
    train_toy(replace(config, resume_from_checkpoint="latest", **remedy), diverging)
    assert (tmp_path / "run" / "checkpoint-000006").is_dir()
    name = next(iter(remedy))
    before = getattr(config, name)
    assert f"{name} was {before}, now it is {remedy[name]}" in caplog.messages


def test_no_remedy_is_named_that_is_in_use(tmp_path: Path) -> None:
    config = toy_config(tmp_path / "run", max_skipped_steps=1)
    with pytest.raises(SmaltiError) as stopped:
        train_toy(config, lambda run, model, step, loss: loss * math.nan)
    assert "a lower --learning_rate; " in str(stopped.value)
