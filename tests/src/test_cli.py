"""The command line: configuration in layers, and errors in one line."""

import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import yaml
from torch._utils import ExceptionWrapper

import smalti
from smalti.cli import (
    COMMANDS,
    help_text,
    main,
    parse_config,
    recipe_text,
    run_command,
    saved_help,
)
from smalti.errors import SmaltiError


@dataclass(frozen=True)
class Model:
    width: int = 1
    depth: int = 1

    def __post_init__(self) -> None:
        if self.width < 0:
            raise SmaltiError(f"width is {self.width}; it must be positive")


@dataclass(frozen=True)
class Config:
    """A command."""

    PRESETS: ClassVar[dict[str, Any]] = {"model": {"big": Model(100, 100)}}

    steps: int = 10
    rate: float = 0.5
    output_dir: Path = Path("out")
    model: Model = field(default_factory=Model)

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise SmaltiError(f"steps is {self.steps}; it must be positive")


def parse(*argv: str) -> Config:
    return parse_config(Config, argv, prog="test")


def recipe(tmp_path: Path, text: str) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return str(path)


def test_defaults_then_recipe_then_flags(tmp_path: Path) -> None:
    file = recipe(tmp_path, "steps: 20\nmodel: {width: 5}\n")
    assert parse() == Config()
    assert parse("--config", file) == Config(20, model=Model(5, 1))
    assert parse("--config", file, "--model.width", "7").model == Model(7, 1)


def test_a_preset_is_what_the_other_values_start_from(tmp_path: Path) -> None:
    assert parse("--model.preset", "big").model == Model(100, 100)
    assert parse("--model.preset=big", "--model.depth", "2").model == Model(100, 2)
    file = recipe(tmp_path, "model: {preset: big, width: 3}\n")
    assert parse("--config", file).model == Model(3, 100)


def test_a_preset_never_has_half_an_effect(tmp_path: Path) -> None:
    spelt_out = recipe(tmp_path, recipe_text(Config()))
    message = "gives values of model, which would override --model.preset big"
    with pytest.raises(SmaltiError, match=message):
        parse("--config", spelt_out, "--model.preset", "big")
    with pytest.raises(SmaltiError, match=message):
        file = recipe(tmp_path, "model: {preset: big, width: 3}\n")
        parse("--config", file, "--model.preset", "big")
    file = recipe(tmp_path, "steps: 3\nmodel: {preset: bgi}\n")  # one name against the other
    assert parse("--config", file, "--model.preset", "big") == Config(3, model=Model(100, 100))


def test_a_kind_is_what_the_other_values_start_from() -> None:
    from smalti.scripts.train_tokenizer import TrainTokenizerConfig
    from smalti.tokenizer.discriminators.stylegan import StyleGANDiscriminatorConfig
    from smalti.tokenizer.quantizers.fsq import FSQConfig

    def train_config(*argv: str) -> TrainTokenizerConfig:
        return parse_config(TrainTokenizerConfig, argv, prog="test")

    flags = ("--objective.discriminator.kind", "stylegan", "--objective.discriminator.channels=16")
    discriminator = train_config(*flags).objective.discriminator
    assert discriminator == StyleGANDiscriminatorConfig(channels=16)
    both = train_config("--tokenizer.quantizer.kind=fsq", *flags)
    assert both.tokenizer.quantizer == FSQConfig() and both.objective.discriminator == discriminator
    with pytest.raises(SmaltiError, match=r'quantizer: kind is .fsk.; did you mean "fsq"'):
        train_config("--tokenizer.quantizer.kind", "fsk")


def test_an_output_that_is_not_utf_8_is_refused_before_any_work(capsys) -> None:
    flags = ["--output_dir", os.fsdecode(b"runs/\xff")]
    assert run_command(lambda argv: bool(parse_config(Config, argv, prog="x")), flags) == 2
    assert r"output_dir is 'runs/\udcff', which is not UTF-8" in capsys.readouterr().err
    assert parse_config(Config, ["--output_dir", "r\u00e9"], prog="x").output_dir == Path("r\u00e9")


