"""Differentiable augmentation (DiffAugment, Zhao et al., 2006.10738) of a discriminator's input.

Real and fake images are augmented alike, in the discriminator's step and in the generator's. A
discriminator then cannot memorise a small training set, and the generator does not learn to imitate
the augmentation. All functions are pure: their randomness is a tensor of uniforms in [0, 1).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from smalti.config import ImageSize
from smalti.data.latents import height_and_width
from smalti.errors import ConfigurationError

AUGMENT_UNIFORMS = 7  # per image: 3 for the colours, 2 for the translation, 2 for the cutout


@dataclass(frozen=True)
class AugmentConfig:
    """Strengths; 0 disables one. Published: colour 1, translation 0.125, cutout 0.5."""

    colour: float = 0.0  # of brightness, saturation and contrast; 0 to 1
    translation: float = 0.0  # largest shift, as a fraction of the side; 0 to 0.5
    cutout: float = 0.0  # side of the grey square, as a fraction of the side; 0 to 1

    def __post_init__(self) -> None:
        for name, limit in (("colour", 1.0), ("translation", 0.5), ("cutout", 1.0)):
            value = getattr(self, name)
            if not 0 <= value <= limit:
                raise ConfigurationError(f"augment.{name} is {value}; it must lie in [0, {limit}]")


def resized(images: Tensor, size: ImageSize) -> Tensor:
    """Images (B, C, H, W) at another size, bilinear with antialiasing."""
    sides = height_and_width(size)
    if images.shape[2:] == sides:
        return images
    return F.interpolate(images, sides, mode="bilinear", antialias=True)


def shift_colours(images: Tensor, strength: float, uniforms: Tensor) -> Tensor:
    """Brightness (plus up to 1/2), saturation (times 0 to 2), contrast (times 1/2 to 3/2). Alpha,
    the fourth channel, stays as it is.

    Args:
        strength: 0 to 1, shrinks the three ranges towards "no change".
        uniforms: (B, 3), one for each.
    """
    if images.shape[1] == 4:
        return torch.cat([shift_colours(images[:, :3], strength, uniforms), images[:, 3:]], 1)
    changes = (strength * (uniforms - 0.5)).view(-1, 3, 1, 1, 1)
    brightness, saturation, contrast = changes.unbind(1)  # (B, 1, 1, 1) each
    images = images + brightness
    grey = images.mean(1, keepdim=True)  # (B, 1, H, W)
    images = grey + (1 + 2 * saturation) * (images - grey)
    mean = images.mean((1, 2, 3), keepdim=True)
    return mean + (1 + contrast) * (images - mean)


def translate(images: Tensor, ratio: float, uniforms: Tensor) -> Tensor:
    """Shift by integer pixels, at most `ratio` of a side in each direction; grey (0) fills the gap.

    Args:
        uniforms: (B, 2), for rows and columns.
    """
    batch, _, height, width = images.shape
    rows, inside_rows = _shifted(height, ratio, uniforms[:, 0])
    columns, inside_columns = _shifted(width, ratio, uniforms[:, 1])
    image = torch.arange(batch, device=images.device)[:, None, None]
    pixels = rearrange(images, "b c h w -> b h w c")[image, rows[:, :, None], columns[:, None, :]]
    moved = rearrange(pixels, "b h w c -> b c h w")
    return moved * (inside_rows[:, None, :, None] & inside_columns[:, None, None, :])


def _shifted(side: int, ratio: float, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Source index of each pixel of a row, (B, side), and whether it lies inside the image."""
    limit = round(ratio * side)
    shift = (uniforms * (2 * limit + 1)).floor().long() - limit  # uniform on -limit ... limit
    source = torch.arange(side, device=uniforms.device) - shift[:, None]
    return source.clamp(0, side - 1), (source >= 0) & (source < side)


def cut_out(images: Tensor, ratio: float, uniforms: Tensor) -> Tensor:
    """Make a square of `ratio` of a side grey (0), at any place, possibly beyond the border.

    Args:
        uniforms: (B, 2), for rows and columns.
    """
    height, width = images.shape[-2:]
    rows = _covered(height, ratio, uniforms[:, 0])
    columns = _covered(width, ratio, uniforms[:, 1])
    return images * ~(rows[:, None, :, None] & columns[:, None, None, :])


def _covered(side: int, ratio: float, uniforms: Tensor) -> Tensor:
    """Which pixels of a row the square covers, (B, side); its centre is any pixel of the row."""
    size = math.ceil(ratio * side)
    first = (uniforms * side).floor().long() - size // 2
    distance = torch.arange(side, device=uniforms.device) - first[:, None]
    return (distance >= 0) & (distance < size)


def augment(images: Tensor, config: AugmentConfig, uniforms: Tensor) -> Tensor:
    """Augment each image independently.

    Args:
        images: (B, C, H, W) in [-1, 1].
        uniforms: (B, at least AUGMENT_UNIFORMS) in [0, 1); equal rows augment images alike.

    Returns:
        (B, C, H, W), differentiable; `images` themselves if all strengths are 0.
    """
    if config.colour:
        images = shift_colours(images, config.colour, uniforms[:, :3])
    if config.translation:
        images = translate(images, config.translation, uniforms[:, 3:5])
    if config.cutout:
        images = cut_out(images, config.cutout, uniforms[:, 5:7])
    return images
