"""What flows between the two stages: a complete description of a latent.

Legend used for shapes everywhere in smalti: B batch, C channels, H W pixels, h w latent grid,
L codes of one image, V vocabulary (codebook) size, D width, T text tokens.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from smalti.errors import SmaltiError

# -------------------------------------------------------------------------------------------------
# What the numbers of a picture mean: float in [-1, 1] within smalti, 0 to 255 in a file.


def to_float(pixels: Tensor) -> Tensor:
    """Values of an 8-bit file in [0, 255], of any type -> float in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def to_levels(images: Tensor) -> Tensor:
    """Images in [-1, 1] -> float, the values 0 to 255 that an 8-bit file would hold."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round()


def rounded(images: Tensor) -> Tensor:
    """Images in [-1, 1] -> the same, as an 8-bit file would give them back."""
    return to_float(to_levels(images))


# -------------------------------------------------------------------------------------------------
# What flows between the two stages: a complete description of a latent.

MAX_SIDE = 2**14  # of a latent grid: beyond the largest pictures, so that a hostile file is refused


@dataclass(frozen=True)
class CodeSpec:
    """Discrete latents: codes (B, L) int64 in [0, vocab_size).

    `grids` lists the (h, w) code grids from coarse to fine: one for a plain VQ tokenizer, ten for
    VAR at 256 px. The codes of all grids lie end to end, each grid in raster order.
    """

    vocab_size: int
    grids: tuple[tuple[int, int], ...]
    kind: Literal["codes"] = "codes"

    def __post_init__(self) -> None:
        if self.vocab_size < 1:
            raise SmaltiError(f"vocab_size is {self.vocab_size}; a codebook needs at least 1 code")
        if not self.grids or any(not 1 <= side <= MAX_SIDE for grid in self.grids for side in grid):
            raise SmaltiError(
                f"grids is {self.grids}; give at least one (h, w) with sides from 1 to {MAX_SIDE}"
            )

    @property
    def lengths(self) -> list[int]:
        """Codes of each grid, coarse to fine."""
        return [height * width for height, width in self.grids]

    @property
    def length(self) -> int:
        """Number of codes of one image, L."""
        return sum(h * w for h, w in self.grids)


@dataclass(frozen=True)
class ContinuousSpec:
    """Continuous latents: real (B, channels, height, width), about zero mean and unit variance."""

    channels: int
    height: int
    width: int
    kind: Literal["continuous"] = "continuous"

    def __post_init__(self) -> None:
        if min(self.channels, self.height, self.width) < 1:
            raise SmaltiError(
                f"channels, height, width are {self.channels}, {self.height}, {self.width};"
                " each must be at least 1"
            )
        if max(self.height, self.width) > MAX_SIDE:
            raise SmaltiError(
                f"height and width are {self.height} and {self.width}; use at most {MAX_SIDE}"
            )


LatentSpec = CodeSpec | ContinuousSpec
