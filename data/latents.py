"""Images with values in [-1, 1], and latents, which a `LatentSpec` describes completely.

Symbols for shapes in all files of smalti: B batch, C channels, H W pixels, h w latent grid,
L codes of one image, V vocabulary (codebook) size, D width, T text tokens.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

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
