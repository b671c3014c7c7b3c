"""Inversion: search the latents that the decoder turns into given pictures.

smalti invert --model runs/demo/pipeline --images me.png --start mean --output inversion.png
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from smalti.cli import parse_config, run_command
from smalti.errors import SmaltiError
from smalti.pipelines.latent_editor import LatentEditor, StatisticsOptions, evenly_spaced
from smalti.tokenizer import manipulation
from smalti.tokenizer.losses.perceptual import LPIPS, MIN_SIDE
from smalti.tokenizer.manipulation import Inversion


@dataclass(frozen=True)
class InvertConfig(StatisticsOptions):
    """Optimise the latents of pictures against the decoder; a column per picture."""

    output: Path = Path("inversion.png")
    start: Literal["encoder", "mean"] = "encoder"  # its answer, or the mean over --data
    steps: int = 200
    learning_rate: float = 0.05
    perceptual_weight: float = 1.0  # of LPIPS beside the mean squared error; 0 leaves it out

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1 or self.learning_rate <= 0:
            raise SmaltiError(
                f"steps is {self.steps}, learning_rate {self.learning_rate}; both must exceed 0"
            )
        if self.perceptual_weight < 0:
            raise SmaltiError(f"perceptual_weight is {self.perceptual_weight}; use 0 or more")
        if self.start == "encoder" and self.max_pictures != StatisticsOptions.max_pictures:
            raise SmaltiError("max_pictures counts the pictures of the mean: add --start mean")


def invert(config: InvertConfig) -> Inversion:
    """Write the strip, and return what was found."""
    bench = LatentEditor(config)
    distance = partial(
        manipulation.picture_distance,
        perceptual=_perceptual(config, bench),
        perceptual_weight=config.perceptual_weight,
    )
    pictures = bench.pictures()
    encoded = bench.vectors(pictures)
    rows = {"encoder": encoded}
    if config.start == "mean":
        measured = evenly_spaced(range(len(bench.source)), config.max_pictures)
        rows["mean"] = bench.vectors_of(measured).mean(0).expand_as(encoded)
    shown = {config.steps // 16, config.steps // 4} - {0}  # it is fast at first
    with tqdm(total=config.steps, desc="invert") as bar:

        def observe(step: int, vectors: Tensor) -> None:
            bar.update(step - bar.n)
            if step in shown:
                rows[f"step {step}"] = vectors

        found = manipulation.invert(
            bench.tokenizer.decode_vectors,
            distance,
            pictures,
            rows[config.start],
            steps=config.steps,
            learning_rate=config.learning_rate,
            observe=observe,
        )
    rows[f"best of {config.steps}"] = found.vectors
    images = [bench.decode(vectors) for vectors in rows.values()]
    means = [distance(image, pictures).mean() for image in images]
    labels = [f"{name}: {mean:.4f}" for name, mean in zip(rows, means, strict=True)]
    bench.save(torch.stack([pictures, *images]), ["original", *labels], bench.names)
    return found


def _perceptual(config: InvertConfig, bench: LatentEditor) -> LPIPS | None:
    """LPIPS, if it has a weight."""
    if not config.perceptual_weight:
        return None
    if bench.tokenizer.image_size < MIN_SIDE:
        raise SmaltiError(
            f"the tokenizer draws {bench.tokenizer.image_size} pixels a side, LPIPS judges "
            f"{MIN_SIDE} and more: pass --perceptual_weight 0"
        )
    return LPIPS.from_embedded().to(bench.device)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of `smalti invert`."""
    config = parse_config(InvertConfig, argv, prog="smalti invert")
    losses = invert(config).losses
    best = losses.min(0).values.mean()
    print(f"distance {losses[0].mean():.4f} from the {config.start}, {best:.4f} at best")
    print(f"strip: {config.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
