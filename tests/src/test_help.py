"""Every option of every command has a description of its own, and no help text offers what is
refused."""

import dataclasses
import typing
from typing import Any

import pytest
from test_remedies import config_of
from tyro._docstrings import get_field_docstring

from smalti.cli import COMMANDS, main, parse_config, saved_help
from smalti.config import registry_of
from smalti.errors import SmaltiError
from smalti.prior.presets import PRESETS as PRIORS
from smalti.scripts.train_prior import TrainPriorConfig
from smalti.tokenizer.presets import PRESETS as TOKENIZERS


def described(config_class: Any, prefix: str = "") -> dict[str, tuple[type, str]]:
    """Each option of a configuration -> the class that has it, and its description."""
    found: dict[str, tuple[type, str]] = {}
    hints = typing.get_type_hints(config_class, include_extras=True)
    for part in dataclasses.fields(config_class):
        hint, name = hints[part.name], f"{prefix}{part.name}"
        texts = [getattr(extra, "help", None) for extra in getattr(hint, "__metadata__", ())]
        plain = hint.__origin__ if texts else hint
        inner = [plain, *typing.get_args(plain)]
        registry = registry_of(plain)
        if registry is not None:
            inner = [registry.config_class(kind) for kind in registry]
        parts = [cls for cls in inner if dataclasses.is_dataclass(cls)]
        for cls in parts:
            found |= {
                f"{key} ({cls.__name__})": value
                for key, value in described(cls, f"{name}.").items()
            }
        if not parts:  # a group of options is described by its class
            own = get_field_docstring(config_class, part.name, ())
            text = next((text for text in texts if text), own)
            found[name] = (config_class, " ".join((text or "").split()))
    return found


@pytest.mark.parametrize("command", list(COMMANDS))
def test_every_option_has_its_own_description(command: str) -> None:
    options = described(config_of(command))
    assert [name for name, (_, text) in options.items() if len(text) < 4] == []
    for name, (cls, text) in options.items():
        same = {other.partition(" ")[0] for other, value in options.items() if value == (cls, text)}
        last = {other.rpartition(".")[2] for other in same}
        assert len(last) == 1, f"{name}: {sorted(same)} are all described by: {text}"


@pytest.mark.parametrize("command", list(COMMANDS))
def test_a_flag_of_a_model_says_that_names_of_shipped_ones_work(command: str) -> None:
    options = described(config_of(command))
    flags = {"model", "models", "initial"} & options.keys()
    if command in ("encode", "import-latents", "train-prior"):
        flags.add("tokenizer")
    assert all("ships with smalti by its name (smalti/" in options[flag][1] for flag in flags)
    words = (word for line in saved_help(command).read_text().splitlines() for word in line.split())
    assert "--model" not in words or "model" in flags


def test_a_description_is_true_beside_every_preset() -> None:
    """A class is described beside the values of a preset, so it must not speak of its defaults."""
    for presets in (TOKENIZERS, PRIORS):
        for config in presets.values():
            assert "default" not in (type(config).__doc__ or "").lower()
            for part in dataclasses.fields(config):
                value = getattr(config, part.name)
                if dataclasses.is_dataclass(value):
                    assert "default" not in (type(value).__doc__ or "").lower(), type(value)


@pytest.mark.parametrize(
    ("command", "shown", "hidden"),
    [
        ("train-tokenizer", ["vq-f16", "256 px <-> 256 codes of 16,384 (16 x 16), 71.9 M"], []),
        (
            "train-prior",
            ["gpt-nano", "--prior.depth INT", "flow: euler, midpoint, heun, rk4", "name:option="],
            [
                "SOLVERS",
                "--prior.condition",
                "text_length",
                "--prior.spec",
                "--prior.num_classes",
                "fingerprint",
            ],
        ),
    ],
)
def test_help_offers_what_can_be_used(command: str, shown, hidden, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = capsys.readouterr().out
    for part in shown:
        assert part in text
    for part in hidden:
        assert part not in text


def test_presets_state_size_resolution_and_memory() -> None:
    line = TOKENIZERS.about(TOKENIZERS["vq-f16"])
    assert line == "256 px <-> 256 codes of 16,384 (16 x 16), 71.9 M parameters, 1.4 GB"
    assert TOKENIZERS.about(TOKENIZERS["kl-f8"]).startswith(
        "256 px <-> 4 x 32 x 32 numbers, 83.7 M"
    )
    line = PRIORS.about(PRIORS["gpt-b"])
    assert line.startswith("with 256 codes of 16,384 (16 x 16), ") and line.endswith(" GB")


def test_a_field_that_another_flag_sets_is_refused_on_the_command_line(tmp_path) -> None:
    for field, value, flag in (
        ("condition", "text", "--condition"),
        ("text_length", "32", "--text.length"),
        ("text_encoder", "bytes", "--text.encoder"),
    ):
        message = f"command line: prior.{field} is {value}, but {flag} sets it: give that instead"
        with pytest.raises(SmaltiError, match=message):
            parse_config(TrainPriorConfig, [f"--prior.{field}", value], prog="test")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("prior: {condition: class, text_length: 120, kind: next-token}\n")
    found = parse_config(TrainPriorConfig, ["--config", str(recipe)], prog="test")
    assert found == TrainPriorConfig()
