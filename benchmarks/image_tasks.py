"""Super-resolution and inpainting of held-out pictures, measured.

    python benchmarks/image_tasks.py --model runs/upscaler/pipeline

The pictures are the held-out part of those that the model was trained on. For super-resolution:
PSNR, SSIM and LPIPS to the originals, of bicubic enlargement, of the samples, and of the
tokenizer's reconstructions of the originals, which limit them. For inpainting: the PSNR of the
known pixels, beside that of the tokenizer's reconstructions at the same pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from smalti.cli import parse_config, run_command
from smalti.config import check_at_least
from smalti.data.dataset import DataOptions
from smalti.data.image_io import image_grid, save_png
from smalti.data.latents import height_and_width, to_levels
from smalti.errors import ConfigurationError
from smalti.evaluation.metrics import reconstruction_metrics
from smalti.pipelines.generation import picture_generator
from smalti.pipelines.image_tasks import Given, SuperResolution, make_task, resized
from smalti.pipelines.pipeline import Pipeline
from smalti.scripts.options import Sampling
from smalti.tokenizer.losses.perceptual import LPIPS

SHOWN = 8  # pictures of the strip


@dataclass(frozen=True)
class MeasureConfig(DataOptions):
    """Measure an image-conditional pipeline on held-out pictures."""

    TRAINED: ClassVar[str] = "model"

    model: str = "runs/prior/pipeline"  # of a prior with --condition image
    output: Path | None = None  # file of a strip of the first pictures
    num_images: int = 256  # held-out pictures, evenly over the classes
    seed: int = 0  # sample i depends on the seed and i alone
    sampling: Sampling = field(default_factory=Sampling)  # of the samples

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(1, self, "num_images")


def measure(config: MeasureConfig) -> dict[str, dict[str, float]]:
    """Metrics by name, for each set of pictures that is compared with the originals."""
    pipeline = Pipeline.from_pretrained(config.model)
    image, tokenizer = pipeline.prior.config.image, pipeline.tokenizer
    if image is None:
        raise ConfigurationError(f"{config.model} is not conditional on pictures")
    task = make_task(image.task)
    dataset = config.dataset("heldout", tokenizer.image_size, channels=tokenizer.image_channels)
    chosen = dataset.even_subset(config.num_images, config.seed)
    originals = torch.cat([batch.images for batch in dataset.batches_of(chosen, 64)])
    given = task.degraded(originals, [(0, index) for index in chosen])
    samples = sampled(pipeline, given, config)
    decoded = torch.cat([tokenizer.reconstruct(part) for part in originals.split(64)])
    if isinstance(task, SuperResolution):
        enlarged = resized(given.images, *height_and_width(tokenizer.image_size))
        sets = {"bicubic": enlarged, "samples": samples, "tokenizer": decoded}
        found = {name: metrics(images, originals) for name, images in sets.items()}
        shown = [enlarged, samples, originals]
    else:
        assert given.mask is not None
        sets = {"samples": samples, "tokenizer": decoded}
        known = given.mask < 0.5
        found = {name: known_psnr(images, originals, known) for name, images in sets.items()}
        shown = [torch.where(known, originals, 0.0), samples, originals]
    if config.output is not None:
        columns = torch.stack([images[:SHOWN] for images in shown], 1).flatten(0, 1)
        save_png(config.output, image_grid(columns, len(shown), scale=3))
    return found


def sampled(pipeline: Pipeline, given: Given, config: MeasureConfig) -> Tensor:
    """A sample for each given picture, (N, C, H, W) in [-1, 1]."""
    output = pipeline(
        image=(given.images + 1) / 2,
        mask_image=given.mask,
        generator=[picture_generator(config.seed, i) for i in range(len(given.images))],
        output_type="pt",
        batch_size=32,
        progress=True,
        **config.sampling.options,
    )
    return output.images * 2 - 1


def metrics(images: Tensor, originals: Tensor) -> dict[str, float]:
    """PSNR, SSIM and LPIPS."""
    found = reconstruction_metrics(images, originals, LPIPS.from_embedded(), {})
    return {name: metric.value for name, metric in found.items()}


def known_psnr(images: Tensor, originals: Tensor, known: Tensor) -> dict[str, float]:
    """PSNR over the known pixels, (N, 1, H, W) bool: the mean over pictures."""
    errors = (to_levels(images) - to_levels(originals)).square().mean(1, keepdim=True)
    mean = (errors * known).flatten(1).sum(1) / known.flatten(1).sum(1)
    return {"known_psnr": (10 * (255**2 / mean.clamp(min=1e-6)).log10()).mean().item()}


def table(found: dict[str, dict[str, Any]]) -> str:
    """A Markdown table with a row for each set of pictures."""
    names = list(next(iter(found.values())))
    lines = [["pictures", *names], ["---"] * (len(names) + 1)]
    lines += [[name, *(f"{row[key]:.3f}" for key in names)] for name, row in found.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    print(table(measure(parse_config(MeasureConfig, argv, prog="benchmarks/image_tasks.py"))))
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
