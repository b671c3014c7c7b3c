"""Images with values in [-1, 1], and latents, which a `LatentSpec` describes completely.

Symbols for shapes in all files of smalti: B batch, C channels, H W pixels, h w latent grid,
L codes of one image, V vocabulary (codebook) size, D width, T text tokens.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from smalti.config import ImageSize, plain
from smalti.errors import ConfigurationError


def as_tensor(values: Any) -> Any:
    """A numpy array as a tensor with a copy of its values; anything else as it is."""
    return torch.tensor(values.copy()) if hasattr(values, "__array_interface__") else values


# -- The range of image values: float in [-1, 1] within smalti, 0 to 255 in an 8-bit file ---------


def to_float(pixels: Tensor) -> Tensor:
    """Values of an 8-bit file in [0, 255], of any type -> float in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def to_levels(images: Tensor) -> Tensor:
    """Images in [-1, 1] -> float, the values 0 to 255 of an 8-bit file."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round()


def rounded(images: Tensor) -> Tensor:
    """Images in [-1, 1] -> the same after a round trip through an 8-bit file."""
    return to_float(to_levels(images))


# -- The size of images: the side of a square, or (height, width) ---------------------------------


def height_and_width(size: ImageSize) -> tuple[int, int]:
    """(height, width) of images of a size, in pixels."""
    return (size, size) if isinstance(size, int) else size


def as_image_size(size: Any) -> ImageSize:
    """A size of images in the form that every config and file has: that of a square is its side.

    Args:
        size: pixels: the side of a square, or its height and width; also numbers of numpy.

    Raises:
        ConfigurationError: it is neither.
    """
    given = plain(size)
    sides = tuple(given) if isinstance(given, list | tuple) else (given, given)
    if len(sides) != 2 or any(type(side) is not int for side in sides):
        raise ConfigurationError(
            f"image_size is {size!r}; give the side of a square in pixels, as in 64, or "
            "(height, width), as in (48, 64)"
        )
    return sides[0] if sides[0] == sides[1] else (sides[0], sides[1])


def resolution(size: ImageSize) -> str:
    """A size in words: 48 x 64, height first."""
    return " x ".join(map(str, height_and_width(size)))


# -- The channels of images: 1 grey, 3 RGB, 4 RGB and alpha ---------------------------------------

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's name for images of so many channels
BLACK, WHITE = -1.0, 1.0


def as_rgb(images: Tensor, background: float = WHITE) -> Tensor:
    """Images (B, C, H, W) of 1, 3 or 4 channels as RGB (B, 3, H, W): grey is repeated, and colours
    with alpha are laid on a plain background.

    Args:
        background: the value of its three channels, in [-1, 1].
    """
    if images.shape[1] == 3:
        return images
    if images.shape[1] == 1:
        return images.expand(-1, 3, -1, -1)
    opacity = (images[:, 3:] + 1) / 2
    return opacity * images[:, :3] + (1 - opacity) * background


def rgb_views(images: Tensor) -> Tensor:
    """Images (B, C, H, W) as RGB for a network that compares them: (B, 3, H, W); for 4 channels
    (2 B, 3, H, W), all on black, then all on white.

    On one background an error of alpha is invisible where the picture has the colour of the
    background. Two that differ determine colour and alpha ("Blue screen matting", Smith and Blinn,
    SIGGRAPH 1996, triangulation).
    """
    if images.shape[1] != 4:
        return as_rgb(images)
    return torch.cat([as_rgb(images, BLACK), as_rgb(images, WHITE)])


# -- Latents: discrete codes, or real numbers -----------------------------------------------------

# Largest side of a latent grid, and most positions of one image. They exceed those of the largest
# images, and limit the memory that a damaged or malicious config file can request.
MAX_SIDE = 2**14
MAX_POSITIONS = 2**20  # 1024 x 1024
MAX_CHANNELS = 2**16


def _refuse_positions(count: int) -> None:
    if count > MAX_POSITIONS:
        raise ConfigurationError(
            f"the latents of an image have {count} positions; use at most {MAX_POSITIONS}"
        )


@dataclass(frozen=True)
class CodeSpec:
    """Discrete latents: codes (B, L) int64 in [0, vocab_size).

    `grids` lists the (h, w) code grids from coarse to fine: one for a plain VQ tokenizer, ten for
    VAR at 256 px. The codes of all grids are concatenated, each grid in raster order.
    """

    vocab_size: int  # number of codes, V
    grids: tuple[tuple[int, int], ...]  # (h, w) of each, coarse to fine
    kind: Literal["codes"] = "codes"  # the kind of latents

    def __post_init__(self) -> None:
        if self.vocab_size < 1:
            raise ConfigurationError(
                f"vocab_size is {self.vocab_size}; a codebook needs at least 1 code"
            )
        if not self.grids or any(not 1 <= side <= MAX_SIDE for grid in self.grids for side in grid):
            raise ConfigurationError(
                f"grids is {self.grids}; give at least one (h, w) with sides from 1 to {MAX_SIDE}"
            )
        _refuse_positions(self.length)

    @property
    def in_words(self) -> str:
        """For people: how many codes, of how many, on which grids."""
        sides = [f"{height} x {width}" for height, width in self.grids]
        few = len(sides) <= 3
        grids = ", ".join(sides) if few else f"{len(sides)} grids, {sides[0]} to {sides[-1]}"
        return f"{self.length} codes of {self.vocab_size:,} ({grids})"

    @property
    def lengths(self) -> list[int]:
        """Number of codes of each grid, coarse to fine."""
        return [height * width for height, width in self.grids]

    @property
    def length(self) -> int:
        """Number of codes of one image, L."""
        return sum(self.lengths)


@dataclass(frozen=True)
class ContinuousSpec:
    """Continuous latents: real (B, channels, height, width), mean about 0, variance about 1."""

    channels: int  # numbers at each position, C
    height: int  # rows of the grid, h
    width: int  # columns of the grid, w
    kind: Literal["continuous"] = "continuous"  # the kind of latents

    def __post_init__(self) -> None:
        if min(self.channels, self.height, self.width) < 1:
            raise ConfigurationError(
                f"channels, height, width are {self.channels}, {self.height}, {self.width};"
                " each must be at least 1"
            )
        if max(self.height, self.width) > MAX_SIDE:
            raise ConfigurationError(
                f"height and width are {self.height} and {self.width}; use at most {MAX_SIDE}"
            )
        if self.channels > MAX_CHANNELS:
            raise ConfigurationError(f"channels is {self.channels}; use at most {MAX_CHANNELS}")
        _refuse_positions(self.height * self.width)

    @property
    def in_words(self) -> str:
        """For people: how many numbers, on which grid."""
        return f"{self.channels} x {self.height} x {self.width} numbers"


LatentSpec = CodeSpec | ContinuousSpec
