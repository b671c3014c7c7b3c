"""From a picture of any size to square images: centre crops, random crops, and sets of views.

Centre and random crops are those of guided diffusion (ADM, 2105.05233), which the published results
of this field use, and need only Pillow. `torchvision.transforms.v2` differs: its resize of tensors
has no box filter and another bicubic filter, its `center_crop` rounds odd margins where ADM
truncates them, and its `resize` truncates the longer side where ADM rounds it. Those of its
functions that give equal results take up to twice as long on small PIL images.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from smalti.data.image_io import to_rgb
from smalti.data.latents import to_float
from smalti.errors import ConfigurationError, DataError

# -- Centre crop ----------------------------------------------------------------------------------

# Pictures longer than this many times their shorter side are cut before they are resized: a
# 1 x 50,000,000 picture would otherwise be enlarged to fill all memory.
MAX_ASPECT = 16


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The centre square of a picture, resized to size x size pixels (ADM's `center_crop_arr`).

    The picture is halved with a box filter while its shorter side is at least 2 size, then its
    shorter side is resized to size with a bicubic filter, then the centre is cropped.
    """
    image = _resize_shorter_side(image, size)
    return _crop(image, (image.height - size) // 2, (image.width - size) // 2, size, size)


def _resize_shorter_side(image: Image.Image, side: int) -> Image.Image:
    image = _limit_aspect(image)
    while min(image.size) >= 2 * side:
        half = (image.width // 2, image.height // 2)
        image = image.resize(half, resample=Image.Resampling.BOX)
    scale = side / min(image.size)
    if scale == 1:
        return image
    target = (round(image.width * scale), round(image.height * scale))
    return image.resize(target, resample=Image.Resampling.BICUBIC)


def _limit_aspect(image: Image.Image) -> Image.Image:
    """The middle of a picture whose longer side exceeds MAX_ASPECT shorter sides."""
    longest = MAX_ASPECT * min(image.size)
    width, height = min(image.width, longest), min(image.height, longest)
    if (width, height) == image.size:
        return image
    return _crop(image, (image.height - height) // 2, (image.width - width) // 2, height, width)


def _crop(image: Image.Image, top: int, left: int, height: int, width: int) -> Image.Image:
    return image.crop((left, top, left + width, top + height))


def to_tensor(image: Image.Image) -> Tensor:
    """RGB picture -> uint8 (3, H, W)."""
    return torch.from_numpy(np.asarray(image, dtype=np.uint8).copy()).permute(2, 0, 1)


def images_of(pictures: Any, size: int) -> Tensor:
    """One or several pictures of Pillow, of any size, as images (B, 3, size, size) in [-1, 1].

    Raises:
        DataError: there are none, or one is no picture of 8 bits per channel.
    """
    given = list(pictures) if isinstance(pictures, list | tuple) else [pictures]
    wrong = next((picture for picture in given if not isinstance(picture, Image.Image)), None)
    if wrong is not None or not given:
        found = "an empty list" if wrong is None else f"a {type(wrong).__name__}"
        raise DataError(f"images are {found}: give a tensor (B, 3, {size}, {size}), or pictures")
    squares = [center_crop(to_rgb(picture), size) for picture in given]
    return to_float(torch.stack([to_tensor(square) for square in squares]))


# -- Augmentation: each random choice is a pure function of (seed, epoch, index) ------------------


@dataclass(frozen=True)
class RandomCrop:
    """How much of a picture a random crop shows; ADM takes 0.8 to 1."""

    min_fraction: float = 0.8  # smallest side of the crop / shorter side of the picture
    max_fraction: float = 1.0  # largest side of the crop / shorter side of the picture

    def __post_init__(self) -> None:
        if not 0 < self.min_fraction <= self.max_fraction <= 1:
            raise ConfigurationError(
                f"a crop's fractions are {self.min_fraction} to {self.max_fraction}; they must lie "
                "in (0, 1], the smaller first"
            )


@dataclass(frozen=True)
class CropUniforms:
    """The random numbers of one crop, each uniform in [0, 1)."""

    scale: float
    top: float
    left: float


def crop_uniforms(seed: int, epoch: int, index: int) -> CropUniforms:
    """The random numbers of a sample's crop in an epoch."""
    key = f"{seed}/crop/{epoch}/{index}".encode()
    digest = hashlib.blake2b(key, digest_size=18).digest()
    # 48 bits each: exact as a float, and below 1
    parts = (int.from_bytes(digest[i : i + 6], "big") / 2**48 for i in (0, 6, 12))
    return CropUniforms(*parts)


def random_crop(
    image: Image.Image, size: int, limits: RandomCrop, uniforms: CropUniforms
) -> Image.Image:
    """A square of size x size pixels at a random place of a picture resized to a random size.

    ADM's `random_crop_arr`: the shorter side becomes an integer number of pixels, uniform between
    size / max_fraction and size / min_fraction, both rounded up.
    """
    smallest = math.ceil(size / limits.max_fraction)
    largest = math.ceil(size / limits.min_fraction)
    image = _resize_shorter_side(image, smallest + int(uniforms.scale * (largest - smallest + 1)))
    top = int(uniforms.top * (image.height - size + 1))
    left = int(uniforms.left * (image.width - size + 1))
    return _crop(image, top, left, size, size)


def flips(seed: int, epoch: int, index: int) -> bool:
    """Whether a sample is mirrored in an epoch, with probability 1/2."""
    key = f"{seed}/flip/{epoch}/{index}".encode()
    return bool(hashlib.blake2b(key, digest_size=1).digest()[0] & 1)


# -- Views: versions of an image that are each encoded once (flip; LlamaGen's ten crops) ----------

ViewSet = Literal["identity", "flip", "ten-crop"]

CENTRE = "centre"
# In the order of torchvision's `five_crop`.
CROPS = ("top-left", "top-right", "bottom-left", "bottom-right", CENTRE)
MIRRORED = "-mirrored"
PLACES = (CENTRE, *CROPS[:-1])
# The first view of each set is neither mirrored nor off centre; evaluation uses it alone.
VIEW_SETS: dict[ViewSet, tuple[str, ...]] = {
    "identity": ("identity",),
    "flip": ("identity", "flip"),
    "ten-crop": (*PLACES, *(place + MIRRORED for place in PLACES)),
}
ENLARGED = (
    1.1  # side of the image that crops are taken from / side of a crop (LlamaGen, 2406.06525)
)


def decoded_size(views: ViewSet, size: int) -> int:
    """Side of the images, in pixels, from which views of size x size pixels are made."""
    return int(size * ENLARGED) if views == "ten-crop" else size


def views_of(images: Tensor, names: Sequence[str], size: int) -> Iterator[Tensor]:
    """Yield each of the named views, (B, 3, size, size).

    A mirrored crop is the crop at that place of the mirrored image.

    Args:
        images: (B, 3, S, S), where S is `decoded_size` of the set that the names are from.
    """
    for name in names:
        place = name.removesuffix(MIRRORED)
        mirrored = name in ("flip", place + MIRRORED)
        image = F.horizontal_flip(images) if mirrored else images
        if place in CROPS:
            image = F.five_crop(image, [size, size])[CROPS.index(place)]
        yield image
