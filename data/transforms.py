"""From a picture of any size to a square one, as in guided diffusion (ADM, 2105.05233)."""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from smalti.errors import SmaltiError

# -------------------------------------------------------------------------------------------------
# Several views of one picture, to encode each of them once: mirrored, and cut at five places.
#
# The ten crops are LlamaGen's (2406.06525): a picture squared to 1.1 times the size, its centre and
# four corners, and the same places of its mirror image.

ViewSet = Literal["identity", "flip", "ten-crop"]

PLACES = ("centre", "top-left", "top-right", "bottom-left", "bottom-right")
MIRRORED = "-mirrored"
# The first view of each set is the plainest: evaluation looks at it alone.
VIEW_SETS: dict[ViewSet, tuple[str, ...]] = {
    "identity": ("identity",),
    "flip": ("identity", "flip"),
    "ten-crop": (*PLACES, *(place + MIRRORED for place in PLACES)),
}
ENLARGED = 1.1  # side of the picture that crops are cut from / side of a crop


def decoded_size(views: ViewSet, size: int) -> int:
    """Side of the pictures, in pixels, that views of size x size pixels are made from."""
    return int(size * ENLARGED) if views == "ten-crop" else size


def views_of(images: Tensor, names: Sequence[str], size: int) -> Iterator[Tensor]:
    """Each of the named views in turn; a mirrored place is that place of the mirror image.

    Args:
        images: (B, 3, S, S), where S = `decoded_size` of the set that the names are from.

    Yields:
        (B, 3, size, size).
    """
    for name in names:
        place = name.removesuffix(MIRRORED)
        picture = images.flip(-1) if name in ("flip", place + MIRRORED) else images
        yield crop(picture, place, size) if place in PLACES else picture


def crop(images: Tensor, place: str, size: int) -> Tensor:
    """The square of size x size pixels at one of `PLACES`: (B, 3, H, W) -> (B, 3, size, size)."""
    height, width = images.shape[-2:]
    top, left = height - size, width - size  # of the square at the bottom right
    if place == "centre":
        top, left = round(top / 2), round(left / 2)
    else:
        top, left = top * place.startswith("bottom"), left * place.endswith("right")
    return images[..., top : top + size, left : left + size]


# -------------------------------------------------------------------------------------------------
# From a picture of any size to a square one, as in guided diffusion (ADM, 2105.05233).

MAX_ASPECT = 16  # of what is resized: longer pictures lose their ends first, for they may be bombs


@dataclass(frozen=True)
class RandomCrop:
    """How much of a picture a random crop shows; the defaults are ADM's."""

    min_fraction: float = 0.8  # side of the crop / shorter side of the picture, at least
    max_fraction: float = 1.0  # and at most

    def __post_init__(self) -> None:
        if not 0 < self.min_fraction <= self.max_fraction <= 1:
            raise SmaltiError(
                f"a crop's fractions are {self.min_fraction} to {self.max_fraction}; they must lie "
                "in (0, 1], the smaller first"
            )


@dataclass(frozen=True)
class CropDraw:
    """What is random about a crop, each uniform in [0, 1)."""

    scale: float
    top: float
    left: float


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The centre square of a picture, resized to size x size pixels.

    Halve by averaging while the shorter side is at least twice the target, then resize it to the
    target with bicubic interpolation, then crop: ADM's pre-processing, which the published
    numbers of this field assume.
    """
    image = _resize_shorter_side(image, size)
    return _crop(image, size, (image.height - size) // 2, (image.width - size) // 2)


def random_crop(image: Image.Image, size: int, limits: RandomCrop, draw: CropDraw) -> Image.Image:
    """A square of size x size pixels from a random place of a picture resized to a random size.

    ADM's `random_crop_arr`: the shorter side becomes a whole number of pixels, all equally likely
    between size / max_fraction and size / min_fraction, both rounded up.
    """
    smallest = math.ceil(size / limits.max_fraction)
    largest = math.ceil(size / limits.min_fraction)
    image = _resize_shorter_side(image, smallest + int(draw.scale * (largest - smallest + 1)))
    top = int(draw.top * (image.height - size + 1))
    left = int(draw.left * (image.width - size + 1))
    return _crop(image, size, top, left)


def crop_draw(seed: int, epoch: int, index: int) -> CropDraw:
    """The random numbers of a sample's crop in an epoch: a pure function of its arguments."""
    key = f"{seed}/crop/{epoch}/{index}".encode()
    digest = hashlib.blake2b(key, digest_size=18).digest()
    # 48 bits each: exact as a float, and below 1
    parts = (int.from_bytes(digest[i : i + 6], "big") / 2**48 for i in (0, 6, 12))
    return CropDraw(*parts)


def _resize_shorter_side(image: Image.Image, side: int) -> Image.Image:
    image = _shorten(image, MAX_ASPECT * min(image.size))
    while min(image.size) >= 2 * side:
        half = (image.width // 2, image.height // 2)
        image = image.resize(half, resample=Image.Resampling.BOX)
    scale = side / min(image.size)
    if scale == 1:
        return image
    target = (round(image.width * scale), round(image.height * scale))
    return image.resize(target, resample=Image.Resampling.BICUBIC)


def _crop(image: Image.Image, size: int, top: int, left: int) -> Image.Image:
    return image.crop((left, top, left + size, top + size))


def _shorten(image: Image.Image, longest: int) -> Image.Image:
    """The middle of a picture, at most `longest` pixels on a side."""
    width, height = min(image.width, longest), min(image.height, longest)
    if (width, height) == image.size:
        return image
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def to_tensor(image: Image.Image) -> Tensor:
    """RGB picture -> uint8 (3, H, W)."""
    return torch.from_numpy(np.asarray(image, dtype=np.uint8).copy()).permute(2, 0, 1)


def flips(seed: int, epoch: int, index: int) -> bool:
    """Whether a sample is mirrored in an epoch: a fair coin, a pure function of its arguments."""
    key = f"{seed}/flip/{epoch}/{index}".encode()
    return bool(hashlib.blake2b(key, digest_size=1).digest()[0] & 1)
