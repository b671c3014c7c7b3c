"""Differentiable augmentation (Zhao et al., 2006.10738): the critic never sees a picture bare.

Reals and fakes are changed alike, in the critic's step and in the generator's, so that a critic
cannot learn the few pictures of a small set by heart, and nothing of the change leaks into what
the generator makes. A pure function of pictures and uniform numbers.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from smalti.errors import SmaltiError

DRAWS = 7  # uniform numbers per picture


@dataclass(frozen=True)
class AugmentConfig:
    """Strengths; 0 leaves a change out. Published: colour 1, translation 0.125, cutout 0.5."""

    colour: float = 0.0  # of brightness, saturation and contrast; 0 to 1
    translation: float = 0.0  # largest shift, in sides of the picture; 0 to 0.5
    cutout: float = 0.0  # side of the grey square, in sides of the picture; 0 to 1

    def __post_init__(self) -> None:
        for name, limit in (("colour", 1.0), ("translation", 0.5), ("cutout", 1.0)):
            value = getattr(self, name)
            if not 0 <= value <= limit:
                raise SmaltiError(f"augment.{name} is {value}; it must lie in [0, {limit}]")


def augment(images: Tensor, config: AugmentConfig, draws: Tensor) -> Tensor:
    """Change each picture in its own way.

    Args:
        images: (B, 3, H, W) in [-1, 1].
        draws: (B, DRAWS), uniform in [0, 1); equal rows change pictures alike.

    Returns:
        (B, 3, H, W), differentiable; `images` themselves if all strengths are 0.
    """
    if config.colour:
        images = shift_colours(images, config.colour, draws[:, :3])
    if config.translation:
        images = translate(images, config.translation, draws[:, 3:5])
    if config.cutout:
        images = cut_out(images, config.cutout, draws[:, 5:7])
    return images


def shift_colours(images: Tensor, strength: float, draws: Tensor) -> Tensor:
    """Brightness (plus up to 1/2), saturation (times 0 to 2), contrast (times 1/2 to 3/2).

    Args:
        strength: 0 to 1, shrinks the three ranges towards "no change".
        draws: (B, 3), one number for each.
    """
    brightness, saturation, contrast = (strength * (draws - 0.5)).view(-1, 3, 1, 1, 1).unbind(1)
    images = images + brightness
    grey = images.mean(1, keepdim=True)  # (B, 1, H, W)
    images = grey + (1 + 2 * saturation) * (images - grey)
    mean = images.mean((1, 2, 3), keepdim=True)
    return mean + (1 + contrast) * (images - mean)


def translate(images: Tensor, ratio: float, draws: Tensor) -> Tensor:
    """Shift by whole pixels, at most `ratio` of a side either way; grey (0) comes in.

    Args:
        draws: (B, 2), for rows and columns.
    """
    batch, _, height, width = images.shape
    rows, inside_rows = _shifted(height, ratio, draws[:, 0])
    columns, inside_columns = _shifted(width, ratio, draws[:, 1])
    which = torch.arange(batch, device=images.device)[:, None, None]
    moved = images.movedim(1, -1)[which, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)
    return moved * (inside_rows[:, None, :, None] & inside_columns[:, None, None, :])


def cut_out(images: Tensor, ratio: float, draws: Tensor) -> Tensor:
    """Make a square of `ratio` of a side grey (0), anywhere, in part outside the picture.

    Args:
        draws: (B, 2), for rows and columns.
    """
    height, width = images.shape[-2:]
    rows = _covered(height, ratio, draws[:, 0])
    columns = _covered(width, ratio, draws[:, 1])
    return images * ~(rows[:, None, :, None] & columns[:, None, None, :])


def resized(images: Tensor, side: int) -> Tensor:
    """Images (B, 3, H, W) as (B, 3, side, side), linearly interpolated without aliasing."""
    if images.shape[2:] == (side, side):
        return images
    return F.interpolate(images, (side, side), mode="bilinear", antialias=True)


def _shifted(side: int, ratio: float, draws: Tensor) -> tuple[Tensor, Tensor]:
    """Where each pixel of a row comes from, (B, side), and whether that lies in the picture."""
    limit = round(ratio * side)
    shift = (draws * (2 * limit + 1)).floor().long() - limit  # -limit to limit, all as likely
    source = torch.arange(side, device=draws.device) - shift[:, None]
    return source.clamp(0, side - 1), (source >= 0) & (source < side)


def _covered(side: int, ratio: float, draws: Tensor) -> Tensor:
    """Which pixels of a row a hole covers, (B, side); its middle lies anywhere in the row."""
    size = math.ceil(ratio * side)
    first = (draws * side).floor().long() - size // 2
    distance = torch.arange(side, device=draws.device) - first[:, None]
    return (distance >= 0) & (distance < size)
