"""Interpolation: from one image to another through latent space, on a line and on an arc.

smalti interpolate --model runs/demo/pipeline --indices 40 1200 --output interpolation.png
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from smalti.cli import parse_config, run_command
from smalti.errors import ConfigurationError
from smalti.pipelines.latent_editor import LatentEditor, LatentGridOptions


@dataclass(frozen=True)
class InterpolateConfig(LatentGridOptions):
    """Blend two images in latent space; a row for linear and one for spherical interpolation."""

    output: Path = Path("interpolation.png")  # PNG file of the latent grid
    steps: int = 9  # blends in a row, both ends included

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 2:
            raise ConfigurationError(f"steps is {self.steps}; use at least 2, the two ends")


def interpolate(config: InterpolateConfig) -> Path:
    """Write the latent grid, and return its path."""
    editor = LatentEditor(config)
    rows = editor.interpolate(editor.images(count=2), config.steps)
    positions = [f"{i / (config.steps - 1):.3g}" for i in range(config.steps)]
    columns = ["original", *positions, "original"]
    return editor.save(torch.stack([*rows.values()]), [*rows], columns)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of `smalti interpolate`."""
    config = parse_config(InterpolateConfig, argv, prog="smalti interpolate")
    print(f"latent grid: {interpolate(config)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
