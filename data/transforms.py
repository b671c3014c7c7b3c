"""From a picture of any size to a square one, as in guided diffusion (ADM, 2105.05233)."""

import hashlib

import numpy as np
import torch
from PIL import Image
from torch import Tensor

MAX_ASPECT = 16  # of what is resized: longer pictures lose their ends first, for they may be bombs


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The centre square of a picture, resized to size x size pixels.

    Halve by averaging while the shorter side is at least twice the target, then resize it to the
    target with bicubic interpolation, then crop: ADM's pre-processing, which the published
    numbers of this field assume.
    """
    image = _shorten(image, MAX_ASPECT * min(image.size))
    while min(image.size) >= 2 * size:
        half = (image.width // 2, image.height // 2)
        image = image.resize(half, resample=Image.Resampling.BOX)
    scale = size / min(image.size)
    if scale != 1:
        target = (round(image.width * scale), round(image.height * scale))
        image = image.resize(target, resample=Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
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


def to_float(images: Tensor) -> Tensor:
    """uint8 in [0, 255] -> float in [-1, 1]."""
    return images.float() / 127.5 - 1


def flips(seed: int, epoch: int, index: int) -> bool:
    """Whether a sample is mirrored in an epoch: a fair coin, a pure function of its arguments."""
    key = f"{seed}/flip/{epoch}/{index}".encode()
    return bool(hashlib.blake2b(key, digest_size=1).digest()[0] & 1)
