"""Trains every tokenizer with one recipe and compares them: the table of docs/tokenizers.md.

    python benchmarks/compare_tokenizers.py --output_dir runs/tokenizers

Steps, batch size and losses are those of `smalti demo` on a CPU. `smalti compare` then measures the
tokenizers. Finished tokenizers are not trained again.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from smalti.cli import parse_config, run_command
from smalti.config import nearest
from smalti.errors import ConfigurationError
from smalti.files import read_json, write_json
from smalti.scripts.compare import CompareConfig, compare
from smalti.scripts.demo import SCALES
from smalti.scripts.pages import markdown
from smalti.scripts.train_tokenizer import train
from smalti.tokenizer.presets import PRESETS

DEFAULT = (
    "vq-1024-tiny",
    "ema-32-tiny",
    "vqvae-32-tiny",
    "simvq-32-tiny",
    "rotation-32-tiny",
    "fsq-32-tiny",
    "lfq-32-tiny",
    "bsq-32-tiny",
    "var-32-tiny",
    "kl-32-tiny",
)


@dataclass(frozen=True)
class TokenizersConfig:
    """Train several tokenizers with the same recipe and compare them."""

    output_dir: Path = Path("runs/tokenizers")  # a folder for each preset, one of the comparison
    presets: tuple[str, ...] = DEFAULT  # presets of tokenizers
    data: str = "emoji"  # as in `smalti train-tokenizer`
    max_train_steps: int = SCALES["cpu"].tokenizer.max_train_steps  # of each tokenizer

    def __post_init__(self) -> None:
        for name in self.presets:
            if name not in PRESETS:
                raise ConfigurationError(f'no preset is called "{name}"; {nearest(name, PRESETS)}')


def trained(config: TokenizersConfig, name: str) -> tuple[Path, int]:
    """Train one tokenizer unless it is finished; return its folder and the seconds it took."""
    folder = config.output_dir / name
    timing = folder / "seconds.json"
    recipe = replace(
        SCALES["cpu"].tokenizer,
        tokenizer=PRESETS[name],
        data=config.data,
        max_train_steps=config.max_train_steps,
        output_dir=folder,
        resume_from_checkpoint="latest",
    )
    started = time.monotonic()
    tokenizer = train(recipe)
    if not timing.is_file():
        write_json(timing, round(time.monotonic() - started))
    return tokenizer, read_json(timing)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: train, compare, print a Markdown table."""
    config = parse_config(TokenizersConfig, argv, prog="compare_tokenizers")
    folders, seconds = zip(*(trained(config, name) for name in config.presets), strict=True)
    comparison = CompareConfig(
        models=tuple(map(str, folders)),
        names=config.presets,
        data=config.data,
        output_dir=config.output_dir / "comparison",
    )
    rows = [
        {**row, "seconds of training": str(took)}
        for row, took in zip(compare(comparison), seconds, strict=True)
    ]
    print(f"\n{markdown(rows)}\n\n{comparison.output_dir / 'reconstructions.png'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
