"""Traversal of latent dimensions: one channel at a time, by multiples of its standard deviation.

smalti traverse --model runs/demo/pipeline --indices 40 --channels 0 1 2 --output traversal.png
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from smalti.cli import parse_config, run_command
from smalti.errors import ConfigurationError
from smalti.pipelines.latent_editor import LatentEditor, StatisticsOptions, signed


@dataclass(frozen=True)
class TraverseConfig(StatisticsOptions):
    """Change one latent channel of an image, equally at all positions; one row for each channel."""

    output: Path = Path("traversal.png")  # PNG file of the latent grid
    channels: tuple[int, ...] = ()  # indices of channels; empty = the first 8
    # Changes, in standard deviations of the channel over the data set.
    strengths: tuple[float, ...] = (-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.strengths:
            raise ConfigurationError("strengths is empty: give at least one number")


def traverse(config: TraverseConfig) -> Path:
    """Write the latent grid, and return its path."""
    editor = LatentEditor(config)
    rows = editor.traverse(
        editor.images(count=1), config.channels, config.strengths, config.max_pictures
    )
    columns = ["original", *(f"{signed(s)} sd" for s in config.strengths)]
    grid = torch.stack([row for _, row in rows])
    return editor.save(grid, [f"channel {channel}" for channel, _ in rows], columns)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of `smalti traverse`."""
    config = parse_config(TraverseConfig, argv, prog="smalti traverse")
    print(f"latent grid: {traverse(config)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
