"""From a picture of any size to images of one size: centre crops, random crops, and sets of views.

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

from smalti.config import ImageSize
from smalti.data.image_io import TRANSPARENT, WHITE, to_8_bit, to_channels
from smalti.data.latents import as_image_size, height_and_width, to_float
from smalti.errors import ConfigurationError, DataError

# -- Centre crop ----------------------------------------------------------------------------------

# Pictures this many times as long as an image, if their shorter side had the length of the image's,
# are cut before they are resized: a 1 x 50,000,000 picture would otherwise be enlarged to fill all
# memory.
MAX_ASPECT = 16


def center_crop(image: Image.Image, size: ImageSize) -> Image.Image:
    """The centre of a picture, resized to an image of some size (ADM's `center_crop_arr`, which
    makes squares).

    The picture is halved with a box filter while both sides are at least twice those of the image,
    then it is resized with a bicubic filter to the smallest size that covers the image, then the
    centre is cropped.
    """
    height, width = height_and_width(size)
    image = _resize_to_cover(image, height, width)
    return _crop(image, (image.height - height) // 2, (image.width - width) // 2, height, width)


def _resize_to_cover(image: Image.Image, height: int, width: int) -> Image.Image:
    """The smallest picture of the same aspect ratio that has at least these sides."""
    image = _limit_aspect(image, height, width)
    while image.height >= 2 * height and image.width >= 2 * width:
        half = (image.width // 2, image.height // 2)
        image = image.resize(half, resample=Image.Resampling.BOX)
    scale = max(height / image.height, width / image.width)
    if scale == 1:
        return image
    target = (round(image.width * scale), round(image.height * scale))
    return image.resize(target, resample=Image.Resampling.BICUBIC)


def _limit_aspect(image: Image.Image, for_height: int, for_width: int) -> Image.Image:
    """The middle of a picture that is more than MAX_ASPECT times as wide or as high as the image
    that it is resized to cover."""
    width = min(image.width, -(-MAX_ASPECT * image.height * for_width // for_height))
    height = min(image.height, -(-MAX_ASPECT * image.width * for_height // for_width))
    if (width, height) == image.size:
        return image
    return _crop(image, (image.height - height) // 2, (image.width - width) // 2, height, width)


def _crop(image: Image.Image, top: int, left: int, height: int, width: int) -> Image.Image:
    return image.crop((left, top, left + width, top + height))


def to_tensor(image: Image.Image) -> Tensor:
    """Picture of mode L, RGB or RGBA -> uint8 (1, 3 or 4, H, W).

    The colour of a fully transparent pixel is arbitrary in a file, and no model could learn it:
    here it is white, on which small errors of a model's alpha are least visible.
    """
    values = np.asarray(image, dtype=np.uint8).copy()
    if image.mode == "RGBA":
        values[values[..., 3] == 0] = (255, 255, 255, 0)
    pixels = torch.from_numpy(values)
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)


def images_of(pictures: Any, size: ImageSize, channels: int = 3) -> Tensor:
    """One or several pictures of Pillow, of any size, as images (B, channels, H, W) in [-1, 1].

    Raises:
        DataError: there are none, or one is no picture of 8 bits per channel.
    """
    given = list(pictures) if isinstance(pictures, list | tuple) else [pictures]
    wrong = next((picture for picture in given if not isinstance(picture, Image.Image)), None)
    if wrong is not None or not given:
        shape = ", ".join(map(str, (channels, *height_and_width(size))))
        found = "an empty list" if wrong is None else f"a {type(wrong).__name__}"
        raise DataError(f"images are {found}: give a tensor (B, {shape}), or pictures")
    background = TRANSPARENT if channels == 4 else WHITE
    upright = (to_channels(to_8_bit(picture, background), channels) for picture in given)
    return to_float(torch.stack([to_tensor(center_crop(picture, size)) for picture in upright]))


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
    image: Image.Image, size: ImageSize, limits: RandomCrop, uniforms: CropUniforms
) -> Image.Image:
    """An image of some size at a random place of a picture resized to a random size.

    ADM's `random_crop_arr`, which makes squares: the shorter side of a rectangle that the picture
    covers becomes an integer number of pixels, uniform between s / max_fraction and
    s / min_fraction, both rounded up, where s is the shorter side of the image.
    """
    height, width = height_and_width(size)
    shorter = min(height, width)
    smallest = math.ceil(shorter / limits.max_fraction)
    largest = math.ceil(shorter / limits.min_fraction)
    side = smallest + int(uniforms.scale * (largest - smallest + 1))
    image = _resize_to_cover(image, round(height * side / shorter), round(width * side / shorter))
    top = int(uniforms.top * (image.height - height + 1))
    left = int(uniforms.left * (image.width - width + 1))
    return _crop(image, top, left, height, width)


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
    1.1  # sides of the image that crops are taken from / sides of a crop (LlamaGen, 2406.06525)
)


def decoded_size(views: ViewSet, size: ImageSize) -> ImageSize:
    """Size of the images, in pixels, from which views of a size are made."""
    if views != "ten-crop":
        return size
    return as_image_size([int(side * ENLARGED) for side in height_and_width(size)])


def views_of(images: Tensor, names: Sequence[str], size: ImageSize) -> Iterator[Tensor]:
    """Yield each of the named views of a size, (B, C, H, W).

    A mirrored crop is the crop at that place of the mirrored image.

    Args:
        images: (B, C, H', W') of the `decoded_size` of the set that the names are from.
    """
    from torchvision.transforms.v2 import functional as F  # takes seconds

    for name in names:
        place = name.removesuffix(MIRRORED)
        mirrored = name in ("flip", place + MIRRORED)
        image = F.horizontal_flip(images) if mirrored else images
        if place in CROPS:
            image = F.five_crop(image, [*height_and_width(size)])[CROPS.index(place)]
        yield image