def test_print_config_is_a_recipe(tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        parse("--steps", "3", "--output_dir", "a/b", "--print-config")
    assert stop.value.code == 0
    file = recipe(tmp_path, capsys.readouterr().out)
    assert parse("--config", file) == Config(3, output_dir=Path("a/b"))
    assert yaml.safe_load(recipe_text(Config()))["model"] == {"width": 1, "depth": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stpes: 3\n", 'unknown key "stpes"; did you mean "steps"'),
        ("steps: many\n", "expected int"),
        ("model: {preset: bgi}\n", 'no preset is called "bgi"; did you mean "big"'),
        ("steps: 1\nsteps: 2\n", 'line 2: the key "steps" is repeated'),
        ("model:\n  width: 1\n  width: 2\n", 'line 3: the key "width" is repeated'),
        ("", "not a recipe"),
        ("[1, 2]\n", "not a recipe"),
        ("a: [\n", "not valid YAML"),
        ("steps: 2020-13-45\n", "steps is '2020-13-45'; expected int"),
        ("steps: 1:30\n", "steps is 1:30; expected int"),
        ("steps: yes\n", "steps is yes; expected int"),
        ("[steps]: 1\n", "a key is a word, not a list"),
        ("steps: !!python/name:os.system\n", "not valid YAML"),
        ('steps: !!int "x"\n', "not valid YAML: invalid literal"),
        ("steps: !!bool x\n", "not valid YAML"),
        ("steps: !!timestamp x\n", "not valid YAML"),
        ("&a {steps: *a}\n", "not valid YAML"),
        ("model: " + "[" * 3000, "line 1: more than 32 levels"),
        ("model: {preset: [a]}\n", "no preset is called \"['a']\"; known are big"),
    ],
)
def test_errors_in_a_recipe_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(SmaltiError) as error:
        parse("--config", recipe(tmp_path, text))
    assert message in str(error.value)


@dataclass(frozen=True)
class Words:
    """Settings of every type."""

    labels: tuple[str, ...] = ()
    pair: tuple[float, float] = (0.0, 1.0)
    precision: Literal["auto", "no"] = "auto"
    number: int | None = 1
    name: str | None = "x"
    switch: bool = True
    path: Path = Path("x")
    any: dict[str, Any] = field(default_factory=dict)


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        ("labels: [yes, no]", ("--labels", "yes", "no")),
        ("labels: [2, 10, 010, 1e3, 2020-01-01, null]", "--labels 2 10 010 1e3 2020-01-01 null"),
        ("labels: [on, Off, ~x, 1:30, '2']", "--labels on Off ~x 1:30 2"),
        ("labels: yes", "--labels yes"),
        ("pair: [2, 10]", "--pair 2 10"),
        ("pair: [1e-4, .5]", "--pair 1e-4 .5"),
        ("precision: no", "--precision no"),
        ("number: 010", "--number 010"),
        ("number: 1_000", "--number 1_000"),
        ("number: None", "--number None"),
        ("number: null", "--number None"),
        ("number:", "--number None"),
        ("name: 5", "--name 5"),
        ("name: no", "--name no"),
        ("name: ~", "--name None"),
        ("switch: no", "--no-switch"),
        ("switch: False", "--no-switch"),
        ("path: 2024", "--path 2024"),
    ],
)
def test_a_recipe_takes_the_words_of_the_command_line(tmp_path: Path, text: str, flags) -> None:
    flags = flags.split() if isinstance(flags, str) else flags
    expected = parse_config(Words, flags, prog="test")
    found = parse_config(Words, ["--config", recipe(tmp_path, text)], prog="test")
    assert found == expected
    assert all(type(label) is str for label in found.labels)
    again = parse_config(Words, ["--config", recipe(tmp_path, recipe_text(found))], prog="test")
    assert again == expected


def test_values_without_a_type_are_those_of_yaml(tmp_path: Path) -> None:
    text = "any: {a: yes, b: [1, 2.5, x], c: null, d: 2020-01-01, e: &e [1], f: *e}"
    found = parse_config(Words, ["--config", recipe(tmp_path, text)], prog="test").any
    expected = {"a": True, "b": [1, 2.5, "x"], "c": None, "d": "2020-01-01", "e": [1], "f": [1]}
    assert found == expected
    text = "any: {a: &a {x: 1, y: 2}, b: &b {<<: *a, x: 3}, c: *b}"
    found = parse_config(Words, ["--config", recipe(tmp_path, text)], prog="test").any
    assert found["b"] == found["c"] == {"x": 3, "y": 2}


