"""From one picture to another through latent space, on a straight line and on an arc.

smalti interpolate --model runs/demo/pipeline --indices 40 1200 --output interpolation.png
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from smalti.cli import parse_config, run_command
from smalti.data.latents import CodeSpec
from smalti.errors import SmaltiError
from smalti.pipelines.latent_editor import LatentEditor, StripOptions
from smalti.tokenizer import manipulation


@dataclass(frozen=True)
class InterpolateConfig(StripOptions):
    """Blend two pictures in latent space: a linear row and a spherical one."""

    output: Path = Path("interpolation.png")
    steps: int = 9  # blends in a row, both ends included

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 2:
            raise SmaltiError(f"steps is {self.steps}; use at least 2, the two ends")


def interpolate(config: InterpolateConfig) -> Path:
    """Write the strip, and return its path."""
    bench = LatentEditor(config)
    pictures = bench.pictures(count=2)
    start, end = bench.vectors(pictures).split(1)
    discrete = isinstance(bench.tokenizer.spec, CodeSpec)
    blends = {
        "linear": manipulation.linear,
        "spherical": manipulation.spherical if discrete else manipulation.spherical_as_one,
    }
    rows = []
    for blend in blends.values():
        path = manipulation.interpolate(start, end, config.steps, blend)[0]  # (steps, d, h, w)
        rows.append(torch.cat([pictures[:1], bench.decode(path), pictures[1:]]))
    places = [f"{i / (config.steps - 1):.3g}" for i in range(config.steps)]
    return bench.save(torch.stack(rows), list(blends), ["original", *places, "original"])


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of `smalti interpolate`."""
    print(f"strip: {interpolate(parse_config(InterpolateConfig, argv, prog='smalti interpolate'))}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
