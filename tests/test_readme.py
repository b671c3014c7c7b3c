"""What the README names is there."""

import re
from pathlib import Path

from smalti.cli import COMMANDS
from smalti.prior.presets import PRESETS as PRIORS
from smalti.tokenizer.presets import PRESETS as TOKENIZERS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_test_that_holds_a_promise_exists() -> None:
    source = "".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
    named = set(re.findall(r"`(test_\w+)`", README))
    assert len(named) > 10
    assert [name for name in named if f"def {name}(" not in source] == []


def test_every_command_and_file_exists() -> None:
    commands = set(re.findall(r"^\s*smalti ([a-z-]+)", README, re.MULTILINE))
    assert commands >= {"demo", "train-tokenizer", "encode", "train-prior", "evaluate", "generate"}
    assert commands <= set(COMMANDS)
    paths = re.findall(r"(?:scripts|benchmarks|docs|data|tokenizer|prior)/[\w./-]*\w\.\w+", README)
    assert [path for path in paths if not (ROOT / path).is_file()] == []


def test_every_preset_exists() -> None:
    named = set(re.findall(r"`([a-z]+-[a-z0-9/-]+)`", README))
    known = set(TOKENIZERS) | set(PRIORS)
    ours = r"(vq|vqgan|vqvae|var|kl|fsq|lfq|bsq|ema|gpt|sit|dit|flow)-"
    like = {name for name in named if re.match(ours, name)}
    assert len(like) > 5 and like <= known


def test_nothing_is_left_to_fill_in() -> None:
    assert "@@" not in README
    assert len(re.findall(r"!\[[^\]]+\]\(docs/\w+\.png\)", README)) >= 3