def nested_aliases(levels: int, width: int) -> str:
    """A recipe of a few bytes with width^levels values."""
    lines = ["a0: &a0 [x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * width)}]" for i in range(1, levels + 1)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (nested_aliases(9, 9), "with its aliases written out"),
        (nested_aliases(400, 1), "with its aliases written out"),
        ("x: " + "{a: " * 500 + "1" + "}" * 500, "more than 32 levels"),
        ("- " * 5000 + "x", "more than 32 levels"),
        ("steps: " + "1" * 2**18, "has 262,151 bytes"),
        ("b: &b {<<: *b}", "contains itself"),
        ("steps: [" + "x, " * 30_000 + "]", "more than 20,000 values"),
    ],
    ids=["aliases", "chain", "braces", "dashes", "bytes", "cycle", "list"],
)
def test_a_recipe_that_would_exhaust_memory_is_refused_in_one_line(
    tmp_path: Path, text: str, message: str
) -> None:
    started = time.monotonic()
    with pytest.raises(SmaltiError, match=message) as error:
        parse("--config", recipe(tmp_path, text))
    assert len(str(error.value)) < 400
    assert time.monotonic() - started < 30


def test_a_flag_that_no_recipe_could_hold_is_refused() -> None:
    with pytest.raises(SmaltiError, match="command line: rate is nan"):
        parse("--rate", "nan")


def test_a_missing_recipe_is_named() -> None:
    with pytest.raises(SmaltiError, match=r"nowhere\.yaml does not exist"):
        parse("--config", "nowhere.yaml")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--stpes", "3"), r"Unrecognized options: --stpes, 3 .*--steps"),
        (("--steps", "three"), r"--steps: invalid literal for int\(\) with base 10: 'three'"),
        (("--steps",), "--steps"),
        (("--model.width", "-1"), r"^width is -1"),
        (("--steps", "-1"), r"^steps is -1"),
    ],
)
def test_an_error_in_a_flag_is_one_line(flags: tuple[str, ...], message: str, capsys) -> None:
    with pytest.raises(SmaltiError, match=message) as error:
        parse(*flags)
    assert "\n" not in str(error.value) and "─" not in str(error.value)
    assert capsys.readouterr().err == ""


def test_unknown_command(capsys) -> None:
    assert main(["train-tokeniser"]) == 2
    assert 'did you mean "train-tokenizer"?' in capsys.readouterr().err


