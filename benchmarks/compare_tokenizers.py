"""Trains every tokenizer with one recipe and measures it on held-out images: the README's table.

    python benchmarks/compare_tokenizers.py --output_dir runs/tokenizers

Steps, batch size and losses are those of `smalti demo` on a CPU. Finished tokenizers are not
trained again.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from smalti.cli import parse_config, run_command
from smalti.config import nearest
from smalti.data.latents import CodeSpec
from smalti.errors import ConfigurationError
from smalti.files import write_json
from smalti.scripts.demo import SCALES
from smalti.scripts.evaluate import EvaluateConfig, evaluate
from smalti.scripts.train_tokenizer import train
from smalti.tokenizer.base import Tokenizer
from smalti.tokenizer.presets import PRESETS

COLUMNS = ("preset", "latents", "bits/pixel", "PSNR", "SSIM", "LPIPS", "usage", "seconds")
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
class CompareConfig:
    """Train several tokenizers with the same recipe and compare them."""

    output_dir: Path = Path("runs/tokenizers")  # a folder for each preset
    presets: tuple[str, ...] = DEFAULT  # presets of tokenizers
    data: str = "emoji"  # as in `smalti train-tokenizer`
    max_train_steps: int = SCALES["cpu"].tokenizer.max_train_steps  # of each tokenizer

    def __post_init__(self) -> None:
        for name in self.presets:
            if name not in PRESETS:
                raise ConfigurationError(f'no preset is called "{name}"; {nearest(name, PRESETS)}')


def measure(config: CompareConfig, name: str) -> dict[str, str]:
    """Train one tokenizer unless it is finished; return its row of the table."""
    folder = config.output_dir / name
    timing = folder / "seconds.json"
    base = SCALES["cpu"].tokenizer
    recipe = replace(
        base,
        tokenizer=PRESETS[name],
        data=config.data,
        max_train_steps=config.max_train_steps,
        output_dir=folder,
        resume_from_checkpoint="latest",
    )
    started = time.monotonic()
    tokenizer_folder = train(recipe)
    if not timing.is_file():
        write_json(timing, round(time.monotonic() - started))
    metrics = evaluate(
        EvaluateConfig(model=str(tokenizer_folder), output_dir=folder, data=config.data)
    )
    values = {key: metric.value for key, metric in metrics.items()}
    spec = Tokenizer.from_pretrained(tokenizer_folder).spec
    if isinstance(spec, CodeSpec):
        latents = f"{spec.length} codes of {spec.vocab_size}"
        bits, usage = f"{values['bits_per_pixel']:.2f}", f"{values['codebook_usage']:.1%}"
    else:
        latents = f"{spec.channels} x {spec.height} x {spec.width} numbers"
        bits, usage = "-", "-"
    quality = [f"{values['psnr']:.2f}", f"{values['ssim']:.3f}", f"{values['lpips']:.4f}"]
    seconds = str(json.loads(timing.read_text()))
    row = [f"`{name}`", latents, bits, *quality, usage, seconds]
    return dict(zip(COLUMNS, row, strict=True))


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: train, measure, print a Markdown table."""
    config = parse_config(CompareConfig, argv, prog="compare_tokenizers")
    rows = [measure(config, name) for name in config.presets]
    print(f"\n| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}")
    for row in rows:
        print(f"| {' | '.join(row.values())} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
