"""Traversal of latent dimensions: one channel at a time, by multiples of its standard deviation.

smalti traverse --model runs/demo/pipeline --indices 40 --channels 0 1 2 --output traversal.png
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from smalti.cli import parse_config, run_command
from smalti.errors import SmaltiError
from smalti.pipelines.latent_editor import LatentEditor, StatisticsOptions, evenly_spaced, signed
from smalti.tokenizer.manipulation import channel_axis, channel_deviations, move

DEFAULT_CHANNELS = 8


@dataclass(frozen=True)
class TraverseConfig(StatisticsOptions):
    """Change one latent channel of a picture everywhere at once; a row per channel."""

    output: Path = Path("traversal.png")
    channels: tuple[int, ...] = ()  # empty = the first 8
    # In standard deviations of the channel over the data set.
    strengths: tuple[float, ...] = (-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.strengths:
            raise SmaltiError("strengths is empty: give at least one number")


def traverse(config: TraverseConfig) -> Path:
    """Write the strip, and return its path."""
    bench = LatentEditor(config)
    pictures = bench.pictures(count=1)
    vectors = bench.vectors(pictures)  # (1, d, h, w)
    width = vectors.shape[1]
    channels = config.channels or range(min(width, DEFAULT_CHANNELS))
    axes = [channel_axis(channel, width).to(vectors) for channel in channels]
    measured = evenly_spaced(range(len(bench.source)), config.max_pictures)
    deviations = channel_deviations(bench.vectors_of(measured))
    rows = []
    for axis in axes:
        moved = move(vectors, deviations * axis, config.strengths)[0]  # (S, d, h, w)
        rows.append(torch.cat([pictures, bench.decode(moved)]))
    columns = ["original", *(f"{signed(s)} sd" for s in config.strengths)]
    return bench.save(torch.stack(rows), [f"channel {c}" for c in channels], columns)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of `smalti traverse`."""
    print(f"strip: {traverse(parse_config(TraverseConfig, argv, prog='smalti traverse'))}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
