"""Inversion: optimise latents until the decoder turns them into given images.

smalti invert --model runs/demo/pipeline --images me.png --start mean --output inversion.png
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from smalti.cli import parse_config, run_command
from smalti.errors import ConfigurationError
from smalti.pipelines.latent_editor import LatentEditor, StatisticsOptions
from smalti.tokenizer.manipulation import Inversion


@dataclass(frozen=True)
class InvertConfig(StatisticsOptions):
    """Optimise the latents of images against the decoder; one column for each image."""

    output: Path = Path("inversion.png")  # PNG file of the latent grid
    start: Literal["encoder", "mean"] = "encoder"  # start at its output, or at the mean over --data
    steps: int = 200  # optimizer steps
    learning_rate: float = 0.05  # of Adam
    perceptual_weight: float = 1.0  # weight of LPIPS, added to the mean squared error; 0: none

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1 or self.learning_rate <= 0:
            raise ConfigurationError(
                f"steps is {self.steps}, learning_rate {self.learning_rate}; both must exceed 0"
            )
        if self.perceptual_weight < 0:
            raise ConfigurationError(
                f"perceptual_weight is {self.perceptual_weight}; use 0 or more"
            )
        if self.start == "encoder" and self.max_pictures != StatisticsOptions.max_pictures:
            raise ConfigurationError(
                "max_pictures is the number of images for the mean: add --start mean"
            )


def invert(config: InvertConfig) -> Inversion:
    """Write the latent grid, and return the result of the optimisation."""
    editor = LatentEditor(config)
    perceptual = editor.load_lpips() if config.perceptual_weight else None
    images = editor.images()
    found, rows = editor.invert(
        images,
        start_at_mean=config.start == "mean",
        steps=config.steps,
        learning_rate=config.learning_rate,
        perceptual=perceptual,
        perceptual_weight=config.perceptual_weight,
        max_images=config.max_pictures,
    )
    grid = torch.stack([images, *rows.values()])
    editor.save(grid, ["original", *rows], editor.image_names)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of `smalti invert`."""
    config = parse_config(InvertConfig, argv, prog="smalti invert")
    losses = invert(config).losses
    best = losses.min(0).values.mean()
    print(f"distance {losses[0].mean():.4f} from the {config.start}, {best:.4f} at best")
    print(f"latent grid: {config.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
