"""Attribute arithmetic: add the mean of one class minus the mean of another to pictures.

    smalti attribute --model runs/demo/pipeline --indices 40 1200 \\
        --positive "Food & Drink" --negative Objects --output attribute.png
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from smalti.cli import parse_config, run_command
from smalti.config import nearest
from smalti.errors import SmaltiError
from smalti.pipelines.latent_editor import LatentEditor, StatisticsOptions, evenly_spaced, signed
from smalti.tokenizer.manipulation import attribute_direction, move


@dataclass(frozen=True)
class AttributeConfig(StatisticsOptions):
    """Move pictures from one class of the data set towards another; a row each."""

    output: Path = Path("attribute.png")
    positive: str = ""  # class to move towards, by name or number
    negative: str = ""  # class to move away from
    strengths: tuple[float, ...] = (-2.0, -1.0, 0.0, 1.0, 2.0)  # how many times the difference

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.strengths:
            raise SmaltiError("strengths is empty: give at least one number")


def attribute(config: AttributeConfig) -> Path:
    """Write the strip, and return its path."""
    bench = LatentEditor(config)
    positive, negative = _classes(config, bench.source.classes)
    pictures = bench.pictures()
    labels = bench.source.labels
    shown: list[int] = []
    for label in (positive, negative):
        members = (labels == label).nonzero().flatten().tolist()
        shown += evenly_spaced(members, max(1, config.max_pictures // 2))
    direction = attribute_direction(bench.vectors_of(shown), labels[shown], positive, negative)
    moved = move(bench.vectors(pictures), direction, config.strengths)  # (B, S, d, h, w)
    images = bench.decode(moved.flatten(0, 1)).unflatten(0, moved.shape[:2])
    columns = ["original", *map(signed, config.strengths)]
    return bench.save(torch.cat([pictures[:, None], images], dim=1), bench.names, columns)


def _classes(config: AttributeConfig, classes: Sequence[str]) -> tuple[int, int]:
    """Numbers of the positive and the negative class."""
    if not (config.positive and config.negative):
        raise SmaltiError(
            f"name two classes of {config.data} with --positive and --negative; known are "
            f"{', '.join(classes)}"
        )
    positive, negative = (class_number(n, classes) for n in (config.positive, config.negative))
    if positive == negative:
        raise SmaltiError(
            f'positive and negative are both "{classes[positive]}": name two different classes'
        )
    return positive, negative


def class_number(name: str, classes: Sequence[str]) -> int:
    """Number of a class given by its name or by its number.

    Raises:
        SmaltiError: no such class.
    """
    if name in classes:
        return classes.index(name)
    if not name.isdecimal():
        raise SmaltiError(f'no class is named "{name}"; {nearest(name, classes)}')
    if int(name) >= len(classes):
        raise SmaltiError(f"class {name} is out of range: use 0 to {len(classes) - 1}")
    return int(name)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of `smalti attribute`."""
    print(f"strip: {attribute(parse_config(AttributeConfig, argv, prog='smalti attribute'))}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
