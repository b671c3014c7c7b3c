"""Attribute arithmetic: add the mean of one class minus the mean of another to images.

    smalti attribute --model runs/demo/pipeline --indices 40 1200 \\
        --positive "Food & Drink" --negative Objects --output attribute.png
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from smalti.cli import parse_config, run_command
from smalti.errors import ConfigurationError
from smalti.pipelines.class_labels import label_ids
from smalti.pipelines.latent_editor import LatentEditor, StatisticsOptions, signed


@dataclass(frozen=True)
class AttributeConfig(StatisticsOptions):
    """Move images from one class of the data set towards another; one row for each image."""

    output: Path = Path("attribute.png")  # PNG file of the latent grid
    positive: str = ""  # class to move towards, by name or number
    negative: str = ""  # class to move away from
    strengths: tuple[float, ...] = (-2.0, -1.0, 0.0, 1.0, 2.0)  # multiples of the difference

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.strengths:
            raise ConfigurationError("strengths is empty: give at least one number")


def attribute(config: AttributeConfig) -> Path:
    """Write the latent grid, and return its path."""
    editor = LatentEditor(config)
    positive, negative = _two_classes(config, editor.source.classes)
    images = editor.add_attribute(
        editor.images(), positive, negative, config.strengths, config.max_pictures
    )
    return editor.save(images, editor.image_names, ["original", *map(signed, config.strengths)])


def _two_classes(config: AttributeConfig, classes: Sequence[str]) -> list[int]:
    """Labels of the positive and the negative class.

    Raises:
        SmaltiError: one is missing or unknown, or both are the same.
    """
    if not classes:
        raise ConfigurationError(
            f"the pictures of {config.data} have no classes: name others in --data, with a "
            "sub-folder for each class"
        )
    if not (config.positive and config.negative):
        raise ConfigurationError(
            f"name two classes of {config.data} with --positive and --negative; known are "
            f"{', '.join(classes)}"
        )
    labels = label_ids([config.positive, config.negative], classes)
    if labels[0] == labels[1]:
        raise ConfigurationError(
            f'positive and negative are both "{classes[labels[0]]}": name two different classes'
        )
    return labels


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of `smalti attribute`."""
    config = parse_config(AttributeConfig, argv, prog="smalti attribute")
    print(f"latent grid: {attribute(config)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
