"""Aspect-ratio buckets: several sizes of images in one set, each picture at the size that it fits.

A crop to a square cuts the ends of long pictures, and a model then learns people without heads and
feet. So each picture goes to the size whose aspect ratio is nearest to its own, is resized to cover
it, and loses little (NovelAI, "Improvements on Stable Diffusion", 2022; SDXL, 2307.01952, section
2.3).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from smalti.config import ImageSize
from smalti.data.latents import height_and_width, resolution
from smalti.errors import ConfigurationError


def bucket_name(size: ImageSize) -> str:
    """48x80: height x width, in pixels. That of a square has both sides."""
    return "x".join(map(str, height_and_width(size)))


def check_buckets(sizes: Sequence[ImageSize]) -> None:
    """Raise `ConfigurationError` unless pictures can be divided among these sizes."""
    if len(sizes) < 2:
        raise ConfigurationError(
            f"1 bucket was given, {bucket_name(sizes[0])}: give 2 or more, or this one as "
            "--image_size"
            if sizes
            else "no bucket was given: give 2 or more"
        )
    for one, other in combinations(sizes, 2):
        (height, width), (rows, columns) = map(height_and_width, (one, other))
        if height * columns == rows * width:
            raise ConfigurationError(
                f"the buckets {bucket_name(one)} and {bucket_name(other)} have the same aspect "
                "ratio, so no picture would go to the second: leave one out"
            )


def nearest_buckets(sizes: Tensor, buckets: Sequence[ImageSize]) -> Tensor:
    """The bucket of each picture, the one whose aspect ratio is nearest: (N,) int64.

    Distances are those of log(height / width), in which portrait and landscape are symmetric; of
    two that are equal the first is taken.

    Args:
        sizes: (N, 2) height and width in pixels; 0 where they are unknown, in the first bucket.
    """
    known = sizes.clamp_min(1).double()
    ratios = known[:, 0].log() - known[:, 1].log()  # (N,)
    ours = [math.log(height / width) for height, width in map(height_and_width, buckets)]
    # Rounded, so that equal distances are equal.
    distances = (ratios[:, None] - torch.tensor(ours).double()).abs().mul(1e9).round()
    return torch.where((sizes > 0).all(1), distances.argmin(1), 0)


def cropped_share(sizes: Tensor, bucket: ImageSize) -> float:
    """The mean share of the area of pictures (N, 2) that their crop to a bucket leaves out."""
    height, width = height_and_width(bucket)
    known = sizes[(sizes > 0).all(1)].double()
    if not len(known):
        return 0.0
    ratio = known[:, 0] / known[:, 1] * width / height
    return float(1 - torch.minimum(ratio, 1 / ratio).mean())


@dataclass(frozen=True)
class Bucket:
    """One of several sizes among which the pictures of a set are divided."""

    number: int  # of the size in `sizes`
    sizes: tuple[ImageSize, ...]

    @property
    def size(self) -> ImageSize:
        """Height and width of its images, in pixels."""
        return self.sizes[self.number]

    def keeps(self, sizes: Tensor) -> Tensor:
        """Which pictures of sizes (N, 2) go to this bucket, (N,) bool."""
        return nearest_buckets(sizes, self.sizes) == self.number

    @property
    def in_words(self) -> str:
        """For people: 48 x 80."""
        return resolution(self.size)
