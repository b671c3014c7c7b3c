"""The commands called from Python: with their configurations, or with some of their settings."""

from dataclasses import replace
from pathlib import Path

import pytest
from conftest import TINY_VQ

import smalti
from smalti.cli import in_python
from smalti.cli import main as smalti_main
from smalti.errors import EXIT_INTERRUPTED, ConfigurationError
from smalti.prior.next_token.config import NextTokenConfig
from smalti.scripts.train_prior import TrainPriorConfig
from smalti.scripts.train_tokenizer import TrainTokenizerConfig
from smalti.tokenizer.losses.objective import ObjectiveConfig
from smalti.tokenizer.presets import PRESETS

STEPS = {"max_train_steps": 1, "train_batch_size": 4}


def test_both_stages_return_what_was_trained(tmp_path: Path, pictures_once: Path) -> None:
    tokenizer = smalti.train_tokenizer(
        data=str(pictures_once),
        output_dir=tmp_path / "tokenizer",
        tokenizer=TINY_VQ,
        objective={"perceptual_weight": 0, "adversarial_weight": 0},
        **STEPS,
    )
    assert isinstance(tokenizer, smalti.Tokenizer) and tokenizer.config == TINY_VQ
    saved = tmp_path / "tokenizer" / "tokenizer"
    latents = smalti.encode_pictures(
        data=str(pictures_once), tokenizer=saved, output_dir=tmp_path / "latents"
    )
    prior = NextTokenConfig(depth=1, width=16, num_heads=2, hidden=32)
    config = TrainPriorConfig(
        latents=latents, tokenizer=saved, output_dir=tmp_path / "prior", prior=prior, **STEPS
    )
    pipe = smalti.train_prior(config)
    assert isinstance(pipe, smalti.Pipeline) and pipe.classes == ("blue", "green", "red")
    assert pipe.guidance_scale == 2.0
    assert len(pipe("red").images) == 1
    with pytest.raises(ConfigurationError, match="put all settings into one of them"):
        smalti.train_prior(config, max_train_steps=2)


def test_settings_are_those_of_the_command() -> None:
    def read(**settings: object) -> TrainTokenizerConfig:
        return in_python(lambda config: config, TrainTokenizerConfig, None, settings)

    objective = ObjectiveConfig(perceptual_weight=0.0)
    config = read(tokenizer="kl-32-tiny", objective=objective, learning_rate=1e-3, data=Path("x"))
    assert config == TrainTokenizerConfig(
        tokenizer=PRESETS["kl-32-tiny"], objective=objective, learning_rate=1e-3, data="x"
    )
    changed = read(tokenizer={"kind": "vq", "image_size": 64})
    assert changed.tokenizer == replace(PRESETS["vq-32-tiny"], image_size=64)
    for settings, message in (
        ({"tokenizer": "vq-32-tyni"}, 'did you mean "vq-32-tiny"'),
        ({"max_trian_steps": 3}, 'did you mean "max_train_steps"'),
        ({"max_train_steps": "many"}, "expected int"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            read(**settings)


def test_an_interruption_is_a_keyboard_interrupt() -> None:
    def stop(config: TrainTokenizerConfig) -> None:
        raise SystemExit(EXIT_INTERRUPTED)

    with pytest.raises(KeyboardInterrupt, match="what was reached is saved"):
        in_python(stop, TrainTokenizerConfig, None, {})


@pytest.mark.parametrize("command", ["generate", "evaluate", "reflow", "traverse"])
def test_without_a_model_a_command_says_how_to_get_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, command: str
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["--indices", "0"] if command == "traverse" else []
    assert smalti_main([command, *flags]) == 2
    message = capsys.readouterr().err
    assert "train one with smalti demo, or give --model" in message