def test_version_and_help(capsys) -> None:
    assert main(["--version"]) == 0
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in COMMANDS)
    for name in ("version", "help"):
        assert main([name]) == main([f"--{name}"]) == 0
        out = capsys.readouterr().out
        assert out == 2 * out[: len(out) // 2] and out


def test_an_error_is_one_line_and_status_2(capsys) -> None:
    def command(argv):
        raise SmaltiError("the thing is\nwrong")

    assert run_command(command) == 2
    assert capsys.readouterr().err == "error: the thing is wrong\n"


def test_an_error_found_by_a_loader_worker_is_one_line(capsys) -> None:
    def command(argv):
        try:  # what a worker does, and then the process that reads from it
            raise SmaltiError("cat/3.png: is cut short")
        except SmaltiError:
            wrapper = ExceptionWrapper(where="in DataLoader worker process 0")
        wrapper.reraise()

    assert run_command(command) == 2
    assert capsys.readouterr().err == "error: cat/3.png: is cut short\n"


def test_only_the_first_process_of_a_job_speaks(capsys, monkeypatch) -> None:
    def command(argv):
        raise SmaltiError("wrong")

    monkeypatch.setenv("RANK", "1")
    assert run_command(command) == 2
    assert capsys.readouterr().err == ""


def test_an_interrupt_is_one_line_and_status_130(capsys) -> None:
    def command(argv):
        raise KeyboardInterrupt

    assert run_command(command) == 130
    assert capsys.readouterr().err == "error: interrupted\n"


def test_a_full_disk_is_one_line_and_status_1(capsys) -> None:
    def command(argv):
        raise OSError(28, "No space left on device", "file")

    assert run_command(command) == 1
    told = "error: No space left on device: file: free some space, or choose another disk\n"
    assert capsys.readouterr().err == told


@pytest.mark.parametrize("below", [".", "folder"])
def test_a_file_in_the_way_is_one_line_with_a_remedy(tmp_path: Path, capsys, below: str) -> None:
    (tmp_path / "file").touch()

    def command(argv):
        (tmp_path / "file" / below).mkdir(exist_ok=True)

    assert run_command(command) == 1
    told = capsys.readouterr().err
    assert "a file exists where a folder is expected: choose another path" in told
    assert len(told.splitlines()) == 1 and str(tmp_path / "file") in told


def test_other_failures_keep_their_traceback() -> None:
    def command(argv):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_command(command)


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_command_explains_itself(name: str, capsys) -> None:
    """The saved text, which is printed without importing torch, is that of the command's options;
    `python tools/write_help.py` writes it."""
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    assert "--config FILE" in capsys.readouterr().out
    assert help_text(name) == saved_help(name).read_text(encoding="utf-8")


STARTING = """
import sys
import smalti
from smalti.cli import COMMANDS, main

dir(smalti)
asked = [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS), ["generate", "-h"]]
asked += [["help"], ["help", "generate"]]
assert all(main(arguments) == 0 for arguments in asked)
imported = {name.partition(".")[0] for name in sys.modules}
print("imported:", *imported & {*sys.argv[1:]})
"""
SLOW_TO_IMPORT = "accelerate gradio huggingface_hub numpy PIL torch torchvision transformers tyro"


def test_help_and_the_import_of_smalti_import_no_library_that_takes_seconds() -> None:
    command = [sys.executable, "-c", STARTING, *SLOW_TO_IMPORT.split()]
    end = subprocess.run(command, capture_output=True, text=True)
    assert end.returncode == 0, end.stderr
    assert "--max_train_steps" in end.stdout and "smalti COMMAND [options]" in end.stdout
    assert end.stdout.endswith("imported:\n")


def test_public_names_are_found_when_they_are_used() -> None:
    assert dir(smalti) == sorted(smalti.__all__)
    for name in smalti.__all__:
        assert getattr(smalti, name) is not None
    assert smalti.__version__ == version("smalti")
    with pytest.raises(AttributeError, match="module 'smalti' has no attribute 'Pipelin'"):
        smalti.Pipelin  # noqa: B018


RECIPES = sorted((Path(__file__).parents[2] / "scripts" / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_valid(path: Path) -> None:
    from smalti.scripts.train_prior import TrainPriorConfig
    from smalti.scripts.train_tokenizer import TrainTokenizerConfig

    config_class = TrainPriorConfig if path.stem.endswith("prior") else TrainTokenizerConfig
    config = parse_config(config_class, ["--config", str(path)], prog="test")
    assert config.output_dir != config_class().output_dir


@pytest.mark.parametrize("rank", ["0", "1"])  # a machine's fault is said where it happens
def test_a_dead_loader_worker_is_one_line(capsys, monkeypatch, rank: str) -> None:
    monkeypatch.setenv("RANK", rank)

    def command(argv) -> int:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    assert run_command(command, []) == 1
    assert "lower --dataloader_num_workers" in capsys.readouterr().err


def test_a_job_of_many_processes_tells_its_news_once_and_its_warnings_always() -> None:
    code = (
        "import logging\n"
        "from smalti.cli import run_command\n"
        "run_command(lambda _: logging.info('news') or logging.warning('beware') or 0, [])"
    )
    for rank, expected in (("0", ["news", "beware"]), ("3", ["beware"])):
        environment = {**os.environ, "RANK": rank}
        told = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=environment
        )
        assert told.stderr.splitlines() == expected


def test_what_is_printed_to_nobody_ends_quietly() -> None:
    code = (
        "from smalti.cli import run_command\n"
        "raise SystemExit(run_command(lambda _: [print('x' * 99) for _ in range(9999)] and 0, []))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout and process.stderr
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(60) == 1
